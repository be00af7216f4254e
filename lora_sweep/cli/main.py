"""The verbs. Nothing heavy is imported before a verb runs."""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

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

SweepFile = Annotated[
    str, typer.Argument(metavar="SWEEP", help="Sweep file, yours or a shipped one (sweeps/NAME.yaml).")
]
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
    from lora_sweep.errors import NoSafeAnswer, OutOfRoom, UserError

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
    except NoSafeAnswer as error:
        complain(error)
        code = 3
    except OutOfRoom as error:
        complain(f"{error}; what was recorded is safe")
        code = 1
    sys.exit(code)


@app.command()
def launch(sweep: SweepFile, overrides: Overrides = None) -> None:
    """Run or resume a study here; ends with a ranking, the flags, the winner and where everything lies."""
    chatter.import_quietly()
    from lora_sweep.cli import live as progress
    from lora_sweep.cli import validate as request
    from lora_sweep.report import results
    from lora_sweep.runner import launch as launcher
    from lora_sweep.runner import pitfalls
    from lora_sweep.study.view import StudyView
    from lora_sweep.system.console import Console, say

    asked = request.checked(sweep, overrides, resumes=True)
    config = asked.base()
    folder = launcher.study_folder(config.study)
    console = Console()
    done = 0
    before = StudyView.find(folder)
    if before is not None:
        counts = before.counts()
        done = counts["COMPLETE"] + counts["PRUNED"] + counts["FAIL"]
        done -= sum(status.reason == "memory" for status in before.statuses())
        if config.sampler.name != "grid":
            # Of drawn cells nobody knows beforehand how many are the same run.
            done += len(before.folded())
    cells = runs = config.sampler.n_trials or len(asked.cells())
    if config.sampler.name == "grid":
        runs = max(launcher.runs(asked), done)
    most = "at most " if config.sampler.name != "grid" and config.study.fold != "off" else ""
    slots = "as many slots as pay" if config.train.slots is None else f"{config.train.slots} slots"
    say(
        console,
        f"{config.study.name}: {cells} cells, {most}{runs} runs, {done} of them finished, {slots} -> {folder}",
    )
    for line in progress.warning_lines([asdict(each) for each in pitfalls.pitfalls(asked)]) if done < runs else ():
        say(console, line)
    with stoppable() as stop, progress.Show(console, runs, done, config.train.max_steps) as show:
        finished = launcher.launch(asked, show, stop)
    view = StudyView.read(folder)
    table = results.rows(view)
    left = sum(row["state"] not in results.ENDED for row in results.runs(table)) + view.size - len(table)
    if not finished and left:
        say(console, f"stopped with {left} runs left; the same command goes on from here")
        raise typer.Exit(stop.code)
    _conclude(console, folder, table, config)
    if all(row["reason"] == "memory" for row in table):
        raise typer.Exit(1)


