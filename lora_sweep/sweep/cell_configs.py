"""Each cell's own configuration, at the cost of the sweep's axes and not of its cells.

A field of the configuration depends on few axes: its own, and those that its references reach. So each field is
resolved once for each combination of those, each group is validated once for each combination of the axes that its
fields depend on, and a cell puts together what is there already.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from lora_sweep.config import GROUPS, Config, cross_faults
from lora_sweep.errors import ConfigError
from lora_sweep.sweep import compose
from lora_sweep.sweep.axis import Axis

_REFERENCE = re.compile(r"\$\{\s*(\.*)([A-Za-z_][\w.-]*)\s*\}")
"""${method.rank}, or ${.rank} from beside it; a resolver is followed by a colon."""


class CellConfigs:
    """Configurations of a sweep's cells."""

    def __init__(self, content: Mapping[str, Any], overrides: Sequence[str], axes: Sequence[Axis]) -> None:
        self._content, self._overrides, self._axes = content, overrides, axes
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._layers: dict[tuple[str, ...], _Layer] = {}

    def composed(self, groups: Sequence[str] = ()) -> DictConfig:
        """The configuration under `groups` (`data=facts`, ...), before a cell's values."""
        key = tuple(groups)
        if key not in self._composed:
            self._composed[key] = compose.compose([*self._overrides, *key], self._content)
        return self._composed[key]

    def merged(self, params: Mapping[str, Any]) -> DictConfig:
        """The configuration with a cell's parameters in it, interpolations unresolved."""
        config: DictConfig = self.composed(_groups(params)).copy()
        for key, value in params.items():
            if key not in GROUPS:
                OmegaConf.update(config, key, value, force_add=True)
        return config

    def of(self, params: Mapping[str, Any]) -> Config:
        """The configuration of the cell with these parameters. Raises ConfigError with all its faults."""
        groups = _groups(params)
        layer = self._layers.get(groups)
        if layer is None:
            layer = self._layers[groups] = _Layer(self, self.composed(groups), self._axes)
        sections = {name: layer.section(name, params) for name in GROUPS}
        if any(section is None for section in sections.values()):
            # Whatever is wrong with it is named by the way that takes no short cut.
            return compose.build(self.merged(params))
        if faults := cross_faults(sections):
            raise ConfigError(faults)
        return Config(**sections)


def _groups(params: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in params.items() if key in GROUPS)


class _Layer:
    """Cells with one choice of groups."""

    def __init__(self, configs: CellConfigs, composed: DictConfig, axes: Sequence[Axis]) -> None:
        self._configs = configs
        self._tree: dict[str, Any] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
        self._axes = {axis.key: axis for axis in axes if axis.key not in GROUPS}
        self._values: dict[tuple[str, ...], Any] = {}
        """(field, the values of the axes that it depends on) -> its value; _NONE where there is none."""
        self._sections: dict[tuple[str, ...], Any] = {}
        """(group, the values of the axes that it depends on) -> its dataclass; None where it has a fault."""

    def section(self, group: str, params: Mapping[str, Any]) -> Any:
        """The dataclass of a group; None where it, or the configuration as a whole, has a fault."""
        if not self._is_plain:
            return None
        key = (group, *(repr(params[axis]) for axis in self._axes_of_group[group]))
        if key not in self._sections:
            self._sections[key] = self._validated(group, params)
        return self._sections[key]

    def _validated(self, group: str, params: Mapping[str, Any]) -> Any:
        plain = {name: self._value(f"{group}.{name}", params) for name in self._fields[group]}
        if any(value is _NONE or value == "???" for value in plain.values()):
            return None
        try:
            return compose.validated(group, plain)
        except ValidationError:
            return None

    def _value(self, field: str, params: Mapping[str, Any]) -> Any:
        key = (field, *(repr(params[axis]) for axis in self._axes_of[field]))
        if key not in self._values:
            self._values[key] = self._resolved(field, params)
        return self._values[key]

    def _resolved(self, field: str, params: Mapping[str, Any]) -> Any:
        given = params[field] if field in self._axes else self._written(field)
        if not any("${" in text for text in _texts(given)):
            return given
        try:
            value = OmegaConf.select(self._configs.merged(params), field)
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except (OmegaConfBaseException, RecursionError):
            return _NONE
        return _NONE if compose.unsafe({field: plain}) else plain

    def _written(self, field: str) -> Any:
        group, _, name = field.partition(".")
        return self._tree[group][name]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tree is groups of fields, as the schema has it; a group may also be a reference as a whole."""
        has_groups = self._tree.keys() <= GROUPS.keys() and all(isinstance(each, dict) for each in self._tree.values())
        return has_groups and not compose.unsafe(self._tree)

    @cached_property
    def _fields(self) -> dict[str, list[str]]:
        """Group -> the names of its fields, those that an axis adds among them."""
        fields = {group: [str(name) for name in self._tree.get(group, {})] for group in GROUPS}
        for key in self._axes:
            group, _, name = key.partition(".")
            if name not in fields[group]:
                fields[group].append(name)
        return fields

    @cached_property
    def _axes_of(self) -> dict[str, tuple[str, ...]]:
        """Field -> keys of the axes that its value depends on."""
        fields = [f"{group}.{name}" for group, names in self._fields.items() for name in names]
        direct = {field: set(self._references(field)) for field in fields}
        axes = {}
        for field in fields:
            reached, new = {field}, [field]
            while new:
                below = [other for path in direct[new.pop()] for other in fields if _meet(path, other)]
                new += [other for other in below if other not in reached]
                reached.update(below)
            axes[field] = tuple(sorted(reached & self._axes.keys()))
        return axes

    @cached_property
    def _axes_of_group(self) -> dict[str, tuple[str, ...]]:
        return {
            group: tuple(sorted({axis for name in names for axis in self._axes_of[f"{group}.{name}"]}))
            for group, names in self._fields.items()
        }

    def _references(self, field: str) -> Iterator[str]:
        """Dotted paths that the field's texts refer to, whatever its axis makes of it."""
        axis = self._axes.get(field)
        for value in [self._written(field)] if axis is None else axis.values:
            for path, text in _texts_at(field, value):
                for dots, name in _REFERENCE.findall(text):
                    # One dot is the mapping or list that the text is in, each more the one around it.
                    around = path.split(".")[: -len(dots)] if dots else []
                    yield ".".join([*around, name])


_NONE = object()


def _meet(path: str, field: str) -> bool:
    """Whether one lies within the other."""
    return f"{path}.".startswith(f"{field}.") or f"{field}.".startswith(f"{path}.")


def _texts_at(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of all texts in nested values."""
    yield from ((at, each) for at, each in compose.leaves(value, path) if isinstance(each, str))


def _texts(value: Any) -> list[str]:
    return [text for _, text in _texts_at("", value)]
