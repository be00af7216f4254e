"""A sweep: axes over a configuration, the cells of its grid, and each cell's own configuration."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution

from lora_sweep.config import Config
from lora_sweep.records import Cell
from lora_sweep.sweep import equivalence
from lora_sweep.sweep.axis import Axis
from lora_sweep.sweep.cell_configs import CellConfigs


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its command line: what is asked, and how each cell becomes a trial's configuration.

    >>> len(sweep.cells()), sweep.cells()[0].params["method.rank"], sweep.config(sweep.cells()[-1]).method.rank
    (24, 2, 4)
    """

    content: Mapping[str, Any]
    """The sweep file without `space`; empty for a single trial."""
    overrides: tuple[str, ...]
    """Fixed values and group choices of the command line."""
    axes: tuple[Axis, ...]

    @cached_property
    def _configs(self) -> CellConfigs:
        return CellConfigs(self.content, self.overrides, self.axes)

    def composed(self) -> DictConfig:
        """The configuration before a cell's values."""
        return self._configs.composed()

    def merged(self, params: Mapping[str, Any]) -> DictConfig:
        """The configuration with a cell's parameters in it, interpolations unresolved."""
        return self._configs.merged(params)

    @cached_property
    def _built(self) -> dict[int, tuple[Cell, Config]]:
        return {}

    def config(self, cell: Cell) -> Config:
        """The trial's own configuration. Raises ConfigError."""
        built = self._built.get(cell.number)
        if built is None or built[0] != cell:
            built = self._built[cell.number] = (cell, self._configs.of(cell.params))
        return built[1]

    def largest_rank(self) -> int:
        """Of any cell, a derived rank included as long as it grows with each axis by itself."""
        ends = [{axis.key: axis.ends[end] for axis in self.axes} for end in (0, 1)]
        tried = [*ends, *(ends[0] | {axis.key: value} for axis in self.axes for value in axis.values or axis.ends)]
        return max(self._configs.of(params).method.rank for params in tried)

    def base(self) -> Config:
        """The configuration at the first value of every axis: for what all cells share."""
        return self._configs.of({axis.key: axis.ends[0] for axis in self.axes})

    def cells(self) -> tuple[Cell, ...]:
        """Every cell of the grid, numbered in the order of the axes, the last one fastest."""
        keys = [axis.key for axis in self.axes]
        grid = itertools.product(*(axis.values for axis in self.axes))
        return tuple(Cell(number, dict(zip(keys, values, strict=True))) for number, values in enumerate(grid))

    def drawn(self, count: int, seed: int) -> tuple[Cell, ...]:
        """Cells at random, each axis by itself; the same for one seed."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        params = (study.ask(self.distributions()).params for _ in range(count))
        return tuple(Cell(number, self.decode(each)) for number, each in enumerate(params))

    def classes(self, fold: equivalence.Fold) -> tuple[equivalence.SameRun, ...]:
        """The cells of the grid in classes of the same run. Raises ConfigError."""
        return equivalence.classes({cell.number: self.config(cell) for cell in self.cells()}, fold)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {axis.key: axis.distribution() for axis in self.axes}

    def decode(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters as values of the configuration."""
        return {axis.key: axis.decode(drawn[axis.key]) for axis in self.axes}

    def as_launched(self) -> dict[str, Any]:
        """What a relaunch is compared with; also the study's config.yaml, references between fields kept."""
        plain: dict[str, Any] = OmegaConf.to_container(self.composed(), resolve=False)  # type: ignore[assignment]
        return plain | {"space": {axis.key: str(axis) for axis in self.axes}}
