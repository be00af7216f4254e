"""One axis of a search space: a line of Hydra's override grammar on one side, Optuna's distribution on the other."""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lora_sweep import config as schema
from lora_sweep.errors import Fault
from lora_sweep.system.bounds import BoundExceeded, bounded

MOST_VALUES = 10_000
"""Of one range or choice: more is a slip, and each is checked."""
MAX_LINE = 100_000
"""Characters of one override: a choice of 10,000 values has as many."""
PARSE_SECONDS, PARSE_BYTES = 10.0, 2**29
"""Most that Hydra's parser may take for one override; a choice of 1,000 values takes 0.2 s."""
_NULL, _NULL_TEXT = re.compile(r"(?<=[(,\s])null(?=[),\s])"), "__null__"
_CALL = re.compile(r"\s*[a-z]+\(")
"""A function of the grammar: choice(..."""


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
        return f"choice({', '.join(written(value) for value in self.values)})"


def written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(written(item) for item in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def parse(line: str) -> tuple[Override | None, list[Fault]]:
    """The line in Hydra's override grammar; None and the fault where it is not, or costs more than its bounds."""
    key = line.partition("=")[0][:80]
    if len(line) > MAX_LINE:
        return None, [Fault(key, f"must have at most {MAX_LINE:,} characters", f"{len(line):,}")]
    try:
        with bounded(PARSE_SECONDS, PARSE_BYTES):
            return OverridesParser.create().parse_override(_with_nulls(line)), []
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return None, [Fault(line, f"is not in Hydra's override grammar: {reason}", None, _quoted(line))]
    except RecursionError:
        return None, [Fault(key, "is nested too deep for Hydra's override grammar")]
    except BoundExceeded as error:
        return None, [Fault(key, f"{error} to read as an override")]


def _with_nulls(line: str) -> str:
    """A choice with text in place of each null, which Hydra's own function refuses."""
    key, equals, value = line.partition("=")
    if not value.lstrip().startswith("choice(") or "'" in value or '"' in value:
        return line
    return f"{key}{equals}{_NULL.sub(_NULL_TEXT, value)}"


def _quoted(line: str) -> str:
    """What the line may have meant: paths and regular expressions hold what the grammar reads as its own."""
    key, _, value = line.partition("=")
    if "${" in value:
        return "put quotes around a value with ${...}"
    if not value or _CALL.match(value) or '"' in value or "'" in value:
        return "key=value"
    return f"""in quotes, and those in the shell's: '{key}="{value}"'"""


def of_override(parsed: Override) -> tuple[Axis | None, list[Fault]]:
    """The axis that a sweep override asks for; None and the fault where it cannot be one."""
    key, sweep = parsed.key_or_group, parsed.value()
    text = str(parsed.input_line).partition("=")[2]

    def refused(rule: str, got: Any = text, remedy: str = "") -> tuple[None, list[Fault]]:
        return None, [Fault(key, rule, got, remedy)]

    if getattr(sweep, "shuffle", False):
        return refused("shuffle is not read: a study goes on in the order it began")
    if getattr(sweep, "tags", set()) - ({"log"} if isinstance(sweep, IntervalSweep) else set()):
        return refused("the only tag read is log, of an interval", remedy="tag(log, interval(1e-5, 1e-3))")
    if isinstance(sweep, IntervalSweep):
        if sweep.start >= sweep.end:
            return refused("low < high must hold")
        log = "log" in sweep.tags
        if log and sweep.start <= 0:
            return refused("a logarithmic interval must start above 0")
        return Axis(key, "interval", low=sweep.start, high=sweep.end, log=log), []
    if isinstance(sweep, RangeSweep):
        values = _range(sweep)
        return refused(values) if isinstance(values, str) else (Axis(key, "range", values), [])
    if isinstance(sweep, ChoiceSweep):
        values = tuple(_unquoted(value) for value in sweep.list)
        same = [written(_as_number(value)) for value in values]
        times = Counter(same)
        twice = list(dict.fromkeys(written(v) for v, word in zip(values, same, strict=True) if times[word] > 1))
        if twice:
            return refused(f"a choice must not repeat a value ({', '.join(twice)})")
        if len(values) > MOST_VALUES:
            return refused(f"must have at most {MOST_VALUES:,} values", f"{len(values):,}")
        return Axis(key, "choice", values), []
    return refused("must be choice(...), range(...) or interval(...)")


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
    return None if value == _NULL_TEXT else getattr(value, "text", value)


def inside(axis: Axis) -> float:
    """A value within an interval: a key that takes whole numbers only may take its ends and nothing between."""
    return axis.low if isinstance(axis.low, int) else axis.low + (axis.high - axis.low) / math.pi
