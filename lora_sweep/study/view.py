"""What a study's ledger holds: attempts as they are stored, cells as they stand. Nothing here writes.

A **cell** is what the user asked for; an Optuna trial is one **attempt** at it, with the cell as one attribute.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from lora_sweep.errors import StudyError
from lora_sweep.records import Cell, State, cell_name
from lora_sweep.study.journal import Journal, is_held
from lora_sweep.system.disk import disk_errors

Reason = Literal["diverged", "memory", "trapped", "error", "lost"]
"""Why an attempt failed; after `lost` the cell is tried again, after `memory` by the next launch, others are final."""

Outcome = Literal["COMPLETE", "PRUNED", "FAIL"]
"""How an attempt ends."""

JOURNAL = "study.journal"

MAX_NUMBER = 10**9
"""Of a cell."""

LAUNCHED = "launched"
"""Attribute of the study: what it was launched with, nested plain values; its config.yaml says the same."""

SAME_RUN_AS = "same_run_as"
"""Attribute of an attempt at a drawn cell that was not run: number of the cell whose end it was given."""


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

    @classmethod
    def of_stored(cls, stored: Any) -> "Attempt":
        """Inverse of `stored`. Raises ValueError for anything else: the number names a folder."""
        match stored:
            case {"number": int(cell), "params": dict(params), "attempt": int(attempt)} if 0 <= cell <= MAX_NUMBER:
                return cls(Cell(cell, params), attempt)
        raise ValueError(f"{str(stored)[:200]!r} is no attempt at a cell")


class StudyView:
    """What anybody may know about a study, also while another process works on it.

    >>> view = StudyView.read(Path("outputs/example"))
    >>> [(status.cell.number, status.state, status.value) for status in view.statuses()]
    [(0, 'COMPLETE', 1.25), (1, 'WAITING', None)]
    """

    def __init__(self, folder: Path, storage: JournalStorage, name: str) -> None:
        self.folder = folder
        self.name = name
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        self.is_held = True
        """Whether a process works on the study, as far as known: else what was running waits for the next launch."""
        self._read: list[Attempt | None] = []
        self._unread: list[int] = []
        self._trial_ids: dict[int, list[int]] = {}
        """Number of a cell -> Optuna's ids of the attempts at it, as far as read."""

    @staticmethod
    def read(folder: Path | str) -> "StudyView":
        """Look at the study in

        Raises StudyError where there is none, or its journal is damaged or lost.

        Args:
            folder: no lock is kept, nothing is written.
        """
        view = StudyView.find(folder)
        if view is not None:
            return view
        folder = Path(folder).absolute()
        if (folder / JOURNAL).exists():
            raise StudyError(f"{folder}: the study was never begun; `launch` begins it")
        raise StudyError(f"{folder}: no study here (no {JOURNAL}); `launch` makes one")

    @staticmethod
    def find(folder: Path | str) -> "StudyView | None":
        """As `read`, but None where no study was begun in `folder`."""
        folder = Path(folder).absolute()
        path = folder / JOURNAL
        if path.exists() or path.is_symlink():
            is_running = is_held(folder)
            with disk_errors(folder), journal_errors(path):
                storage = JournalStorage(Journal(path, writable=False))
                for each in storage.get_all_studies():
                    if "about" in each.user_attrs:
                        view = StudyView(folder, storage, each.study_name)
                        view.is_held = is_running
                        view.check()
                        return view
        refuse_lost(folder)
        return None

    def check(self) -> None:
        """Raises ValueError where what is stored cannot have been stored by a Study."""
        match self._about():
            case {"id": str(identity), "size": int(), "kind": str(), **rest} if re.fullmatch(r"[\w-]{1,58}", identity):
                for number, params, runs in rest.get("folded", []):
                    Attempt.of_stored({"number": number, "params": params, "attempt": runs})
            case other:
                raise ValueError(f"{str(other)[:200]!r} is no study")
        for _ in self._attempts():
            pass

    @property
    def launched(self) -> dict[str, Any] | None:
        """What the study was launched with; None of one that is older than this record."""
        launched = self._storage.get_study_user_attrs(self._study_id).get(LAUNCHED)
        return launched if isinstance(launched, dict) else None

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
        return self.folder / "trials" / cell_name(cell)

    def duplicates(self) -> dict[int, tuple[Cell, int]]:
        """Cells that are not run: {number: (the cell, number of the cell that runs for it)}.

        Of a grid all duplicates; of drawn cells those that ended as another did.
        """
        stored = self._about().get("folded", [])
        cells = {number: (Cell(number, params), runs) for number, params, runs in stored}
        for attempt, trial in self._last().values():
            if has_ended(trial) and (runs := trial.user_attrs.get(SAME_RUN_AS)) is not None:
                cells[attempt.cell.number] = attempt.cell, runs
        return cells

    def _last(self) -> dict[int, tuple[Attempt, FrozenTrial]]:
        """Number of each cell -> its last attempt, or the one that finished."""
        last: dict[int, tuple[Attempt, FrozenTrial]] = {}
        for attempt, trial in self._attempts():
            before = last.get(attempt.cell.number)
            if before is None or before[1].state not in (TrialState.COMPLETE, TrialState.PRUNED):
                last[attempt.cell.number] = attempt, trial
        return last

    def statuses(self) -> tuple[CellStatus, ...]:
        """One per cell that has an attempt and is no duplicate, by number."""
        by_number: dict[int, tuple[Cell, list[FrozenTrial]]] = {}
        duplicates = self.duplicates()
        for attempt, trial in self._attempts():
            if attempt.cell.number in duplicates:
                continue
            by_number.setdefault(attempt.cell.number, (attempt.cell, []))[1].append(trial)
        return tuple(status_of(*by_number[number], is_held=self.is_held) for number in sorted(by_number))

    def status(self, number: int) -> tuple[CellStatus, int | None]:
        """(status of the cell of this number, number of the cell whose end it was given, if any).

        At the cost of the cell's own attempts. Raises KeyError where none has been read yet.
        """
        trials = [self._storage.get_trial(trial_id) for trial_id in self._trial_ids[number]]
        cell = Attempt.of_stored(trials[0].user_attrs["cell"]).cell
        runs = next((trial.user_attrs[SAME_RUN_AS] for trial in trials if SAME_RUN_AS in trial.user_attrs), None)
        return status_of(cell, trials, is_held=self.is_held), runs

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
                attempt = self._read[number] = Attempt.of_stored(stored)
                self._trial_ids.setdefault(attempt.cell.number, []).append(trials[number]._trial_id)
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


