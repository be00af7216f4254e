"""From what was timed to the rows of the table: medians, ratios with their bounds, factors, losses side by side."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_sweep.bench import gauge

RESAMPLES = 10_000


@dataclass(frozen=True)
class Run:
    """All trials, once, in one way."""

    seconds: float
    eval_losses: tuple[float, ...]
    """The last of each trial, in their order."""
    peak_bytes: int | None
    """Above what was held before."""


@dataclass(frozen=True)
class TrainerRun:
    """One trial in its own process."""

    eval_loss: float
    startup_seconds: float
    """From the process's start to the first step."""
    training_seconds: float
    """Steps and evaluations."""
    seconds: float
    """The process from start to end."""
    peak_bytes: int | None


@dataclass(frozen=True)
class Work:
    """What all trials together do once."""

    trained_tokens: int
    """Tokens trained on, without padding."""
    evaluated_tokens: int
    multiplied_parameters: int

    @property
    def flop(self) -> int:
        return gauge.flop(self.multiplied_parameters, self.trained_tokens, self.evaluated_tokens)


def bounds(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bounds of the median, by the bootstrap (Efron 1979): quantiles of RESAMPLES medians."""
    drawn = np.random.default_rng(seed).choice(np.asarray(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative one of any trial; inf where only one side is finite."""
    worst = 0.0
    for mine, other in zip(losses, reference, strict=True):
        if math.isfinite(mine) and math.isfinite(other):
            worst = max(worst, abs(mine - other) / abs(other))
        elif math.isfinite(mine) or math.isfinite(other):
            worst = math.inf
    return worst


def reduce(
    runs: dict[str, list[Run]], trainer_runs: list[list[TrainerRun]], work: Work, peak: float, tolerance: float
) -> dict[str, Any]:
    """Rows of the table and the factors.

    Args:
        runs: `sequential` and `packed K` -> one Run a repetition, in the order of the repetitions. A packed row's ratio
            is that of the seconds of (b) to its own, repetition by repetition. Factors, where HF Trainer was run:
            `total` = `start_up` (the processes' whole time over their training time) x `trainer` (that over (b)) x
            `packing` (the ratio).
    """
    reference = runs["sequential"]
    b_seconds = statistics.median(run.seconds for run in reference)
    rows, factors = [], {}
    if trainer_runs:
        rows.append(_trainer_row(trainer_runs, reference[0], work, peak, b_seconds))
    for name, own in runs.items():
        K = None if name == "sequential" else int(name.partition(" ")[2])
        ratios = [b.seconds / c.seconds for b, c in zip(reference, own, strict=True)]
        low, high = bounds(ratios)
        seconds = statistics.median(run.seconds for run in own)
        peaks = [run.peak_bytes for run in own if run.peak_bytes is not None]
        rows.append(
            {
                "way": "sequential" if K is None else "packed",
                "slots": K,
                "seconds": [run.seconds for run in own],
                "median_seconds": seconds,
                "ratios": ratios,
                "ratio": statistics.median(ratios),
                "ratio_low": low,
                "ratio_high": high,
                **_speed(work, seconds, peak),
                "peak_mib": max(peaks) / 2**20 if peaks else None,
                "eval_losses": [_plain(loss) for loss in own[-1].eval_losses],
                "largest_difference": _plain(
                    max(difference(c.eval_losses, b.eval_losses) for b, c in zip(reference, own, strict=True))
                ),
            }
        )
        if trainer_runs and K is not None:
            whole, training = rows[0]["median_seconds"], rows[0]["median_training_seconds"]
            factors[str(K)] = {
                "start_up": whole / training,
                "trainer": training / b_seconds,
                "packing": rows[-1]["ratio"],
                "total": whole / b_seconds * rows[-1]["ratio"],
            }
    worst = [row["largest_difference"] for row in rows]
    agree = all(each is not None and each <= tolerance for each in worst)
    return {
        "trained_tokens": work.trained_tokens,
        "evaluated_tokens": work.evaluated_tokens,
        "rows": rows,
        "factors": factors,
        "tolerance": tolerance,
        "losses_agree": agree,
    }


def _trainer_row(
    trainer_runs: list[list[TrainerRun]], reference: Run, work: Work, peak: float, b_seconds: float
) -> dict[str, Any]:
    """Sums over the trials, medians over the repetitions."""
    whole = [sum(each.seconds for each in repetition) for repetition in trainer_runs]
    training = [sum(each.training_seconds for each in repetition) for repetition in trainer_runs]
    seconds = statistics.median(whole)
    ratios = [b_seconds / each for each in whole]
    low, high = bounds(ratios)
    processes = [each for repetition in trainer_runs for each in repetition]
    peaks = [each.peak_bytes for each in processes if each.peak_bytes is not None]
    losses = [tuple(each.eval_loss for each in repetition) for repetition in trainer_runs]
    return {
        "way": "HF Trainer",
        "slots": None,
        "seconds": whole,
        "median_seconds": seconds,
        "training_seconds": training,
        "median_training_seconds": statistics.median(training),
        "startup_seconds": [each.startup_seconds for each in processes],
        "median_startup_seconds": statistics.median(each.startup_seconds for each in processes),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        **_speed(work, seconds, peak),
        "peak_mib": max(peaks) / 2**20 if peaks else None,
        "eval_losses": [_plain(loss) for loss in losses[-1]],
        "largest_difference": _plain(max(difference(each, reference.eval_losses) for each in losses)),
    }


def _speed(work: Work, seconds: float, peak: float) -> dict[str, float]:
    """Over the whole time, evaluations and admissions included."""
    return {"tokens_per_second": work.trained_tokens / seconds, "mfu": work.flop / seconds / peak}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
