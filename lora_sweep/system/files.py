"""Files that somebody else may have put there: read within bounds, written without following links.

A study folder, a checkpoint, an adapter or a data file may come from a stranger. Reading one ends, whatever lies there:
a FIFO, a device, an endless line. Writing one touches nothing outside its folder: what is written gets a name of its
own by chance and takes the place of what lay there.
"""

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 2**26
"""Of one JSON file that this package or a library wrote: the largest known, a tokenizer, has a quarter of it."""


class Unsafe(ValueError):
    """The file is not read; the message is one clause that begins with a verb: `is a FIFO, no file`."""


def open_file(path: Path, *, follow: bool = True) -> BufferedReader:
    """Opens a regular file for reading, without waiting for anybody.

    Raises Unsafe for anything but a regular file, OSError where there is none or it cannot be read.

    Args:
        follow: whether `path` itself may be a link.
    """
    return os.fdopen(_opened(path, os.O_RDONLY, follow), "rb")


def append_to(path: Path) -> BinaryIO:
    """Opens a regular file to append to, made where there is none; a link is not followed. Raises Unsafe or OSError."""
    return os.fdopen(_opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, follow=False), "ab")


def read_bytes(path: Path, most_bytes: int, *, follow: bool = True) -> bytes:
    """The whole file. Raises Unsafe where it is no regular file or larger than `most_bytes`, else as `open_file`."""
    with open_file(path, follow=follow) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise Unsafe(f"is larger than {most_bytes:,} bytes")
    return content


def read_text(path: Path, most_bytes: int, *, follow: bool = True) -> str:
    """The whole file, UTF-8. Raises as `read_bytes`, and Unsafe where it is not UTF-8."""
    try:
        return read_bytes(path, most_bytes, follow=follow).decode()
    except UnicodeDecodeError as error:
        raise Unsafe(f"is not UTF-8 (byte {error.start + 1})") from error


def read_json(path: Path, most_bytes: int = MAX_JSON_BYTES, *, follow: bool = True) -> Any:
    """The value in a JSON file. Raises as `read_text`, and Unsafe where it is no JSON or nested too deep."""
    text = read_text(path, most_bytes, follow=follow)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Unsafe(f"is no JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise Unsafe("is nested too deep") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise Unsafe(f"cannot be read ({str(error).partition(';')[0]})") from error


def create(path: Path) -> BinaryIO:
    """Opens a new file for writing. Raises FileExistsError where anything lies there, a link that leads nowhere too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def write_at(path: Path, content: bytes, offset: int, size: int) -> bool:
    """Writes into a file in one call: a process that is killed leaves all of it or none.

    False, and nothing is written, where no regular file of `size` bytes lies there. Raises OSError.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return False
        os.pwrite(descriptor, content, offset)
        return True
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, by a temporary name and rename; a link that lies there is replaced.

    Raises OSError where it cannot be written.
    """
    temporary = staging(path)
    try:
        with create(temporary) as file:
            file.write(content)
            flush(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def staging(path: Path) -> Path:
    """A name beside `path` that nobody can foresee, ending in .tmp."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def remove(path: Path) -> None:
    """Removes what lies there, if anything: a file, a folder with all in it; of a link only itself. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def links(folder: Path) -> Iterator[Path]:
    """Every link in the folder, at any depth; none is followed."""
    for entry in sorted(os.scandir(folder), key=lambda each: each.name) if folder.is_dir() else ():
        if entry.is_symlink():
            yield Path(entry.path)
        elif entry.is_dir(follow_symlinks=False):
            yield from links(Path(entry.path))


def share(path: Path) -> None:
    """Gives a new file, or a folder and the files in it, the mode that the user's umask asks for.

    Libraries that write by a temporary file keep its mode, which shuts out all others.
    """
    mask = os.umask(0)
    os.umask(mask)
    for each in (path, *path.iterdir()) if path.is_dir() else (path,):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def flush(file: BinaryIO) -> None:
    """To the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """To the disk: else a name may be lost with the power."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _opened(path: Path, flags: int, follow: bool) -> int:
    if not follow and path.is_symlink():
        raise Unsafe("is a link")
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    opened = os.open(path, flags, 0o666)
    mode = os.fstat(opened).st_mode
    if not stat.S_ISREG(mode):
        os.close(opened)
        raise Unsafe(f"is {_kind(mode)}, no file")
    os.set_blocking(opened, True)
    return opened


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
