"""Whether data can be what the configuration says, by its first rows: nothing is tokenized, no hub is asked."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_sweep.config import DataConfig
from lora_sweep.data import encoding, example, retention, source, tasks
from lora_sweep.data.example import ParsedRow
from lora_sweep.data.file_rows import Row, Unreadable
from lora_sweep.errors import ConfigError, Fault

USER_DATA = ("files", "hub")
"""Of data.name: what the user brings, tokenized once and kept."""
ONLY_OWN_DATA = ("path", "eval_path", "columns", "chat_template", "format", "undesirable")
ONLY_HUB = ("subset", "split", "revision", "eval_split")
"""Fields that mean nothing of other data: passed over, they would train on something else than was meant."""
NOT_GIVEN: tuple[Any, ...] = (None, {}, "auto", "refuse")
HEAD_ROWS = 100
"""Rows read before anything is prepared."""


def check(data: DataConfig) -> list[Fault]:
    """Whether the files are there and their first rows are examples; tokenizes nothing, asks no hub."""
    faults = [
        Fault("data.columns", f"must name {', '.join(example.COLUMNS)}", name)
        for name in data.columns
        if name not in example.COLUMNS
    ]
    if not faults and not example.meanings(data.columns):
        rule = "must name what goes together: " + "; ".join(
            ", ".join((*needed, *beside)) for needed, beside in example.FORMATS.values()
        )
        faults.append(Fault("data.columns", rule, ", ".join(data.columns)))
    elif not faults and data.format != "auto" and data.format not in example.meanings(data.columns):
        needed, beside = example.FORMATS[data.format]
        rule = f"must name columns of data.format={data.format}: {', '.join((*needed, *beside))}"
        faults.append(Fault("data.columns", rule, ", ".join(data.columns)))
    faults += _unread(data)
    if faults:
        return faults
    if data.name not in USER_DATA:
        try:
            tasks.task(data)
        except ConfigError as error:
            faults += error.faults
    elif data.path is None:
        remedy = "data.path=FILE.jsonl" if data.name == "files" else "data.path=ORGANISATION/NAME"
        faults.append(Fault("data.path", "is needed", None, remedy))
    elif data.name == "files":
        faults += _head_faults("data.path", data.path, data)
    elif Path(data.path).expanduser().exists():
        faults.append(Fault("data.path", "lies here, it is no hub id", data.path, f"data=files data.path={data.path}"))
    if data.eval_path is not None:
        faults += _head_faults("data.eval_path", data.eval_path, data)
    if data.retention is not None and data.retention != retention.EMBEDDED:
        faults += _head_faults("data.retention", data.retention, data, retention.parse)
    if data.chat_template is not None:
        try:
            encoding.template_text(data)
        except ConfigError as error:
            faults += error.faults
    return faults


def _unread(data: DataConfig) -> list[Fault]:
    """Fields that are given and would not be read."""
    is_own, is_hub = data.name in USER_DATA, data.name == "hub"
    given = [key for key in (*ONLY_OWN_DATA, *ONLY_HUB) if getattr(data, key) not in NOT_GIVEN]
    faults = []
    for key in given:
        got = getattr(data, key)
        if not is_own:
            faults.append(Fault(f"data.{key}", f"is not read by data={data.name}", got, "say data=files or data=hub"))
        elif key in ONLY_HUB and not is_hub:
            faults.append(Fault(f"data.{key}", "is of a hub data set, files have none", got, f"data.{key}=null"))
    if is_hub and data.eval_path is not None and data.eval_split is not None:
        faults.append(Fault("data.eval_split", "and data.eval_path exclude each other", data.eval_split))
    return faults


def _head_faults(
    key: str, path: str, data: DataConfig, parse: Callable[[Any, Mapping[str, str], str], ParsedRow] = example.parse
) -> list[Fault]:
    """Of a file: unreadable, empty, or not one usable example among its first rows."""
    try:
        places, rows = [], []
        for row in _head(path):
            places.append(row.where)
            rows.append(ParsedRow(row.broken) if row.broken else parse(row.record, data.columns, data.format))
    except Unreadable as error:
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).expanduser().exists()
        remedy = f"a data set of the hub is data=hub data.path={path}" if is_id and not Path(path).suffix else ""
        return [Fault(key, f"cannot be read ({error})", path, remedy if key == "data.path" else "")]
    if not rows:
        return [Fault(key, "holds no example", path)]
    if all(isinstance(row.example, str) for row in rows):
        many = f"none of the first {len(rows)} rows can" if len(rows) > 1 else "its only row cannot"
        return [Fault(key, f"{many} be used; {places[0]} {rows[0].example}", path, rows[0].remedy)]
    undesirable = [place for place, row in zip(places, rows, strict=True) if row.is_undesirable]
    if undesirable and data.undesirable == "refuse" and key != "data.retention":
        return [undesirable_fault(path, len(undesirable), undesirable[0], f" of the first {len(rows)}")]
    return []


def undesirable_fault(path: str, count: int, first: str, of: str) -> Fault:
    """For `count` rows, whose first is `first`, with a false label; `of` says among how many."""
    rule = f"must be skip or train: {count:,}{of} rows of {path} have `label: false`, an answer not to give ({first})"
    return Fault("data.undesirable", rule, "refuse", "data.undesirable=skip leaves them out")


def _head(path: str) -> Iterator[Row]:
    return itertools.islice(source.rows_of_path(path)(), HEAD_ROWS)
