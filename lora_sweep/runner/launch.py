"""Where workers run: this machine's GPU or CPU."""

import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_sweep.config import Config, HealthConfig, StudyConfig
from lora_sweep.errors import Fault, StudyError
from lora_sweep.health import BIN_EDGES
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.report import results
from lora_sweep.report.results import StudyTable
from lora_sweep.report.trials_file import TrialsFile
from lora_sweep.runner import kept_base
from lora_sweep.runner.verify_equivalence import GridRuns, verify
from lora_sweep.runner.worker import Stop, Watcher, device, use_threads, work
from lora_sweep.runner.worker import train as train_one
from lora_sweep.study.asha import Asha
from lora_sweep.study.search import Search
from lora_sweep.study.study import Study
from lora_sweep.study.view import JOURNAL, Outcome, StudyView
from lora_sweep.sweep import equivalence, optuna_classes, saved
from lora_sweep.sweep.compose import to_yaml
from lora_sweep.sweep.sweep import Sweep
from lora_sweep.system.disk import refuse_links, write_whole
from lora_sweep.tracking import METRICS, RESULT, Tracker

HELD = 8
"""Cells that a sampler is asked for at once, where the number of slots is chosen later."""
TABLE_EVERY_SECONDS, TABLE_SHARE = 2.0, 0.01
"""trials.jsonl is rewritten at most this often while trials run, and in at most this share of the time: it has a line
for every cell, so each of many would cost the more."""


def study_folder(study: StudyConfig) -> Path:
    return Path(study.root).expanduser() / study.name


def check(study: StudyConfig) -> list[Fault]:
    """Whether the study's folder can be written; leaves nothing behind."""
    faults = []
    if not study.root.strip() or any(character < " " for character in study.root):
        remedy = "study.root=. is the working directory"
        return [Fault("study.root", "must name a folder, in printable characters", study.root, remedy)]
    try:
        folder = study_folder(study).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, RuntimeError) as error:  # a name too long, a home of nobody, no working directory
        reason = getattr(error, "strerror", None) or str(error)
        return [Fault("study.root", f"cannot be used ({reason})", study.root[:200], "choose another study.root")]
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
    settings = config.tracker
    return Tracker(
        study=config.study.name,
        study_id=study_id,
        folder=folder,
        bin_edges=BIN_EDGES,
        mode="none" if settings.name == "none" or is_switched_off() else settings.mode,
        project=settings.project,
        entity=settings.entity,
        tags=settings.tags,
    )


def is_switched_off() -> bool:
    """Whether W&B is switched off by its own environment variables, as its users know them; they switch nothing on."""
    mode, disabled = (os.environ.get(name, "").lower() for name in ("WANDB_MODE", "WANDB_DISABLED"))
    return mode == "disabled" or disabled in ("true", "1", "yes")


def launch(sweep: Sweep, watcher: Watcher, stop: Stop) -> bool:
    """Runs or resumes the sweep's study here; False when `stop` ended it early, and the same call goes on.

    Raises StudyError where the folder holds a study of another meaning, another process works on it, or two cells that
    are the same run turned out otherwise (study.verify_fold; all is recorded by then).
    """
    config = sweep.base()
    use_threads(config.launcher)
    folder = study_folder(config.study)
    launched = sweep.as_launched()
    before = launched_before(folder)
    if before is not None and (changed := saved.differences(before, launched)):
        raise StudyError(
            f"{folder}: holds a study with another meaning; choose another study.name, or launch it as it was:\n  "
            + "\n  ".join(changed)
        )
    sampler_config = config.sampler
    grid = None if sampler_config.name == "optuna" else sweep.cells()
    search = None
    if sampler_config.name == "optuna":
        sampler = optuna_classes.instance(sampler_config.instance or {}, "samplers")
        search = Search(
            sampler,
            sweep.distributions(),
            sampler_config.n_trials or 1,
            sweep.decode,
            hold=config.train.slots or HELD,
            same_run=_same_run(sweep, config.study.fold),
        )
    runs = None if grid is None else GridRuns.of(sweep)
    with Study.open(
        folder,
        name=config.study.name,
        cells=grid,
        search=search,
        pruner=_pruner(config),
        same_run=() if runs is None else runs.cells,
        launched=launched,
    ) as study:
        write_whole(folder / "config.yaml", to_yaml(launched))
        if count := kept_base.repair(folder):
            watcher.noticed(kept_base.moved(folder, count))
        recorded = _Recorded(watcher, study, config.health)
        wandb_runs = tracker(config, folder, study.id)
        try:
            finished = work(
                study,
                sweep,
                sweep.largest_rank(),
                wandb_runs,
                device(config.launcher),
                recorded,
                stop,
            )
        finally:
            wandb_runs.close()
            recorded.write()
        if finished and runs is not None:
            verify(study, runs.checks)
        return finished


