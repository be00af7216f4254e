"""A sweep file and the command line, read into a Sweep.

    space:
      method.rank: choice(4, 16, 64)
      optimizer.base_lr: tag(log, interval(1e-5, 1e-3))

The same words on the command line replace an axis (`method.rank=choice(8,32)`) or fix it (`method.rank=8`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType

from lora_sweep import config as schema
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.sweep import compose, spellings
from lora_sweep.sweep.axis import Axis, of_override, parse, written
from lora_sweep.sweep.sweep import Sweep

SWEPT_GROUPS = ("model", "data", "method", "optimizer", "train")
"""Groups whose keys may be an axis; the others say how a study is run, not what is asked."""

NEVER_SWEPT = ("train.slots", "model.trust_remote_code")


def read(path: str | None, overrides: Sequence[str]) -> tuple[Sweep, list[Fault]]:
    """A sweep file (or None for a single trial) with the command line's overrides, and every fault of their form.

    What is faulty is left out of the sweep, so that `check` can report the faults of the rest too.

    Args:
        path: a sweep file, or the name of a shipped one; None for a single trial.
        overrides: of the command line, in Hydra's grammar.

    Raises:
        ConfigError: where the file cannot be read at all.

    >>> sweep, faults = read("quickstart", ["method.rank=choice(2,4)", "method.alpha=8", "train.slots=2"])
    >>> faults
    []
    """
    content, space, name = _read_file(path) if path is not None else ({}, {}, "train")
    faults: list[Fault] = []
    axes: dict[str, Axis] = {}
    fixed: list[str] = []
    for key, text in space.items():
        if isinstance(text, list):
            faults.append(Fault(key, "must be in Hydra's grammar", text, f"choice({', '.join(map(written, text))})"))
            continue
        line = spellings.alias(f"{key}={written(text)}")
        faults += compose.text_faults(f"space.{key}", line)
        parsed, more = parse(line)
        faults += more
        if parsed is not None:
            faults += _sort_in(parsed, axes, fixed)
    for line in map(spellings.alias, overrides):
        faults += compose.text_faults(line.partition("=")[0], line)
        parsed, more = parse(line)
        faults += more
        if parsed is not None:
            if not parsed.is_sweep_override():
                axes.pop(parsed.key_or_group, None)
            faults += _sort_in(parsed, axes, fixed)
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


def find(path: str) -> Path:
    """The sweep file: as given, or of that name among the shipped ones. Raises ConfigError."""
    shipped = compose.shipped("sweeps")
    for candidate in (Path(path), shipped / Path(path).name, shipped / f"{Path(path).name}.yaml"):
        if candidate.exists() and not candidate.is_dir():
            return candidate
    names = sorted(f"sweeps/{file.name}" for file in shipped.glob("*.yaml"))
    remedy = compose.nearest(path, names) or f"shipped are {', '.join(names)}"
    raise ConfigError([Fault("SWEEP", "no such file", path, remedy)])


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    file = find(path)
    content = compose.read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError([Fault(str(file), "must hold a mapping with `space`")])
    space = content.pop("space", None) or {}
    if not isinstance(space, dict):
        raise ConfigError([Fault("space", "must map a key to choice(...), range(...) or interval(...)", space)])
    if faults := spellings.foreign(content):
        raise ConfigError(faults)
    if axes := [(name, value) for name, value in space.items() if spellings.is_axis_of_wandb(value)]:
        rule = "must be in Hydra's grammar"
        raise ConfigError(
            [Fault(f"space.{name}", rule, value, f"{name}: {spellings.axis_of(value)}") for name, value in axes]
        )
    content, faults = spellings.renamed(content)
    if faults:
        raise ConfigError(faults)
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
    faults = compose.unsafe(content)
    for key in content:
        if key == "hydra" or "searchpath" in key:
            faults.append(Fault(key, "Hydra's own settings and search paths are refused in a sweep file"))
        elif "." in key:
            faults.append(Fault(key, "dotted keys are read under `space` only", None, "nest it: `method: {rank: 8}`"))
    return faults


def _sort_in(parsed: Override, axes: dict[str, Axis], fixed: list[str]) -> list[Fault]:
    """Puts an override where it belongs: among the axes or the fixed values. Returns its faults."""
    key, line = parsed.key_or_group, str(parsed.input_line)
    if parsed.type is OverrideType.DEL or parsed.package is not None:
        name = key.partition("@")[0]
        remedy = (
            f"{name}=VALUE gives the key one value, an axis too" if "." in name else f"{name}=OPTION chooses another"
        )
        return [Fault(line, "deletions and packages are not read", None, remedy)]
    if key.split(".")[0] == "hydra":
        remedy = "the sampler is sampler=grid, random or tpe; devices are launcher.device; studies lie in study.root"
        return [Fault(key, "Hydra's own settings are not read", None, remedy)]
    if parsed.is_sweep_override():
        axis, faults = of_override(parsed)
        if axis is not None:
            axes[key] = axis
        return faults
    if key in schema.GROUPS:
        fixed.append(f"{key}={parsed.value()}")
    elif "." not in key:
        return [_unknown(key)]
    elif spellings.is_axis_of_wandb(parsed.value()):
        remedy = f"'{key}={spellings.axis_of(parsed.value())}'"
        return [Fault(key, "must be in Hydra's grammar", parsed.value(), remedy)]
    elif key == "study.name" and isinstance(parsed.value(), int | float):
        fixed.append(f'++{key}="{line.partition("=")[2].strip()}"')
    else:
        fixed.append("++" + line.lstrip("+"))
    return []


def _key_faults(key: str) -> list[Fault]:
    """An axis must be a known key of a trial's configuration."""
    group, _, name = key.partition(".")
    if group in schema.GROUPS and (group not in SWEPT_GROUPS or key in NEVER_SWEPT):
        only = f"only keys of {', '.join(SWEPT_GROUPS)} can"
        rule = "it says how a study is run, not what is trained" if key in NEVER_SWEPT else only
        return [Fault(key, f"cannot be swept, {rule}")]
    if key in SWEPT_GROUPS or (
        group in SWEPT_GROUPS and name in [field.name for field in fields(schema.GROUPS[group])]
    ):
        return []
    return [_unknown(key)]


def _unknown(key: str) -> Fault:
    keys = [f"{group}.{field.name}" for group, section in schema.GROUPS.items() for field in fields(section)]
    own = spellings.near_key(key, keys)
    near = f"did you mean {own}?" if own else compose.nearest(key, [*keys, *schema.GROUPS])
    return Fault(key or "=", "unknown key", None, near or "see conf/")
