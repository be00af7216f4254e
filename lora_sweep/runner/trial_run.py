"""One trial from its slot to its files: record, best adapter, checkpoint, result.

What reaches the disk and W&B does so in a thread of its own, in order, while the slots go on training: a row before the
checkpoint that builds on it, the adapter before the result, the result before the study is told.
"""

import json
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

from lora_sweep import health
from lora_sweep.config import Config
from lora_sweep.pack import DamagedCheckpoint, Pack, Trial
from lora_sweep.records import BaselineLosses, Cell, Diagnosis, Evaluation, Finding
from lora_sweep.report.trial_result import peer
from lora_sweep.study.view import Outcome, Reason
from lora_sweep.sweep import equivalence
from lora_sweep.sweep.compose import to_yaml
from lora_sweep.system import files
from lora_sweep.system.background import Background
from lora_sweep.system.disk import disk_errors, write_whole
from lora_sweep.tracking import Record, Tracker, is_whole, read_losses, read_rows, seal

Ended = tuple[float | None, tuple[str, ...]]
"""(best evaluation loss or None, flags)."""

Result = TypeVar("Result")

BEST = "best.json"
"""The seal of the adapter, of a trial that is not finished."""


class Run:
    """One trial in its slot, with its record: admitted anew, or as of its last checkpoint."""

    def __init__(
        self,
        pack: Pack,
        base: BaselineLosses,
        cell: Cell,
        config: Config,
        folder: Path,
        tracker: Tracker,
        writer: Background,
    ) -> None:
        """`writer`: of one thread, which all runs of a pack may share."""
        trial = Trial.of(cell, config)
        self.cell = cell
        self.folder = folder
        self._pack, self._base, self._config, self._writer = pack, base, config, writer
        self._broken: Exception | None = None
        """What the first write that failed has raised; none is tried after it."""
        self._logged: Future[None] | None = None
        """The row of the last evaluation."""
        self.before: dict[int, float] = {}
        """Step -> evaluation loss of what an earlier attempt recorded up to the checkpoint."""
        self._train_losses: list[float] = []
        """Of each step, those of an earlier attempt too, nats per token; what is not finite is left out."""
        self._best_before: tuple[int, float, float] | None = None
        """(step, evaluation loss, loss of the train probe) of the best evaluation of an earlier attempt."""
        self.lost = ""
        """What kept the trial from going on from its checkpoint, one clause; empty where nothing did."""
        resume_step = self._resume(trial)
        self.step = resume_step or 0
        self._curve = dict(self.before)
        """Step -> evaluation loss: by it trials are compared at equal steps."""
        self.best_loss: float = min(self.before.values(), default=math.inf)
        self._best: Evaluation | None = None
        """Of this attempt."""
        self._last: Evaluation | None = None
        self._record: Record | None = None
        self._lost_on_save: tuple[str, ...] = ()
        """Modules whose file does not hold what memory does. This and the record are the writer's alone."""
        self._in_background(lambda: self._open(tracker, resume_step))

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def _resume(self, trial: Trial) -> int | None:
        """Takes a slot, as of the checkpoint where that, the record and the adapter are whole; returns its step.

        None: the trial begins anew.
        """
        if not self._pack.has_checkpoint(self._checkpoint):
            self.slot = self._pack.admit(trial)
            return None
        try:
            self.slot = self._pack.restore(trial, self._checkpoint)
        except DamagedCheckpoint as error:
            self.lost = f"its checkpoint {error}"
            self.slot = self._pack.admit(trial)
            return None
        step = self._pack.step(self.slot)
        rows = [row for row in read_rows(self.folder) if row["step"] <= step]
        before = {row["step"]: row["eval/loss"] for row in rows if row.get("eval/loss") is not None}
        if not is_whole(self.folder, step):
            self.lost = "its record (metrics.jsonl, evaluations/) is not whole"
        elif before and not _is_adapter_whole(self.folder):
            self.lost = "its adapter is not the one that was written"
        if self.lost:
            self._pack.evict(self.slot)
            self.slot = self._pack.admit(trial)
            return None
        self.before = before
        self._train_losses = [row["train/loss"] for row in rows if row.get("train/loss") is not None]
        measured = [
            (row["step"], row["eval/loss"], row["probe/loss"])
            for row in rows
            if row.get("eval/loss") is not None and row.get("probe/loss") is not None
        ]
        self._best_before = min(measured, key=itemgetter(1), default=None)
        return step

    # -- where the slots train -----------------------------------------------------------------------------------------

    def take(self, evaluation: Evaluation) -> None:
        """Records the evaluation; the adapter of the best one will lie in adapter/.

        Waits for the row of the evaluation before: a disk that is slower than the training holds it up, else what is
        to be written would fill the memory. Raises what an earlier write has raised: StorageUnavailable, say.
        """
        if self._logged is not None:
            self._writer.result(self._logged)
        if self._broken is not None:
            raise self._broken
        self._logged = self._in_background(lambda: self._opened.log(evaluation))
        self.step, self._last = evaluation.step, evaluation
        self._train_losses += [each.train_loss for each in evaluation.steps if math.isfinite(each.train_loss)]
        if math.isfinite(evaluation.eval_loss):
            self._curve[evaluation.step] = evaluation.eval_loss
        if self._best is None or evaluation.eval_loss < self._best.eval_loss:
            self._best = evaluation
        if not evaluation.diverged and evaluation.eval_loss < self.best_loss:
            self.best_loss = evaluation.eval_loss
            write = self._pack.export(self.slot)
            self._in_background(lambda: self._export(write))

    def keep(self) -> None:
        """What a kill after it is written costs nothing of."""
        write = self._pack.checkpoint(self.slot)

        def keep() -> None:
            with disk_errors(self.folder):
                write(self._checkpoint)

        self._in_background(keep)

    def peer(self) -> health.Peer:
        """The trial as the others of its study see it."""
        effective = equivalence.coordinates(self._config)
        values = {"cell": self.cell.number, "effective": effective and asdict(effective), "curve": self.before}
        return peer(self.folder, values)

    @property
    def failed(self) -> Reason | None:
        """Why the trial need not go on after its last evaluation; None: it may."""
        if self._last is None or self._last.diverged:
            return None if self._last is None else "diverged"
        stops = self._config.health.action == "stop"
        trainer_settings = Trial.of(self.cell, self._config).trainer_settings
        return "trapped" if stops and health.cannot_learn(self._last.snapshot, trainer_settings) else None

    def finish(self, state: Outcome, reason: Reason | None = None, peers: health.Peers | None = None) -> Future[Ended]:
        """Frees the slot; the result is written when the future is done.

        Args:
            peers: the trials of the study so far, this one among them, which its flags in W&B compare it with.
        """
        self._pack.evict(self.slot)
        return self._in_background(lambda: self._finish(state, reason, peers))

    def abandon(self) -> None:
        """Interrupted: waits until all is written that can be, and closes files and W&B run without a result."""

        def close() -> None:
            if self._record is not None:
                self._record.abandon()

        self._writer.result(self._writer.submit(close))

    def _in_background(self, work: Callable[[], Result]) -> Future[Result]:
        def in_turn() -> Result:
            if self._broken is not None:
                raise self._broken
            try:
                return work()
            except Exception as error:
                self._broken = error
                raise

        return self._writer.submit(in_turn)

    # -- in the writer's thread ----------------------------------------------------------------------------------------

    def _open(self, tracker: Tracker, resume_step: int | None) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                for left in (self._checkpoint, self.folder / seal.ADAPTER, self.folder / BEST):
                    files.remove(left)
        write_whole(self.folder / "config.yaml", to_yaml(asdict(self._config)))
        self._record = Record.open(
            self.folder,
            cell=self.cell,
            config=asdict(self._config),
            base=self._base,
            tracker=tracker,
            resume_step=resume_step,
        )

    @property
    def _opened(self) -> Record:
        assert self._record is not None
        return self._record

    def _export(self, write: Callable[[Path], tuple[str, ...]]) -> None:
        """Whole or not at all: a reader never sees half an adapter."""
        adapter = self.folder / seal.ADAPTER
        with disk_errors(self.folder):
            staging = files.staging(adapter)
            self._lost_on_save = write(staging)
            files.remove(adapter)
            staging.rename(adapter)
            sealed = seal.sealed(self.folder, (seal.ADAPTER,))
        write_whole(self.folder / BEST, json.dumps(sealed, indent=2) + "\n")

    def _finish(self, state: Outcome, reason: Reason | None, peers: health.Peers | None) -> Ended:
        last, value = self._last, self.best_loss if math.isfinite(self.best_loss) else None
        was_pruned = state == "PRUNED"
        diagnosis, own = (None, ()) if last is None else self._diagnosed(last, was_pruned)
        rules, cell = self._config.health, self.cell.number
        verdict = health.compared(diagnosis, own, rules, peers, cell, self.step, was_pruned)
        effective = equivalence.coordinates(self._config)
        result = {
            "params": dict(self.cell.params),
            "eval_loss": value,
            "base_loss": self._base.eval_loss,
            "gain": None if value is None else self._base.eval_loss - value,
            # None of a trial that was never evaluated: it did not fit into memory.
            "train_loss": last and last.train_loss,
            "probe_loss": last and last.probe_loss,
            "gap": last and last.gap,
            "forgetting": last and health.forgetting(self._base, last),
            "effective": effective and asdict(effective),
            "steps": self.step,
            "tokens": last and last.tokens,
            "seconds": last and last.seconds,
            "last_finite_step": last and last.last_finite_step,
            "curve": dict(self._curve),
            "diagnosis": diagnosis and asdict(diagnosis),
        }
        self._opened.finish(state, result, own, verdict, reason)
        with disk_errors(self.folder):
            files.remove(self.folder / BEST)
        return value, tuple(finding.flag for finding in (*verdict, *own))

    def _diagnosed(self, last: Evaluation, was_pruned: bool) -> tuple[Diagnosis | None, tuple[Finding, ...]]:
        """What the trial shows by itself."""
        rules = self._config.health
        losses = self._train_losses
        history = health.LossHistory(self._base, losses, self._config.train.warmup_steps, self._lowest(last), last)
        inputs = health.rule_input(last, Trial.of(self.cell, self._config).trainer_settings, rules, self._lost_on_save)
        own = health.own_findings(inputs, history, rules, was_pruned)
        return None if last.diverged else health.diagnose(history, inputs, own, rules), own

    def _lowest(self, last: Evaluation) -> Evaluation:
        """The evaluation with the lowest loss, of an earlier attempt too."""
        best = self._best or last
        if self._best_before is None or not self._best_before[1] < best.eval_loss:
            return best
        step, loss, probe = self._best_before
        losses = read_losses(self.folder, step)
        return (
            best if losses is None else replace(best, step=step, eval_loss=loss, probe_loss=probe, eval_losses=losses)
        )


def _is_adapter_whole(folder: Path) -> bool:
    """Whether the adapter is the one that was last exported."""
    try:
        plain = files.read_json(folder / BEST, follow=False)
    except (OSError, files.Unsafe):
        return False
    return bool(plain) and seal.is_seal(plain) and not seal.changed(folder, plain)
