"""The verbs. Nothing heavy is imported before a verb runs."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lora_sweep.cli import bench
from lora_sweep.system import chatter
from lora_sweep.system.process import stoppable
from lora_sweep.system.terminal import complain

if TYPE_CHECKING:
    from lora_sweep.config import Config
    from lora_sweep.system.console import Console

app = typer.Typer(
    help="Pick LoRA hyperparameters for production: exact packed sweeps over rank, alpha, rsLoRA and LoRA+ ratio.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")

SweepFile = Annotated[
    str, typer.Argument(metavar="SWEEP", help="Sweep file, yours or a shipped one (sweeps/NAME.yaml).")
]
# Whoever comes from Hydra types it; every launch runs its whole space anyway.
Multirun = Annotated[bool, typer.Option("--multirun", "-m", hidden=True)]
StudyFolder = Annotated[Path, typer.Argument(metavar="STUDY", help="Study folder, e.g. outputs/quickstart.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides: train.max_steps=100 'method.rank=choice(8,32)'"),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else.")]


def main() -> NoReturn:
    """Runs a verb and ends in SystemExit.

    Exit codes: 0 done, 2 the user's mistake, 3 no safe answer, 128 + n stopped by signal n, 1 anything else.
    """
    from lora_sweep.errors import NoEligibleTrial, StorageUnavailable, UserError

    # Read when torch is imported: how long its threads spin for one another before they sleep. By default so long that
    # on a machine with other work small operations took 10 to 40 times as long; none at all costs a third when idle.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with chatter.silenced():
            app()
        code = 0
    except UserError as error:
        complain(error)
        code = 2
    except NoEligibleTrial as error:
        complain(error)
        code = 3
    except StorageUnavailable as error:
        complain(f"{error}; what was recorded is safe")
        code = 1
    sys.exit(code)


@app.command()
def launch(sweep: SweepFile, overrides: Overrides = None, multirun: Multirun = False) -> None:
    """Run or resume a study here; ends with a ranking, the flags, the winner and where everything lies."""
    chatter.import_quietly()
    from lora_sweep.cli.live import Show
    from lora_sweep.cli.validate import validate_sweep
    from lora_sweep.report import results
    from lora_sweep.report.plan_table import warning_lines
    from lora_sweep.report.tables import count
    from lora_sweep.runner import launch as runner
    from lora_sweep.runner import pitfalls
    from lora_sweep.study.view import StudyView
    from lora_sweep.system.console import Console, say

    requested = validate_sweep(sweep, overrides, resumes=True)
    config = requested.base()
    folder = runner.study_folder(config.study)
    console = Console()
    cells, runs, done = runner.amounts(requested)
    at_most = "at most " if config.sampler.name != "grid" and config.study.fold != "off" else ""
    slots = "slots: auto" if config.train.slots is None else count(config.train.slots, "slot")
    amounts = f"{count(cells, 'cell')}, {at_most}{count(runs, 'run')}, {done} of them finished"
    say(console, f"{config.study.name}: {amounts}, {slots} -> {folder}")
    warnings = pitfalls.pitfalls(requested) if done < runs else []
    for line in warning_lines([asdict(each) for each in warnings]):
        say(console, line)
    with stoppable() as stop, Show(console, runs, done, config.train.max_steps) as show:
        finished = runner.launch(requested, show, stop)
    view = StudyView.read(folder)
    table = results.rows(view)
    left = sum(row["state"] not in results.ENDED for row in results.runs(table)) + view.size - len(table)
    if not finished and left:
        say(console, f"stopped with {count(left, 'run')} left; the same command goes on from here")
        raise typer.Exit(stop.code)
    _conclude(console, folder, table, config)
    if all(row["reason"] == "memory" for row in table):
        raise typer.Exit(1)


@app.command()
def plan(sweep: SweepFile, overrides: Overrides = None, as_json: Json = False, multirun: Multirun = False) -> None:
    """Check a sweep and show its cells, memory and time estimate; trains nothing."""
    chatter.import_quietly()
    from lora_sweep.cli.validate import validate_sweep
    from lora_sweep.report import plan_table
    from lora_sweep.report.tables import short
    from lora_sweep.runner import estimate
    from lora_sweep.system.console import Console, say

    requested = validate_sweep(sweep, overrides)
    planned = estimate.plan(requested)
    if as_json:
        print(json.dumps(planned))
        return
    console = Console()
    for line in plan_table.heading(planned):
        say(console, line)
    console.print(plan_table.plan_table(planned))
    for cell in requested.cells()[:3] if planned["is_grid"] else ():
        say(console, f"cell {cell.name}: {short(cell.params)}")
    if not planned["is_grid"] and requested.base().study.fold != "off":
        say(console, "a cell that is drawn and is the same run as one before it is not run, but ends as that one")
    for line in [*plan_table.class_lines(planned), *plan_table.warning_lines(planned["warnings"])]:
        say(console, line)


@app.command()
def train(overrides: Overrides = None) -> None:
    """Train one trial, without a study."""
    chatter.import_quietly()
    from lora_sweep import health
    from lora_sweep.cli.live import Show
    from lora_sweep.cli.validate import validate_sweep
    from lora_sweep.records import Diagnosis, Finding
    from lora_sweep.report.tables import duration
    from lora_sweep.runner import launch as runner
    from lora_sweep.system.console import Console, say
    from lora_sweep.tracking import read_result

    config = validate_sweep(None, overrides, resumes=True).base()
    folder = runner.study_folder(config.study)
    console = Console()
    with stoppable() as stop, Show(console, 1, 0, config.train.max_steps) as show:
        finished = runner.train(config, show, stop)
    if not finished:
        say(console, "stopped; the same command goes on from here")
        raise typer.Exit(stop.code)
    result = read_result(folder) or {}
    loss = "not finite" if result["eval_loss"] is None else f"{result['eval_loss']:.4f}"
    spent = duration(result["seconds"])
    say(console, f"{result['state']}: eval loss {loss} (base {result['base_loss']:.4f}), {spent}")
    # Alone, a trial is compared with its base only.
    diagnosis = None if result["diagnosis"] is None else Diagnosis.of_plain(result["diagnosis"])
    own = [Finding.of_plain(each) for each in result["findings"]]
    for finding in (*health.compared(diagnosis, own, config.health), *own):
        say(console, f"{finding.flag}: {finding.sentence}")
    say(console, f"record and adapter in {folder}")


@app.command()
def status(study: StudyFolder, as_json: Json = False) -> None:
    """How far a study is, once."""
    from lora_sweep.report import results
    from lora_sweep.report.tables import count, duration, flag_lines, show_ranking
    from lora_sweep.study.view import StudyView
    from lora_sweep.sweep import compose
    from lora_sweep.system.console import Console, say

    view = StudyView.read(study)
    table = results.rows(view)
    summary = results.summary(view, table, compose.leaf(results.launched(view), "train.slots"))
    if as_json:
        print(json.dumps(summary))
        return
    console = Console()
    states = ", ".join(f"{summary[state]} {state}" for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"))
    cells = count(summary["cells"], "cell")
    say(console, f"{summary['study']}: {cells}: {states}; ETA {duration(summary['eta_seconds'])}")
    left = summary["RUNNING"] + summary["WAITING"]
    if left and not view.is_held:
        say(console, f"no process works on it; `launch` goes on with what is left ({left})")
    if ranked := results.ranked(table):
        show_ranking(console, table, ranked)
    for line in flag_lines(table):
        say(console, line)


@app.command("config")
def show_config(
    group: Annotated[str | None, typer.Argument(metavar="[GROUP]", help="One group, e.g. optimizer.")] = None,
    as_json: Json = False,
) -> None:
    """Print every configuration key with its default, bound and description."""
    from lora_sweep.cli import config_table
    from lora_sweep.system.console import Console

    keys = config_table.keys(group)
    if as_json:
        print(json.dumps({each.name: each.plain() for each in keys}))
        return
    config_table.draw(Console(), keys)


@app.command()
def pick(study: StudyFolder, overrides: Overrides = None, as_json: Json = False) -> None:
    """Export the best healthy finished cell to STUDY/production; pick.form=lora writes it as plain LoRA."""
    from lora_sweep.production import pick as production
    from lora_sweep.records import cell_name
    from lora_sweep.report.tables import short
    from lora_sweep.runner import kept_base
    from lora_sweep.system.console import Console, say

    picked = production.pick(study, production.form(study, overrides or []))
    winner = picked.winner
    if as_json:
        over = [row["number"] for row in picked.passed_over]
        print(json.dumps({"winner": winner, "production": str(picked.production), "passed_over": over}))
        return
    console = Console()
    if picked.repaired:
        say(console, kept_base.moved(study, picked.repaired))
    for row in picked.passed_over:
        loss = f"{row['eval_loss']:.4f}"
        say(console, f"passed over: cell {cell_name(row['number'])} with eval loss {loss}: {row['damage']}")
    share = winner["eval_loss"] / winner["base_loss"]
    say(console, f"winner: cell {cell_name(winner['number'])}  {short(winner['params'])}")
    say(console, f"eval loss {winner['eval_loss']:.4f}, {share:.1%} of the base's; one seed, not yet confirmed")
    say(console, f"exported to {picked.production}: production.yaml, adapter/, evidence.md")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or of several.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="PATH_OR_ID", help="Compare with this base: the update relative to W."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read adapter_model.bin too, by torch.load(weights_only=True).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Health of any PEFT LoRA adapter on disk: sizes, norms, zeros, stable rank, verdict.

    Exit code 0 when it could be read, whatever the verdict; 2 when not.
    """
    if base is not None:
        chatter.import_quietly()
    from lora_sweep import inspection
    from lora_sweep.errors import UserError
    from lora_sweep.system.console import Console

    inspected, errors = inspection.inspect(adapter, base, allow_pickle)
    if as_json and inspected:
        print(json.dumps({"adapters": [each.plain() for each in inspected]}, allow_nan=False))
    console = Console()
    for each in () if as_json else inspected:
        inspection.draw(console, each)
    if errors:
        raise UserError("\n".join(errors))


