"""The study's journal on disk: appended whole or not at all, read by anybody, held by one."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from lora_sweep.errors import OutOfRoom, StudyError

LOCK = "study.lock"


class Journal(JournalFileBackend):
    """Optuna's journal file, made to survive a torn tail and a full disk.

    After half a line (disk full, power loss) Optuna's own class glues the next record to it and ruins the file.
    Here what follows the last newline is cut, under the lock, before anything is appended; nobody was ever told
    that it had been written. Readers skip it.
    """

    def __init__(self, path: Path, writable: bool) -> None:
        # Absolute: the lock is a symbolic link to it, and Optuna never breaks a dangling one, whatever its grace.
        self._path = path.absolute()
        self._mutex = JournalFileSymlinkLock(str(self._path))
        self.writable = writable
        super().__init__(str(self._path), self._mutex)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        with disk_errors(self._path):
            try:
                yield from super().read_logs(log_number_from)
            except ValueError as error:
                raise StudyError(f"{self._path}: damaged in the middle ({error}); restore it from a copy") from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if not self.writable:
            raise StudyError(f"{self._path.parent}: the study is closed or open for reading only")
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        with disk_errors(self._path):
            self._mutex.acquire()
            try:
                self._append(lines)
            finally:
                try:
                    self._mutex.release()
                except RuntimeError as error:
                    raise OutOfRoom(f"{self._path}: its lock vanished while it was written") from error

    def _append(self, lines: bytes) -> None:
        # Unbuffered, so that a failed write leaves nothing behind that close() would write later; "r+b", so that a
        # journal that was removed is not begun anew without its head.
        with self._path.open("r+b", buffering=0) as file:
            end = _end_of_last_line(file.fileno())
            file.truncate(end)
            file.seek(end)
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError becomes the user's to mend (rights, a file in the way) or OutOfRoom (full, away)."""
    try:
        yield
    except OutOfRoom:
        raise
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise StudyError(f"{path}: can't be used for a study: {error.strerror}") from error
    except OSError as error:
        raise OutOfRoom(f"{path}: {error.strerror or error}; what was recorded is safe, resume later") from error


def hold(folder: Path) -> int:
    """Take the folder's lock for this process; returns its file descriptor, which must stay open."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder = f"{os.getpid()} on {socket.gethostname()}".encode()
        os.pwrite(lock, holder, 0)
        os.ftruncate(lock, len(holder))
    except OSError as error:
        told = os.pread(lock, 200, 0).decode(errors="replace")
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise StudyError(
                f"{folder}: process {told or '(unknown)'} is working on this study; one process at a time: wait until "
                f"it ends, or stop it first"
            ) from None
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            raise StudyError(f"{folder}: this file system has no locks; put study.root on another") from error
        raise
    return lock


def _end_of_last_line(file: int) -> int:
    """Offset after the last newline of an open file; 0 where there is none."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
