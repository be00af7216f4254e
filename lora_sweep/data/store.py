"""Tokenized sets on disk: written once per content and settings, mapped by everybody after.

Flat arrays of tokens, as training corpora are kept, since a padded or pickled set would have to fit in memory.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import datasets
import numpy as np

from lora_sweep.data.tokens import Encoded, TokenSet
from lora_sweep.errors import StorageUnavailable, UserError

VERSION = 3
"""Of everything that decides which tokens come out: raised when the code makes others."""

REPORT = "report.json"
PARTS = ("tokens", "counted", "ends")

_STALE_SECONDS = 24 * 3600.0


def folder_of(settings: Mapping[str, Any]) -> Path:
    """Where the sets of these contents and settings lie, under `datasets`' own cache (HF_DATASETS_CACHE, HF_HOME)."""
    key = hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_sweep" / key


class Writer:
    """Appends examples to one set's files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._files: list[BinaryIO] = [(folder / f"{name}.{part}").open("wb") for part in ("tokens", "counted")]
        self._ends = folder / f"{name}.ends"
        self._ends_so_far = array("q", [0])

    def add(self, example: Encoded) -> None:
        ids, loss_mask = example
        self._files[0].write(ids.tobytes())
        self._files[1].write(loss_mask.tobytes())
        self._ends_so_far.append(self._ends_so_far[-1] + len(ids))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        np.frombuffer(self._ends_so_far, dtype=np.int64).tofile(self._ends)


def write(folder: Path, names: Sequence[str], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Lets `make` fill a folder with the sets of these names and returns its report; it appears whole or not at all.

    Raises UserError where the cache cannot be written, StorageUnavailable where it is full.
    """
    with _cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep_out(folder.parent)
        staging = Path(tempfile.mkdtemp(prefix=".aside-", dir=folder.parent))
        try:
            rows_report = make(staging)
            (staging / REPORT).write_text(json.dumps(rows_report), encoding="utf-8")
            staging.chmod(0o755)  # others may share the cache
            if folder.is_dir() and report(folder, names) is None:
                _remove_torn(folder)
            try:
                staging.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was faster with the same content
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return rows_report


def _remove_torn(torn: Path) -> None:
    staging = tempfile.TemporaryDirectory(prefix=".aside-", dir=torn.parent, ignore_cleanup_errors=True)
    with staging as folder, suppress(FileNotFoundError):  # another process has done so
        torn.rename(Path(folder) / torn.name)


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"{cache}: prepared data cannot be kept there ({error.strerror or error})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageUnavailable(message) from error
        raise UserError(f"{message}; HF_DATASETS_CACHE names another folder") from error


def _sweep_out(cache: Path) -> None:
    """Removes what killed processes left behind."""
    for staging in cache.glob(".aside-*"):
        if time.time() - staging.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(staging, ignore_errors=True)


def report(folder: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What was reported when the sets of these names were made; None where they are not there, whole.

    A cache is swept by others: of a folder some files may be gone.
    """
    try:
        plain: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if all(_is_whole(folder, name) for name in names):
            return plain
    except (OSError, ValueError):
        pass
    return None


def _is_whole(folder: Path, name: str) -> bool:
    sizes = {part: (folder / f"{name}.{part}").stat().st_size for part in PARTS}
    last = np.fromfile(folder / f"{name}.ends", dtype=np.int64, offset=max(sizes["ends"] - 8, 0))
    return len(last) == 1 and (sizes["tokens"], sizes["counted"]) == (4 * last[0], last[0])


def read(folder: Path, name: str) -> TokenSet:
    """The set, mapped from disk. Raises UserError where it cannot be read."""
    with _cache_errors(folder.parent):
        offsets = np.fromfile(folder / f"{name}.ends", dtype=np.int64)
        if offsets[-1] == 0:
            return TokenSet.of([])
        tokens = np.memmap(folder / f"{name}.tokens", dtype=np.int32, mode="r")
        loss_mask = np.memmap(folder / f"{name}.counted", dtype=np.bool_, mode="r")
    with suppress(OSError):  # it may be another's
        os.utime(folder)  # whoever clears the cache by age sees what is in use
    return TokenSet(tokens, loss_mask, offsets, np.arange(len(offsets) - 1))
