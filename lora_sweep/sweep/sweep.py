"""The search space: Hydra's override grammar on one side, cells and Optuna's distributions on the other.

    space:
      method.rank: choice(4, 16, 64)
      optimizer.base_lr: tag(log, interval(1e-5, 1e-3))

The same words on the command line replace an axis (`method.rank=choice(8,32)`) or fix it (`method.rank=8`).
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution

from lora_sweep import config as schema
from lora_sweep.config import Config, HealthConfig
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.records import Cell
from lora_sweep.study.asha import Asha
from lora_sweep.sweep import compose as composition
from lora_sweep.sweep import equivalence as folding
from lora_sweep.sweep import optuna_classes as samplers
from lora_sweep.sweep.axis import Axis, inside, of_override, parse, written

SWEPT_GROUPS = ("model", "data", "method", "optimizer", "train")
"""Groups whose keys may be an axis; the others say how a study is run, not what is asked."""

MAX_CELLS = 50_000
"""Of a grid, and combinations of the values that a sampler draws from: more is a slip, and each is checked."""

NEVER_SWEPT = ("train.slots", "model.trust_remote_code")


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its command line: what is asked, and how each cell becomes a trial's configuration."""

    content: Mapping[str, Any]
    """The sweep file without `space`; empty for a single trial."""
    overrides: tuple[str, ...]
    """Fixed values and group choices of the command line."""
    axes: tuple[Axis, ...]

    @cached_property
    def _composed(self) -> dict[tuple[str, ...], DictConfig]:
        return {}

    def composed(self, groups: Sequence[str] = ()) -> DictConfig:
        """The configuration under `groups` (`data=facts`, ...), before a cell's values."""
        key = tuple(groups)
        if key not in self._composed:
            self._composed[key] = composition.compose([*self.overrides, *key], self.content)
        return self._composed[key]

    def merged(self, params: Mapping[str, Any]) -> DictConfig:
        """The configuration with a cell's parameters in it, interpolations unresolved."""
        groups = [f"{key}={value}" for key, value in params.items() if key in schema.GROUPS]
        config: DictConfig = self.composed(groups).copy()
        for key, value in params.items():
            if key not in schema.GROUPS:
                OmegaConf.update(config, key, value, force_add=True)
        return config

    @cached_property
    def _built(self) -> dict[int, tuple[Cell, Config]]:
        return {}

    def config(self, cell: Cell) -> Config:
        """The trial's own configuration. Raises ConfigError."""
        known = self._built.get(cell.number)
        if known is None or known[0] != cell:
            known = self._built[cell.number] = (cell, composition.build(self.merged(cell.params)))
        return known[1]

    def largest_rank(self) -> int:
        """Of any cell, a derived rank included as long as it grows with each axis by itself."""
        ends = [{axis.key: axis.ends[end] for axis in self.axes} for end in (0, 1)]
        tried = [*ends, *(ends[0] | {axis.key: value} for axis in self.axes for value in axis.values or axis.ends)]
        return max(composition.build(self.merged(params)).method.rank for params in tried)

    def base(self) -> Config:
        """The configuration at the first value of every axis: for what all cells share."""
        return composition.build(self.merged({axis.key: axis.ends[0] for axis in self.axes}))

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

    def classes(self, fold: folding.Fold) -> tuple[folding.SameRun, ...]:
        """The cells of the grid in classes of the same run. Raises ConfigError."""
        return folding.classes({cell.number: self.config(cell) for cell in self.cells()}, fold)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {axis.key: axis.distribution() for axis in self.axes}

    def decode(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters as values of the configuration."""
        return {axis.key: axis.decode(drawn[axis.key]) for axis in self.axes}

    def as_launched(self) -> dict[str, Any]:
        """What a relaunch is compared with; also the study's config.yaml, references between fields kept."""
        plain: dict[str, Any] = OmegaConf.to_container(self.composed(), resolve=False)  # type: ignore[assignment]
        return plain | {"space": {axis.key: str(axis) for axis in self.axes}}


def read(path: str | None, overrides: Sequence[str]) -> tuple[Sweep, list[Fault]]:
    """A sweep file (or None for a single trial) with the command line's overrides, and every fault of their form.

    What is faulty is left out of the sweep, so that `check` can tell the faults of the rest too. Raises ConfigError
    where the file cannot be read at all.
    """
    content, space, name = _read_file(path) if path is not None else ({}, {}, "train")
    faults: list[Fault] = []
    axes: dict[str, Axis] = {}
    fixed: list[str] = []
    for key, text in space.items():
        if isinstance(text, list):
            faults.append(Fault(key, "must be in Hydra's grammar", text, f"choice({', '.join(map(written, text))})"))
            continue
        line = f"{key}={written(text)}"
        faults += composition.text_faults(f"space.{key}", line)
        parsed = parse(line, faults)
        if parsed is not None:
            _sort_in(parsed, axes, fixed, faults)
    for line in overrides:
        faults += composition.text_faults(line.partition("=")[0], line)
        parsed = parse(line, faults)
        if parsed is not None:
            if not parsed.is_sweep_override():
                axes.pop(parsed.key_or_group, None)
            _sort_in(parsed, axes, fixed, faults)
    content["study"] = {"name": name} | (content.get("study") or {})
    unsafe = _content_faults(content)
    if unsafe:
        raise ConfigError([*faults, *unsafe])
    for key in list(axes):
        unknown = _key_faults(key)
        if unknown:
            faults += unknown
            del axes[key]
    return Sweep(content, tuple(fixed), tuple(axes.values())), faults


HOW_NOT_WHAT = (
    "tracker", "launcher", "pick", "study.root", "study.keep_adapters", "study.fold", "study.verify_fold",
    "train.slots",
)  # fmt: skip
"""What a relaunch may change: it says how a study runs, not what its numbers mean."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a relaunch would change in a study's meaning, a line each."""
    old, new = (dict(composition.leaves(tree)) for tree in (before, now))
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        means = not any(key == how or key.startswith(f"{how}.") for how in HOW_NOT_WHAT)
        if means and old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    return lines


def load_launched(folder: Path, name: str = "config.yaml") -> dict[str, Any] | None:
    """A study's or a trial's configuration, or None where there is none. Raises ConfigError when it cannot be read."""
    file = folder / name
    if not os.path.lexists(file):
        return None
    plain = composition.read_yaml(file)
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ConfigError([Fault(str(file), "must hold a mapping of groups, as `launch` wrote it")])
    return plain


def of_launched(plain: Mapping[str, Any]) -> Config:
    """The configuration in a trial's config.yaml; knobs younger than it are at their defaults. Raises ConfigError."""
    whole = OmegaConf.merge(composition.compose([]), OmegaConf.create(dict(plain)))
    assert isinstance(whole, DictConfig)
    return composition.build(whole)


def health_rules(launched: Mapping[str, Any]) -> HealthConfig:
    """By which a study's trials are judged: those that it was launched with, younger ones at their defaults.

    Raises ConfigError.
    """
    health: HealthConfig = composition.section("health", launched.get("health", {}))
    return health


def find(path: str) -> Path:
    """The sweep file: as given, or of that name among the shipped ones. Raises ConfigError."""
    shipped = composition.shipped("sweeps")
    for candidate in (Path(path), shipped / Path(path).name, shipped / f"{Path(path).name}.yaml"):
        if candidate.exists() and not candidate.is_dir():
            return candidate
    known = sorted(f"sweeps/{file.name}" for file in shipped.glob("*.yaml"))
    remedy = composition.nearest(path, known) or f"shipped are {', '.join(known)}"
    raise ConfigError([Fault("SWEEP", "no such file", path, remedy)])


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    file = find(path)
    content = composition.read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError([Fault(str(file), "must hold a mapping with `space`")])
    space = content.pop("space", None) or {}
    if not isinstance(space, dict):
        raise ConfigError([Fault("space", "must map a key to choice(...), range(...) or interval(...)", space)])
    study = content.get("study")
    if study is not None and not isinstance(study, dict):
        raise ConfigError([Fault("study", "must be a mapping", study)])
    flat = {key: value for name, value in space.items() for key, value in _flat(str(name), value)}
    return {str(key): value for key, value in content.items()}, flat, file.stem


def _flat(key: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _flat(f"{key}.{name}", below)
    else:
        yield key, value


def _content_faults(content: Mapping[str, Any]) -> list[Fault]:
    faults = composition.unsafe(content)
    for key in content:
        if key == "hydra" or "searchpath" in key:
            faults.append(Fault(key, "Hydra's own settings and search paths are refused in a sweep file"))
        elif "." in key:
            faults.append(Fault(key, "dotted keys are read under `space` only", None, "nest it: `method: {rank: 8}`"))
    return faults


def _sort_in(parsed: Override, axes: dict[str, Axis], fixed: list[str], faults: list[Fault]) -> None:
    """Puts an override where it belongs: among the axes or the fixed values."""
    key, line = parsed.key_or_group, str(parsed.input_line)
    if parsed.type is OverrideType.DEL or parsed.package is not None:
        faults.append(Fault(line, "deletions and packages are not read", None, "give the key a value"))
    elif key.split(".")[0] == "hydra":
        faults.append(Fault(key, "Hydra's own settings are not read"))
    elif parsed.is_sweep_override():
        axis = of_override(parsed, faults)
        if axis is not None:
            axes[key] = axis
    elif key in schema.GROUPS:
        fixed.append(f"{key}={parsed.value()}")
    elif "." not in key:
        faults.append(_unknown(key))
    else:
        fixed.append("++" + line.lstrip("+"))


def _key_faults(key: str) -> list[Fault]:
    """An axis must be a known key of a trial's configuration."""
    group, _, name = key.partition(".")
    if group in schema.GROUPS and (group not in SWEPT_GROUPS or key in NEVER_SWEPT):
        return [Fault(key, f"cannot be swept, only keys of {', '.join(SWEPT_GROUPS)} can")]
    if key in SWEPT_GROUPS or (
        group in SWEPT_GROUPS and name in [field.name for field in fields(schema.GROUPS[group])]
    ):
        return []
    return [_unknown(key)]


def _unknown(key: str) -> Fault:
    known = [f"{group}.{field.name}" for group, section in schema.GROUPS.items() for field in fields(section)]
    same_name = [full for full in known if full.endswith(f".{key}")]
    near = f"did you mean {same_name[0]}?" if same_name else composition.nearest(key, [*known, *schema.GROUPS])
    return Fault(key or "=", "unknown key", None, near or "see conf/")


def check(sweep: Sweep) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(the faultless groups at the first values and with each axis varied by itself, every fault found on the way).

    Looks at axes, values, samplers and pruners; files and devices are for the rooms that read them.
    """
    count = math.prod(len(axis.values) for axis in sweep.axes if axis.kind != "interval")
    if count > MAX_CELLS:
        rule = f"must have at most {MAX_CELLS:,} combinations of the values of its axes"
        return [], [Fault("space", rule, f"{count:,}", "an interval takes any number: interval(1e-5, 1e-3)")]
    faults: list[Fault] = []
    tried: dict[str, list[Any]] = {}
    with composition.groups():
        for axis in sweep.axes:
            tried[axis.key] = list(axis.values or (*axis.ends, inside(axis)))
            for value in axis.values if axis.is_group else ():
                unknown = composition.option_faults(axis.key, value)
                if unknown:
                    faults += unknown
                    tried[axis.key].remove(value)
    first = {key: values[0] for key, values in tried.items() if values}
    try:
        varied = [first, *(first | {key: value} for key, values in tried.items() for value in values[1:])]
        variants = []
        for params in varied:
            good, found = composition.sections(sweep.merged(params))
            variants.append(good)
            faults += [*map(partial(_of_interval, sweep), found), *schema.cross_faults(good)]
    except ConfigError as error:
        return [], [*faults, *error.faults]
    faults += _trust_faults(sweep, variants)
    for groups in variants:
        # What is refused is read by nobody.
        if "model" in groups and groups["model"].trust_remote_code and not _is_trusted(sweep):
            del groups["model"]
    sampler, pruner = variants[0].get("sampler"), variants[0].get("pruner")
    if sampler is not None:
        if sampler.name == "grid" and not faults:
            faults += _combination_faults(sweep)
        if sampler.name == "grid":
            for axis in sweep.axes:
                if axis.kind == "interval":
                    rule = "a grid cannot run over an interval"
                    faults.append(Fault(axis.key, rule, str(axis), "choice(...), or sampler=tpe"))
        if sampler.instance is not None:
            faults += samplers.target_faults("sampler.instance", sampler.instance, "samplers")
    if pruner is not None and pruner.instance is not None:
        faults += samplers.target_faults("pruner.instance", pruner.instance, "pruners")
    train = variants[0].get("train")
    if pruner is not None and pruner.name == "asha" and pruner.eta and pruner.min_steps and train is not None:
        try:
            Asha(pruner.eta, pruner.min_steps, train.max_steps, train.eval_every)
        except ConfigError as error:
            faults += error.faults
    return variants, list({str(fault): fault for fault in faults}.values())


def _trust_faults(sweep: Sweep, variants: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """Code that lies beside a checkpoint runs when its user says so, never because a file does."""
    key = "model.trust_remote_code"
    trusting = any("model" in groups and groups["model"].trust_remote_code for groups in variants)
    if not trusting or _is_trusted(sweep):
        return []
    return [Fault(key, "is heard on the command line only", True, f"{key}=true after the sweep file")]


def _is_trusted(sweep: Sweep) -> bool:
    return any(line.startswith("++model.trust_remote_code=") for line in sweep.overrides)


def _combination_faults(sweep: Sweep) -> list[Fault]:
    """What only two axes together get wrong; none of an interval, which is a fault by itself."""
    if any(axis.kind == "interval" for axis in sweep.axes):
        return []
    for cell in sweep.cells():
        try:
            sweep.config(cell)
        except ConfigError as error:
            asked = ", ".join(f"{key}={written(value)}" for key, value in cell.params.items())
            return [Fault(fault.field, f"{fault.rule} (at {asked})", fault.got, fault.remedy) for fault in error.faults]
    return []


def _of_interval(sweep: Sweep, fault: Fault) -> Fault:
    """A whole number missed by an interval of floats: says how to ask for one of integers."""
    axis = next((axis for axis in sweep.axes if axis.key == fault.field and axis.kind == "interval"), None)
    if axis is None or "integer" not in fault.rule:
        return fault
    return Fault(fault.field, "takes whole numbers", str(axis), f"int(interval({axis.low:g}, {axis.high:g}))")
