"""One device: keep the pack full, report, prune, refill."""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch

from lora_sweep import health
from lora_sweep.config import Config, LauncherConfig, StudyConfig
from lora_sweep.errors import Fault, StudyError
from lora_sweep.pack import Pack, PackOutOfMemory, Trial
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.report.trial_result import peer, read_ended
from lora_sweep.runner.device import LoadedDevice
from lora_sweep.runner.trial_run import Ended, Run
from lora_sweep.study.lease import Lease
from lora_sweep.study.study import Study
from lora_sweep.study.view import Outcome, Reason
from lora_sweep.sweep.sweep import Sweep
from lora_sweep.system import files
from lora_sweep.system.background import Background
from lora_sweep.system.files import Unsafe
from lora_sweep.system.out_of_memory import is_out_of_memory
from lora_sweep.tracking import RESULT, Tracker, seal

Stop = Callable[[], bool]

TURN_SECONDS = 0.001
"""How long another thread may keep the interpreter from the one that trains; Python's own is five times that."""


class Watcher(Protocol):
    """Whoever looks on: a live table, plain lines, a test."""

    def admitted(self, cell: Cell, slot: int, step: int) -> None: ...
    def stepped(self) -> None: ...
    def chosen(self, reason: str) -> None: ...
    def noticed(self, sentence: str) -> None: ...
    def evaluated(self, cell: Cell, evaluation: Evaluation, base: BaselineLosses) -> None: ...
    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None: ...


def train(config: Config, folder: Path, tracker: Tracker, device: torch.device, watcher: Watcher, stop: Stop) -> bool:
    """One trial without a study, in `folder`; False when `stop` ended it early (the same call goes on)."""
    cell = Cell(0)
    with LoadedDevice(device, folder).pack(config, config.method.rank) as (pack, base), _steady(), _writer() as writer:
        run = Run(pack, base, cell, config, folder, tracker, writer)
        _notice_lost(run, watcher)
        watcher.admitted(cell, run.slot, run.step)
        while True:
            evaluations = pack.advance(_heartbeat(watcher, stop))
            if not evaluations:
                run.abandon()
                return False
            run.take(evaluations[0])
            watcher.evaluated(cell, evaluations[0], base)
            failed = run.failed
            if failed is not None or run.step >= config.train.max_steps:
                state: Outcome = "COMPLETE" if failed is None else "FAIL"
                value, flags = writer.result(run.finish(state, failed))
                _drop_checkpoint(folder)
                watcher.ended(cell, state, value, flags)
                return True
            run.keep()


def work(
    study: Study, sweep: Sweep, bank_rank: int, tracker: Tracker, device: torch.device, watcher: Watcher, stop: Stop
) -> bool:
    """Runs trials until the study has none left; False when `stop` ended it early.

    Trials that cannot share a pack (another base, data, length, batch shape) wait until the pack at work is empty.
    """
    bench = LoadedDevice(device, study.folder)
    while not stop():
        lease = study.ask(lambda _: True)
        _report_duplicates(study, watcher)
        if lease is None:
            return True
        if _recorded_before(study, sweep, lease, watcher):
            continue
        config = sweep.config(lease.cell)
        with bench.pack(config, bank_rank) as (pack, base), _steady(), _writer() as writer:
            session = PackSession(study, sweep, pack, base, config, tracker, writer, watcher)
            if not session.run(lease, stop):
                return False
    return False


