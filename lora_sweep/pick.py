"""The decision: which cell goes into production, exported with what speaks for it."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_sweep import folding, results, space
from lora_sweep.composition import to_yaml
from lora_sweep.errors import NoSafeAnswer, StudyError
from lora_sweep.folding import Form
from lora_sweep.ledger import StudyView
from lora_sweep.results import Row

IN_PRODUCTION = ("model", "data", "method", "optimizer", "train")
"""Groups of a trial's configuration that its numbers depend on."""

REWRITTEN = (
    ("method", "alpha"), ("method", "use_rslora"), ("optimizer", "ratio"), ("optimizer", "weight_decay_B"),
)  # fmt: skip
"""What another form of the same run says otherwise."""


def pick(folder: Path, form: Form | None = None) -> tuple[Row, Path]:
    """(the best healthy finished cell, production/): its configuration, adapter and evidence, written whole.

    `form`: the equivalent form that production.yaml takes; the adapter stays as it was trained. Raises NoSafeAnswer
    where no finished cell is healthy and better than the base, ConfigError where there is no such form.
    """
    view = StudyView.read(folder)
    table = results.rows(view)
    ranking = results.ranked(table)
    if not ranking:
        raise NoSafeAnswer(f"{folder}: no cell is finished yet; `lora-sweep status` says how far the study is")
    healthy = [row for row in ranking if results.is_healthy(row) and row["eval_loss"] < row["base_loss"]]
    if not healthy:
        flags = sorted({flag for row in ranking for flag in row["faults"]})
        why = f"flags: {', '.join(flags)}" if flags else "none is better than its base"
        raise NoSafeAnswer(
            f"{folder}: none of {len(ranking)} finished cells can be shipped ({why}); widen the learning rates"
        )
    winner = healthy[0]
    trial = view.trial_folder(winner["number"])
    if not (trial / "adapter").is_dir():
        raise StudyError(f"{trial}/adapter: is missing; study.keep_adapters must keep the best cell's")
    written = _production(view.name, winner, trial, form)
    aside, production = folder / ".production", folder / "production"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    shutil.copytree(trial / "adapter", aside / "adapter")
    (aside / "production.yaml").write_text(to_yaml(written))
    (aside / "evidence.md").write_text(_evidence(view.name, winner, table))
    shutil.rmtree(production, ignore_errors=True)
    aside.rename(production)
    return winner, production


def _production(study: str, winner: Row, trial: Path, form: Form | None) -> dict[str, Any]:
    plain = space.load_launched(trial) or {}
    head = {"study": study, "cell": winner["number"], **{key: winner[key] for key in ("eval_loss", "base_loss")}}
    if form is not None:
        written, grade = folding.in_form(space.of_launched(plain), form)
        trained = {key: plain[group][key] for group, key in REWRITTEN}
        # The same training in other words: the adapter beside it keeps the scaling that it was trained with.
        head |= {"form": form, "same_run": str(grade), "adapter_trained_with": trained}
        plain = asdict(written)
    return head | {group: plain[group] for group in IN_PRODUCTION}


def _evidence(study: str, winner: Row, table: list[Row]) -> str:
    ranking, folded = results.runs(results.ranked(table)), results.same_run(table)
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
        same = ", ".join(map(str, folded.get(row["number"], [])))
        flags = ", ".join(row["flags"])
        lines.append(f"| {place} | {row['number']} | {row['eval_loss']:.4f} | {flags} | {params} | {same} |")
    return "\n".join(lines) + "\n"
