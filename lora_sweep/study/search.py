"""Where cells come from that are no grid: a sampler of Optuna's draws them, by what has ended before."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, BruteForceSampler, GridSampler
from optuna.trial import Trial

from lora_sweep.records import Cell


@dataclass(frozen=True)
class Search:
    """Where sampled cells come from. Raises ValueError when it cannot serve."""

    sampler: BaseSampler
    distributions: Mapping[str, BaseDistribution]
    """Optuna's parameter name -> distribution; the same for the whole life of the study."""
    n_trials: int
    """Cells in all; lost attempts don't count."""
    decode: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Optuna's parameters (e.g. a log2 rank) -> the config values that Cell.params holds."""
    hold: int = 8
    """At most so many cells are drawn that don't fit and wait: each is drawn knowing less than it could."""
    same_run: Callable[[Cell], Hashable] | None = None
    """Equal for cells that are the same run, of which one is run for all; None: every cell is run."""

    def __post_init__(self) -> None:
        if self.n_trials < 1 or self.hold < 1:
            raise ValueError(f"n_trials and hold must be at least 1, got {self.n_trials} and {self.hold}")
        if not self.distributions:
            raise ValueError("distributions must name at least one parameter")
        if isinstance(self.sampler, GridSampler | BruteForceSampler):
            raise ValueError(f"{type(self.sampler).__name__} runs cells twice in parallel: give the grid as `cells`")

    def params(self, trial: Trial) -> dict[str, Any]:
        """What the sampler suggests for the trial, as the config values of a cell."""
        drawn = {name: _suggest(trial, name, each) for name, each in self.distributions.items()}
        return dict(self.decode(drawn))


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, FloatDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_float(name, low, high, step=distribution.step, log=distribution.log)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_int(name, low, high, step=distribution.step, log=distribution.log)
    return trial.suggest_categorical(name, cast(Any, distribution).choices)