class PackSession:
    """The trials of one pack, from the first admitted to the last evicted."""

    def __init__(
        self,
        study: Study,
        sweep: Sweep,
        pack: Pack,
        base: BaselineLosses,
        config: Config,
        tracker: Tracker,
        writer: Background,
        watcher: Watcher,
    ) -> None:
        self._study, self._sweep, self._pack, self._base = study, sweep, pack, base
        self._config, self._tracker, self._writer, self._watcher = config, tracker, writer, watcher
        self._runs: dict[Lease, Run] = {}
        self._ending: dict[Lease, _Ending] = {}
        """Without a slot any more, to be ended as soon as their results are written."""
        self._slots_reported = False
        self._peers = health.Peers(base.eval_loss)
        """The trials of the study on this base and data."""
        for folder in (study.trial_folder(status.cell.number) for status in study.statuses()):
            with suppress(Unsafe):  # of a damaged one nothing is known; `results` names it
                result = read_ended(folder)
                if result is not None and result["base_loss"] == base.eval_loss:
                    self._peers.add(peer(folder, result))
        self._has_prepared_next = False

    def run(self, first: Lease, stop: Stop) -> bool:
        """Five verbs: lease, advance, record, report, tell. False when `stop` ended it early."""
        beat = _heartbeat(self._watcher, stop)

        def heartbeat() -> bool:
            self._flush_results(self._pack.capacity.slots)
            return beat()

        try:
            self._admit(first)
            while self._fill():
                try:
                    evaluations = self._pack.advance(heartbeat)
                except PackOutOfMemory as error:
                    if self._config.train.fixed_shapes:
                        raise
                    self._give_up(error.slot)
                    continue
                self._report_slots()
                if not evaluations:
                    self._flush_results(0)
                    self._give_back()
                    return False
                self._conclude({evaluation.cell: evaluation for evaluation in evaluations})
            self._flush_results(0)
        except BaseException:
            # A bug or a full disk must not cost the other cells their turn.
            self._give_back()
            raise
        return True

    def _give_up(self, slot: int) -> None:
        """A trial that does not fit into memory by itself."""
        (lease,) = [lease for lease, run in self._runs.items() if run.slot == slot]
        self._end(lease, "FAIL", "memory")

    def _report_slots(self) -> None:
        capacity = self._pack.capacity
        if capacity.is_chosen and capacity.measured and not self._slots_reported:
            self._slots_reported = True
            self._watcher.chosen(capacity.reason)

    def _suits(self, cell: Cell) -> bool:
        config = self._sweep.config(cell)
        same_input = (config.model, config.data) == (self._config.model, self._config.data)
        return same_input and self._pack.suits(Trial.of(cell, config))

    def _fill(self) -> bool:
        """Leases trials until the pack is full; whether there is any in it."""
        if self._study.draws and self._pack.has_room:
            # What is drawn next builds on what has ended.
            self._flush_results(0)
        while self._pack.has_room and (lease := self._study.ask(self._suits)) is not None:
            if not _recorded_before(self._study, self._sweep, lease, self._watcher):
                self._admit(lease)
        _report_duplicates(self._study, self._watcher)
        if not self._has_prepared_next:
            # The trials that will come next get ready while these train.
            self._has_prepared_next = True
            soon = self._study.next(self._suits, self._pack.capacity.slots)
            self._pack.prepare([Trial.of(cell, self._sweep.config(cell)) for cell in soon])
        return bool(self._runs)

    def _admit(self, lease: Lease) -> None:
        folder = self._study.trial_folder(lease.cell.number)
        config = self._sweep.config(lease.cell)
        try:
            run = Run(self._pack, self._base, lease.cell, config, folder, self._tracker, self._writer)
        except BaseException as error:
            if is_out_of_memory(error):
                self._refuse(lease)
                return
            self._study.release(lease)
            raise
        self._runs[lease] = run
        _notice_lost(run, self._watcher)
        self._peers.add(run.peer())
        self._has_prepared_next = False
        for step, loss in run.before.items():
            # A rung passed by an earlier attempt counts for the others; its verdict was to go on.
            self._study.report_rung({lease: loss}, step)
        self._watcher.admitted(lease.cell, run.slot, run.step)

    def _refuse(self, lease: Lease) -> None:
        """There is no memory for one trial more than there are; alone, it does not fit at all."""
        if self._runs:
            self._pack.capacity.slots = len(self._runs)
            self._study.release(lease)
        else:
            self._study.tell(lease, "FAIL", why="memory")
            self._watcher.ended(lease.cell, "FAIL", None, ())

    def _conclude(self, evaluations: dict[int, Evaluation]) -> None:
        due = {lease: evaluations[lease.cell.number] for lease in self._runs if lease.cell.number in evaluations}
        for lease, evaluation in due.items():
            self._runs[lease].take(evaluation)
            self._watcher.evaluated(lease.cell, evaluation, self._base)
            if not evaluation.diverged:
                self._peers.record(lease.cell.number, evaluation.step, evaluation.eval_loss)
        for lease in due:
            if (failed := self._runs[lease].failed) is not None:
                self._end(lease, "FAIL", failed)
        alive = {lease: evaluation for lease, evaluation in due.items() if lease in self._runs}
        for step in sorted({evaluation.step for evaluation in alive.values()}):
            rung = {lease: each.eval_loss for lease, each in alive.items() if each.step == step}
            kept = self._study.report_rung(rung, step)
            for lease in rung:
                if step >= self._config.train.max_steps:
                    self._end(lease, "COMPLETE")
                elif not kept[lease]:
                    self._end(lease, "PRUNED")
                else:
                    self._runs[lease].keep()

    def _end(self, lease: Lease, state: Outcome, reason: Reason | None = None) -> None:
        """Frees the slot."""
        run = self._runs.pop(lease)
        self._ending[lease] = _Ending(run, state, reason, run.finish(state, reason, self._peers))
        if state == "FAIL":
            # Its values at the rungs count against the others until it is told.
            self._flush_results(0)

    def _flush_results(self, most: int) -> None:
        """Tells those that have ended, in this order, whose results are written; waits until at most so many are left.

        Each that is left holds its adapter in memory, and would be trained again after a kill.
        """
        for lease, ending in list(self._ending.items()):
            if len(self._ending) <= most and not ending.written.done():
                return
            value, flags = self._writer.result(ending.written)
            state, folder = ending.state, ending.run.folder
            self._study.tell(lease, state, None if state == "FAIL" else value, ending.reason)
            del self._ending[lease]
            _drop_checkpoint(folder)
            _keep_best(self._study, self._config.study)
            self._watcher.ended(lease.cell, state, value, flags)

    def _give_back(self) -> None:
        """All that is not told yet; what can still be told is."""
        with suppress(Exception):  # it is on its way up already, or is the reason why we are here
            self._flush_results(0)
        unfinished = {lease: ending.run for lease, ending in self._ending.items()} | self._runs
        self._ending.clear()
        self._runs.clear()
        for lease, run in unfinished.items():
            run.abandon()
            self._study.release(lease)


