"""Where examples come from: files, folders and hub data sets, row by row, each row with its place.

Formats of lines (JSONL, CSV, text) are read here, since whoever mends a file needs the line; the columnar ones and the
hub are `datasets`' own. Nothing is held in memory but the row under way, except a JSON array.
"""

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import datasets
from datasets.packaged_modules.cache.cache import Cache

from lora_sweep.config import DataConfig
from lora_sweep.errors import ConfigError
from lora_sweep.records import Fault
from lora_sweep.source import Refusal, cached_commit, hub_fault, refusal

MAX_LINE_BYTES = 2**26
"""Of a line: a longer one is told and passed over."""
MAX_ARRAY_BYTES = 2**29
"""Of a JSON array, which is parsed as a whole."""

_SPLIT = re.compile(r"(?:^|[-_./])(train|test|eval|evaluation|valid|validation|dev)(?:[-_./]|$)")


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


@dataclass(frozen=True)
class Source:
    """Readable rows with an identity."""

    name: str
    """As the user names it."""
    digest: str
    """Of the content."""
    rows: Callable[[], Iterator[Row]]
    passed_over: tuple[str, ...] = ()
    """Files of a folder that are no data."""
    is_lines: bool = False
    """Whether the rows are the lines of texts."""


def of_path(path: str) -> Source:
    """A file, or all data files of a folder in the order of their names. Raises Unreadable."""
    at = Path(path).expanduser()
    if not at.exists():
        raise Unreadable("No such file or directory")
    if (at / "dataset_dict.json").is_file():
        raise Unreadable(f"holds several splits; give one of them, e.g. {path}/train")
    if (at / "state.json").is_file():
        stored = _from_disk(at)
        return Source(path, _digest(tuple(sorted(at.glob("*.arrow")))), lambda: _of_dataset(path, stored))
    files, other = _files(at) if at.is_dir() else ([at], ())
    if not files:
        raise Unreadable(f"holds no data file ({', '.join(_READERS)})")
    for file in files:
        if _kind(file) is None:
            raise Unreadable(f"is of no known kind ({', '.join(_READERS)})")
    if at.is_dir():
        _refuse_other_splits(at, files)
    is_lines = all(_kind(file) == ".txt" for file in files)
    return Source(path, _digest(tuple(files)), lambda: _of_files(files), other, is_lines)


def of_hub(data: DataConfig, split: str, key: str) -> Source:
    """One split of a hub data set, downloaded once to `datasets`' own cache; `key` is the field that names the split.

    Raises ConfigError with the field at fault.
    """
    try:
        # On disk: what has no file has no digest.
        loaded = datasets.load_dataset(
            str(data.path), data.subset, split=split, revision=data.revision, keep_in_memory=False
        )
        loaded = _at_commit(loaded, data, split)
    except Exception as error:  # its own, the hub client's and pyarrow's: no common base
        raise ConfigError([_hub_fault(error, data, split, key)]) from error
    name = f"{data.path}[{split}]"
    files = tuple(Path(each["filename"]) for each in loaded.cache_files)
    return Source(name, _digest(files), lambda: _of_dataset(name, loaded))


def _at_commit(loaded: Any, data: DataConfig, split: str) -> Any:
    """The rows of the commit asked for. Where the hub is away, `datasets` takes what it cached last, of any commit."""
    commit = cached_commit(str(data.path), data.revision or "main")
    if not loaded.cache_files or (commit is None and data.revision is None):
        return loaded
    folder = Path(loaded.cache_files[0]["filename"]).parent
    if folder.name == commit:
        return loaded
    if commit is None or not (folder.parent / commit).is_dir():
        raise ConnectionError(f"{folder} is of another commit")
    subset, version = folder.parts[-3:-1]
    name = {"dataset_name": str(data.path).rpartition("/")[2], "repo_id": str(data.path)}
    return Cache(**name, config_name=subset, version=version, hash=commit).as_dataset(split)


def _hub_fault(error: Exception, data: DataConfig, split: str, key: str) -> Fault:
    path, told = str(data.path), _one_line(error)
    why = refusal(error) or _refusal(error, told)
    if why is not None:
        return hub_fault(why, "data", path, data.revision)
    listed = " ".join(str(error).split()).partition("[")[2].partition("]")[0]
    there = f"{path} has {listed.replace(chr(39), '')[:300]}"
    if told.startswith("Unknown split"):
        return Fault(key, "no such split", split, there)
    if told.startswith("BuilderConfig"):
        return Fault("data.subset", "no such subset", data.subset, there)
    if told.startswith("Config name is missing"):
        return Fault("data.subset", "is needed", None, there)
    return Fault("data.path", f"cannot be read ({told})", path)


def _refusal(error: Exception, told: str) -> Refusal | None:
    """What `datasets` says in its own words: it drops the hub client's error."""
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "gated" if "gated" in told.removeprefix("Dataset").partition("' ")[2] else "missing"
    is_away = isinstance(error, ConnectionError) or told.startswith("Couldn't find cache for")
    return "away" if is_away else None


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _kind(file: Path) -> str | None:
    """The suffix that says how to read it, without .gz."""
    suffix = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return suffix.lower() if suffix.lower() in _READERS else None


