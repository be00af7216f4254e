"""How data files are read, kind by kind, row by row, each row with its place.

Formats of lines (JSONL, CSV, text) are read here, since whoever mends a file needs the line; the columnar ones are
`datasets`' own. Nothing is held in memory but the row under way, except a JSON array.
"""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import datasets
from pyarrow import parquet

from lora_sweep.data import containers
from lora_sweep.system import files

MAX_LINE_BYTES = 2**26
"""Of a line: a longer one is reported and passed over."""
MAX_ARRAY_BYTES = 2**29
"""Of a JSON array, which is parsed as a whole; of a compressed one when written out."""
ENDLESS_BYTES = 2**30
"""Of a line: nobody waits for the end of a longer one, the file is refused."""
MAX_RATIO, RATIO_FROM_BYTES = 200, 2**23
"""A compressed file that is written out to so many times its size is no text, which has 3 to 20; from so many bytes."""
MAX_GROUP_BYTES = 2**32
"""Of a row group of a Parquet file, written out."""
COLUMNAR_ROWS = 1024
"""Read at a time of a columnar file."""


class Unreadable(Exception):
    """A source cannot be read at all; the message is one clause."""


@dataclass(frozen=True)
class Row:
    """One record and where it stands."""

    where: str
    """`facts.jsonl:17`: the line; `facts.parquet, row 17` where there are no lines."""
    record: Any
    broken: str = ""
    """Why there is no record; empty when there is one."""
    share: float = 0.0
    """How much of its source has been read, 0 to 1."""


def one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def kind(file: Path) -> str | None:
    """The suffix that says how to read it, without .gz."""
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return suffix.lower() if suffix.lower() in READERS else None


def _lines(file: Path) -> Iterator[tuple[int, bytes | None, float]]:
    """(number, line or None where it is too long, share of the file read)."""
    size = file.stat().st_size or 1
    with _opened(file) as raw:
        stream = _plain(file, raw)
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            whole: bytes | None = line
            long = len(line)
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                whole, line = None, stream.readline(MAX_LINE_BYTES)
                long += len(line)
                if long > ENDLESS_BYTES:
                    raise Unreadable(f"{file}:{number}: is longer than {ENDLESS_BYTES >> 20:,} MiB")
            yield number, whole, raw.tell() / size


def _opened(file: Path) -> BinaryIO:
    """Raises Unreadable where it is no regular file: a FIFO or a device may have no end."""
    try:
        return files.open_file(file)
    except files.Unsafe as error:
        raise Unreadable(f"{file}: {error}") from error


def _plain(file: Path, raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Written(file, raw))) if file.suffix == ".gz" else raw


class _Written(io.RawIOBase):
    """A compressed file written out, as far as it could be text."""

    def __init__(self, file: Path, raw: BinaryIO) -> None:
        self._file, self._raw, self._stream = file, raw, gzip.GzipFile(fileobj=raw)
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._bytes += count
        if self._bytes > max(RATIO_FROM_BYTES, MAX_RATIO * self._raw.tell()):
            rule = f"is written out to more than {MAX_RATIO} times its size, which no text is"
            raise Unreadable(f"{self._file}: {rule}")
        return count


def _decoded(line: bytes | None, number: int) -> tuple[str, str]:
    """(text, why it cannot be read)."""
    if line is None:
        return "", f"is longer than {MAX_LINE_BYTES >> 20} MiB"
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), ""
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 (byte {error.start + 1})"


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line, share in _lines(file):
        where = f"{file}:{number}"
        text, broken = _decoded(line, number)
        if number == 1 and text.strip() in ("{", "["):
            # One value over many lines, whatever the file's name promises.
            try:
                value = list(_read_json(file))
            except Unreadable:
                value = []
            if value:
                yield from value
                return
        if broken or text.strip():
            record, broken = (None, broken) if broken else _parsed(text)
            several = containers.records(record) if isinstance(record, list) else [record]
            for place, each in enumerate(several, start=1):
                yield Row(where if len(several) == 1 else f"{where}, example {place}", each, broken, share)


def _parsed(text: str) -> tuple[Any, str]:
    """(value, why it is none)."""
    try:
        return json.loads(text), ""
    except json.JSONDecodeError as error:
        return None, f"is no JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"cannot be read ({str(error).partition(';')[0]})"


def _read_text(file: Path) -> Iterator[Row]:
    for number, line, share in _lines(file):
        text, broken = _decoded(line, number)
        if broken or text.strip():
            yield Row(f"{file}:{number}", {"text": text}, broken, share)


