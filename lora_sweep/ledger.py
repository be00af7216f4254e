"""What a study's ledger tells: attempts as they are stored, cells as they stand. Nothing here writes.

A **cell** is what the user asked for; an Optuna trial is one **attempt** at it, with the cell as one attribute.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from lora_sweep.errors import StudyError
from lora_sweep.journal import Journal, disk_errors
from lora_sweep.records import Cell, State

Reason = Literal["diverged", "memory", "trapped", "error", "lost"]
"""Why an attempt failed; after `lost` the cell is tried again, the others are final."""

Outcome = Literal["COMPLETE", "PRUNED", "FAIL"]
"""How an attempt ends."""

JOURNAL = "study.journal"

SAME_RUN_AS = "same_run_as"
"""Attribute of an attempt at a drawn cell that was not run: number of the cell whose end it was told."""


@dataclass(frozen=True)
class CellStatus:
    """One line per cell, derived from all attempts at it."""

    cell: Cell
    state: State
    value: float | None
    """As told with COMPLETE or PRUNED, nats per token; None in other states."""
    reason: Reason | None
    """Of a FAIL; None in other states."""
    attempts: int
    """Attempts that were begun."""
    step: int | None
    """Last reported step of the attempt shown; None before its first report."""
    started: datetime | None
    finished: datetime | None
    """UTC, of the attempt shown."""


class Attempt(NamedTuple):
    """What a trial is for."""

    cell: Cell
    number: int
    """1 for the first attempt at the cell."""

    def stored(self) -> dict[str, Any]:
        return {"number": self.cell.number, "params": dict(self.cell.params), "attempt": self.number}


class StudyView:
    """What anybody may know about a study, also while another process works on it."""

    def __init__(self, folder: Path, storage: JournalStorage, name: str) -> None:
        self.folder = folder
        self.name = name
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        self._read: list[Attempt | None] = []
        self._unread: list[int] = []

    @staticmethod
    def read(folder: Path | str) -> "StudyView":
        """Look at the study in `folder`: no lock, nothing written. Raises StudyError where there is none."""
        folder = Path(folder).absolute()
        path = folder / JOURNAL
        if not path.is_file():
            raise StudyError(f"{folder}: no study here (no {JOURNAL}); `launch` makes one")
        with disk_errors(folder):
            storage = JournalStorage(Journal(path, writable=False))
        for found in storage.get_all_studies():
            if "about" in found.user_attrs:
                return StudyView(folder, storage, found.study_name)
        raise StudyError(f"{folder}: the study was never begun; `launch` begins it")

    @property
    def id(self) -> str:
        """Eight hexadecimal digits drawn at creation; never changes."""
        return str(self._about()["id"])

    @property
    def size(self) -> int:
        """How many cells were asked for; those not drawn yet have no status."""
        return int(self._about()["size"])

    def trial_folder(self, cell: int) -> Path:
        """Where the record of the cell of this number lies."""
        return self.folder / "trials" / f"{cell:04d}"

    def folded(self) -> dict[int, tuple[Cell, int]]:
        """Cells that are not run: {number: (the cell, number of the cell that runs for it)}.

        Of a grid all that are to be folded; of drawn cells those that were told the end of another.
        """
        stored = self._about().get("folded", [])
        found = {number: (Cell(number, params), runs) for number, params, runs in stored}
        for attempt, trial in self._attempts():
            if has_ended(trial) and (runs := trial.user_attrs.get(SAME_RUN_AS)) is not None:
                found[attempt.cell.number] = attempt.cell, runs
        return found

    def statuses(self) -> tuple[CellStatus, ...]:
        """One per cell that has an attempt and is not folded, by number."""
        by_number: dict[int, tuple[Cell, list[FrozenTrial]]] = {}
        folded = self.folded()
        for attempt, trial in self._attempts():
            if attempt.cell.number in folded:
                continue
            by_number.setdefault(attempt.cell.number, (attempt.cell, []))[1].append(trial)
        return tuple(status_of(*by_number[number]) for number in sorted(by_number))

    def counts(self) -> dict[State, int]:
        """Cells that are run, by state; every state is a key."""
        states = [status.state for status in self.statuses()]
        return {state: states.count(state) for state in cast(tuple[State, ...], get_args(State))}

    def _about(self) -> dict[str, Any]:
        return cast(dict[str, Any], self._storage.get_study_user_attrs(self._study_id).get("about", {}))

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _attempts(self) -> Iterator[tuple[Attempt, FrozenTrial]]:
        """In the order of creation, without trials whose drawing was cut short."""
        trials = self._trials()
        # What an attempt is for never changes, so it is read once: this runs at every call of the seam.
        self._unread.extend(range(len(self._read), len(trials)))
        self._read.extend([None] * (len(trials) - len(self._read)))
        for number in self._unread:
            if (stored := trials[number].user_attrs.get("cell")) is not None:
                self._read[number] = Attempt(Cell(stored["number"], stored["params"]), stored["attempt"])
        self._unread = [
            number
            for number in self._unread
            if self._read[number] is None and trials[number].state is not TrialState.FAIL
        ]
        named = filter(itemgetter(0), zip(self._read, trials, strict=True))
        return cast(Iterator[tuple[Attempt, FrozenTrial]], named)


def has_ended(trial: FrozenTrial) -> bool:
    """Whether the attempt is the cell's last: finished, and not to be tried again."""
    return trial.state.is_finished() and trial.user_attrs.get("reason") != "lost"


def status_of(cell: Cell, attempts: Sequence[FrozenTrial]) -> CellStatus:
    """How far a cell is, by all attempts at it (at least one, in order of creation).

    A finished attempt wins (the first), then a running one, then a waiting one. Otherwise the last failure says it:
    final, or `lost`, and then the cell is waiting for whoever opens the study next.
    """
    ranks = {TrialState.COMPLETE: 3, TrialState.PRUNED: 3, TrialState.RUNNING: 2, TrialState.WAITING: 1}
    best = max(ranks.get(trial.state, 0) for trial in attempts)
    of_best = [trial for trial in attempts if ranks.get(trial.state, 0) == best]
    shown = of_best[0] if best == 3 else of_best[-1]
    state, reason = cast(State, shown.state.name), None
    if state == "FAIL":
        reason = cast(Reason, shown.user_attrs.get("reason", "error"))
        if reason == "lost":
            state, reason = "WAITING", None
    idle = state == "WAITING"
    return CellStatus(
        cell=cell,
        state=state,
        value=shown.value if best == 3 else None,
        reason=reason,
        attempts=sum(trial.state != TrialState.WAITING for trial in attempts),
        step=None if idle else max(shown.intermediate_values, default=None),
        started=None if idle else _utc(shown.datetime_start),
        finished=None if idle else _utc(shown.datetime_complete),
    )


def _utc(local: datetime | None) -> datetime | None:
    # Optuna hands out local time without a zone.
    return None if local is None else local.astimezone(UTC)
