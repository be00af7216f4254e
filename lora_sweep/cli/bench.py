"""`lora-sweep bench`: what a user measures, and the project's claims, measured here."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from lora_sweep.system import chatter

app = typer.Typer(help="Measure speed, overhead and the project's own claims, here.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Hydra overrides: train.max_steps=12")
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, nothing else.")]


@app.command()
def speed(
    overrides: Overrides = None,
    slots: Annotated[
        str, typer.Option(metavar="K,K,...", help="Slots of the packs compared; auto: the fastest measured.")
    ] = "auto,1,4",
    trials: Annotated[int | None, typer.Option(help="A multiple of every K; by default the smallest.")] = None,
    repetitions: Annotated[int, typer.Option(help="Of every way but HF Trainer, in alternation.")] = 9,
    trainer_repetitions: Annotated[int, typer.Option(help="Of HF Trainer, a process per trial; 0: none.")] = 1,
    random: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=N,...",
            help="A Llama with random weights and random tokens: width=576,layers=8,heads=9,vocab=1024"
            "[,kv_heads=3,ffn=1536].",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Packed trials against the same trials alone, and against HF Trainer with PEFT."""
    with _imported_quietly():
        from lora_sweep.bench import question, table
        from lora_sweep.bench import speed as bench_speed
        from lora_sweep.cli.validate import validate_sweep
    from lora_sweep.errors import ConfigError
    from lora_sweep.system.console import Console, say

    compared = question.Question.of(slots, trials, repetitions, trainer_repetitions, random)
    unread = () if compared.dimensions is None else ("model", "data")
    config = validate_sweep(None, overrides, question.STEPS, unread=unread).base()
    if faults := question.check(config, compared):
        raise ConfigError(faults)
    measured = bench_speed.measure(config, compared, _progress)
    if as_json:
        print(json.dumps(measured))
        return
    console = Console()
    for line in table.heading(measured):
        say(console, line)
    console.print(table.table(measured))
    for line in table.verdict(measured):
        say(console, line)


@app.command()
def overhead(
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(help="20 or more show whether the cost of a trial grows.")] = 20,
    trainer_repetitions: Annotated[int, typer.Option(help="Of HF Trainer, a process each; 0: none.")] = 1,
    as_json: Json = False,
) -> None:
    """What a trial costs beyond its steps, how long a refill holds the others up, and whether it grows."""
    with _imported_quietly():
        from lora_sweep.bench import overhead as bench_overhead
        from lora_sweep.bench import question
        from lora_sweep.cli.validate import validate_sweep
    from lora_sweep.errors import ConfigError, Fault

    if trials < 2:
        raise ConfigError([Fault("--trials", "must be at least 2", trials)])
    sweep = validate_sweep(None, overrides, question.STEPS)
    measured = bench_overhead.measure(sweep, trials, trainer_repetitions, _progress)
    _print(measured, bench_overhead.lines(measured), as_json)


@app.command()
def tasks(as_json: Json = False) -> None:
    """Are the embedded tasks worth sweeping?"""
    with _imported_quietly():
        from lora_sweep.evidence import tasks as evidence_tasks

    measured = evidence_tasks.tasks(_progress)
    _print(measured, evidence_tasks.lines(measured), as_json)


@app.command()
def diagnosis(
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Keeps each part there as soon as it is measured, and does not measure it again."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Are faults named, and healthy trainings left alone?"""
    with _imported_quietly():
        from lora_sweep.evidence import diagnosis as evidence_diagnosis

    measured = evidence_diagnosis.diagnosis(_progress, keep=keep)
    _print(measured, evidence_diagnosis.lines(measured), as_json)


@contextmanager
def _imported_quietly() -> Iterator[None]:
    chatter.import_quietly()
    with redirect_stdout(sys.stderr):  # transformers' Trainer, when imported, prints how W&B runs
        yield


def _progress(line: str) -> None:
    print(line, file=sys.stderr)


def _print(measured: object, lines: Iterator[str], as_json: bool) -> None:
    from lora_sweep.system.console import Console, say

    if as_json:
        print(json.dumps(measured))
        return
    for line in lines:
        say(Console(), line)