def _read_json(file: Path) -> Iterator[Row]:
    """One JSON value, by `containers.records`, or lines after all."""
    with _opened(file) as raw:
        stream = _plain(file, raw)
        first = stream.readline(MAX_LINE_BYTES)
        second = stream.readline(MAX_LINE_BYTES)
        if isinstance(_parsed(_decoded(first, 1)[0])[0], dict) and second.strip():
            yield from _read_jsonl(file)
            return
        # Before it is read, where its size is known.
        content = first + second
        if file.stat().st_size <= MAX_ARRAY_BYTES:
            content += stream.read(MAX_ARRAY_BYTES)
        if max(len(content), file.stat().st_size) > MAX_ARRAY_BYTES:
            limit = f"more than {MAX_ARRAY_BYTES >> 20} MiB"
            raise Unreadable(f"{file}: is one JSON value of {limit}; write one object a line")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file}: is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Unreadable(f"{file}:{error.lineno}: is no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{file}: cannot be read ({str(error).partition(';')[0]})") from error
    records = containers.records(value)
    if isinstance(records, str):
        raise Unreadable(f"{file}: {records}")
    for place, record in enumerate(records, start=1):
        yield Row(f"{file}, example {place}", record, share=place / len(records))


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    size = file.stat().st_size or 1
    comma = "\t" if str(kind(file)) == ".tsv" else ","
    # A byte that is no UTF-8 becomes half a surrogate pair, which the example's own check reports with its line.
    text = partial(io.TextIOWrapper, encoding="utf-8-sig", errors="surrogateescape", newline="")
    with _opened(file) as raw, text(_plain(file, raw)) as stream:
        # Strict: else a quote that is never closed swallows all rows behind it without a word.
        reader = csv.reader(_short_lines(file, stream), delimiter=comma, strict=True)
        columns: list[str] | None = None
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                lines = range(first, max(first, reader.line_num) + 1)
                opened = f", in the row that begins at line {first}" if len(lines) > 1 else ""
                for line in lines:
                    yield Row(f"{file}:{line}", None, f"is no CSV ({error}{opened})")
                continue
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = [name.strip() for name in cells]
                if len(set(columns)) < len(columns):
                    raise Unreadable(f"{file}:1: names a column twice ({', '.join(columns)})")
                continue
            broken = ""
            if len(cells) != len(columns):
                broken = f"has {len(cells)} fields, the header names {len(columns)}"
            record = dict(zip(columns, cells, strict=False))
            yield Row(f"{file}:{first}", record, broken, raw.tell() / size)


def _short_lines(file: Path, stream: TextIO) -> Iterator[str]:
    """Raises Unreadable for a line that the bound of a field would hold in memory before it is reported."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(("\n", "\r")):
            raise Unreadable(f"{file}:{number}: is longer than {MAX_LINE_BYTES >> 20} MiB")
        yield line


def _read_columnar(file: Path) -> Iterator[Row]:
    builder = {".parquet": "parquet", ".arrow": "arrow"}[str(kind(file))]
    try:
        _opened(file).close()
        count, pieces = 0, {}
        if builder == "parquet":
            metadata = parquet.read_metadata(file)
            count, pieces = metadata.num_rows, {"batch_size": COLUMNAR_ROWS}
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
            if max(sizes, default=0) > MAX_GROUP_BYTES:
                limit = f"more than {MAX_GROUP_BYTES >> 20:,} MiB"
                raise Unreadable(f"{file}: has a row group that is written out to {limit}; write smaller ones")
        # Escaped: `datasets` takes a name for a pattern, and data[1].parquet for data1.parquet.
        rows = datasets.load_dataset(
            builder, data_files=glob.escape(str(file)), split="train", streaming=True, **pieces
        )
        for place, record in enumerate(rows, start=1):
            yield Row(f"{file}, row {place}", _filled(record), share=place / count if count else 0.0)
    except (OSError, Unreadable, MemoryError):
        raise
    except Exception as error:  # datasets' and pyarrow's: no common base
        raise Unreadable(f"{file}: {one_line(error)}") from error


def of_files(files: list[Path]) -> Iterator[Row]:
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes) or 1, 0
    for file, size in zip(files, sizes, strict=True):
        try:
            for row in READERS[str(kind(file))](file):
                yield Row(row.where, row.record, row.broken, (before + row.share * size) / total)
        except (OSError, EOFError, zlib.error) as error:
            raise Unreadable(getattr(error, "strerror", None) or f"{file}: {one_line(error)}") from error
        before += size


def without_nulls(value: Any) -> Any:
    """Without the keys that hold nothing: a columnar file gives every object all keys that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    return {name: without_nulls(value) for name, value in record.items()}


def of_dataset(name: str, rows: Any) -> Iterator[Row]:
    for place, record in enumerate(rows, start=1):
        yield Row(f"{name}, row {place}", _filled(record), share=place / len(rows))


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_columnar,
    ".arrow": _read_columnar,
    ".txt": _read_text,
}
"""Suffix -> reader; those of lines also with .gz."""
