"""The search space: Hydra's override grammar on one side, cells and Optuna's distributions on the other.

    space:
      method.rank: choice(4, 16, 64)
      optimizer.base_lr: tag(log, interval(1e-5, 1e-3))

The same words on the command line replace an axis (`method.rank=choice(8,32)`) or fix it (`method.rank=8`).
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from yaml import YAMLError

from lora_sweep import config as schema
from lora_sweep.config import Config
from lora_sweep.errors import ConfigError
from lora_sweep.records import Cell, Fault

SWEPT_GROUPS = ("model", "data", "method", "optimizer", "train")
"""Groups whose keys may be an axis; the others say how a study is run, not what is asked."""

NEVER_SWEPT = ("train.slots",)

MOST_VALUES = 100_000
"""Of one range: more is a slip."""


@dataclass(frozen=True)
class Axis:
    """One line of `space`."""

    key: str
    kind: Literal["choice", "range", "interval"]
    values: tuple[Any, ...] = ()
    """Of a choice or range (expanded, exclusive end), in order."""
    low: float = 0.0
    high: float = 0.0
    """Bounds of an interval, both inclusive."""
    log: bool = False

    @property
    def is_group(self) -> bool:
        return self.key in schema.GROUPS

    @property
    def ends(self) -> tuple[Any, Any]:
        """First and last value."""
        return (self.low, self.high) if self.kind == "interval" else (self.values[0], self.values[-1])

    @property
    def is_ordered(self) -> bool:
        """Numbers in ascending order: a model-based sampler may use their distance."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        return len(numbers) == len(self.values) > 1 and all(a < b for a, b in itertools.pairwise(numbers))

    def distribution(self) -> BaseDistribution:
        """Ordered values go in by their index (log2 for 4, 8, 16), unordered ones as categories."""
        if self.kind == "interval":
            if isinstance(self.low, int) and isinstance(self.high, int):
                return IntDistribution(self.low, self.high, log=self.log)
            return FloatDistribution(self.low, self.high, log=self.log)
        if self.is_ordered:
            return IntDistribution(0, len(self.values) - 1)
        return CategoricalDistribution(range(len(self.values)))

    def decode(self, drawn: Any) -> Any:
        """The value of the configuration that a drawn parameter stands for."""
        return drawn if self.kind == "interval" else self.values[drawn]

    def __str__(self) -> str:
        if self.kind == "interval":
            interval = f"interval({self.low}, {self.high})"
            return f"tag(log, {interval})" if self.log else interval
        return f"choice({', '.join(_written(value) for value in self.values)})"


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_written(item) for item in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


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
            self._composed[key] = schema.compose([*self.overrides, *key], self.content)
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
            known = self._built[cell.number] = (cell, schema.build(self.merged(cell.params)))
        return known[1]

    def largest_rank(self) -> int:
        """Of any cell, a derived rank included as long as it grows with each axis by itself."""
        ends = [{axis.key: axis.ends[end] for axis in self.axes} for end in (0, 1)]
        tried = [*ends, *(ends[0] | {axis.key: value} for axis in self.axes for value in axis.values or axis.ends)]
        return max(schema.build(self.merged(params)).method.rank for params in tried)

    def base(self) -> Config:
        """The configuration at the first value of every axis: for what all cells share."""
        return schema.build(self.merged({axis.key: axis.ends[0] for axis in self.axes}))

    def cells(self) -> tuple[Cell, ...]:
        """Every cell of the grid, numbered in the order of the axes, the last one fastest."""
        keys = [axis.key for axis in self.axes]
        grid = itertools.product(*(axis.values for axis in self.axes))
        return tuple(Cell(number, dict(zip(keys, values, strict=True))) for number, values in enumerate(grid))

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
            faults.append(Fault(key, "must be in Hydra's grammar", text, f"choice({', '.join(map(_written, text))})"))
            continue
        line = f"{key}={_written(text)}"
        faults += schema.text_faults(f"space.{key}", line)
        parsed = _parse(line, faults)
        if parsed is not None:
            _sort_in(parsed, axes, fixed, faults)
    for line in overrides:
        faults += schema.text_faults(line.partition("=")[0], line)
        parsed = _parse(line, faults)
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


HOW_NOT_WHAT = ("tracker", "launcher", "study.root", "study.keep_adapters", "train.slots")
"""What a relaunch may change: it says how a study runs, not what its numbers mean."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a relaunch would change in a study's meaning, a line each."""
    old, new = (dict(schema.leaves(tree)) for tree in (before, now))
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        means = not any(key == how or key.startswith(f"{how}.") for how in HOW_NOT_WHAT)
        if means and old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    return lines


