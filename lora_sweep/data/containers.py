"""What holds the records of one JSON value: an array, columns as pandas writes them, or nothing but one record."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_sweep.data.dialects import is_message

_SPLIT_KEYS = {"columns", "index", "data", "index_names", "column_names"}


def records(value: Any) -> Sequence[Any] | str:
    """The records in order, or why there are none, as a clause behind the file's name.

    An object that is an example by itself is one, whatever lists are in it: a conversation is no list of examples. Else
    pandas' orients are read (records, columns, list, index, split, table), and an object around one array.
    """
    if isinstance(value, list):
        if value and all(map(is_message, value)):
            return [value]
        return value
    if not isinstance(value, Mapping):
        return "is neither an array of objects nor one object a line"
    if any(isinstance(each, list) and each and all(map(is_message, each)) for each in value.values()):
        return [value]
    if {"columns", "data"} <= value.keys() <= _SPLIT_KEYS:
        return _split(value["columns"], value["data"])
    kinds = {_kind(each) for each in value.values()}
    if value and kinds == {"object"}:
        return _objects(value)
    if value and kinds == {"list"}:
        lengths = {len(each) for each in value.values()}
        if len(lengths) == 1 and not any(isinstance(each, Mapping) for column in value.values() for each in column):
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    arrays = {
        name: each
        for name, each in value.items()
        if isinstance(each, list) and each and all(isinstance(record, Mapping) for record in each)
    }
    if len(arrays) > 1:
        return f"holds several arrays of objects ({', '.join(map(str, arrays))}); write each into a file of its own"
    return next(iter(arrays.values()), [value])


def _kind(value: Any) -> str:
    return "object" if isinstance(value, Mapping) else "list" if isinstance(value, list) else "value"


def _split(columns: Any, rows: Any) -> Sequence[Any] | str:
    if not isinstance(columns, list) or not isinstance(rows, list):
        return "has `columns` and `data` that are no lists"
    if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
        return f"has rows in `data` that are no lists of {len(columns)} values, one a column"
    return [dict(zip(map(str, columns), row, strict=True)) for row in rows]


def _objects(value: Mapping[str, Any]) -> Sequence[Any]:
    """Column by column, or row by row: by which of the two the inner keys are numbers."""
    inner = list(value.values())
    keys = list(inner[0])
    if all(list(each) == keys for each in inner):
        if keys and all(key.lstrip("-").isdigit() for key in keys):
            return [{name: column[key] for name, column in value.items()} for key in keys]
        if all(key.lstrip("-").isdigit() for key in value):
            return inner
    return [value]
