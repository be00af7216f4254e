"""The ledger of a study: who runs what, what is finished. Optuna's storage is the only truth.

A **cell** is what the user asked for; an Optuna trial is one **attempt** at it. Every attempt is born WAITING with
its cell as one attribute, is claimed by compare-and-swap (WAITING -> RUNNING) and ends COMPLETE, PRUNED or FAIL,
which Optuna makes immutable. It never goes back: a lost attempt is told FAIL, reason `lost`, and the cell is
enqueued again. So whatever process dies wherever, one rule repairs the study: a cell needs an attempt iff none is
live or finished and the last one, if any, was lost.

Until leases have deadlines one process at a time works on a study (`Study.open`); anybody may read
(`view.StudyView`). A `Study` serves one thread.
"""

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, get_args

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lora_sweep.errors import StudyError
from lora_sweep.records import Cell
from lora_sweep.study.asha import Asha
from lora_sweep.study.journal import Journal, hold
from lora_sweep.study.lease import Lease, StaleLease, held
from lora_sweep.study.search import Search
from lora_sweep.study.storage import check_arguments, grid_duplicates, open_storage, refuse_other_cells
from lora_sweep.study.view import (
    JOURNAL,
    LAUNCHED,
    SAME_RUN_AS,
    Attempt,
    Outcome,
    Reason,
    StudyView,
    has_ended,
    journal_errors,
)
from lora_sweep.system.disk import disk_errors, refuse_links


