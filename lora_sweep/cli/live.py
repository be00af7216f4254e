"""What a person sees while trials run: a live table on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_sweep.records import Base, Cell, Evaluation
from lora_sweep.report import results
from lora_sweep.report.results import Row
from lora_sweep.study.view import Outcome
from lora_sweep.system.console import say

RANKED_SHOWN = 10
CLASSES_SHOWN = 12
MEMORY_REMEDY = (
    "launch again with more free memory and they are tried again; or in another study with a smaller "
    "train.batch_size or data.max_length, train.gradient_checkpointing=true, or model.quantization=nf4"
)
TRAPPED = ("zero_trapped", "partially_trapped", "barely_learned")
"""Flags that have a cause."""


def short(params: Mapping[str, Any]) -> str:
    """`rank=8 alpha=16 ...`: keys without their group."""
    return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in params.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


class Preparing:
    """data's Progress: a bar on a terminal, elsewhere a line now and then; nothing where it is quick."""

    QUICK_SECONDS, EVERY_SECONDS = 2.0, 20.0

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("")
        self._shown_at = self._began = time.monotonic()

    def __call__(self, name: str, share: float) -> None:
        now = time.monotonic()
        if now - self._began < self.QUICK_SECONDS:
            return
        if self._console.is_terminal:
            if not self._bar.live.is_started:
                self._bar.start()
            self._bar.update(self._task, description=f"preparing {name}", completed=100 * share)
        elif now - self._shown_at > self.EVERY_SECONDS:
            self._shown_at = now
            self._console.print(f"preparing {name}: {share:.0%}", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()


class _Bay:
    """One slot as shown."""

    def __init__(self, cell: Cell, step: int) -> None:
        self.cell, self.step = cell, step
        self.last: Evaluation | None = None


class Show:
    """A worker's Watcher that draws. Use it as a context manager around the work."""

    def __init__(self, console: Console, cells: int, done: int, max_steps: int) -> None:
        self._console = console
        self._cells, self._done, self._max_steps = cells, done, max_steps
        self._bays: dict[int, _Bay] = {}
        """By slot."""
        self._bay_of: dict[int, _Bay] = {}
        """By number of the cell."""
        self._todo = (cells - done) * max_steps
        self._slot_steps = 0
        self._settled_steps = 0
        self._began = time.monotonic()
        self._base: Base | None = None
        self._bar = Progress(TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"))
        self._task = self._bar.add_task("cells", total=cells, completed=done, eta="")
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self._draw) if console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    # -- Watcher ----------------------------------------------------------------------------------------------------

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        """Also into a slot whose last cell has not ended yet: its result is still being written."""
        self._bays[slot] = self._bay_of[cell.number] = _Bay(cell, step)
        self._settled_steps += step

    def stepped(self) -> None:
        under_way = [bay for bay in self._bays.values() if bay.step < self._max_steps]
        for bay in under_way:
            bay.step += 1
        self._slot_steps += len(under_way)

    def chosen(self, reason: str) -> None:
        self._console.print(reason, markup=False, highlight=False, soft_wrap=True)

    def noticed(self, sentence: str) -> None:
        say(self._console, sentence)

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: Base) -> None:
        self._base = base
        bay = self._bay_of[cell.number]
        bay.step, bay.last = evaluation.step, evaluation

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self._done += 1
        bay = self._bay_of.pop(cell.number, None)
        self._bays = {slot: each for slot, each in self._bays.items() if each is not bay}
        self._settled_steps += self._max_steps - (bay.step if bay else 0)
        self._bar.update(self._task, completed=self._done)
        if self._live is None:
            loss = "-" if value is None else f"{value:.4f}"
            base = f" (base {self._base.eval_loss:.4f})" if self._base else ""
            line = (
                f"[{self._done}/{self._cells}] cell {cell.folder} {state} eval loss {loss}{base}  {short(cell.params)}"
            )
            flagged = f"  {', '.join(flags)}" if flags else ""
            self._console.print(
                f"{line}{flagged}  ETA {duration(self._eta())}", markup=False, highlight=False, soft_wrap=True
            )

    def _eta(self) -> float | None:
        left = self._todo - self._settled_steps - self._slot_steps
        spent = time.monotonic() - self._began
        return max(left, 0) * spent / self._slot_steps if self._slot_steps else None

    def _draw(self) -> Group:
        self._bar.update(self._task, eta=f"ETA {duration(self._eta())}")
        table = Table(box=None, padding=(0, 1))
        for name in ("slot", "cell", "step", "train loss", "eval loss", "of base"):
            table.add_column(name, justify="right")
        table.add_column("parameters", no_wrap=True, overflow="ellipsis")
        for slot, bay in sorted(self._bays.items()):
            step = f"{bay.step}/{self._max_steps}"
            losses = ["", "", ""]
            if bay.last is not None and self._base is not None:
                share = bay.last.eval_loss / self._base.eval_loss
                losses = [f"{bay.last.train_loss:.4f}", f"{bay.last.eval_loss:.4f}", f"{share:.0%}"]
            table.add_row(str(slot), bay.cell.folder, step, *losses, short(bay.cell.params))
        return Group(self._bar, table)


ENDLESS_COLUMNS = 10_000
NARROW_COLUMNS = 60
"""Of a terminal: on a narrower one a table would cut values."""