def status_of(cell: Cell, attempts: Sequence[FrozenTrial], is_held: bool = True) -> CellStatus:
    """How far a cell is, by all attempts at it (at least one, in order of creation).

    A finished attempt wins (the first), then a running one, then a waiting one. Otherwise the last failure says it:
    final, or `lost`, and then the cell is waiting for whoever opens the study next. So is one that was running when the
    last process that worked on the study died (not `is_held`).
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
    if state == "RUNNING" and not is_held:
        state = "WAITING"
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


@contextmanager
def journal_errors(path: Path) -> Iterator[None]:
    """StudyError for what Optuna and this module raise on a journal whose lines are JSON, but not a study's."""
    try:
        yield
    except StudyError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError, NotImplementedError) as error:
        message = " ".join(str(error).split())[:200]
        raise StudyError(f"{path}: damaged ({type(error).__name__}: {message}); restore it from a copy") from error


def refuse_lost(folder: Path) -> None:
    """Raises StudyError where a folder without a ledger holds trials: begun anew, it would write over them."""
    trials = folder / "trials"
    recorded = sum(each.name.isdecimal() for each in trials.iterdir()) if trials.is_dir() else 0
    if recorded:
        raise StudyError(
            f"{folder / JOURNAL}: the ledger is gone or empty, but trials/ holds {recorded} trials; restore it from a "
            "copy, or choose another study.name"
        )


def _utc(local: datetime | None) -> datetime | None:
    # Optuna hands out local time without a zone.
    return None if local is None else local.astimezone(UTC)
