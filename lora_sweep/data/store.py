"""Tokenised sets on disk: written once per content and settings, mapped by everybody after.

Flat arrays of tokens, as training corpora are kept, since a padded or pickled set would have to fit in memory.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import datasets
import numpy as np

from lora_sweep.data.tokens import Encoded, TokenSet

VERSION = 1
"""Of everything that decides which tokens come out: raised when the code makes others."""

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
        ids, counted = example
        self._files[0].write(ids.tobytes())
        self._files[1].write(counted.tobytes())
        self._ends_so_far.append(self._ends_so_far[-1] + len(ids))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        np.frombuffer(self._ends_so_far, dtype=np.int64).tofile(self._ends)


def write(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Lets `make` fill a folder and returns its report; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_out(folder.parent)
    aside = Path(tempfile.mkdtemp(prefix=".aside-", dir=folder.parent))
    try:
        report = make(aside)
        (aside / "report.json").write_text(json.dumps(report), encoding="utf-8")
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster with the same content
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


def _sweep_out(cache: Path) -> None:
    """Removes what killed processes left behind."""
    for aside in cache.glob(".aside-*"):
        if time.time() - aside.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(aside, ignore_errors=True)


def report(folder: Path) -> dict[str, Any] | None:
    """What was told when the sets were made; None where there are none."""
    try:
        found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def read(folder: Path, name: str) -> TokenSet:
    """The set, mapped from disk."""
    offsets = np.fromfile(folder / f"{name}.ends", dtype=np.int64)
    if offsets[-1] == 0:
        return TokenSet.of([])
    tokens = np.memmap(folder / f"{name}.tokens", dtype=np.int32, mode="r")
    counted = np.memmap(folder / f"{name}.counted", dtype=np.bool_, mode="r")
    os.utime(folder)  # whoever clears the cache by age sees what is in use
    return TokenSet(tokens, counted, offsets, np.arange(len(offsets) - 1))