def show_ranking(console: Console, table: Sequence[Row], ranked: Sequence[Row]) -> None:
    """The ranking as a table, on a narrow terminal as lines."""
    drawn = ranking(table, ranked)
    # Measured on a terminal without end: on this one the least is never more than its width.
    least = Measurement.get(console, console.options.update(width=ENDLESS_COLUMNS), drawn).minimum
    if console.width >= max(NARROW_COLUMNS, least):
        console.print(drawn)
        return
    say(console, str(drawn.title))
    folded = results.same_run(table)
    for place, row in enumerate(results.runs(ranked)[:RANKED_SHOWN], start=1):
        share = "-" if row["base_loss"] is None else f"{row['eval_loss'] / row['base_loss']:.1%}"
        gap = "" if row["gap"] is None else f", gap {row['gap']:+.4f}"
        same = f"same run {_some(folded[row['number']])}" if row["number"] in folded else ""
        loss = f"cell {row['number']:04d}  {row['eval_loss']:.4f}, {share} of base{gap}"
        say(console, "  ".join(filter(None, (f"{place}. {loss}", short(row["params"]), same, flags(row)))))


def ranking(table: Sequence[Row], ranked: Sequence[Row]) -> Table:
    """The best finished runs, one column per swept key; cells that were not run stand beside the one that was."""
    keys = list(dict.fromkeys(key for row in table for key in row["params"]))
    folded = results.same_run(table)
    ranked = results.runs(ranked)
    runs = f" in {len(results.runs(table))} runs" if folded else ""
    title = f"best {min(len(ranked), RANKED_SHOWN)} of {len(table)} cells{runs}"
    drawn = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for name in ("", "cell"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for key in keys:
        # A narrow terminal folds the name of a column, never its values.
        widest = max((len(_short(row["params"].get(key, ""))) for row in ranked[:RANKED_SHOWN]), default=1)
        drawn.add_column(key.rpartition(".")[2], justify="right", overflow="fold", min_width=widest)
    for name in ("eval loss", "of base", "gap"):
        drawn.add_column(name, justify="right", no_wrap=True)
    same = [_some(folded.get(row["number"], ())) for row in ranked[:RANKED_SHOWN]]
    if any(same):
        drawn.add_column("same run", overflow="fold")
    flagged = any(row["flags"] for row in ranked[:RANKED_SHOWN])
    if flagged:
        drawn.add_column("flags")
    for place, row in enumerate(ranked[:RANKED_SHOWN], start=1):
        params = [_short(row["params"].get(key, "")) for key in keys]
        share = "-" if row["base_loss"] is None else f"{row['eval_loss'] / row['base_loss']:.1%}"
        gap = "-" if row["gap"] is None else f"{row['gap']:+.4f}"
        numbers = [f"{row['eval_loss']:.4f}", share, gap]
        beside: list[str | Text] = [same[place - 1]] if any(same) else []
        if flagged:
            beside.append(Text(flags(row), style="red" if row["faults"] else "yellow"))
        drawn.add_row(str(place), f"{row['number']:04d}", *params, *numbers, *beside)
    return drawn


def flags(row: Row) -> str:
    """`zero_trapped (lr_too_small), A_frozen`."""
    return ", ".join(_flag(row, flag) for flag in row["flags"])


def _some(numbers: Sequence[int], most: int = 3) -> str:
    """`0003 0007 0012 +9`."""
    more = f" +{len(numbers) - most}" if len(numbers) > most else ""
    return " ".join(f"{number:04d}" for number in numbers[:most]) + more


def class_lines(made: Mapping[str, Any]) -> list[str]:
    """The classes of estimate.plan, a line each, as far as they are few; and what keeps others apart."""
    lines = []
    for each in made["classes"][:CLASSES_SHOWN]:
        first, *others = each["cells"]
        why = f" ({' and '.join(each['reasons'])}, up to {each['size']:.0e} of the loss)" if each["reasons"] else ""
        lines.append(f"cell {first:04d} runs for {_some(others, most=8)}: {each['grade']}{why}")
    if len(made["classes"]) > CLASSES_SHOWN:
        lines.append(f"... and {len(made['classes']) - CLASSES_SHOWN} more classes; --json has them all")
    if near := made["near"]:
        lines.append(
            f"study.fold=near would leave {near['distinct_runs']} runs, equal up to {near['size']:.0e} of the loss "
            f"({', '.join(near['reasons'])})"
        )
    if runs := made["scaled_runs"]:
        rules = "optimizer.eps_rule=scaled optimizer.decay_rule=scaled optimizer.clip_rule=scaled"
        lines.append(f"{rules} would leave {runs} runs, equal by algebra")
    return lines


def warning_lines(warnings: Sequence[Mapping[str, str]]) -> list[str]:
    """Each warning of `pitfalls` as a line."""
    return [f"warning: {each['field']}: {each['sentence']}" for each in warnings]


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
        shown = ", ".join(f"{number:04d}" for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
        cells = "1 cell" if len(numbers) == 1 else f"{len(numbers)} cells"
        lines.append(f"{flag}: {cells} ({shown}){': ' if remedy else ''}{remedy}")
    return lines


def _flag(row: Row, flag: str) -> str:
    return f"{flag} ({row['cause']})" if flag in TRAPPED and row["cause"] is not None else flag
