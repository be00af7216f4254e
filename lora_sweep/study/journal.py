"""The study's journal on disk: appended whole or not at all, read by anybody, held by one."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from lora_sweep.errors import StorageUnavailable, StudyError
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors

LOCK = "study.lock"

MAX_JOURNAL_BYTES = 2**30
"""A journal of 100,000 attempts has a tenth of it; a larger one is refused unread."""
HOLD_TRIES, HOLD_PAUSE_SECONDS = 5, 0.1
"""Whoever only looks whether the study is held (`is_held`) holds it for an instant."""


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
        with disk_errors(self._path), suppress(FileNotFoundError), files.open_file(self._path, follow=False) as file:
            if os.fstat(file.fileno()).st_size > MAX_JOURNAL_BYTES:
                raise files.Unsafe(f"is larger than {MAX_JOURNAL_BYTES:,} bytes")
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
                    raise StorageUnavailable(f"{self._path}: its lock vanished while it was written") from error

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


def hold(folder: Path) -> int:
    """Take the folder's lock for this process; returns its file descriptor, which must stay open."""
    with disk_errors(folder / LOCK), files.append_to(folder / LOCK):  # refuses a link
        pass
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(lock)
        holder = f"{os.getpid()} on {socket.gethostname()}".encode()
        os.pwrite(lock, holder, 0)
        os.ftruncate(lock, len(holder))
    except OSError as error:
        pid = os.pread(lock, 200, 0).decode(errors="replace")
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise StudyError(
                f"{folder}: process {pid or '(unknown)'} is working on this study; one process at a time: wait until "
                f"it ends, or stop it first"
            ) from None
        if error.errno in (errno.ENOLCK, errno.ENOTSUP):
            raise StudyError(f"{folder}: this file system has no locks; put study.root on another") from error
        raise
    return lock


def is_held(folder: Path) -> bool:
    """Whether a process works on the study in `folder`; True where the file system cannot say."""
    try:
        with files.open_file(folder / LOCK, follow=False) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (FileNotFoundError, files.Unsafe):
        return False
    except OSError:
        return True
    return False


def _lock(lock: int) -> None:
    for left in reversed(range(HOLD_TRIES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(HOLD_PAUSE_SECONDS)


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