@app.command()
def plan(sweep: SweepFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a sweep and show its cells, memory and time estimate; trains nothing."""
    chatter.import_quietly()
    from rich.table import Table

    from lora_sweep.cli import live as progress
    from lora_sweep.cli import validate as request
    from lora_sweep.cli.live import class_lines, duration, short
    from lora_sweep.runner import estimate
    from lora_sweep.system.console import Console, say

    asked = request.checked(sweep, overrides)
    made = estimate.plan(asked)
    if as_json:
        print(json.dumps(made))
        return
    console = Console()
    runs = f", {made['distinct_runs']} distinct runs," if made["is_grid"] else ""
    say(console, f"{made['study']}: {made['cells']} cells{runs} over {', '.join(made['axes']) or 'nothing'}")
    if made["packs"] > 1:
        say(console, f"{made['packs']} kinds of pack: an axis changes the base, the data or the shape of a batch")
    table = Table(box=None, show_header=False)
    kind = made["quantization"] or made["dtype"]
    table.add_row("base", f"{made['base_parameters']:,} parameters, {made['base_mib']:,.1f} MiB in {kind}")
    for rank, count in made["adapter_parameters"].items():
        table.add_row(f"adapter, rank {rank}", f"{count:,} parameters, {made['adapter_mib'][rank]:,.1f} MiB")
    rows = "" if made["train_rows"] == made["train_examples"] else f", packed into {made['train_rows']:,} rows"
    held_out = made["eval_examples_held_out"]
    of = f" of {held_out:,} held out (data.eval_size)" if held_out > made["eval_examples"] else ""
    table.add_row(
        "examples", f"{made['train_examples']:,} to train on{rows}, {made['eval_examples']:,}{of} to evaluate on"
    )
    table.add_row("tokens", f"{made['tokens']:,} to train on, {made['train_tokens']:,} of them counted")
    lengths = made["lengths"]
    table.add_row(
        "lengths",
        f"median {lengths['median']}, 95 % up to {lengths['p95']}, longest {lengths['max']}, "
        f"padded to {lengths['padded']}",
    )
    table.add_row("cut", f"{made['examples_cut']:,} longer than data.max_length, {made['share_cut']:.1%}")
    table.add_row(
        "left out", f"{made['rows_skipped']:,} rows skipped, {made['duplicates_removed']:,} duplicates removed"
    )
    table.add_row("epoch", f"{made['steps_per_epoch']:,.1f} steps; {made['epochs']:.1f} epochs a trial")
    table.add_row(
        "memory", f"about {made['memory_mib']:,.0f} MiB with {made['slots']} adapters at once, their states and a pass"
    )
    table.add_row("slots", made["slots_reason"])
    table.add_row("time", f"about {duration(made['seconds'])} on {made['device']}, if no cell is pruned")
    console.print(table)
    for cell in asked.cells()[:3] if made["is_grid"] else ():
        say(console, f"cell {cell.folder}: {short(cell.params)}")
    if not made["is_grid"] and asked.base().study.fold != "off":
        say(console, "a cell that is drawn and is the same run as one before it is not run, but told its end")
    for line in [*class_lines(made), *progress.warning_lines(made["warnings"])]:
        say(console, line)


@app.command()
def train(overrides: Overrides = None) -> None:
    """Train one trial, without a study."""
    chatter.import_quietly()
    from lora_sweep import health
    from lora_sweep.cli import live as progress
    from lora_sweep.cli import validate as request
    from lora_sweep.records import Diagnosis, Finding
    from lora_sweep.runner import launch as launcher
    from lora_sweep.system.console import Console, say
    from lora_sweep.tracking import read_result

    asked = request.checked(None, overrides, resumes=True)
    config = asked.base()
    folder = launcher.study_folder(config.study)
    console = Console()
    with stoppable() as stop, progress.Show(console, 1, 0, config.train.max_steps) as show:
        finished = launcher.train(config, show, stop)
    if not finished:
        say(console, "stopped; the same command goes on from here")
        raise typer.Exit(stop.code)
    result = read_result(folder) or {}
    spent = progress.duration(result["seconds"])
    loss = "not finite" if result["eval_loss"] is None else f"{result['eval_loss']:.4f}"
    say(console, f"{result['state']}: eval loss {loss} (base {result['base_loss']:.4f}), {spent}")
    # Alone, a trial is compared with its base only.
    made = None if result["diagnosis"] is None else Diagnosis.of_plain(result["diagnosis"])
    own = [Finding.of_plain(each) for each in result["findings"]]
    for found in (*health.compared(made, own, config.health), *own):
        say(console, f"{found.flag}: {found.sentence}")
    say(console, f"record and adapter in {folder}")


@app.command()
def status(study: StudyFolder, as_json: Json = False) -> None:
    """How far a study is, once."""
    from lora_sweep.cli import live as progress
    from lora_sweep.report import results
    from lora_sweep.study.view import StudyView
    from lora_sweep.sweep import compose as composition
    from lora_sweep.system.console import Console, say

    view = StudyView.read(study)
    table = results.rows(view)
    made = results.summary(view, table, composition.leaf(results.launched(view), "train.slots"))
    if as_json:
        print(json.dumps(made))
        return
    console = Console()
    states = ", ".join(f"{made[state]} {state}" for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"))
    say(console, f"{made['study']}: {made['cells']} cells: {states}; ETA {progress.duration(made['eta_seconds'])}")
    left = made["RUNNING"] + made["WAITING"]
    if left and not view.is_held:
        say(console, f"nobody works on it now; `launch` goes on with what is left ({left})")
    ranked = results.ranked(table)
    if ranked:
        progress.show_ranking(console, table, ranked)
    for line in progress.flag_lines(table):
        say(console, line)


@app.command()
def pick(study: StudyFolder, overrides: Overrides = None, as_json: Json = False) -> None:
    """Export the best healthy finished cell to STUDY/production; pick.form=lora writes it as plain LoRA."""
    from lora_sweep.cli.live import short
    from lora_sweep.errors import ConfigError, Fault
    from lora_sweep.production import pick as picker
    from lora_sweep.report import results
    from lora_sweep.runner import kept_base as bases
    from lora_sweep.study.view import StudyView
    from lora_sweep.sweep import check, sweep_file
    from lora_sweep.sweep import compose as composition
    from lora_sweep.system.console import Console, say

    asked, faults = sweep_file.read(None, overrides or [])
    faults += check.check(asked)[1]
    foreign = [word for word in overrides or [] if not word.startswith("pick.")]
    faults += [Fault(word, "pick reads pick.form only") for word in foreign]
    if faults:
        raise ConfigError(faults)
    launched = composition.leaf(results.launched(StudyView.read(study)), "pick.form")
    picked = picker.pick(study, asked.base().pick.form or launched)
    winner, production = picked.winner, picked.production
    if as_json:
        over = [row["number"] for row in picked.passed_over]
        print(json.dumps({"winner": winner, "production": str(production), "passed_over": over}))
        return
    console = Console()
    if picked.repaired:
        say(console, bases.moved(study, picked.repaired))
    for row in picked.passed_over:
        loss = f"{row['eval_loss']:.4f}"
        say(console, f"passed over: cell {row['number']:04d} with eval loss {loss}: {row['damage']}")
    share = winner["eval_loss"] / winner["base_loss"]
    say(console, f"winner: cell {winner['number']:04d}  {short(winner['params'])}")
    say(console, f"eval loss {winner['eval_loss']:.4f}, {share:.1%} of the base's; one seed, not yet confirmed")
    say(console, f"exported to {production}: production.yaml, adapter/, evidence.md")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or of several.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="PATH_OR_ID", help="Hold it against this base: the update relative to W."),
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

    made, errors = inspection.inspect(adapter, base, allow_pickle)
    if as_json and made:
        print(json.dumps({"adapters": [each.plain() for each in made]}, allow_nan=False))
    console = Console()
    for each in () if as_json else made:
        inspection.draw(console, each)
    if errors:
        raise UserError("\n".join(errors))


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="tasks: are the embedded tasks worth sweeping? speed: packed trials against the same trials alone; "
            "upkeep: what a trial costs beyond its steps, how long a refill holds the others up, and whether it grows; "
            "diagnosis: are faults named, and healthy trainings left alone?",
        ),
    ] = "tasks",
    overrides: Overrides = None,
    slots: Annotated[
        str, typer.Option(metavar="K,K,...", help="speed: slots of the packs compared; auto: as many as pay.")
    ] = "auto,1,4",
    trials: Annotated[
        int | None, typer.Option(help="speed: a multiple of every K, by default the smallest; upkeep: 20 or more.")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="speed: of every way but stock, in alternation.")] = 9,
    stock_repetitions: Annotated[int, typer.Option(help="Each a process per trial (upkeep: one); 0: none.")] = 1,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=N,...",
            help="speed: a Llama with random weights and random tokens: width=576,layers=8,heads=9,vocab=1024"
            "[,kv_heads=3,ffn=1536].",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="diagnosis: keeps each part there as soon as it is measured, and does not measure it again.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the project itself, here."""
    from lora_sweep.errors import ConfigError, Fault
    from lora_sweep.system.console import Console, say

    if what not in ("tasks", "speed", "upkeep", "diagnosis"):
        raise ConfigError([Fault("WHAT", "must be `tasks`, `speed`, `upkeep` or `diagnosis`", what)])
    if what == "upkeep":
        _bench_upkeep(overrides, 20 if trials is None else trials, stock_repetitions, as_json)
        return
    if what == "speed":
        _bench_speed(overrides, (slots, trials, repetitions, stock_repetitions, random), as_json)
        return
    if overrides:
        raise ConfigError([Fault(f"bench {what}", "takes no overrides", overrides[0])])
    chatter.import_quietly()
    with redirect_stdout(sys.stderr):  # transformers' Trainer, when imported, prints how W&B runs
        from lora_sweep.evidence import diagnosis, tasks

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    made = tasks.tasks(tell) if what == "tasks" else diagnosis.diagnosis(tell, keep=keep)
    if as_json:
        print(json.dumps(made))
        return
    for line in (tasks if what == "tasks" else diagnosis).lines(made):
        say(Console(), line)


def _bench_upkeep(overrides: list[str] | None, trials: int, stock_repetitions: int, as_json: bool) -> None:
    chatter.import_quietly()
    from lora_sweep.errors import ConfigError, Fault
    from lora_sweep.system.console import Console, say

    with redirect_stdout(sys.stderr):  # transformers' Trainer, when imported, prints how W&B runs
        from lora_sweep.bench import question, upkeep
        from lora_sweep.cli import validate as request

    if trials < 2:
        raise ConfigError([Fault("--trials", "must be at least 2", trials)])
    asked = request.checked(None, overrides, question.STEPS)
    made = upkeep.measure(asked, trials, stock_repetitions, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(made))
        return
    for line in upkeep.lines(made):
        say(Console(), line)


def _bench_speed(
    overrides: list[str] | None, asked: tuple[str, int | None, int, int, str | None], as_json: bool
) -> None:
    chatter.import_quietly()
    from lora_sweep.errors import ConfigError
    from lora_sweep.system.console import Console, say

    with redirect_stdout(sys.stderr):  # transformers' Trainer, when imported, prints how W&B runs
        from lora_sweep.bench import question, speed, table
        from lora_sweep.cli import validate as request

    compared = question.Question.of(*asked)
    is_drawn = compared.dimensions is not None
    config = request.checked(None, overrides, question.STEPS, unread=("model", "data") if is_drawn else ()).base()
    faults = question.check(config, compared)
    if faults:
        raise ConfigError(faults)
    made = speed.measure(config, compared, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps(made))
        return
    console = Console()
    for line in table.heading(made):
        say(console, line)
    console.print(table.table(made))
    for line in table.verdict(made):
        say(console, line)


def _conclude(console: "Console", folder: Path, table: list[dict[str, Any]], config: "Config") -> None:
    from lora_sweep.cli import live as progress
    from lora_sweep.report import results
    from lora_sweep.runner import launch as launch_room
    from lora_sweep.system.console import say

    ranked = results.ranked(table)
    if ranked:
        progress.show_ranking(console, table, ranked)
    for line in progress.flag_lines(table):
        say(console, line)
    winner = next((row for row in ranked if results.is_healthy(row)), None)
    if winner is None and all(row["reason"] == "memory" for row in table):
        say(console, "no cell was trained: there is not enough memory for one of them")
    elif winner is None:
        say(console, "no healthy cell is finished: widen the learning rates")
    else:
        share = winner["eval_loss"] / winner["base_loss"]
        say(console, f"winner: cell {winner['number']:04d}  {progress.short(winner['params'])}")
        say(
            console,
            f"  eval loss {winner['eval_loss']:.4f} nats per token, {share:.1%} of the base's",
        )
    say(console, f"all cells     {folder}/trials.jsonl")
    say(console, f"each trial    {folder}/trials/NNNN/  (metrics.jsonl, adapter/, result.json)")
    if config.tracker.name == "wandb":
        where = f"{folder}/wandb/  (wandb sync {folder}/wandb/offline-run-*)"
        where = where if config.tracker.mode == "offline" else config.tracker.project
        off = "none: WANDB_MODE or WANDB_DISABLED switches W&B off"
        say(console, f"W&B runs      {off if launch_room.is_switched_off() else where}")
    say(console, f"ship it       lora-sweep pick {folder}")
