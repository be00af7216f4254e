"""Successive halving, decided by all values of a rung together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_sweep.errors import ConfigError, Fault


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2020, 1810.05934), decided by all values stored at the rung.

    All in optimizer steps. Raises ConfigError (a ValueError) with every fault.
    """

    eta: int
    """At each rung the best floor(n / eta) of n go on, at least one; >= 2."""
    min_steps: int
    """>= 1 and below max_steps: no cell is pruned earlier."""
    max_steps: int
    eval_every: int
    """>= 1; values exist at its multiples only."""

    def __post_init__(self) -> None:
        faults = [
            Fault(key, f"must be an integer of at least {least}", got)
            for key, least, got in (
                ("pruner.eta", 2, self.eta),
                ("pruner.min_steps", 1, self.min_steps),
                ("train.max_steps", 1, self.max_steps),
                ("train.eval_every", 1, self.eval_every),
            )
            if type(got) is not int or got < least
        ]
        if not faults and not self.rungs:
            first = _ceil_to(self.min_steps, self.eval_every)
            faults.append(
                Fault(
                    "pruner.min_steps",
                    f"must leave an evaluation before train.max_steps={self.max_steps}; with "
                    f"train.eval_every={self.eval_every} the first is at step {first}",
                    self.min_steps,
                    "lower min_steps or eval_every, or use pruner=none",
                )
            )
        if faults:
            raise ConfigError(faults)

    @property
    def rungs(self) -> tuple[int, ...]:
        """The evaluation steps at or first after min_steps * eta**k, below max_steps, ascending."""
        steps: list[int] = []
        target = self.min_steps
        while (step := _ceil_to(target, self.eval_every)) < self.max_steps:
            if step not in steps:
                steps.append(step)
            target *= self.eta
        return tuple(steps)

    def survivors(self, values: Mapping[int, float]) -> frozenset[int]:
        """Which of {cell number: loss} go on: the lowest max(1, floor(n / eta)), ties to the lower number.

        n counts all values; those that are not finite never go on.
        """
        ranked = sorted((value, number) for number, value in values.items() if math.isfinite(value))
        return frozenset(number for _, number in ranked[: max(1, len(values) // self.eta)])


def _ceil_to(steps: int, multiple: int) -> int:
    return -(-steps // multiple) * multiple
