"""The decision: which cell goes into production, exported with what speaks for it."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_sweep.adapters import reader
from lora_sweep.errors import ConfigError, Fault, NoEligibleTrial, StudyError
from lora_sweep.records import cell_name
from lora_sweep.report import results
from lora_sweep.report.results import Row
from lora_sweep.report.trial_result import read_ended
from lora_sweep.runner import kept_base
from lora_sweep.study.view import StudyView
from lora_sweep.sweep import check, compose, equivalence, saved, sweep_file
from lora_sweep.sweep.equivalence import Form
from lora_sweep.system import files
from lora_sweep.system.disk import disk_errors, refuse_links
from lora_sweep.tracking import seal

PRODUCTION = "production"

SHIPPED = ("config.yaml", seal.ADAPTER)
"""Of a trial: what production/ is made of."""

IN_PRODUCTION = ("model", "data", "method", "optimizer", "train")
"""Groups of a trial's configuration that its numbers depend on."""

REWRITTEN = (
    ("method", "alpha"), ("method", "use_rslora"), ("optimizer", "ratio"), ("optimizer", "weight_decay_B"),
)  # fmt: skip
"""What another form of the same run says otherwise."""


@dataclass(frozen=True)
class Picked:
    """What went into production."""

    winner: Row
    production: Path
    passed_over: tuple[Row, ...]
    """Cells with a lower loss whose record or adapter is not what it was, the best first."""
    repaired: int
    """Adapters that named a base elsewhere, see kept_base.repair."""


def pick(folder: Path, form: Form | None = None) -> Picked:
    """Exports the best healthy finished cell to production/: its configuration, adapter and evidence, written whole.

    The adapter is compared with the digests in the trial's result.json before and after it is copied. Raises
    NoEligibleTrial where no finished cell is healthy, whole and better than the base, ConfigError where there is no
    such form, StudyError where production/ cannot be written.

    Args:
        form: the equivalent form that production.yaml takes; the adapter stays as it was trained.
    """
    view = StudyView.read(folder)
    refuse_links(view.folder)
    repaired = kept_base.repair(view.folder)
    table = results.rows(view)
    ranking = results.ranked(table)
    if not ranking:
        raise NoEligibleTrial(f"{folder}: no cell is finished yet; `lora-sweep status` says how far the study is")
    passed_over = []
    for row in ranking:
        if not results.is_intact(row) and set(row["faults"]) <= results.DAMAGES:
            passed_over.append(row)
        elif results.is_healthy(row) and row["eval_loss"] < row["base_loss"]:
            changed = _changed(view, row)
            if not changed:
                return Picked(row, _export(view, row, table, form), tuple(passed_over), repaired)
            passed_over.append(row | {"damage": changed})
    damaged = {"adapter_damaged"} if passed_over else set()
    flags = sorted({flag for row in ranking for flag in row["faults"]} | damaged)
    why = f"flags: {', '.join(flags)}" if flags else "none is better than its base"
    remedy = "bring the files back from a copy" if passed_over else "widen the learning rates"
    damages = "".join(f"\n  cell {cell_name(row['number'])}: {row['damage']}" for row in passed_over)
    raise NoEligibleTrial(f"{folder}: none of {len(ranking)} finished cells can be shipped ({why}); {remedy}{damages}")


def form(study: Path, overrides: Sequence[str]) -> Form | None:
    """The form in which `pick` writes the winner: of the command line, else of the study's launch; None: as it was run.

    Raises ConfigError with every fault, and StudyError where there is no study.
    """
    requested, faults = sweep_file.read(None, overrides)
    faults += check.check(requested)[1]
    faults += [Fault(word, "pick reads pick.form only") for word in overrides if not word.startswith("pick.")]
    if faults:
        raise ConfigError(faults)
    launched: Form | None = compose.leaf(results.launched(StudyView.read(study)), "pick.form")
    return requested.base().pick.form or launched


