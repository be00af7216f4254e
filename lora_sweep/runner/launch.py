"""Where workers run: this machine's GPU or CPU."""

import os
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_sweep.config import Config, HealthConfig, StudyConfig
from lora_sweep.errors import Fault, StudyError
from lora_sweep.health import BIN_EDGES
from lora_sweep.records import Base, Cell, Evaluation
from lora_sweep.report import results
from lora_sweep.runner import kept_base as bases
from lora_sweep.runner.worker import Stop, Watcher, device, work
from lora_sweep.runner.worker import train as train_one
from lora_sweep.study.asha import Asha
from lora_sweep.study.search import Search
from lora_sweep.study.study import Study
from lora_sweep.study.view import JOURNAL, Outcome, StudyView
from lora_sweep.sweep import equivalence as folding
from lora_sweep.sweep import optuna_classes as samplers
from lora_sweep.sweep import saved
from lora_sweep.sweep.compose import to_yaml
from lora_sweep.sweep.sweep import Sweep
from lora_sweep.system.disk import refuse_links, write_whole
from lora_sweep.tracking import METRICS, RESULT, Tracker, read_rows

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
    asked = config.tracker
    return Tracker(
        study=config.study.name,
        study_id=study_id,
        folder=folder,
        bin_edges=BIN_EDGES,
        mode="none" if asked.name == "none" or is_switched_off() else asked.mode,
        project=asked.project,
        entity=asked.entity,
        tags=asked.tags,
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
    folder = study_folder(config.study)
    launched = sweep.as_launched()
    before = launched_before(folder)
    if before is not None and (changed := saved.differences(before, launched)):
        raise StudyError(
            f"{folder}: holds a study with another meaning; choose another study.name, or launch it as it was:\n  "
            + "\n  ".join(changed)
        )
    asked = config.sampler
    grid = None if asked.name == "optuna" else sweep.cells()
    search = None
    if asked.name == "optuna":
        sampler = samplers.instance(asked.instance or {}, "samplers")
        search = Search(
            sampler,
            sweep.distributions(),
            asked.n_trials or 1,
            sweep.decode,
            hold=config.train.slots or HELD,
            same_run=_same_run(sweep, config.study.fold),
        )
    classes, checks = ((), ()) if grid is None else _folded(sweep)
    with Study.open(
        folder,
        name=config.study.name,
        cells=grid,
        search=search,
        pruner=_pruner(config),
        same_run=classes,
        launched=launched,
    ) as study:
        write_whole(folder / "config.yaml", to_yaml(launched))
        if count := bases.repair(folder):
            watcher.noticed(bases.moved(folder, count))
        runs = tracker(config, folder, study.id)
        try:
            finished = work(
                study,
                sweep,
                sweep.largest_rank(),
                runs,
                device(config.launcher),
                _Ledgered(watcher, study, config.health),
                stop,
            )
        finally:
            runs.close()
            results.write(study)
        if finished:
            _verify(study, checks)
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


def _same_run(sweep: Sweep, fold: folding.Fold) -> Callable[[Cell], Hashable] | None:
    """By which drawn cells are held against those before them."""
    return None if fold == "off" else lambda cell: folding.run_key(sweep.config(cell), fold)


def runs(sweep: Sweep) -> int:
    """How many cells of the grid a new study runs."""
    return len(_folded(sweep)[0])


def _folded(sweep: Sweep) -> tuple[tuple[tuple[int, ...], ...], tuple[folding.Check, ...]]:
    """(numbers of the cells that one is run for, the pairs to compare): a cell to compare is a class by itself."""
    asked = sweep.base().study
    found = sweep.classes(asked.fold)
    checks = folding.checks(found, asked.verify_fold)
    alone = {check.other for check in checks}
    kept = [tuple(number for number in each.cells if number not in alone) for each in found]
    return (*kept, *((number,) for number in sorted(alone))), checks


def _verify(study: Study, checks: Sequence[folding.Check]) -> None:
    """Raises StudyError with each pair of cells that differs by more than its grade allows."""
    folded = study.folded()
    cells = {status.cell.number: status.cell for status in study.statuses()}
    broken = []
    for check in checks:
        one, other = (cells[folded[number][1] if number in folded else number] for number in (check.one, check.other))
        allowed, difference = _difference(study, one, other, check.grade)
        if difference > allowed:
            differ = [key for key, value in one.params.items() if other.params[key] != value]
            axes = ", ".join(f"{key} {one.params[key]} -> {other.params[key]}" for key in differ)
            broken.append(
                f"cells {one.folder} and {other.folder} ({axes}) should be the same run ({check.grade}), but their "
                f"losses differ by {difference:.1e}"
            )
    if broken:
        remedy = "run each by itself with study.fold=off"
        raise StudyError(
            "\n  ".join([f"{study.folder}: all is recorded, but the folding does not hold ({remedy})", *broken])
        )


def _difference(study: Study, one: Cell, other: Cell, grade: folding.Grade) -> tuple[float, float]:
    """(largest relative difference of losses that the grade allows, the one found)."""
    folders = [study.trial_folder(cell.number) for cell in (one, other)]
    trained = [(saved.load_launched(folder) or {}).get("train", {}) for folder in folders]
    # Passes of other shapes round differently.
    same_shapes = all(each.get("fixed_shapes") for each in trained) and trained[0]["slots"] == trained[1]["slots"]
    whole = grade.name == "bitwise" and same_shapes
    keys = ("train/loss", "eval/loss") if whole else ("train/loss",)
    curves = [[row.get(key) for row in read_rows(folder) for key in keys] for folder in folders]
    if not whole:
        curves = [curve[: folding.HELD_STEPS] for curve in curves]
    return (0.0 if whole else max(grade.size, folding.EXACT_SIZE)), folding.largest_difference(*curves)


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


@dataclass
class _Ledgered:
    """Passes everything on, and keeps trials.jsonl fresh on the way."""

    watcher: Watcher
    study: Study
    rules: HealthConfig
    _due: float = 0.0

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        self.watcher.admitted(cell, slot, step)

    def stepped(self) -> None:
        self.watcher.stepped()

    def chosen(self, reason: str) -> None:
        self.watcher.chosen(reason)

    def noticed(self, sentence: str) -> None:
        self.watcher.noticed(sentence)

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: Base) -> None:
        self.watcher.evaluated(cell, evaluation, base)
        self._refresh()

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self.watcher.ended(cell, state, value, flags)
        self._refresh()

    def _refresh(self) -> None:
        began = time.monotonic()
        if began >= self._due:
            results.write(self.study, self.rules)
            took = time.monotonic() - began
            self._due = began + took + max(TABLE_EVERY_SECONDS, took / TABLE_SHARE)
