"""Where examples come from: files, folders and hub data sets, each with an identity."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.cache.cache import Cache

from lora_sweep.config import DataConfig
from lora_sweep.data.file_rows import READERS, Row, Unreadable, kind, of_dataset, of_files, one_line
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.hub import Refusal, cached_commit, hub_fault, refusal
from lora_sweep.system.files import read_json

_SPLIT = re.compile(
    r"(?:^|[-_./])(train|training|test|testing|eval|evaluation|val|valid|validation|dev|holdout|held[-_]?out)(?:[-_./]|$)"
)


@dataclass(frozen=True)
class Source:
    """Readable rows with an identity."""

    name: str
    """As the user names it."""
    digest: str
    """Of the content."""
    rows: Callable[[], Iterator[Row]]
    files: tuple[str, ...] = ()
    """As its rows are reported."""
    passed_over: tuple[str, ...] = ()
    """Files of a folder that are no data."""
    is_lines: bool = False
    """Whether the rows are the lines of texts."""


def of_path(path: str) -> Source:
    """A file, or all data files of a folder in the order of their names. Raises Unreadable."""
    at, rows = Path(path).expanduser(), rows_of_path(path)
    if (at / "state.json").is_file():
        return Source(path, _digest(tuple(sorted(at.glob("*.arrow")))), rows)
    files, other = _data_files(at)
    is_lines = all(kind(file) == ".txt" for file in files)
    return Source(path, _digest(tuple(files)), rows, tuple(map(str, files)), other, is_lines)


def rows_of_path(path: str) -> Callable[[], Iterator[Row]]:
    """The rows of `of_path` alone: nothing is read before they are asked for. Raises Unreadable."""
    at = Path(path).expanduser()
    if not at.exists():
        raise Unreadable("No such file or directory")
    if (at / "dataset_dict.json").is_file():
        raise Unreadable(f"holds several splits; give one of them, e.g. {path}/train")
    if (at / "state.json").is_file():
        stored = _from_disk(at)
        return lambda: of_dataset(path, stored)
    files, _ = _data_files(at)
    return lambda: of_files(files)


def _data_files(at: Path) -> tuple[list[Path], tuple[str, ...]]:
    """(the data files, those of a folder that are none). Raises Unreadable."""
    files, other = _files(at) if at.is_dir() else ([at], ())
    if not files:
        raise Unreadable(f"holds no data file ({', '.join(READERS)})")
    for file in files:
        if kind(file) is None:
            raise Unreadable(f"is of no known kind ({', '.join(READERS)}); save it as one of them")
        if not file.is_file():
            raise Unreadable("is no regular file")
    if at.is_dir():
        _refuse_other_splits(at, files)
    return files, other


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
    # A slice is read from the same files as the whole.
    digest = hashlib.sha256(f"{_digest(files)}[{split}]".encode()).hexdigest()
    return Source(name, digest, lambda: of_dataset(name, loaded))


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
    path, message = str(data.path), one_line(error)
    why = refusal(error) or _refusal(error, message)
    if why is not None:
        return hub_fault(why, "data", path, data.revision)
    listed = " ".join(str(error).split()).partition("[")[2].partition("]")[0]
    there = f"{path} has {listed.replace(chr(39), '')[:300]}"
    if message.startswith("Unknown split"):
        return Fault(key, "no such split", split, there)
    if message.startswith("BuilderConfig"):
        return Fault("data.subset", "no such subset", data.subset, there)
    if message.startswith("Config name is missing"):
        return Fault("data.subset", "is needed", None, there)
    return Fault("data.path", f"cannot be read ({message})", path)


def _refusal(error: Exception, message: str) -> Refusal | None:
    """What `datasets` says in its own words: it drops the hub client's error."""
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "gated" if "gated" in message.removeprefix("Dataset").partition("' ")[2] else "missing"
    is_away = isinstance(error, ConnectionError) or message.startswith("Couldn't find cache for")
    return "away" if is_away else None


def _files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """(data files, names of the others), linked folders included. What begins with a dot is not there."""
    files, other = [], []
    for path in sorted(_walk(folder, frozenset())):
        inside = path.relative_to(folder)
        is_data = path.is_file() and kind(path) is not None and not any(part.startswith("_") for part in inside.parts)
        files.append(path) if is_data else other.append(str(inside))
    return files, tuple(other)


def _walk(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # a link to a folder that it lies in
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, above | {here})
        else:
            yield path


def _refuse_other_splits(folder: Path, files: list[Path]) -> None:
    """A folder with train and test files, read whole, would train on its own test."""
    splits: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(folder)
        if match := _SPLIT.search(inside.as_posix().lower()):
            # The folder of a split, where it has one of its own.
            depth = inside.as_posix()[: match.end()].count("/")
            splits.setdefault(match[1].removesuffix("ing"), folder.joinpath(*inside.parts[: depth or None]))
    if "train" in splits and len(splits) > 1:
        other = next(file for split, file in splits.items() if split != "train")
        raise Unreadable(f"holds files of several splits; give data.path={splits['train']} data.eval_path={other}")


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
            whole.update(f"{kind(file)}{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return whole.hexdigest()


def _from_disk(folder: Path) -> Any:
    try:
        state = read_json(folder / "state.json")
        read_json(folder / "dataset_info.json")
        names = [each["filename"] for each in state["_data_files"]]
        if any(Path(name).name != name for name in names):
            raise Unreadable(f"state.json names a file outside of the folder: {names[0]}")
        return datasets.load_from_disk(str(folder))
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # datasets' and pyarrow's: no common base
        raise Unreadable(one_line(error)) from error