def load_launched(folder: Path) -> dict[str, Any] | None:
    """A study's config.yaml, or None where there is none. Raises ConfigError when it cannot be read."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        plain: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[assignment]
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([Fault(str(file), f"cannot be read: {' '.join(str(error).split())}")]) from error
    return plain


def find(path: str) -> Path:
    """The sweep file: as given, or of that name among the shipped ones. Raises ConfigError."""
    shipped = schema.shipped("sweeps")
    for candidate in (Path(path), shipped / Path(path).name, shipped / f"{Path(path).name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(f"sweeps/{file.name}" for file in shipped.glob("*.yaml"))
    remedy = schema.nearest(path, known) or f"shipped are {', '.join(known)}"
    raise ConfigError([Fault("SWEEP", "no such file", path, remedy)])


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    file = find(path)
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError([Fault(str(file), f"cannot be read: {' '.join(str(error).split())}")]) from error
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
    faults = []
    for key, value in schema.leaves(content):
        if isinstance(value, str):
            faults += schema.text_faults(key, value)
    for key in content:
        if key == "hydra" or "searchpath" in key:
            faults.append(Fault(key, "Hydra's own settings and search paths are refused in a sweep file"))
        elif "." in key:
            faults.append(Fault(key, "dotted keys are read under `space` only", None, "nest it: `method: {rank: 8}`"))
    return faults


def _parse(line: str, faults: list[Fault]) -> Override | None:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        remedy = "put quotes around a value with ${...}" if "${" in line else "key=value"
        faults.append(Fault(line, f"is not in Hydra's override grammar: {reason}", None, remedy))
    return None


def _sort_in(parsed: Override, axes: dict[str, Axis], fixed: list[str], faults: list[Fault]) -> None:
    """Puts an override where it belongs: among the axes or the fixed values."""
    key, line = parsed.key_or_group, str(parsed.input_line)
    if parsed.type is OverrideType.DEL or parsed.package is not None:
        faults.append(Fault(line, "deletions and packages are not read", None, "give the key a value"))
    elif key.split(".")[0] == "hydra":
        faults.append(Fault(key, "Hydra's own settings are not read"))
    elif parsed.is_sweep_override():
        axis = _axis(parsed, faults)
        if axis is not None:
            axes[key] = axis
    elif key in schema.GROUPS:
        fixed.append(f"{key}={parsed.value()}")
    elif "." not in key:
        faults.append(_unknown(key))
    else:
        fixed.append("++" + line.lstrip("+"))


def _axis(parsed: Override, faults: list[Fault]) -> Axis | None:
    key, sweep = parsed.key_or_group, parsed.value()
    text = str(parsed.input_line).partition("=")[2]
    if getattr(sweep, "shuffle", False):
        faults.append(Fault(key, "shuffle is not read: a study goes on in the order it began", text))
        return None
    if getattr(sweep, "tags", set()) - ({"log"} if isinstance(sweep, IntervalSweep) else set()):
        faults.append(Fault(key, "the only tag read is log, of an interval", text, "tag(log, interval(1e-5, 1e-3))"))
        return None
    if isinstance(sweep, IntervalSweep):
        if sweep.start >= sweep.end:
            faults.append(Fault(key, "low < high must hold", text))
            return None
        log = "log" in sweep.tags
        if log and sweep.start <= 0:
            faults.append(Fault(key, "a logarithmic interval must start above 0", text))
            return None
        return Axis(key, "interval", low=sweep.start, high=sweep.end, log=log)
    if isinstance(sweep, RangeSweep):
        values = _range(sweep)
        if isinstance(values, str):
            faults.append(Fault(key, values, text))
            return None
        return Axis(key, "range", values)
    if isinstance(sweep, ChoiceSweep):
        values = tuple(_unquoted(value) for value in sweep.list)
        same = [_written(_as_number(value)) for value in values]
        twice = list(dict.fromkeys(_written(v) for v, word in zip(values, same, strict=True) if same.count(word) > 1))
        if twice:
            faults.append(Fault(key, f"a choice must not repeat a value ({', '.join(twice)})", text))
            return None
        return Axis(key, "choice", values)
    faults.append(Fault(key, "must be choice(...), range(...) or interval(...)", text))
    return None


def _range(sweep: RangeSweep) -> tuple[Any, ...] | str:
    """Its values, or what is wrong; in decimals, so that no rounding lets the exclusive end in."""
    ends = (sweep.start, sweep.stop, sweep.step)
    if not all(math.isfinite(end) for end in ends):
        return "a range must be finite"
    start, stop, step = (Decimal(str(end)) for end in ends)
    if step == 0:
        return "the step of a range must not be 0"
    count = math.ceil((stop - start) / step)
    if count < 1:
        return "the range is empty (its end is exclusive)"
    if count > MOST_VALUES:
        return f"a range of more than {MOST_VALUES:,} values"
    number = int if all(isinstance(end, int) for end in ends) else float
    return tuple(number(start + place * step) for place in range(count))


def _as_number(value: Any) -> Any:
    """8 and 8.0 ask for the same."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _unquoted(value: Any) -> Any:
    """Hydra's quoted strings as plain ones."""
    if isinstance(value, list):
        return [_unquoted(item) for item in value]
    return getattr(value, "text", value)


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
    near = f"did you mean {same_name[0]}?" if same_name else schema.nearest(key, [*known, *schema.GROUPS])
    return Fault(key or "=", "unknown key", None, near or "see conf/")


