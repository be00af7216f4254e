"""trials.jsonl: one line a cell, written whole or, when a cell ends, in the place of its line."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_sweep.report.results import ENDED, Row
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors, write_whole

NAME = "trials.jsonl"

LINE_BYTES = 1536
"""Least length of the line of a cell that has not ended: spaces after its JSON leave room for how it ends."""


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int
    """Bytes, the line feed among them."""


class TrialsFile:
    """The trials.jsonl of a study that this process works on."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._places: dict[int, _Place] = {}
        """Number of a cell -> its line."""
        self._size = 0

    def write(self, table: Sequence[Row]) -> None:
        """Writes all lines anew, whole or not at all. Raises StudyError or StorageUnavailable."""
        lines = [_line(row) for row in table]
        write_whole(self._path, b"".join(lines).decode())
        self._places, self._size = {}, 0
        for row, line in zip(table, lines, strict=True):
            self._add(row, line)

    def update(self, row: Row) -> bool:
        """Writes the line of one cell in its place, or after the last line where it has none yet.

        False where there is not enough room for it, or the file is not the one that was written: `write` has to come.
        Raises StudyError or StorageUnavailable.
        """
        line = _line(row)
        place = self._places.get(row["number"])
        with disk_errors(self._path):
            if place is None:
                if not files.write_at(self._path, line, self._size, self._size):
                    return False
                self._add(row, line)
                return True
            if len(line) > place.length:
                return False
            return files.write_at(self._path, line[:-1].ljust(place.length - 1) + b"\n", place.offset, self._size)

    def _add(self, row: Row, line: bytes) -> None:
        self._places[row["number"]] = _Place(self._size, len(line))
        self._size += len(line)


def _line(row: Row) -> bytes:
    line = json.dumps(row).encode()
    return (line if row["state"] in ENDED else line.ljust(LINE_BYTES - 1)) + b"\n"
