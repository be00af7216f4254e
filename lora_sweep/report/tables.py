"""Texts and tables about a study, for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lora_sweep.records import cell_name
from lora_sweep.report import results
from lora_sweep.report.results import Row
from lora_sweep.system.console import say

RANKED_SHOWN = 10
MEMORY_REMEDY = (
    "launch again with more free memory and they are tried again; or in another study with a smaller "
    "train.batch_size or data.max_length, train.gradient_checkpointing=true, or model.quantization=nf4"
)
TRAPPED = ("zero_trapped", "partially_trapped", "barely_learned")
"""Flags that have a cause."""


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 cell`, `2 cells`, `1,024 cells`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def short(params: Mapping[str, Any]) -> str:
    """`rank=8 alpha=16 ...`: keys without their group."""
    return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in params.items())


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


ENDLESS_COLUMNS = 10_000
SHORT_NAMES = {
    "use_rslora": "rslora",
    "target_modules": "targets",
    "weight_decay_B": "decay_B",
    "max_grad_norm": "clip",
}
"""Headings of long keys where a terminal is too narrow for their names."""


def show_ranking(console: Console, table: Sequence[Row], ranked: Sequence[Row]) -> None:
    """The best finished runs, one column per swept key; cells that were not run stand beside the one that was.

    On a terminal that is too narrow for all columns the table loses, in this order and as far as it must: keys that
    have one value in all rows shown (a line below names them), the long names of keys, `gap`, `of base`, space, `same
    run`. What then does not fit is written as a line a run. No heading and no value is ever broken.
    """
    runs = results.runs(ranked)
    shown = runs[:RANKED_SHOWN]
    duplicates = results.same_run(table)
    of = f" in {count(len(results.runs(table)), 'run')}" if duplicates else ""
    title = f"best {len(shown)} of {count(len(table), 'cell')}{of}"
    for view in _views(table, shown):
        drawn = _ranking(title, shown, duplicates, view)
        # Measured on a terminal without end: on this one nothing is ever wider than it.
        if Measurement.get(console, console.options.update(width=ENDLESS_COLUMNS), drawn).maximum <= console.width:
            console.print(drawn)
            if view.constant:
                say(console, f"all of them: {short(view.constant)}")
            return
    say(console, title)
    for place, row in enumerate(shown, start=1):
        gap = "" if row["gap"] is None else f", gap {row['gap']:+.4f}"
        same = f"same run {some(duplicates[row['number']])}" if row["number"] in duplicates else ""
        loss = f"cell {cell_name(row['number'])}  {row['eval_loss']:.4f}, {_of_base(row)} of base{gap}"
        say(console, "  ".join(filter(None, (f"{place}. {loss}", short(row["params"]), same, flags(row)))))


@dataclass(frozen=True)
class _View:
    """What of the ranking a table shows."""

    keys: Sequence[str]
    names: Sequence[str]
    """Headings of the keys."""
    constant: Mapping[str, Any]
    """Keys that have no column, with the value that all rows have."""
    columns: Sequence[str]
    """Of the losses."""
    gap: int = 2
    """Spaces between columns."""
    has_same: bool = True
    """Whether duplicates have a column."""


def _views(table: Sequence[Row], shown: Sequence[Row]) -> Iterator[_View]:
    """Of one ranking, the widest first."""
    keys = list(dict.fromkeys(key for row in table for key in row["params"]))
    names = {key: key.rpartition(".")[2] for key in keys}
    columns = ("eval loss", "of base", "gap")
    yield _View(keys, [*names.values()], {}, columns)
    values = {key: [row["params"].get(key) for row in shown] for key in keys}
    constant = {key: each[0] for key, each in values.items() if len(shown) > 1 and each.count(each[0]) == len(each)}
    varied = [key for key in keys if key not in constant]
    yield _View(varied, [names[key] for key in varied], constant, columns)
    short_names = [SHORT_NAMES.get(names[key], names[key]) for key in varied]
    for left in (columns, columns[:2], columns[:1]):
        yield _View(varied, short_names, constant, left)
    yield _View(varied, short_names, constant, columns[:1], gap=1)
    yield _View(varied, short_names, constant, columns[:1], gap=1, has_same=False)


def _ranking(title: str, shown: Sequence[Row], duplicates: Mapping[int, Sequence[int]], view: _View) -> Table:
    drawn = Table(
        title=title, title_justify="left", box=None, padding=(0, view.gap, 0, 0), header_style="bold underline"
    )
    for name in ("", "cell", *view.names, *view.columns):
        drawn.add_column(name, justify="right", no_wrap=True)
    has_same = view.has_same and any(row["number"] in duplicates for row in shown)
    has_flags = any(row["flags"] for row in shown)
    if has_same:
        drawn.add_column("same run", no_wrap=True)
    if has_flags:
        drawn.add_column("flags", no_wrap=True)
    for place, row in enumerate(shown, start=1):
        params = [_short(row["params"].get(key, "")) for key in view.keys]
        losses = [f"{row['eval_loss']:.4f}", _of_base(row), "-" if row["gap"] is None else f"{row['gap']:+.4f}"]
        beside: list[str | Text] = [some(duplicates.get(row["number"], ()))] if has_same else []
        if has_flags:
            # Below one another.
            beside.append(Text("\n".join(_flags(row)), style="red" if row["faults"] else "yellow"))
        drawn.add_row(str(place), cell_name(row["number"]), *params, *losses[: len(view.columns)], *beside)
    return drawn


def _of_base(row: Row) -> str:
    return "-" if row["base_loss"] is None else f"{row['eval_loss'] / row['base_loss']:.1%}"


def flags(row: Row) -> str:
    """`zero_trapped (lr_too_small), A_frozen`."""
    return ", ".join(_flags(row))


def _flags(row: Row) -> list[str]:
    return [_flag(row, flag) for flag in row["flags"]]


def some(numbers: Sequence[int], most: int = 3) -> str:
    """`0003 0007 0012 +9`."""
    more = f" +{len(numbers) - most}" if len(numbers) > most else ""
    return " ".join(cell_name(number) for number in numbers[:most]) + more


def flag_lines(table: Sequence[Row]) -> list[str]:
    """One line per flag or reason of failure: how many cells, which, and what to do where that is known."""
    named: dict[tuple[str, str], list[int]] = {}
    for row in table:
        words = [(_flag(row, flag), row["remedies"].get(flag, "")) for flag in row["flags"]]
        reason = row["reason"]
        for word in words or [(reason, MEMORY_REMEDY if reason == "memory" else "")] * (reason is not None):
            named.setdefault(word, []).append(row["number"])
    lines = []
    for (flag, remedy), numbers in sorted(named.items()):
        shown = ", ".join(cell_name(number) for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
        lines.append(f"{flag}: {count(len(numbers), 'cell')} ({shown}){': ' if remedy else ''}{remedy}")
    return lines


def _flag(row: Row, flag: str) -> str:
    return f"{flag} ({row['cause']})" if flag in TRAPPED and row["cause"] is not None else flag
