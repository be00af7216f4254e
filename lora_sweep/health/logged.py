"""The losses that somebody else's trainer logs -> the gain over the base, and how the training went. Pure.

It logs means over some steps, and evaluations without their examples: there is no error paired by example, so chance is
told from how far the logged losses wander.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lora_sweep.config import HealthConfig
from lora_sweep.health import loss_history
from lora_sweep.records import Estimate, Finding

START, END = 1, 3
"""Logged losses that stand for the base and for the trained adapter, where nothing was evaluated at step 0."""

OF_DIFFERENCES = 0.6745 * math.sqrt(2)
"""The median size of the difference of two losses, in their standard deviations."""


@dataclass
class Logged:
    """What was logged of one training; losses as the trainer counts them."""

    knows_start: bool = True
    """Whether the first loss is that of the first steps."""
    warmup_steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean over the steps since the one before)."""
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss)."""

    def take(self, row: Mapping[str, Any], step: int) -> None:
        """A row of transformers' log."""
        if "loss" in row:
            self.losses.append((step, float(row["loss"])))
        if "eval_loss" in row:
            self.evaluations.append((step, float(row["eval_loss"])))

    @property
    def base_loss(self) -> float | None:
        """Of the evaluation before the first step; None where there was none."""
        return next((loss for step, loss in self.evaluations if step == 0), None)

    def gain(self, rules: HealthConfig) -> tuple[float | None, float]:
        """(gain over the base, what could be chance): of evaluations if one came first, else of logged losses."""
        finite = [loss for _, loss in self.losses if math.isfinite(loss)]
        end = finite[-END:]
        chance = rules.min_gain_standard_errors * statistics.stdev(end) if len(end) > 1 else 0.0
        base, trained = self.base_loss, [loss for step, loss in self.evaluations if step > 0]
        if base is not None and trained:
            start, stop = base, trained[-1]
        elif self.knows_start and len(finite) >= START + END:
            start, stop = statistics.mean(finite[:START]), statistics.mean(end)
        else:
            return None, 0.0
        if not math.isfinite(start - stop):
            return None, 0.0
        return start - stop, max(rules.min_gain_of_base * start, chance)

    def error(self, rules: HealthConfig) -> float | None:
        """Standard error of a gain between two evaluations, on the same examples; None where losses of steps tell it.

        Of its examples nothing is logged: the share of the base's loss that is no gain stands for two errors.
        """
        base = self.base_loss
        return None if base is None or len(self.evaluations) < 2 else rules.min_gain_of_base * base / loss_history.SURE

    def fall(self) -> Estimate | None:
        """How far the logged losses fell; None where they are too few to tell."""
        finite = [(step, loss) for step, loss in self.losses if math.isfinite(loss)]
        return loss_history.trend([step for step, _ in finite], [loss for _, loss in finite])

    def not_finite(self, checks: Sequence[tuple[int, bool]] = ()) -> Finding | None:
        """Whether losses, evaluations or the adapter itself came to an end that is not finite.

        Args:
            checks: (step, whether A and B were finite). They are needed: transformers logs 0 for a loss that is not.
        """
        finite_at = [[(step, math.isfinite(loss)) for step, loss in each] for each in (self.losses, self.evaluations)]
        finite_at.append([*checks])
        broken = [step for each in finite_at if (step := _broken_at(each)) is not None]
        if not broken:
            return None
        finite = (step for each in finite_at for step, is_finite in each if is_finite and step < min(broken))
        return loss_history.not_finite(max(finite, default=0))

    def findings(self, rules: HealthConfig) -> Iterator[Finding]:
        """Of finite losses, worst first. Overfitting needs errors by example, which nobody logs."""
        steps, L0 = self._by_step(), self._highest_start()
        base = self.base_loss
        trained = [loss for step, loss in self.evaluations if step > 0 and math.isfinite(loss)]
        diverged = None if L0 is None else loss_history.above_start(steps[self.warmup_steps :], L0)
        if diverged is None and base is not None and math.isfinite(base) and trained:
            error = max(rules.min_gain_of_base * base / loss_history.SURE, self._wander())
            diverged = loss_history.given_back(base - min(trained), error, base - trained[-1])
        if diverged is not None:
            yield diverged
        # A mean over several steps hides a jump.
        if L0 is not None and len(steps) == len(self.losses):
            spikes = loss_history.spiking(steps, self.warmup_steps, L0)
            if spikes is not None:
                yield spikes

    def _by_step(self) -> list[float]:
        """The loss of each step that was logged, or the mean that it went into."""
        steps = [0, *(step for step, _ in self.losses)]
        return [
            loss
            for (before, step), (_, loss) in zip(pairwise(steps), self.losses, strict=True)
            for _ in range(step - before)
        ]

    def _highest_start(self) -> float | None:
        """What the loss of the training data at step 0 can have been at most: the first one is of few examples.

        Where it is a mean over many steps, what the loss did in those is not seen.
        """
        has_start = self.knows_start and len(self.losses) > 1
        return self.losses[0][1] + loss_history.SURE * self._wander() if has_start else None

    def _wander(self) -> float:
        """Standard deviation of a logged loss about its course, by the differences, whatever a few jumps do."""
        differences = np.abs(np.diff([loss for _, loss in self.losses if math.isfinite(loss)]))
        return float(np.median(differences)) / OF_DIFFERENCES if len(differences) else 0.0


def _broken_at(finite_at: Sequence[tuple[int, bool]]) -> int | None:
    """The step from which on nothing was finite; None where the last is."""
    broken = None
    for step, is_finite in reversed(finite_at):
        if is_finite:
            break
        broken = step
    return broken
