"""One device: keep the pack full, report, prune, refill."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

import torch

from lora_sweep import data as data_room
from lora_sweep import folding, health
from lora_sweep import model as model_room
from lora_sweep.config import Config, DataConfig, LauncherConfig, ModelConfig, StudyConfig, to_yaml
from lora_sweep.data import Data, Report
from lora_sweep.errors import StudyError, UserError
from lora_sweep.model import LoadedBase
from lora_sweep.pack import Capacity, Exhausted, Pack, Settings, Trial
from lora_sweep.records import Base, Cell, Diagnosis, Evaluation, Fault, Finding
from lora_sweep.space import Sweep
from lora_sweep.study import Lease, Reason, Study
from lora_sweep.tracking import Record, Tracker, read_result, read_rows, write_whole

Outcome = Literal["COMPLETE", "PRUNED", "FAIL"]
Stop = Callable[[], bool]

NONE_KNOWN: Mapping[int, float] = MappingProxyType({})


class Watcher(Protocol):
    """Whoever looks on: a live table, plain lines, a test."""

    def admitted(self, cell: Cell, slot: int, step: int) -> None: ...
    def stepped(self) -> None: ...
    def chosen(self, reason: str) -> None: ...
    def evaluated(self, cell: Cell, evaluation: Evaluation, base: Base) -> None: ...
    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None: ...


@dataclass
class Bench:
    """The device with the base and the data that are resident on it, loaded when first asked for."""

    device: torch.device
    folder: Path
    """Of the study: a base that no name reaches is written to its base/."""
    _model: tuple[ModelConfig, LoadedBase] | None = None
    _data: tuple[DataConfig, LoadedBase, Data] | None = None

    def base(self, model: ModelConfig) -> LoadedBase:
        if self._model is None or self._model[0] != model:
            self._model = self._data = None
            self._model = (model, model_room.load(model, self.device, self.folder))
        return self._model[1]

    def data(self, data: DataConfig, base: LoadedBase) -> Data:
        if self._data is None or self._data[0] != data or self._data[1] is not base:
            loaded = data_room.load(data, base.tokenizer)
            self._keep_report(loaded.report)
            self._data = (data, base, loaded)
        return self._data[2]

    def _keep_report(self, report: Report) -> None:
        """What became of the data's rows, and the digest of each source: a study never mixes two contents of one name.

        Raises StudyError where a source has changed since the study began.
        """
        for name, digest in report.sources.items():
            file = self.folder / "data" / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.json"
            if file.is_file() and (before := json.loads(file.read_text())["digest"]) != digest:
                raise StudyError(
                    f"{self.folder}: {name} has changed since the study began (sha256 {before[:12]} -> {digest[:12]}); "
                    "choose another study.name, or bring the data back"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"source": name, "digest": digest, "report": report.plain()}, indent=2) + "\n")

    @contextmanager
    def pack(self, config: Config, bank_rank: int) -> Iterator[tuple[Pack, Base]]:
        """A pack for trials of this configuration's kind, and the losses of its base."""
        loaded = self.base(config.model)
        settings = Settings.of(Trial.of(Cell(0), config))
        known = Known(self.folder / "capacity.json", f"{config.model} {config.data} {settings} {self.device.type}")
        pack = Pack(loaded, self.data(config.data, loaded), settings, bank_rank, known.too_wide)
        try:
            yield pack, pack.evaluate_base()
            known.keep(pack.capacity)
        except Exhausted as error:
            known.keep(pack.capacity)
            raise UserError(
                f"train.slots: {error.slots} trials do not fit into the device's memory; lower train.batch_size or "
                "data.max_length, or set train.gradient_checkpointing=true"
            ) from error
        finally:
            pack.close()


