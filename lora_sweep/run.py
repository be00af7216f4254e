"""One trial from its slot to its files: record, best adapter, checkpoint, result."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from lora_sweep import folding, health
from lora_sweep.config import Config, to_yaml
from lora_sweep.pack import Pack, Trial
from lora_sweep.records import Base, Cell, Diagnosis, Evaluation, Finding
from lora_sweep.study import Reason
from lora_sweep.tracking import Record, Tracker, read_rows, write_whole

Outcome = Literal["COMPLETE", "PRUNED", "FAIL"]

NONE_KNOWN: Mapping[int, float] = MappingProxyType({})


class Run:
    """One trial in its slot, with its record: admitted anew, or as of its last checkpoint."""

    def __init__(self, pack: Pack, base: Base, cell: Cell, config: Config, folder: Path, tracker: Tracker) -> None:
        trial = Trial.of(cell, config)
        self.cell = cell
        self.folder = folder
        self._pack, self._base, self._config = pack, base, config
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.yaml", to_yaml(asdict(config)))
        resume_step = None
        if pack.has_checkpoint(self._checkpoint):
            self.slot = pack.restore(trial, self._checkpoint)
            resume_step = pack.step(self.slot)
        else:
            self.slot = pack.admit(trial)
            shutil.rmtree(folder / "adapter", ignore_errors=True)
        self.step = resume_step or 0
        self._record = Record.open(
            folder, cell=cell, config=asdict(config), base=base, tracker=tracker, resume_step=resume_step
        )
        self._rows = read_rows(folder)
        self.before = _curve(self._rows)
        """Step -> evaluation loss of what an earlier attempt recorded up to the checkpoint."""
        self.best_loss: float = min(self.before.values(), default=math.inf)
        self._best: Evaluation | None = None
        """Of this attempt."""
        self._last: Evaluation | None = None
        self._lost_on_save: tuple[str, ...] = ()
        """Modules whose file does not hold what memory does."""

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def take(self, evaluation: Evaluation) -> None:
        """Records the evaluation; the adapter of the best one lies in adapter/."""
        self._record.log(evaluation)
        self.step, self._last = evaluation.step, evaluation
        if self._best is None or evaluation.eval_loss < self._best.eval_loss:
            self._best = evaluation
        if not evaluation.diverged and evaluation.eval_loss < self.best_loss:
            self.best_loss = evaluation.eval_loss
            self._export()

    def _export(self) -> None:
        """Whole or not at all: a reader never sees half an adapter."""
        aside, adapter = self.folder / ".adapter", self.folder / "adapter"
        shutil.rmtree(aside, ignore_errors=True)
        self._lost_on_save = self._pack.export(self.slot, aside)
        shutil.rmtree(adapter, ignore_errors=True)
        aside.rename(adapter)

    def keep(self) -> None:
        """What a kill after this moment costs nothing of."""
        self._pack.checkpoint(self.slot, self._checkpoint)

    @property
    def failed(self) -> Reason | None:
        """Why the trial need not go on after its last evaluation; None: it may."""
        if self._last is None or self._last.diverged:
            return None if self._last is None else "diverged"
        stops = self._config.health.action == "stop"
        asked = Trial.of(self.cell, self._config).asked
        return "trapped" if stops and health.cannot_learn(self._last.reading, asked) else None

    def finish(
        self, state: Outcome, reason: Reason | None = None, best_gains: Mapping[int, float] = NONE_KNOWN
    ) -> tuple[float | None, tuple[str, ...]]:
        """Writes the result and frees the slot; returns (best evaluation loss or None, flags).

        `best_gains`: step -> best gain of the study so far, which the run's verdict in W&B is given by.
        """
        last, value = self._last, self.best_loss if math.isfinite(self.best_loss) else None
        self._rows = read_rows(self.folder)
        diagnosis, own = (None, ()) if last is None else self._diagnosed(last)
        verdict: tuple[Finding, ...] = ()
        if diagnosis is not None and last is not None and not last.diverged:
            verdict = health.verdict(diagnosis, best_gains.get(last.step), self._config.health)
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
            "effective": asdict(folding.coordinates(self._config)),
            "steps": self.step,
            "tokens": last and last.tokens,
            "seconds": last and last.seconds,
            "last_finite_step": last and last.last_finite_step,
            # Step -> evaluation loss: by it trials are compared at equal steps.
            "curve": _curve(self._rows),
            "diagnosis": diagnosis and asdict(diagnosis),
        }
        self._record.finish(state, result, own, verdict, reason)
        self._pack.evict(self.slot)
        return value, tuple(finding.flag for finding in (*verdict, *own))

    def _diagnosed(self, last: Evaluation) -> tuple[Diagnosis | None, tuple[Finding, ...]]:
        """What the trial shows by itself."""
        rules = self._config.health
        losses = [row["train/loss"] for row in self._rows if row.get("train/loss") is not None]
        how = health.Course(self._base, losses, self._config.train.warmup_steps, self._best or last, last)
        seen = health.seen(last, Trial.of(self.cell, self._config).asked, rules, self._lost_on_save)
        own = health.own_findings(seen, how, rules)
        return None if last.diverged else health.diagnose(self._base, last, seen, own, rules), own

    def abandon(self) -> None:
        self._record.abandon()


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Step -> evaluation loss."""
    return {row["step"]: row["eval/loss"] for row in rows if row.get("eval/loss") is not None}