@dataclass(frozen=True)
class _Ending:
    """A trial whose result is being written."""

    run: Run
    state: Outcome
    reason: Reason | None
    written: Future[Ended]


@contextmanager
def _steady() -> Iterator[None]:
    """Keeps the interpreter's own work out of steps and refills."""
    before = sys.getswitchinterval()
    # Packages and the base live on anyway: looking through them for garbage takes a third of a second, at any moment.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
        gc.unfreeze()


def _writer() -> Background:
    """The thread in which all runs of a pack are written."""
    return Background("records")


def use_threads(launcher: LauncherConfig) -> None:
    """Sets torch's threads for the whole process, where `launcher.threads` says how many."""
    if launcher.threads is not None:
        torch.set_num_threads(launcher.threads)


def device(launcher: LauncherConfig) -> torch.device:
    """The device of `launcher.device`."""
    if launcher.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(launcher.device)


def check(launcher: LauncherConfig) -> list[Fault]:
    """Whether the device is there."""
    index = launcher.device.partition(":")[2] or "0"
    if launcher.device.startswith("cuda") and int(index) >= torch.cuda.device_count():
        rule = f"this machine has {torch.cuda.device_count()} CUDA devices"
        return [Fault("launcher.device", rule, launcher.device, "launcher.device=auto takes what is there")]
    return []


def _report_duplicates(study: Study, watcher: Watcher) -> None:
    """Cells that ended as an equal one did are not run, but they are done."""
    for cell, state, value in study.ended_duplicates():
        watcher.ended(cell, state, value, ())


def _recorded_before(study: Study, sweep: Sweep, lease: Lease, watcher: Watcher) -> bool:
    """Tells a cell whose result was written, but not told, when its worker was killed: finished work is not redone."""
    folder = study.trial_folder(lease.cell.number)
    try:
        result = read_ended(folder)
    except Unsafe as error:
        watcher.noticed(f"cell {lease.cell.name}: {RESULT} {error}; the cell is trained again")
        return False
    if result is None or result["reason"] == "memory":
        # What did not fit into memory is tried again by the next launch.
        return False
    if result["params"] != dict(lease.cell.params):
        raise StudyError(
            f"{folder}: holds a trial of other parameters than the ledger's cell {lease.cell.number}, so the ledger "
            "has lost that cell; restore study.journal from a copy, or choose another study.name"
        )
    if seal.broken(folder, result.get("files", {})):
        watcher.noticed(f"cell {lease.cell.name}: files of its record are gone or changed; the cell is trained again")
        return False
    state = cast(Outcome, result["state"])
    study.tell(lease, state, None if state == "FAIL" else result["eval_loss"], result["reason"])
    _drop_checkpoint(folder)
    _keep_best(study, sweep.config(lease.cell).study)
    watcher.ended(lease.cell, state, result["eval_loss"], result["flags"])
    return True


def _notice_lost(run: Run, watcher: Watcher) -> None:
    if run.lost:
        watcher.noticed(f"cell {run.cell.name}: {run.lost}; the cell is trained again from its first step")


def _drop_checkpoint(folder: Path) -> None:
    with suppress(OSError):  # it costs room, nothing else
        files.remove(folder / "checkpoint")


def _keep_best(study: Study, rules: StudyConfig) -> None:
    """Removes the adapters that study.keep_adapters does not ask for."""
    if rules.keep_adapters == "all":
        return
    done = [status for status in study.statuses() if status.state in ("COMPLETE", "PRUNED")]
    ranked = sorted(done, key=lambda status: math.inf if status.value is None else status.value)
    for status in ranked[int(rules.keep_adapters) :]:
        with suppress(OSError):
            files.remove(study.trial_folder(status.cell.number) / seal.ADAPTER)


def _heartbeat(watcher: Watcher, stop: Stop) -> Stop:
    def on_step() -> bool:
        watcher.stepped()
        return stop()

    return on_step
