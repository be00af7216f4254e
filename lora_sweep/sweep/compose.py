"""The composed configuration: Hydra puts it together from conf/, a sweep file and overrides; read without its code.

`compose` composes, `sections` names every fault at once, `build` turns a faultless configuration into the dataclasses
of the schema.
"""

import difflib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from lora_sweep.config import GROUPS, RENAMED, YOUNGER, Config, cross_faults
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.system import files
from lora_sweep.system.bounds import BoundExceeded, bounded

_ADAPTERS = {name: TypeAdapter(section) for name, section in GROUPS.items()}

MAX_YAML_BYTES = 2**20
"""Of one YAML file: a sweep file or an option of a group; the largest shipped has a five-hundredth of it."""
MAX_YAML_VALUES = 100_000
"""Of one YAML file, aliases written out."""
COMPOSE_SECONDS, COMPOSE_BYTES = 4.0, 2**29
"""Most that reading a YAML file, composing or resolving a configuration may take; it takes 0.1 s and a few MiB."""
_DEVICE = "must be auto, cpu, cuda or cuda:N"
_PLAIN_NAME = "must be a plain name: letters, digits, `.`, `_`, `-`, no path parts"
MAX_NUMBER = 1e300
"""Of a derived value: whole numbers have no end of their own."""

RESOLVERS = ("times", "divide", "power")
"""Arithmetic for derived values, the only resolvers a configuration may use."""

_READ = re.compile(r"\s*(?:(?:times|divide|power)\s*:|(?!\.*hydra\b)\.*[A-Za-z_][\w.-]*\s*\})")
"""What may follow `${`: one of the resolvers, or a plain reference. A name put together (`oc.${x}`) is neither."""


def _power(base: float, exponent: float) -> float:
    # In floats: 10**10**10 in whole numbers would never end.
    result = math.pow(base, exponent)
    return int(result) if result.is_integer() and isinstance(base, int) and isinstance(exponent, int) else result


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("times", lambda a, b: _within(_number(a) * _number(b)), replace=True)
    OmegaConf.register_new_resolver("divide", lambda a, b: _number(a) / _number(b), replace=True)
    OmegaConf.register_new_resolver("power", lambda a, b: _power(_number(a), _number(b)), replace=True)


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise ValueError(f"takes numbers, got {value!r}")
    return value


def _within(value: Any) -> Any:
    if abs(value) > MAX_NUMBER:
        raise ValueError(f"must be at most {MAX_NUMBER:g}")
    return value


def shipped(folder: str) -> Path:
    """`conf` or `sweeps` as shipped: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / folder
    return inside if inside.is_dir() else package.parent / folder


class _OwnGroups(SearchPathPlugin):
    """A conf/ folder in the working directory comes before the shipped one."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = Path.cwd() / "conf"
        if own.is_dir() and own.resolve() != shipped("conf").resolve():
            search_path.prepend("working-directory", f"file://{own}")


@contextmanager
def groups() -> Iterator[None]:
    """Hydra over the user's own and the shipped groups."""
    Plugins.instance().register(_OwnGroups)
    with initialize_config_dir(str(shipped("conf")), version_base="1.3", job_name="lora_sweep"):
        yield


def read_yaml(file: Path) -> Any:
    """The content of a YAML file as nested plain values, references unresolved.

    Raises ConfigError in one line where it cannot be read, is no plain YAML (tags of Python's objects are refused), or
    takes more than its bounds.
    """
    try:
        text = files.read_text(file, MAX_YAML_BYTES)
        with bounded(COMPOSE_SECONDS, COMPOSE_BYTES):
            if (count := _count(yaml.safe_load(text), {})) > MAX_YAML_VALUES:
                raise files.Unsafe(
                    f"holds {count:,} values with its aliases written out, at most {MAX_YAML_VALUES:,} are read"
                )
            return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except files.Unsafe as error:
        raise ConfigError([Fault(str(file), f"cannot be read: it {error}")]) from error
    except _UNREADABLE as error:
        raise ConfigError([Fault(str(file), f"cannot be read: {_reason(error)}")]) from error


_UNREADABLE = (
    OSError,
    UnicodeDecodeError,
    YAMLError,
    OmegaConfBaseException,
    RecursionError,
    BoundExceeded,
    AssertionError,
)
"""What YAML, OmegaConf and the bounds raise on a file or a tree that cannot be read."""


def _count(tree: Any, counts: dict[int, int]) -> int:
    """Of all values in a tree: what is in it twice, by an alias, counts twice but is walked once."""
    if id(tree) not in counts:
        below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
        counts[id(tree)] = 1 + sum(_count(each, counts) for each in below)
    return counts[id(tree)]


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, BoundExceeded):
        return f"it {error}"
    return " ".join(str(error).split())[:500]


