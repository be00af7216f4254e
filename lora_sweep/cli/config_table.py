"""Every key of the configuration, with its default, its bound and its description."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lora_sweep.config import GROUPS
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.sweep import compose
from lora_sweep.sweep.axis import written

_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
    "pattern": "matching",
}
_NAMES = {"boolean": "true or false", "null": "null", "integer": "a whole number", "number": "a number"}
_NAMES |= {"string": "text", "array": "a list", "object": "a mapping"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    >>> keys("method")[1]
    Key(name='method.rank', default='8', bound='a whole number, at least 1', description='Rows of A...')
    """

    name: str
    """Dotted, as it is typed."""
    default: str
    """As a sweep file without any choice of groups has it; `???` where a value is needed."""
    bound: str
    description: str
    """With the unit, where it has one."""

    def plain(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if key != "name"}


def keys(group: str | None = None) -> list[Key]:
    """The keys of one group, or of all, in the order of the schema. Raises ConfigError for a group that is none."""
    if group is not None and group not in GROUPS:
        near = compose.nearest(group, list(GROUPS)) or f"groups are {', '.join(GROUPS)}"
        raise ConfigError([Fault("GROUP", "no such group", group, near)])
    composed = compose.plain(compose.compose([], {"study": {"name": "SWEEP"}}))
    return [key for name in GROUPS if group in (None, name) for key in _of_group(name, composed.get(name, {}))]


def draw(console: Console, shown: Sequence[Key]) -> None:
    """One paragraph a key: name = default, the bound, and the description below."""
    for key in shown:
        line = Text.assemble((f"{key.name} = {key.default}", "bold"), f"   {key.bound}")
        console.print(line, soft_wrap=True)
        if key.description:
            console.print(Padding(Text(key.description), (0, 0, 0, 4)))


def _of_group(group: str, defaults: Mapping[str, Any]) -> list[Key]:
    schema = TypeAdapter(GROUPS[group]).json_schema()
    return [
        Key(
            f"{group}.{name}",
            written(defaults.get(name, "???")),
            _bound(field),
            " ".join(field.get("description", "").split()),
        )
        for name, field in schema["properties"].items()
    ]


def _bound(field: Mapping[str, Any]) -> str:
    """What a field of pydantic's JSON schema may be, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_bound(each) for each in field["anyOf"]))
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    limits = [f"{words} {field[key]}" for key, words in _BOUNDS.items() if key in field]
    return ", ".join([_NAMES.get(field.get("type", ""), "anything"), *limits])