def _conclude(console: "Console", folder: Path, table: list[dict[str, Any]], config: "Config") -> None:
    from lora_sweep.records import cell_name
    from lora_sweep.report import results
    from lora_sweep.report.tables import flag_lines, short, show_ranking
    from lora_sweep.runner.launch import is_switched_off
    from lora_sweep.system.console import say

    ranked = results.ranked(table)
    if ranked:
        show_ranking(console, table, ranked)
    for line in flag_lines(table):
        say(console, line)
    winner = next((row for row in ranked if results.is_healthy(row)), None)
    if winner is None and all(row["reason"] == "memory" for row in table):
        say(console, "no cell was trained: there is not enough memory for one of them")
    elif table and all(row["reason"] == "diverged" for row in results.runs(table)):
        say(console, "every cell diverged: lower optimizer.base_lr, or the ratio and alpha that multiply it")
    elif winner is None:
        say(console, "no healthy cell is finished: the flags above say why, and what to change")
    else:
        share = winner["eval_loss"] / winner["base_loss"]
        say(console, f"winner: cell {cell_name(winner['number'])}  {short(winner['params'])}")
        say(console, f"  eval loss {winner['eval_loss']:.4f} nats per token, {share:.1%} of the base's")
    say(console, f"all cells     {folder}/trials.jsonl")
    say(console, f"each trial    {folder}/trials/NNNN/  (metrics.jsonl, adapter/, result.json)")
    if config.tracker.name == "wandb":
        where = f"{folder}/wandb/  (wandb sync {folder}/wandb/offline-run-*)"
        where = where if config.tracker.mode == "offline" else config.tracker.project
        off = "none: WANDB_MODE or WANDB_DISABLED switches W&B off"
        say(console, f"W&B runs      {off if is_switched_off() else where}")
    if winner is not None:
        say(console, f"ship it       lora-sweep pick {folder}")
