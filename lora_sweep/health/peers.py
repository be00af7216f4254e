"""The trials of a study that one of them is compared with: the best gain, and whether a tenth of the rate does better.

What a rate does to a LoRA depends on X = s r lr_B, the slope of its learning curve at the start, and on lr_A (a run's
effective coordinates); of trials whose optimizer has no such coordinates nothing is said.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_sweep.health.loss_history import paired_error

Numbers = NDArray[np.float64]

TENTH = math.log(10)

ABOUT = math.log(10 / 8)
"""A trial at an eighth of X stands for a tenth too."""

ROUNDING = 1e-6
"""Of lr_A as it is typed."""

AS_NEAR = 0.3
"""In natural logs of X and lr_A: trials that are about as near have other ranks, say, and the best of them counts."""


@dataclass(frozen=True)
class Peer:
    """A trial as others of its study see it."""

    cell: int
    log_X: float
    """nan where it is not known."""
    log_Y: float
    """Minus the natural log of lr_A; nan where it is not known."""
    curve: dict[int, float]
    """Step -> evaluation loss, nats per token."""
    losses: Callable[[int], Numbers | None]
    """Step -> (examples,) losses of that evaluation, nats per token; None where they were not kept."""


@dataclass(frozen=True)
class Cooler:
    """A trial at about a tenth of another's rates that does better than that one."""

    cell: int
    gain: float
    """By how much, nats per token."""
    error: float
    """Standard error of the gain, paired by example."""
    factor: float
    """By which its X is lower."""


class Peers:
    """The trials of a study on one base and one data set, as far as they have come."""

    def __init__(self, base_loss: float, trials: Iterable[Peer] = ()) -> None:
        """`base_loss`: of the base alone, nats per token."""
        self._base_loss = base_loss
        self._trials = {each.cell: each for each in trials}
        self._tables: dict[int, Numbers] = {}

    def add(self, trial: Peer) -> None:
        self._trials[trial.cell] = trial
        self._tables.clear()

    def record(self, cell: int, step: int, loss: float) -> None:
        """An evaluation of a trial that goes on."""
        self._trials[cell].curve[step] = loss
        self._tables.pop(step, None)

    def best_gain(self, step: int) -> float | None:
        """Over the base, of the trials that were evaluated at this step, nats per token; None where there is none."""
        losses = self._at(step)[:, 0]
        return self._base_loss - float(losses.min()) if len(losses) else None

    def cooler(self, cell: int, step: int, standard_errors: float) -> Cooler | None:
        """The trial that stands for `cell` at a tenth of both rates, if it does better at `step` beyond chance.

        It has at most an eighth of X and no larger lr_A; of those as near as any to a tenth of both it is the best.
        """
        trial = self._trials.get(cell)
        loss = None if trial is None else trial.curve.get(step)
        if trial is None or loss is None:
            return None
        table = self._at(step)
        below, slower = trial.log_X - table[:, 1] - TENTH, table[:, 2] - trial.log_Y
        fits = (below >= -ABOUT) & (slower >= -ROUNDING)
        if not fits.any():
            return None
        with np.errstate(invalid="ignore"):
            away = np.where(fits, np.hypot(below, slower - TENTH), np.inf)
        near = table[away <= away.min() + AS_NEAR]
        best = self._trials[int(near[near[:, 0].argmin(), 3])]
        here, there = trial.losses(step), best.losses(step)
        if here is None or there is None or len(here) != len(there):
            return None
        gain, error = loss - best.curve[step], paired_error(here - there)
        factor = math.exp(trial.log_X - best.log_X)
        return Cooler(best.cell, gain, error, factor) if gain > standard_errors * error else None

    def _at(self, step: int) -> Numbers:
        """(trials evaluated at this step, [loss, log X, log Y, cell])."""
        if step not in self._tables:
            rows = [
                (each.curve[step], each.log_X, each.log_Y, each.cell)
                for each in list(self._trials.values())  # another thread may add to them
                if each.curve.get(step) is not None
            ]
            self._tables[step] = np.array(rows, np.float64).reshape(-1, 4)
        return self._tables[step]