def launched_before(folder: Path) -> dict[str, Any] | None:
    """What the study in `folder` was launched with: by its ledger, of an older one by config.yaml; None if it is new.

    Raises StudyError where neither says so, or the folder holds trials without their ledger; ConfigError where an older
    study's config.yaml cannot be read.
    """
    view = StudyView.find(folder)
    if view is None:
        return saved.load_launched(folder)
    before = results.launched(view)
    if not before:
        raise StudyError(
            f"{folder}: config.yaml is gone, and the ledger of an older version does not hold it; restore it from a "
            "copy, or choose another study.name"
        )
    return before


def _same_run(sweep: Sweep, fold: equivalence.Fold) -> Callable[[Cell], Hashable] | None:
    """By which drawn cells are compared with those before them."""
    return None if fold == "off" else lambda cell: equivalence.run_key(sweep.config(cell), fold)


def amounts(sweep: Sweep) -> tuple[int, int, int]:
    """(cells asked for, runs that they take, runs that the study has finished already).

    Of drawn cells nobody knows beforehand how many are the same run: each counts as one.
    """
    config = sweep.base()
    is_grid = config.sampler.name == "grid"
    view, done = StudyView.find(study_folder(config.study)), 0
    if view is not None:
        statuses = view.statuses()
        done = sum(status.state in results.ENDED and status.reason != "memory" for status in statuses)
        if not is_grid:
            done += len(view.duplicates())
    cells = len(sweep.cells()) if is_grid else config.sampler.n_trials or 0
    return cells, max(GridRuns.of(sweep).count, done) if is_grid else cells, done


def _pruner(config: Config) -> Any:
    """Asha, an Optuna pruner or None."""
    pruner, train = config.pruner, config.train
    if pruner.name == "asha":
        return Asha(pruner.eta or 0, pruner.min_steps or 0, train.max_steps, train.eval_every)
    return None if pruner.instance is None else optuna_classes.instance(pruner.instance, "pruners")


def train(config: Config, watcher: Watcher, stop: Stop) -> bool:
    """One trial without a study, in its own folder under study.root; False when `stop` ended it early.

    Raises StudyError where the folder holds a study, a finished trial, or one of another meaning: nothing recorded is
    written over.
    """
    folder = study_folder(config.study)
    alone = replace(config, train=replace(config.train, slots=1))
    use_threads(config.launcher)
    refuse_links(folder)
    if (folder / JOURNAL).exists() or (folder / "trials").exists():
        raise StudyError(f"{folder}: holds a study; choose another study.name")
    if (folder / RESULT).exists():
        raise StudyError(f"{folder}: holds a finished trial; choose another study.name")
    before = saved.load_launched(folder)
    if before is None and (folder / METRICS).exists():
        raise StudyError(f"{folder}: holds a trial whose config.yaml is gone; choose another study.name")
    if before is not None and (changed := saved.differences(before, asdict(alone))):
        raise StudyError(f"{folder}: holds another trial; choose another study.name\n  " + "\n  ".join(changed))
    runs = tracker(config, folder, config.study.name)
    try:
        return train_one(alone, folder, runs, device(config.launcher), watcher, stop)
    finally:
        runs.close()


class _Recorded:
    """Passes everything on, and keeps trials.jsonl as fresh as its cost allows."""

    def __init__(self, watcher: Watcher, study: Study, rules: HealthConfig) -> None:
        self._watcher = watcher
        self._table = StudyTable(study, rules)
        self._file = TrialsFile(study.folder)
        self._due = 0.0
        self.write()

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        self._watcher.admitted(cell, slot, step)

    def stepped(self) -> None:
        self._watcher.stepped()

    def chosen(self, reason: str) -> None:
        self._watcher.chosen(reason)

    def noticed(self, sentence: str) -> None:
        self._watcher.noticed(sentence)

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: BaselineLosses) -> None:
        self._watcher.evaluated(cell, evaluation, base)
        self._table.evaluated(cell.number, evaluation)
        self._refresh()

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self._watcher.ended(cell, state, value, flags)
        fits = [self._file.update(row) for row in self._table.ended(cell.number)]
        if not all(fits):
            self._due = 0.0
        self._refresh()

    def write(self) -> None:
        """All rows, compared with the study as it is now."""
        began = time.monotonic()
        self._file.write(self._table.rows())
        took = time.monotonic() - began
        self._due = began + took + max(TABLE_EVERY_SECONDS, took / TABLE_SHARE)

    def _refresh(self) -> None:
        if time.monotonic() >= self._due:
            self.write()