@dataclass
class Known:
    """What an earlier pack of the same kind has found out about the device's memory."""

    file: Path
    kind: str

    @property
    def too_wide(self) -> int | None:
        """The smallest number of slots a pass that ran out of memory."""
        found: int | None = self._all().get(self._key, {}).get("too_wide")
        return found

    def keep(self, capacity: Capacity) -> None:
        if not capacity.measured and capacity.too_wide is None:
            return
        measured = {"slots": capacity.slots, "too_wide": capacity.too_wide, "reason": capacity.reason}
        write_whole(self.file, json.dumps(self._all() | {self._key: measured}, indent=2) + "\n")

    @property
    def _key(self) -> str:
        return hashlib.sha256(self.kind.encode()).hexdigest()[:12]

    def _all(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        return found


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


def train(config: Config, folder: Path, tracker: Tracker, device: torch.device, watcher: Watcher, stop: Stop) -> bool:
    """One trial without a study, in `folder`; False when `stop` ended it early (the same call goes on)."""
    cell = Cell(0)
    with Bench(device, folder).pack(config, config.method.rank) as (pack, base):
        run = Run(pack, base, cell, config, folder, tracker)
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
                value, flags = run.finish(state, failed)
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
    bench = Bench(device, study.folder)
    while not stop():
        lease = study.ask(lambda _: True)
        if lease is None:
            return True
        if _told_before(study, sweep, lease, watcher):
            continue
        config = sweep.config(lease.cell)
        with bench.pack(config, bank_rank) as (pack, base):
            shift = _Shift(study, sweep, pack, base, config, tracker, watcher)
            if not shift.run(lease, stop):
                return False
    return False


class _Shift:
    """The trials of one pack, from the first admitted to the last evicted."""

    def __init__(
        self, study: Study, sweep: Sweep, pack: Pack, base: Base, config: Config, tracker: Tracker, watcher: Watcher
    ) -> None:
        self._study, self._sweep, self._pack, self._base = study, sweep, pack, base
        self._config, self._tracker, self._watcher = config, tracker, watcher
        self._runs: dict[Lease, Run] = {}
        self._told = False
        finished = (read_result(study.trial_folder(status.cell.number)) for status in study.statuses())
        self._best_gains = health.best_gains(result for result in finished if result is not None).get(
            base.eval_loss, {}
        )
        """Step -> best gain on this base and data."""
        self._looked_ahead = False

    def run(self, first: Lease, stop: Stop) -> bool:
        """Five verbs: lease, advance, record, report, tell. False when `stop` ended it early."""
        try:
            self._admit(first)
            while self._fill():
                try:
                    evaluations = self._pack.advance(_heartbeat(self._watcher, stop))
                except Exhausted as error:
                    if self._config.train.fixed_shapes:
                        raise
                    self._give_up(error.slot)
                    continue
                self._tell_choice()
                if not evaluations:
                    self._give_back()
                    return False
                self._conclude({evaluation.cell: evaluation for evaluation in evaluations})
        except BaseException:
            # A bug or a full disk must not cost the other cells their turn.
            self._give_back()
            raise
        return True

    def _give_up(self, slot: int) -> None:
        """A trial that does not fit into memory by itself."""
        (lease,) = [lease for lease, run in self._runs.items() if run.slot == slot]
        self._end(lease, "FAIL", "memory")

    def _tell_choice(self) -> None:
        capacity = self._pack.capacity
        if capacity.is_settled and capacity.measured and not self._told:
            self._told = True
            self._watcher.chosen(capacity.reason)

    def _suits(self, cell: Cell) -> bool:
        config = self._sweep.config(cell)
        same_input = (config.model, config.data) == (self._config.model, self._config.data)
        return same_input and self._pack.suits(Trial.of(cell, config))

    def _fill(self) -> bool:
        """Leases trials until the pack is full; whether there is any in it."""
        while self._pack.has_room and (lease := self._study.ask(self._suits)) is not None:
            if not _told_before(self._study, self._sweep, lease, self._watcher):
                self._admit(lease)
        if not self._looked_ahead:
            # The trials that will come next get ready while these train.
            self._looked_ahead = True
            soon = self._study.next(self._suits, self._pack.capacity.slots)
            self._pack.prepare([Trial.of(cell, self._sweep.config(cell)) for cell in soon])
        return bool(self._runs)

    def _admit(self, lease: Lease) -> None:
        folder = self._study.trial_folder(lease.cell.number)
        config = self._sweep.config(lease.cell)
        run = Run(self._pack, self._base, lease.cell, config, folder, self._tracker)
        self._runs[lease] = run
        self._looked_ahead = False
        for step, loss in run.before.items():
            # A rung passed by an earlier attempt counts for the others; its verdict was to go on.
            self._study.report_rung({lease: loss}, step)
        self._watcher.admitted(lease.cell, run.slot, run.step)

    def _conclude(self, evaluations: dict[int, Evaluation]) -> None:
        due = {lease: evaluations[lease.cell.number] for lease in self._runs if lease.cell.number in evaluations}
        for lease, evaluation in due.items():
            self._runs[lease].take(evaluation)
            self._watcher.evaluated(lease.cell, evaluation, self._base)
            if not evaluation.diverged:
                gain = self._base.eval_loss - evaluation.eval_loss
                self._best_gains[evaluation.step] = max(gain, self._best_gains.get(evaluation.step, gain))
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
        run = self._runs.pop(lease)
        value, flags = run.finish(state, reason, self._best_gains)
        self._study.tell(lease, state, None if state == "FAIL" else value, reason)
        _drop_checkpoint(run.folder)
        _keep_best(self._study, self._config.study)
        self._watcher.ended(lease.cell, state, value, flags)

    def _give_back(self) -> None:
        for lease, run in self._runs.items():
            run.abandon()
            self._study.release(lease)
        self._runs.clear()


def device(launcher: LauncherConfig) -> torch.device:
    """The device of `launcher.device`; sets torch's threads on the way."""
    if launcher.threads is not None:
        torch.set_num_threads(launcher.threads)
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


def _told_before(study: Study, sweep: Sweep, lease: Lease, watcher: Watcher) -> bool:
    """Tells a cell whose result was written, but not told, when its worker was killed: finished work is not redone."""
    folder = study.trial_folder(lease.cell.number)
    result = read_result(folder)
    if result is None:
        return False
    state = cast(Outcome, result["state"])
    study.tell(lease, state, None if state == "FAIL" else result["eval_loss"], result["reason"])
    _drop_checkpoint(folder)
    _keep_best(study, sweep.config(lease.cell).study)
    watcher.ended(lease.cell, state, result["eval_loss"], result["flags"])
    return True


def _drop_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _keep_best(study: Study, rules: StudyConfig) -> None:
    """Removes the adapters that study.keep_adapters does not ask for."""
    if rules.keep_adapters == "all":
        return
    done = [status for status in study.statuses() if status.state in ("COMPLETE", "PRUNED")]
    ranked = sorted(done, key=lambda status: math.inf if status.value is None else status.value)
    for status in ranked[int(rules.keep_adapters) :]:
        shutil.rmtree(study.trial_folder(status.cell.number) / "adapter", ignore_errors=True)


def _heartbeat(watcher: Watcher, stop: Stop) -> Stop:
    def asked() -> bool:
        watcher.stepped()
        return stop()

    return asked