class Study(StudyView):
    """A study to work on. Make one with `Study.open`; use it as a context manager.

    >>> with Study.open("outputs/example", name="example", cells=sweep.cells()[:2]) as study:
    ...     lease = study.ask(lambda cell: True)
    ...     study.report_rung({lease: 1.25}, step=12)[lease]
    ...     study.tell(lease, "COMPLETE", 1.25)
    True
    """

    def __init__(
        self,
        folder: Path,
        storage: JournalStorage,
        journal: Journal,
        name: str,
        search: Search | None,
        pruner: Asha | BasePruner | None,
    ) -> None:
        super().__init__(folder, storage, name)
        self._journal = journal
        self._search = search
        self._pruner = pruner
        self._leased: set[int] = set()
        self._idle: Collection[int] = ()
        """Numbers of duplicates in a grid."""
        self._keys: dict[int, Hashable] = {}
        """Number of a drawn cell -> `Search.same_run` of it."""
        self._ended_duplicates: list[tuple[Cell, Outcome, float | None]] = []
        """Not yet handed out by `ended_duplicates`."""
        self._lock: int | None = None

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        name: str,
        cells: Iterable[Cell] | None = None,
        search: Search | None = None,
        pruner: Asha | BasePruner | None = None,
        same_run: Iterable[Collection[int]] = (),
        launched: Mapping[str, Any] | None = None,
    ) -> Self:
        """Create or resume the study in `folder`, for this process alone.

        Give `cells` (a grid: each is enqueued once, never sampled) or `search`. Of each class in `same_run` (numbers of
        cells, none in two classes) one cell is run, those that have not begun are its duplicates: the one that is
        furthest, else the lowest. Attempts of a dead process are reaped and every cell that needs an attempt gets one.
        The kernel frees the lock when this process and the children it forked are gone, kill -9 included. `launched` is
        kept as `StudyView.launched`.

        Raises StudyError when another process holds the study, when what is on disk is another study (name, cells or
        distributions), damaged or without its ledger, and when the folder can't be written or holds a link;
        StorageUnavailable when the disk is full or gone; ValueError for arguments that make no sense. Nothing is
        written before the arguments are checked.
        """
        grid = check_arguments(cells, search, pruner)
        if optuna.logging.get_verbosity() == logging.INFO:  # Its default: one line per study and trial on stderr.
            optuna.logging.set_verbosity(logging.WARNING)
        folder = Path(folder).absolute()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder)
            try:
                # Whoever left Optuna's own lock behind is dead: don't wait out its 30 s of grace.
                for left in folder.glob(f"{JOURNAL}.lock*"):
                    left.unlink(missing_ok=True)
                refuse_links(folder)
                with journal_errors(folder / JOURNAL):
                    storage, journal = open_storage(folder, name)
                    study = cls(folder, storage, journal, name, search, pruner)
                    if study._about():
                        study.check()
                study._match(grid, same_run)
                study._keep_launched(launched)
                study.reap()
                study._retry_memory()
                study._repair(cell for cell in grid or () if cell.number not in study._idle)
            except BaseException:
                os.close(lock)
                raise
        study._lock = lock
        return study

    def _keep_launched(self, launched: Mapping[str, Any] | None) -> None:
        if launched is not None and self.launched != json.loads(json.dumps(launched)):
            self._storage.set_study_user_attr(self._study_id, LAUNCHED, launched)

    def close(self) -> None:
        """Let go of the study; leases still held are reaped by whoever opens it next. May be called twice."""
        self._journal.writable = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def draws(self) -> bool:
        """Whether cells are drawn, by what has ended before."""
        return self._search is not None

    def ask(self, fits: Callable[[Cell], bool]) -> Lease | None:
        """Claim the waiting cell of the lowest number that fits, else draw new ones until one fits.

        None: nothing fits now, or nothing is left. A drawn cell that does not fit waits, unchanged, for a later call
        (at most `Search.hold` of them), so don't ask for a pack that is full. One that is the same run as another
        (`Search.same_run`) waits until that has ended, and is told its end.
        """
        while True:
            self._end_duplicates()
            for attempt, trial in self._ready():
                if fits(attempt.cell) and (lease := self._claim(attempt, trial._trial_id)):
                    return lease
            if self._search is None or len(self._waiting()) >= self._search.hold:
                return None
            if len({attempt.cell.number for attempt, _ in self._attempts()}) >= self._search.n_trials:
                return None
            self._draw(self._search)

    def next(self, fits: Callable[[Cell], bool], most: int) -> list[Cell]:
        """The cells that `ask` would lease next, at most so many; not those that are yet to be drawn."""
        return list(islice((attempt.cell for attempt, _ in self._ready() if fits(attempt.cell)), most))

    def _waiting(self) -> list[tuple[Attempt, FrozenTrial]]:
        """By number."""
        waiting = [
            (attempt, trial)
            for attempt, trial in self._attempts()
            if trial.state is TrialState.WAITING and attempt.cell.number not in self._idle
        ]
        return sorted(waiting, key=lambda each: each[0].cell.number)

    def _ready(self) -> list[tuple[Attempt, FrozenTrial]]:
        """Those that wait for a slot alone: of cells that are the same run the first, as long as none is running."""
        attempts = self._attempts()
        taken = {self._key(attempt.cell) for attempt, trial in attempts if trial.state is TrialState.RUNNING}
        ready = []
        for attempt, trial in self._waiting():
            if (key := self._key(attempt.cell)) not in taken:
                taken.add(key)
                ready.append((attempt, trial))
        return ready

    def _end_duplicates(self) -> None:
        """Each waiting cell that is the same run as one that was run to its end ends as that did, whatever the end.

        It is claimed, marked and told like any other, so a kill on the way leaves a lost attempt: the next one is told.
        """
        if self._search is None or self._search.same_run is None:
            return
        ended: dict[Hashable, tuple[Cell, FrozenTrial]] = {}
        for attempt, trial in self._last().values():
            if has_ended(trial) and SAME_RUN_AS not in trial.user_attrs:
                ended.setdefault(self._key(attempt.cell), (attempt.cell, trial))
        for attempt, trial in self._waiting():
            cell, ran = ended.get(self._key(attempt.cell), (None, trial))
            if cell is not None and (lease := self._claim(attempt, trial._trial_id)):
                self._storage.set_trial_user_attr(lease.trial, SAME_RUN_AS, cell.number)
                why = ran.user_attrs.get("reason", "error") if ran.state is TrialState.FAIL else None
                state = cast(Outcome, ran.state.name)
                self.tell(lease, state, ran.value, why)
                self._ended_duplicates.append((attempt.cell, state, ran.value))

    def ended_duplicates(self) -> list[tuple[Cell, Outcome, float | None]]:
        """(cell, state, value) of those that `ask` told the end of an equal cell, each handed out once."""
        ended, self._ended_duplicates = self._ended_duplicates, []
        return ended

    def _key(self, cell: Cell) -> Hashable:
        """Equal for cells of which one is run for all; it never changes, so it is asked for once."""
        if self._search is None or self._search.same_run is None:
            return cell.number
        if cell.number not in self._keys:
            self._keys[cell.number] = self._search.same_run(cell)
        return self._keys[cell.number]

    def report_rung(self, values: Mapping[Lease, float], step: int) -> dict[Lease, bool]:
        """Store the losses (nats per token) of all slots at `step`, then decide as a whole who goes on (True).

        With Asha a step that is no rung keeps all; at a rung each cell is compared with all values stored there, of
        its latest attempt unless that failed, whatever the order of `values`. Without a pruner all go on. Raises
        StaleLease before anything is stored when one of the leases is no longer held.
        """
        for lease in values:
            self.renew(lease)
        for lease, value in values.items():
            with held(lease):
                self._storage.set_trial_intermediate_value(lease.trial, int(step), float(value))
        if isinstance(self._pruner, Asha):
            if step not in self._pruner.rungs:
                return dict.fromkeys(values, True)
            at_rung = {
                attempt.cell.number: trial.intermediate_values[step]
                for attempt, trial in self._attempts()
                if trial.state is not TrialState.FAIL and step in trial.intermediate_values
            }
            survivors = self._pruner.survivors(at_rung)
            return {lease: lease.cell.number in survivors for lease in values}
        if self._pruner is None:
            return dict.fromkeys(values, True)
        study = self._optuna()
        return {lease: not self._pruner.prune(study, self._storage.get_trial(lease.trial)) for lease in values}

    def tell(self, lease: Lease, state: Outcome, value: float | None = None, why: Reason | None = None) -> None:
        """End the attempt, for good.

        COMPLETE needs a finite `value` (nats per token). PRUNED may have one, by default the last finite one reported.
        FAIL needs `why` and has no value; after `lost` the cell waits again. Raises StaleLease when the attempt was
        ended by somebody else, ValueError otherwise.
        """
        if value is not None and not math.isfinite(value):
            raise ValueError(f"value must be finite, got {value}: tell FAIL, diverged")
        if (state == "COMPLETE" and value is None) or (state == "FAIL" and value is not None):
            raise ValueError(f"COMPLETE needs a value and FAIL has none, got {state} with {value}")
        if (why in get_args(Reason)) != (state == "FAIL") or (state != "FAIL" and why is not None):
            raise ValueError(f"FAIL needs a reason of {get_args(Reason)}, other states none, got {state} with {why!r}")
        trial = self._running(lease)
        if state == "PRUNED" and value is None:
            finite = {step: loss for step, loss in trial.intermediate_values.items() if math.isfinite(loss)}
            value = finite[max(finite)] if finite else None
        values = None if value is None else [float(value)]
        with held(lease):
            if self._search is not None:
                self._search.sampler.after_trial(self._optuna(), trial, TrialState[state], values)
            if why is not None:
                self._storage.set_trial_user_attr(lease.trial, "reason", why)
            self._storage.set_trial_state_values(lease.trial, TrialState[state], values)
        self._leased.discard(lease.trial)
        if why == "lost":
            self._enqueue(Attempt(lease.cell, lease.attempt + 1), trial)

    def release(self, lease: Lease) -> None:
        """Give the cell back unfinished (a clean stop): the attempt is told FAIL, `lost`, and the cell waits again."""
        self.tell(lease, "FAIL", why="lost")

    def renew(self, lease: Lease) -> None:
        """Make sure that the lease is still held; raises StaleLease otherwise. Leases have no deadline yet."""
        self._running(lease)

    def reap(self) -> tuple[Cell, ...]:
        """End what dead processes left RUNNING, as `lost`, and enqueue those cells again; returns them.

        As long as one process at a time holds the study, that is every running attempt that isn't leased by it.
        """
        lost = [
            (attempt.cell, trial._trial_id)
            for attempt, trial in self._attempts()
            if trial.state is TrialState.RUNNING and trial._trial_id not in self._leased
        ]
        waiting = [trial for trial in self._trials() if trial.state is TrialState.WAITING]
        half_drawn = [trial._trial_id for trial in waiting if "cell" not in trial.user_attrs]
        for trial_id in half_drawn + [trial_id for _, trial_id in lost]:
            self._storage.set_trial_user_attr(trial_id, "reason", "lost")
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)
        self._repair()
        return tuple(cell for cell, _ in lost)

    def _retry_memory(self) -> None:
        """Enqueues the cells again that did not fit into memory: there may be more of it by now."""
        for attempt, trial in self._last().values():
            if trial.state is TrialState.FAIL and trial.user_attrs.get("reason") == "memory":
                self._enqueue(Attempt(attempt.cell, attempt.number + 1), trial)

    def _repair(self, cells: Iterable[Cell] = ()) -> None:
        """Enqueue exactly those of `cells` and of the cells known that need an attempt."""
        last: dict[int, tuple[Attempt, FrozenTrial]] = {}
        live = set()
        for attempt, trial in self._attempts():
            last[attempt.cell.number] = (attempt, trial)
            if trial.state is not TrialState.FAIL:
                live.add(attempt.cell.number)
        for cell in cells:
            if cell.number not in last:
                self._enqueue(Attempt(cell, 1), None)
        for number, (attempt, trial) in sorted(last.items()):
            if number not in live and trial.user_attrs.get("reason") == "lost":
                self._enqueue(Attempt(attempt.cell, attempt.number + 1), trial)

    def _enqueue(self, attempt: Attempt, like: FrozenTrial | None) -> None:
        """A drawn cell keeps its parameters and distributions, so that samplers learn from the attempt that ends."""
        template = create_trial(
            state=TrialState.WAITING,
            params=like.params if like else None,
            distributions=like.distributions if like else None,
            user_attrs={"cell": attempt.stored()},
        )
        self._storage.create_new_trial(self._study_id, template)

    def _draw(self, search: Search) -> None:
        """A new cell, as a WAITING attempt that becomes one by its last write.

        Not by optuna.Study.ask: that would claim the waiting cells first, which were just found not to fit.
        """
        trial_id = self._storage.create_new_trial(self._study_id, create_trial(state=TrialState.WAITING))
        trial = Trial(self._optuna(), trial_id)
        attempt = Attempt(Cell(trial.number, search.params(trial)), 1)
        self._storage.set_trial_user_attr(trial_id, "cell", attempt.stored())

    def _claim(self, attempt: Attempt, trial_id: int) -> Lease | None:
        try:
            won = self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            won = False
        if not won:
            return None
        self._leased.add(trial_id)
        return Lease(attempt.cell, attempt.number, trial_id)

    def _running(self, lease: Lease) -> FrozenTrial:
        trial = self._storage.get_trial(lease.trial)
        if trial.state != TrialState.RUNNING:
            raise StaleLease(lease, trial.state.name)
        return trial

    def _optuna(self) -> optuna.Study:
        """For samplers and pruners. Always a new one: it caches trials, and only its own ask and tell clear that."""
        sampler = self._search.sampler if self._search else None
        return optuna.load_study(study_name=self.name, storage=self._storage, sampler=sampler)

    def _match(self, grid: Sequence[Cell] | None, classes: Iterable[Collection[int]]) -> None:
        """Refuse to go on with other cells or another space than those on disk; remember what is asked."""
        kind, size = ("grid", len(grid)) if grid else ("search", self._search.n_trials if self._search else 0)
        about = self._about() or {"id": secrets.token_hex(4), "kind": kind}
        if about["kind"] != kind:
            raise StudyError(f"{self.folder}: begun as a {about['kind']}, not a {kind}; choose another study.name")
        if self._search is not None:
            if any(trial.distributions != dict(self._search.distributions) for _, trial in self._attempts()):
                raise StudyError(f"{self.folder}: begun with another space; choose another study.name")
        else:
            begun = [attempt.cell for attempt, _ in self._attempts()] + [cell for cell, _ in self.duplicates().values()]
            refuse_other_cells(self.folder, begun, grid or ())
        duplicates = grid_duplicates(grid or (), classes, self._attempts())
        self._idle = frozenset(number for number, _, _ in duplicates)
        # Through JSON, as it is stored: a tuple comes back as a list.
        about = json.loads(json.dumps(about | {"size": size, "folded": duplicates}))
        if self._about() != about:
            # One attribute, so that a kill leaves all of it or nothing.
            self._storage.set_study_user_attr(self._study_id, "about", about)
        if self._search is not None and self._read:
            # A seeded sampler would begin its sequence anew and draw the same cells.
            self._search.sampler.reseed_rng()
