"""The losses that somebody else's trainer logs -> the gain over the base, and how the training went. Pure.

It logs means over some steps, and evaluations without their examples: there is no error paired by example, so chance is
told from how far the logged losses wander.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_sweep.config import HealthConfig

START, END = 1, 3
"""Logged losses that stand for the base and for the trained adapter, where nothing was evaluated at step 0."""


@dataclass
class Logged:
    """What was logged of one training; losses as the trainer counts them."""

    knows_start: bool = True
    """Whether the first loss is that of the first steps."""
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