def check(sweep: Sweep) -> tuple[list[dict[str, Any]], list[Fault]]:
    """(the faultless groups at the first values and with each axis varied by itself, every fault found on the way).

    Looks at axes, values, samplers and pruners; files and devices are for the rooms that read them.
    """
    faults: list[Fault] = []
    tried: dict[str, list[Any]] = {}
    with schema.groups():
        for axis in sweep.axes:
            tried[axis.key] = list(axis.values or (*axis.ends, _inside(axis)))
            for value in axis.values if axis.is_group else ():
                unknown = schema.option_faults(axis.key, value)
                if unknown:
                    faults += unknown
                    tried[axis.key].remove(value)
    first = {key: values[0] for key, values in tried.items() if values}
    try:
        varied = [first, *(first | {key: value} for key, values in tried.items() for value in values[1:])]
        variants = []
        for params in varied:
            good, found = schema.sections(sweep.merged(params))
            variants.append(good)
            faults += [*map(partial(_of_interval, sweep), found), *schema.cross_faults(good)]
    except ConfigError as error:
        return [], [*faults, *error.faults]
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
            faults += target_faults("sampler.instance", sampler.instance, "samplers")
    if pruner is not None and pruner.instance is not None:
        faults += target_faults("pruner.instance", pruner.instance, "pruners")
    return variants, list({str(fault): fault for fault in faults}.values())


def _combination_faults(sweep: Sweep) -> list[Fault]:
    """What only two axes together get wrong; none of an interval, which is a fault by itself."""
    if any(axis.kind == "interval" for axis in sweep.axes):
        return []
    for cell in sweep.cells():
        try:
            sweep.config(cell)
        except ConfigError as error:
            asked = ", ".join(f"{key}={_written(value)}" for key, value in cell.params.items())
            return [Fault(fault.field, f"{fault.rule} (at {asked})", fault.got, fault.remedy) for fault in error.faults]
    return []


def _of_interval(sweep: Sweep, fault: Fault) -> Fault:
    """A whole number missed by an interval of floats: says how to ask for one of integers."""
    axis = next((axis for axis in sweep.axes if axis.key == fault.field and axis.kind == "interval"), None)
    if axis is None or "integer" not in fault.rule:
        return fault
    return Fault(fault.field, "takes whole numbers", str(axis), f"int(interval({axis.low:g}, {axis.high:g}))")


def _inside(axis: Axis) -> float:
    """A value within an interval: a key that takes whole numbers only may take its ends and nothing between."""
    return axis.low if isinstance(axis.low, int) else axis.low + (axis.high - axis.low) / math.pi


def target_faults(field: str, node: Mapping[str, Any], kind: Literal["samplers", "pruners"]) -> list[Fault]:
    """Whether every `_target_` in the node is one of Optuna's own sampler or pruner classes, and takes its arguments.

    A prefix test would not do: `optuna.samplers._base.np.load` starts with the right words and reads pickles.
    """
    faults = []
    targets = {"_target_": node.get("_target_")} | dict(schema.leaves(node))
    for key, value in targets.items():
        *above, name = key.split(".")
        if name == "_target_" and not any(part.startswith("_") for part in above):
            kinds = [kind] if key == "_target_" else list(_KINDS)
            if not any(_is_optuna_class(value, each) for each in kinds):
                remedy = f"e.g. optuna.{kind}.{_KINDS[kind][1]}"
                faults.append(
                    Fault(f"{field}.{key}", f"must be a class of optuna.{' or optuna.'.join(kinds)}", value, remedy)
                )
        elif any(part.startswith("_") for part in (*above, name)):
            faults.append(Fault(f"{field}.{key}", "only _target_ and plain arguments are read"))
    if faults:
        return faults
    try:
        _made(node)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        faults.append(Fault(field, f"{node['_target_']} refuses these arguments: {reason}"))
    return faults


def _made(node: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Who names a class by its path knows what it is.
        warnings.simplefilter("ignore", ExperimentalWarning)
        return instantiate(dict(node))


_KINDS: dict[str, tuple[Any, str, type]] = {
    "samplers": (optuna.samplers, "TPESampler", optuna.samplers.BaseSampler),
    "pruners": (optuna.pruners, "MedianPruner", optuna.pruners.BasePruner),
}


def _is_optuna_class(target: Any, kind: str) -> bool:
    module, _, base = _KINDS[kind]
    package, _, name = str(target).rpartition(".")
    if package != module.__name__ or name not in module.__all__:
        return False
    found = getattr(module, name)
    return isinstance(found, type) and issubclass(found, base)


def instance(node: Mapping[str, Any], kind: Literal["samplers", "pruners"]) -> Any:
    """Optuna's own object for a sampler's or pruner's `instance`. Raises ConfigError."""
    faults = target_faults(f"{kind[:-1]}.instance", node, kind)
    if faults:
        raise ConfigError(faults)
    return _made(node)