def _own_faults() -> list[Fault]:
    """Of the user's own conf/ folder: each file that cannot be read."""
    faults: list[Fault] = []
    for file in sorted((Path.cwd() / "conf").glob("**/*.yaml")):
        try:
            read_yaml(file)
        except ConfigError as error:
            faults += error.faults
    return faults


def compose(overrides: Sequence[str], sweep: Mapping[str, Any] | None = None) -> DictConfig:
    """The configuration of `overrides` over `sweep` over the defaults, interpolations unresolved.

    `sweep` is the content of a sweep file without its `space`; its `defaults` list is Hydra's own
    (`- override /data: facts`). Raises ConfigError with all faults that keep Hydra from composing.
    """
    register_resolvers()
    store = ConfigStore.instance()
    # From the store, so that a config.yaml in the user's own conf/ is not taken for it.
    store.store(name="lora_sweep", node=OmegaConf.load(shipped("conf") / "config.yaml"))
    chosen = list(overrides)
    if sweep is not None:
        store.store(group="sweep", name="this", node=OmegaConf.create(dict(sweep)), package="_global_")
        chosen.insert(0, "+sweep=this")
    with groups():
        faults = [*_group_faults(overrides), *_default_faults(sweep or {})]
        if faults:
            raise ConfigError(faults)
        try:
            with bounded(COMPOSE_SECONDS, COMPOSE_BYTES):
                composed: DictConfig = hydra_compose("lora_sweep", overrides=chosen)
        except (HydraException, *_UNREADABLE, AttributeError, TypeError) as error:
            # Hydra does not say which file it was.
            raise ConfigError(_own_faults() or [Fault("configuration", f"cannot be read: {_reason(error)}")]) from error
    return composed


def _group_faults(overrides: Sequence[str]) -> list[Fault]:
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    return [fault for key, _, value in pairs if key in GROUPS for fault in option_faults(key, value)]


def _default_faults(sweep: Mapping[str, Any]) -> list[Fault]:
    remedy = "write `- override /data: facts`"
    entries = sweep.get("defaults", [])
    if not isinstance(entries, list):
        return [Fault("defaults", "must be a list", entries, remedy)]
    faults = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            wrong = [Fault("defaults", "must choose an option of a group", entry, remedy)]
            faults += wrong if entry != "_self_" else []
            continue
        for key, value in entry.items():
            word, _, group = str(key).partition("/")
            if word.strip() == "override" and group in GROUPS:
                faults += option_faults(group, value)
            else:
                faults.append(Fault("defaults", "no such group", key, remedy))
    return faults


def option_faults(group: str, option: Any) -> list[Fault]:
    """Whether conf/<group>/ (shipped or the user's own) has the option; needs Hydra initialized."""
    loader = GlobalHydra.instance().config_loader()
    options = loader.get_group_options(group)
    if option in options:
        own = Path.cwd() / "conf" / group / f"{option}.yaml"
        try:
            # Before Hydra reads it, which has no bounds and does not name it.
            _ = read_yaml(own) if own.exists() else None
        except ConfigError as error:
            return list(error.faults)
        return []
    return [Fault(group, f"must be one of {', '.join(options)}", option, nearest(str(option), options))]


