"""What a person sees while trials run: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.report.tables import duration, short
from lora_sweep.study.view import Outcome
from lora_sweep.system.console import say


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
        self._ended_steps = 0
        self._began = time.monotonic()
        self._base: BaselineLosses | None = None
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
        self._ended_steps += step

    def stepped(self) -> None:
        under_way = [bay for bay in self._bays.values() if bay.step < self._max_steps]
        for bay in under_way:
            bay.step += 1
        self._slot_steps += len(under_way)

    def chosen(self, reason: str) -> None:
        self._console.print(reason, markup=False, highlight=False, soft_wrap=True)

    def noticed(self, sentence: str) -> None:
        say(self._console, sentence)

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: BaselineLosses) -> None:
        self._base = base
        bay = self._bay_of[cell.number]
        bay.step, bay.last = evaluation.step, evaluation

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self._done += 1
        bay = self._bay_of.pop(cell.number, None)
        self._bays = {slot: each for slot, each in self._bays.items() if each is not bay}
        self._ended_steps += self._max_steps - (bay.step if bay else 0)
        self._bar.update(self._task, completed=self._done)
        if self._live is None:
            loss = "-" if value is None else f"{value:.4f}"
            base = f" (base {self._base.eval_loss:.4f})" if self._base else ""
            line = f"[{self._done}/{self._cells}] cell {cell.name} {state} eval loss {loss}{base}  {short(cell.params)}"
            flagged = f"  {', '.join(flags)}" if flags else ""
            self._console.print(
                f"{line}{flagged}  ETA {duration(self._eta())}", markup=False, highlight=False, soft_wrap=True
            )

    def _eta(self) -> float | None:
        left = self._todo - self._ended_steps - self._slot_steps
        spent = time.monotonic() - self._began
        return max(left, 0) * spent / self._slot_steps if self._slot_steps else None

    def _draw(self) -> Group:
        self._bar.update(self._task, eta=f"ETA {duration(self._eta())}")
        table = Table(box=None, padding=(0, 1))
        for name in ("slot", "cell", "step", "train loss", "eval loss", "of base"):
            table.add_column(name, justify="right", no_wrap=True)
        # The only column that a narrow terminal makes narrower.
        table.add_column("parameters")
        for slot, bay in sorted(self._bays.items()):
            step = f"{bay.step}/{self._max_steps}"
            losses = ["", "", ""]
            if bay.last is not None and self._base is not None:
                share = bay.last.eval_loss / self._base.eval_loss
                losses = [f"{bay.last.train_loss:.4f}", f"{bay.last.eval_loss:.4f}", f"{share:.0%}"]
            params = Text(short(bay.cell.params), no_wrap=True, overflow="ellipsis")
            table.add_row(str(slot), bay.cell.name, step, *losses, params)
        return Group(self._bar, table)