def _files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    inside = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    files = [path for path in inside if _kind(path) is not None]
    return files, tuple(str(path.relative_to(folder)) for path in inside if path not in files)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _refuse_other_splits(folder: Path, files: list[Path]) -> None:
    """A folder with train and test files, read whole, would train on its own test."""
    found: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(folder)
        if match := _SPLIT.search(inside.as_posix().lower()):
            # The folder of a split, where it has one of its own.
            depth = inside.as_posix()[: match.end()].count("/")
            found.setdefault(match[1], folder.joinpath(*inside.parts[: depth or None]))
    if "train" in found and len(found) > 1:
        other = next(file for split, file in found.items() if split != "train")
        raise Unreadable(f"holds files of several splits; give data.path={found['train']} data.eval_path={other}")


def _digest(files: tuple[Path, ...]) -> str:
    try:
        stats = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _content(files, stats)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


@lru_cache(maxsize=64)
def _content(files: tuple[Path, ...], _: tuple[tuple[int, int], ...]) -> str:
    """sha256 of the files' bytes and kinds, whatever their names; read again when size or time changed."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{_kind(file)}{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return whole.hexdigest()


def _of_files(files: list[Path]) -> Iterator[Row]:
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes) or 1, 0
    for file, size in zip(files, sizes, strict=True):
        try:
            for row in _READERS[str(_kind(file))](file):
                yield Row(row.where, row.record, row.broken, (before + row.share * size) / total)
        except (OSError, EOFError, gzip.BadGzipFile) as error:
            raise Unreadable(getattr(error, "strerror", None) or f"{file}: {_one_line(error)}") from error
        before += size


def _lines(file: Path) -> Iterator[tuple[int, bytes | None, float]]:
    """(number, line or None where it is too long, share of the file read)."""
    size = file.stat().st_size or 1
    with file.open("rb") as raw:
        stream = _plain(file, raw)
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            whole: bytes | None = line
            while len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                whole, line = None, stream.readline(MAX_LINE_BYTES)
            yield number, whole, raw.tell() / size


def _plain(file: Path, raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if file.suffix == ".gz" else raw


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
        if broken or text.strip():
            record, broken = (None, broken) if broken else _parsed(text)
            yield Row(where, record, broken, share)


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
    """An array of objects, an object that holds one, or lines after all."""
    with file.open("rb") as raw:
        stream = _plain(file, raw)
        first = stream.readline(MAX_LINE_BYTES)
        second = stream.readline(MAX_LINE_BYTES)
        if isinstance(_parsed(_decoded(first, 1)[0])[0], dict) and second.strip():
            yield from _read_jsonl(file)
            return
        if file.stat().st_size > MAX_ARRAY_BYTES:
            raise Unreadable(f"{file}: is one JSON value of {file.stat().st_size >> 20} MiB; write one object a line")
        content = first + second + stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file}: is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Unreadable(f"{file}:{error.lineno}: is no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{file}: cannot be read ({str(error).partition(';')[0]})") from error
    if isinstance(value, dict):
        arrays = [each for each in value.values() if isinstance(each, list)]
        value = arrays[0] if len(arrays) == 1 else [value]
    if not isinstance(value, list):
        raise Unreadable(f"{file}: is neither an array of objects nor one object a line")
    for place, record in enumerate(value, start=1):
        yield Row(f"{file}, example {place}", record, share=place / len(value))


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE_BYTES)
    size = file.stat().st_size or 1
    comma = "\t" if str(_kind(file)) == ".tsv" else ","
    # A byte that is no UTF-8 becomes half a surrogate pair, which the example's own check tells with its line.
    text = partial(io.TextIOWrapper, encoding="utf-8-sig", errors="surrogateescape", newline="")
    with file.open("rb") as raw, text(_plain(file, raw)) as stream:
        reader = csv.reader(stream, delimiter=comma)
        columns: list[str] | None = None
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(f"{file}:{reader.line_num}", None, f"is no CSV ({error})")
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
            yield Row(f"{file}:{reader.line_num}", record, broken, raw.tell() / size)


def _read_columnar(file: Path) -> Iterator[Row]:
    kind = {".parquet": "parquet", ".arrow": "arrow"}[str(_kind(file))]
    try:
        rows = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        for place, record in enumerate(rows, start=1):
            yield Row(f"{file}, row {place}", record)
    except OSError:
        raise
    except Exception as error:  # datasets' and pyarrow's: no common base
        raise Unreadable(f"{file}: {_one_line(error)}") from error


def _from_disk(folder: Path) -> Any:
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets' and pyarrow's: no common base
        raise Unreadable(_one_line(error)) from error


def _of_dataset(name: str, rows: Any) -> Iterator[Row]:
    for place, record in enumerate(rows, start=1):
        yield Row(f"{name}, row {place}", record, share=place / len(rows))


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
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
