"""What a trial costs a worker beyond its passes, and whether that stays so over hundreds of trials.

A real study in a folder of its own: ledger, records, W&B runs, checkpoints and exports as configured. Whatever passes
between two calls of `Pack.advance` is overhead; a pause is such a stretch in which a slot was freed and filled again.
What a thread writes in the background is neither: it slows the passes, and shows in the seconds a trial.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lora_sweep.base.load import load as load_base
from lora_sweep.bench import gauge
from lora_sweep.bench.hf_trainer_process import TrainerProcess
from lora_sweep.data import load as load_data
from lora_sweep.pack import Pack, Trial
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.runner import launch, worker
from lora_sweep.study.view import Outcome
from lora_sweep.sweep.axis import Axis
from lora_sweep.sweep.sweep import Sweep

Say = Callable[[str], None]

CHECKS = 10
"""Times that the memory is measured."""
WINDOW = 5
"""A window is one in so many of the trials."""


@dataclass(frozen=True)
class Stretch:
    """One call of `Pack.advance`."""

    began: float
    ended: float
    slots: int
    live: int
    steps: int


@dataclass
class Clock:
    """A Watcher that notes when what happened."""

    trials: int
    device: torch.device
    stretches: list[Stretch] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    """When each trial had ended."""
    admissions: list[float] = field(default_factory=list)
    held_bytes: list[tuple[int, int]] = field(default_factory=list)
    """(trials that had ended, bytes of the process)."""
    reason: str | None = None
    checking: list[tuple[float, float]] = field(default_factory=list)
    """(begin, end) of each look at the memory, which no trial is charged with."""

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        self.admissions.append(time.perf_counter())

    def stepped(self) -> None: ...

    def noticed(self, sentence: str) -> None:
        pass

    def chosen(self, reason: str) -> None:
        self.reason = reason

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: BaselineLosses) -> None: ...

    def ended(self, cell: Cell, state: Outcome, value: float | None, flags: Sequence[str]) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) % max(1, self.trials // CHECKS) == 0:
            began = time.perf_counter()
            held = gauge.fresh_peak(self.device).held_bytes
            if held is not None:
                self.held_bytes.append((len(self.ends), int(held)))
            self.checking.append((began, time.perf_counter()))

    def passes(self, begin: float, end: float) -> float:
        """Seconds of these in passes; a trial may end in the middle of one."""
        inside = ((max(each.began, begin), min(each.ended, end)) for each in self.stretches)
        return sum(self.between(a, b) for a, b in inside if a < b)

    def between(self, begin: float, end: float) -> float:
        """Seconds, without memory checks."""
        return end - begin - sum(max(0.0, min(b, end) - max(a, begin)) for a, b in self.checking)


@contextmanager
def _timed(clock: Clock) -> Iterator[None]:
    """Notes every call of `Pack.advance`. From outside: a worker makes its packs itself, and need not know."""
    real = Pack.advance

    def advance(pack: Pack, stop: Callable[[], bool]) -> list[Evaluation]:
        live, began = pack.live, time.perf_counter()
        before = [pack.step(slot) for slot in live]
        evaluations = real(pack, stop)
        steps = max((pack.step(slot) - step for slot, step in zip(live, before, strict=True)), default=0)
        clock.stretches.append(Stretch(began, time.perf_counter(), pack.capacity.slots, len(live), steps))
        return evaluations

    Pack.advance = advance  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Pack.advance = real  # type: ignore[method-assign]


def measure(sweep: Sweep, trials: int, trainer_repetitions: int, say: Say) -> dict[str, Any]:
    """One study of `trials` seeds; seconds, bytes and shares, ready for JSON. Raises UserError."""
    config = sweep.base()
    worker.use_threads(config.launcher)
    device = worker.device(config.launcher)
    clock = Clock(trials, device)
    with tempfile.TemporaryDirectory(prefix="lora-sweep-bench-") as folder:
        seeds = Axis("train.seed", "range", tuple(range(trials)))
        own = (*sweep.overrides, f"++study.root={folder}", "++study.name=overhead")
        study = replace(sweep, overrides=own, axes=(seeds,))
        say(f"a study of {trials} trials")
        with _timed(clock):
            launch.launch(study, clock, lambda: False)
        startup: list[float] = []
        if trainer_repetitions:
            base = load_base(config.model, device, Path(folder))
            process = TrainerProcess(config, base, load_data(config.data, base.tokenizer), Path(folder))
            for repetition in range(trainer_repetitions):
                say(f"HF Trainer {repetition + 1} of {trainer_repetitions}")
                startup.append(process.run(Trial.of(Cell(0), config)).startup_seconds)
    return {
        "device": gauge.device_name(device),
        "model": config.model.name,
        "trials": trials,
        "steps": config.train.max_steps,
        "tracker": config.tracker.name,
        "reason": clock.reason,
    } | reduce(clock, startup)


def reduce(clock: Clock, startup_seconds: Sequence[float]) -> dict[str, Any]:
    """Overhead of a trial, pauses, occupancy, and what has grown from the first trials to the last."""
    stretches, trials = clock.stretches, clock.trials
    first, last = stretches[0].began, clock.ends[-1]
    passes = clock.passes(first, last)
    overhead = (clock.between(first, last) - passes) / trials
    pauses, each_refill = [], []
    for before, after in pairwise(stretches):
        refills = sum(before.ended <= at <= after.began for at in clock.admissions)
        if refills:
            pauses.append(clock.between(before.ended, after.began))
            each_refill.append(pauses[-1] / refills)
    # The queue has drained when the last trial is in.
    full = [each for each in stretches if each.began < clock.admissions[-1]]
    offered = sum(each.slots * each.steps for each in full)
    startup = statistics.median(startup_seconds) if startup_seconds else None
    windows = _windows(clock)
    held = [held for _, held in clock.held_bytes]
    return {
        "overhead_seconds_a_trial": overhead,
        "startup_seconds_of_trainer": startup,
        "share_of_startup": None if startup is None else overhead / startup,
        "pauses": len(pauses),
        "pause_seconds_a_refill": {"median": _median(each_refill), "max": max(each_refill, default=None)},
        "occupancy": min(1.0, sum(each.live * each.steps for each in full) / offered) if offered else None,
        "busy": passes / clock.between(first, last),
        "windows": windows,
        "growth_of_cost": None if windows is None else windows["last"]["seconds"] / windows["first"]["seconds"] - 1,
        "held_mib": [[ended, held / 2**20] for ended, held in clock.held_bytes],
        "growth_mib": (held[-1] - held[1]) / 2**20 if len(held) > 2 else None,
    }


def _windows(clock: Clock) -> dict[str, Any] | None:
    """Median seconds of a trial, passes and overhead, early and late; the first trials, which warm up, left out."""
    size = clock.trials // WINDOW
    if size < 4:
        return None
    early, late = clock.ends[size // 4 : size // 4 + size], clock.ends[-size:]
    return {name: _of_window(clock, part) for name, part in (("first", early), ("last", late))}


def _of_window(clock: Clock, ends: Sequence[float]) -> dict[str, float]:
    begin, end = ends[0], ends[-1]
    passes = clock.passes(begin, end)
    whole = clock.between(begin, end)
    count = len(ends) - 1
    return {"seconds": whole / count, "overhead": (whole - passes) / count, "passes": passes / count}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """What `measure` returned, for people."""
    trials = f"{measured['trials']} trials of {measured['steps']} steps"
    yield f"{measured['model']}, {trials}, tracker {measured['tracker']}: {measured['device']}"
    if measured["reason"]:
        yield measured["reason"]
    startup = measured["startup_seconds_of_trainer"]
    share = (
        f", {measured['share_of_startup']:.1%} of the {startup:.2f} s in which an HF Trainer trial starts"
        if startup
        else ""
    )
    yield f"overhead   {1e3 * measured['overhead_seconds_a_trial']:.0f} ms a trial beyond its passes{share}"
    pause = measured["pause_seconds_a_refill"]
    if measured["pauses"]:
        refill = f"median {1e3 * pause['median']:.0f} ms, longest {1e3 * pause['max']:.0f} ms"
        yield f"refill     {refill} a slot, in {measured['pauses']} pauses"
    if measured["occupancy"] is not None:
        yield f"occupancy  {measured['occupancy']:.1%} of the slots until the queue drained"
    yield f"busy       {measured['busy']:.1%} of the time in passes"
    if measured["windows"] is not None:
        early, late = measured["windows"]["first"], measured["windows"]["last"]
        yield (
            f"scale      {early['seconds']:.3f} s a trial early, {late['seconds']:.3f} s late "
            f"({measured['growth_of_cost']:+.1%}); "
            f"overhead {1e3 * early['overhead']:.0f} and {1e3 * late['overhead']:.0f} ms"
        )
    if measured["growth_mib"] is not None:
        (_, _), (early, _), *_, (late, _) = measured["held_mib"]
        yield f"memory     {measured['growth_mib']:+.1f} MiB from trial {early} to trial {late}"