def nearest(word: str, words: Sequence[str]) -> str:
    """`did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def text_faults(where: str, text: str) -> list[Fault]:
    """A configuration from a stranger must neither run code nor read secrets."""
    rule = f"refused: only the resolvers {', '.join(RESOLVERS)} and plain references between fields are read"
    if all(_READ.match(after) for after in text.split("${")[1:]):
        return []
    return [Fault(where, rule, text)]


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf of nested mappings and lists."""
    if isinstance(tree, Mapping):
        pairs = tree.items()
    elif isinstance(tree, list | tuple):
        pairs = {str(index): value for index, value in enumerate(tree)}.items()
    else:
        return [(prefix, tree)]
    return [leaf for key, value in pairs for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def leaf(tree: Any, key: str) -> Any:
    """The value of a dotted key in nested mappings; None where there is none."""
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def unsafe(tree: Any) -> list[Fault]:
    """`text_faults` of every text in nested mappings and lists."""
    texts = [(key, value) for key, value in leaves(tree) if isinstance(value, str)]
    return [fault for key, value in texts for fault in text_faults(key, value)]


def sections(config: DictConfig, is_bounded: bool = True) -> tuple[dict[str, Any], list[Fault]]:
    """(name -> dataclass of every faultless group, all faults of the others).

    Args:
        is_bounded: whether resolving it is. The bound on memory is the whole process's: it is for a request as it comes
            in, not for a cell of one that was checked, while other threads are at work.
    """
    faults = unsafe(OmegaConf.to_container(config, resolve=False))
    if faults:
        return {}, faults
    try:
        with bounded(COMPOSE_SECONDS, COMPOSE_BYTES) if is_bounded else nullcontext():
            plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        return {}, [Fault(str(error.full_key or "configuration"), str(error).splitlines()[0])]
    except (RecursionError, BoundExceeded) as error:
        return {}, [Fault("configuration", f"cannot be resolved: {_reason(error)}")]
    # Again: two halves of a reference may have met.
    faults = unsafe(plain)
    if faults:
        return {}, faults
    for key in plain.keys() - GROUPS.keys():
        near = nearest(key, list(GROUPS))
        faults.append(Fault(key, "unknown group", None, near or f"groups are {', '.join(GROUPS)}"))
    absent = {key.partition(".")[0]: key for key, value in leaves(plain) if value == "???"}
    faults += [Fault(key, "is needed", None, f"{key}=...") for key in absent.values()]
    good = {}
    for name in GROUPS:
        if name in absent:
            continue
        try:
            good[name] = validated(name, plain.get(name))
        except ValidationError as error:
            faults += _readable(name, error)
    return good, faults


def validated(group: str, plain: Any) -> Any:
    """The dataclass of one group from its plain values, old keys among them. Raises pydantic's ValidationError."""
    return _ADAPTERS[group].validate_python(_current(group, plain))


def _current(group: str, plain: Any) -> Any:
    """A group's values under the names that its keys have now, those that it lacks with their meaning of then.

    One under an old name was given and stands.
    """
    names, younger = RENAMED.get(group, {}), YOUNGER.get(group, {})
    if not isinstance(plain, Mapping) or not (names.keys() & plain.keys() or younger.keys() - plain.keys()):
        return plain
    renamed = {new: plain[old] for old, new in names.items() if old in plain}
    return younger | {key: value for key, value in plain.items() if key not in names} | renamed


def current(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as nested plain values, each key under the name that it has now."""
    return {group: _current(group, values) for group, values in tree.items()}


def old_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """{a key of older versions that stands in the configuration: its name now}, both dotted."""
    return {
        f"{group}.{old}": f"{group}.{new}"
        for group, names in RENAMED.items()
        for old, new in names.items()
        if isinstance(tree.get(group), Mapping) and old in tree[group]
    }


def _readable(group: str, error: ValidationError) -> list[Fault]:
    """pydantic's errors as faults; of a union, one fault for the field."""
    own_names = [field.name for field in fields(GROUPS[group])]
    faults: dict[str, Fault] = {}
    for item in error.errors():
        names = [str(part) for part in item["loc"]]
        key = ".".join([group, *names[:1]])
        got = item["input"]
        if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            faults[key] = Fault(
                key, "unknown key", None, nearest(names[0], own_names) or f"known: {', '.join(own_names)}"
            )
        elif item["type"] in ("missing", "missing_argument"):
            faults[key] = Fault(key, "is missing")
        elif item["type"] == "string_pattern_mismatch":
            faults[key] = Fault(key, _DEVICE if key == "launcher.device" else _PLAIN_NAME, got)
        elif key in faults:
            rule = f"{faults[key].rule}, or {_rule(item['msg'])}"
            faults[key] = Fault(key, rule, faults[key].got)
        else:
            number = item["type"] == "string_type" and isinstance(got, int | float)
            faults[key] = Fault(key, _rule(item["msg"]), got, f'in quotes: "{got}"' if number else "")
    return list(faults.values())


def _rule(message: str) -> str:
    rule = message.removeprefix("Value error, ").replace("Input should be", "must be")
    rule = rule.replace("String should have at least 1 character", "must not be empty")
    rule = re.sub(r"a dictionary or an instance of \w+", "a mapping", rule)
    return rule.replace("greater than or equal to", "at least")


def build(config: DictConfig) -> Config:
    """The dataclasses of a composed configuration. Raises ConfigError with all faults."""
    good, faults = sections(config, is_bounded=False)
    if not faults:
        faults = cross_faults(good)
    if faults:
        raise ConfigError(faults)
    return Config(**good)


def section(group: str, values: Mapping[str, Any]) -> Any:
    """The dataclass of one group from what is known of it, the rest at the values of conf/<group>/default.yaml.

    Raises ConfigError.
    """
    defaults = OmegaConf.to_container(OmegaConf.load(shipped("conf") / group / "default.yaml"))
    assert isinstance(defaults, dict)
    try:
        return validated(group, defaults | dict(values))
    except ValidationError as error:
        raise ConfigError(_readable(group, error)) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as nested plain values, references unresolved."""
    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return tree


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Nested plain values as YAML, in their order."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(tree)))
