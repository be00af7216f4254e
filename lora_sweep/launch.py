"""Where workers run: this machine's GPU or CPU."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_sweep import results, samplers, space
from lora_sweep.asha import Asha
from lora_sweep.config import Config, StudyConfig, to_yaml
from lora_sweep.errors import StudyError
from lora_sweep.health import BIN_EDGES
from lora_sweep.records import Base, Cell, Evaluation, Fault
from lora_sweep.space import Sweep
from lora_sweep.study import JOURNAL, Search, Study
from lora_sweep.tracking import Tracker, read_result, write_whole
from lora_sweep.worker import Outcome, Stop, Watcher, device, work
from lora_sweep.worker import train as train_one

TABLE_EVERY_SECONDS = 2.0
"""trials.jsonl is rewritten at most this often while trials run."""


def study_folder(study: StudyConfig) -> Path:
    return Path(study.root).expanduser() / study.name


def check(study: StudyConfig) -> list[Fault]:
    """Whether the study's folder can be written; leaves nothing behind."""
    faults = []
    folder = study_folder(study).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        faults.append(Fault("study.root", f"{existing} is a file, no folder", study.root))
    elif not _writable(existing):
        faults.append(Fault("study.root", f"{existing} cannot be written", study.root, "choose another study.root"))
    return faults


def _writable(folder: Path) -> bool:
    """By trying: root may be allowed to write where the file system is not."""
    probe = folder / f".lora-sweep-{time.monotonic_ns()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def tracker(config: Config, folder: Path, study_id: str) -> Tracker:
    asked = config.tracker
    return Tracker(
        study=config.study.name,
        study_id=study_id,
        folder=folder,
        bin_edges=BIN_EDGES,
        mode="none" if asked.name == "none" else asked.mode,
        project=asked.project,
        entity=asked.entity,
        tags=asked.tags,
    )


def launch(sweep: Sweep, watcher: Watcher, stop: Stop) -> bool:
    """Runs or resumes the sweep's study here; False when `stop` ended it early, and the same call goes on.

    Raises StudyError where the folder holds a study of another meaning, or another process works on it.
    """
    config = sweep.base()
    folder = study_folder(config.study)
    before = space.load_launched(folder)
    launched = sweep.as_launched()
    if before is not None and (changed := space.differences(before, launched)):
        raise StudyError(
            f"{folder}: holds a study with another meaning; choose another study.name, or launch it as it was:\n  "
            + "\n  ".join(changed)
        )
    asked = config.sampler
    grid = None if asked.name == "optuna" else sweep.cells()
    search = None
    if asked.name == "optuna":
        sampler = samplers.instance(asked.instance or {}, "samplers")
        search = Search(sampler, sweep.distributions(), asked.n_trials or 1, sweep.decode, hold=config.train.slots)
    with Study.open(folder, name=config.study.name, cells=grid, search=search, pruner=_pruner(config)) as study:
        write_whole(folder / "config.yaml", to_yaml(launched))
        runs = tracker(config, folder, study.id)
        try:
            return work(
                study, sweep, sweep.largest_rank(), runs, device(config.launcher), _Ledgered(watcher, study), stop
            )
        finally:
            runs.close()
            results.write(study)


def _pruner(config: Config) -> Any:
    """Asha, an Optuna pruner or None."""
    asked, train = config.pruner, config.train
    if asked.name == "asha":
        return Asha(asked.eta or 0, asked.min_steps or 0, train.max_steps, train.eval_every)
    return None if asked.instance is None else samplers.instance(asked.instance, "pruners")


def train(config: Config, watcher: Watcher, stop: Stop) -> bool:
    """One trial without a study, in its own folder under study.root; False when `stop` ended it early.

    Raises StudyError where the folder holds a study, a finished trial, or one of another meaning: nothing recorded is
    written over.
    """
    folder = study_folder(config.study)
    alone = replace(config, train=replace(config.train, slots=1))
    before = space.load_launched(folder)
    if (folder / JOURNAL).exists():
        raise StudyError(f"{folder}: holds a study; choose another study.name")
    if read_result(folder) is not None:
        raise StudyError(f"{folder}: holds a finished trial; choose another study.name")
    if before is not None and (changed := space.differences(before, asdict(alone))):
        raise StudyError(f"{folder}: holds another trial; choose another study.name\n  " + "\n  ".join(changed))
    runs = tracker(config, folder, config.study.name)
    try:
        return train_one(alone, folder, runs, device(config.launcher), watcher, stop)
    finally:
        runs.close()


@dataclass
class _Ledgered:
    """Passes everything on, and keeps trials.jsonl fresh on the way."""

    watcher: Watcher
    study: Study
    _written_at: float = 0.0

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        self.watcher.admitted(cell, slot, step)

    def stepped(self) -> None:
        self.watcher.stepped()

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: Base) -> None:
        self.watcher.evaluated(cell, evaluation, base)
        self._refresh()

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self.watcher.ended(cell, state, value, flags)
        self._refresh()

    def _refresh(self) -> None:
        if time.monotonic() - self._written_at > TABLE_EVERY_SECONDS:
            results.write(self.study)
            self._written_at = time.monotonic()