def _changed(view: StudyView, row: Row) -> str:
    """What of the adapter is not as it was when the trial ended, one clause; empty where all is."""
    trial = view.trial_folder(row["number"])
    if not (trial / seal.ADAPTER).is_dir():
        raise StudyError(f"{trial / seal.ADAPTER}: is missing; study.keep_adapters must keep the best cell's")
    changed = seal.changed(trial, _seal(trial))
    return f"{trial}: gone or changed since the trial ended: {', '.join(changed)}" if changed else ""


def _seal(trial: Path) -> seal.Seal:
    """The seal of what goes into production; of a trial of an older version what lies there counts."""
    sealed: seal.Seal = (read_ended(trial) or {}).get("files") or seal.sealed(trial, SHIPPED)
    return {name: each for name, each in sealed.items() if name.partition("/")[0] in SHIPPED}


def _export(view: StudyView, winner: Row, table: list[Row], form: Form | None) -> Path:
    trial, production = view.trial_folder(winner["number"]), view.folder / PRODUCTION
    written, sealed = _production(view.name, winner, trial, form), _seal(trial)
    with disk_errors(view.folder):
        if production.exists() and not production.is_dir():
            raise StudyError(f"{production}: is no folder; move it away")
        staging = files.staging(production)
        (staging / seal.ADAPTER).mkdir(parents=True)
        try:
            copied = {name: each for name, each in sealed.items() if name.startswith(f"{seal.ADAPTER}/")}
            for name in copied:
                with files.open_file(trial / name, follow=False) as source, files.create(staging / name) as target:
                    shutil.copyfileobj(source, target)
                    files.flush(target)
            if changed := seal.changed(staging, copied):
                raise StudyError(f"{trial}: changed while it was copied: {', '.join(changed)}; pick again")
            reader.read(staging / seal.ADAPTER)
            files.write_whole(staging / "production.yaml", compose.to_yaml(written).encode())
            files.write_whole(staging / "evidence.md", _evidence(view.name, winner, table).encode())
            before = files.staging(production)
            if production.exists():
                production.rename(before)
            staging.rename(production)
            files.remove(before)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return production


def _production(study: str, winner: Row, trial: Path, form: Form | None) -> dict[str, Any]:
    plain = saved.load_launched(trial) or {}
    head = {"study": study, "cell": winner["number"], **{key: winner[key] for key in ("eval_loss", "base_loss")}}
    if form is not None:
        written, grade = equivalence.in_form(saved.of_launched(plain), form)
        trained = {key: plain[group][key] for group, key in REWRITTEN}
        # The same training in other words: the adapter beside it keeps the scaling that it was trained with.
        head |= {"form": form, "same_run": str(grade), "adapter_trained_with": trained}
        plain = asdict(written)
    return head | {group: plain[group] for group in IN_PRODUCTION}


def _evidence(study: str, winner: Row, table: list[Row]) -> str:
    ranking, duplicates = results.runs(results.ranked(table)), results.same_run(table)
    counts = {state: sum(row["state"] == state for row in table) for state in ("COMPLETE", "PRUNED", "FAIL")}
    gain = 1 - winner["eval_loss"] / winner["base_loss"]
    lines = [
        f"# {study}: cell {winner['number']}",
        "",
        f"Evaluation loss {winner['eval_loss']:.4f} nats per token; the base alone has {winner['base_loss']:.4f} "
        f"({gain:.1%} less).",
        f"Cells: {counts['COMPLETE']} complete, {counts['PRUNED']} pruned, {counts['FAIL']} failed.",
        "",
        "Chosen as the lowest loss of one seed among the healthy finished cells. The best of many looks better than it "
        "is: confirm it on fresh seeds before you rely on small differences.",
        "",
        "| place | cell | eval loss | flags | parameters | the same run as cells |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for place, row in enumerate(ranking[:10], start=1):
        params = ", ".join(f"{key}={value}" for key, value in row["params"].items())
        same = ", ".join(map(str, duplicates.get(row["number"], [])))
        flags = ", ".join(row["flags"])
        lines.append(f"| {place} | {row['number']} | {row['eval_loss']:.4f} | {flags} | {params} | {same} |")
    return "\n".join(lines) + "\n"
