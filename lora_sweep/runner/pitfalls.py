"""Where sweeps go wrong by the book though every value is allowed: warnings, before anything is trained."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_sweep import data
from lora_sweep.base import base_config
from lora_sweep.base.load import tokenizer as load_tokenizer
from lora_sweep.config import Config
from lora_sweep.errors import ConfigError
from lora_sweep.health import window
from lora_sweep.study.asha import Asha
from lora_sweep.sweep import compose
from lora_sweep.sweep.axis import Axis, written
from lora_sweep.sweep.sweep import Sweep

CELLS_SHOWN = 8
MOST_CORNERS = 256
"""Of a space that is drawn from: where it has more, only the first and the last value of each axis are combined."""

RSLORA_ALPHA = 2
"""rsLoRA is known to become unstable where alpha is this many times the rank or more (LoRA's own custom carried over):
s = alpha / sqrt(rank) then grows with the root of the rank, and 16 bits of base round what it multiplies."""

SMALLEST_DIFFERENCE = 0.01
"""Of the loss: what an evaluation set should distinguish, at two standard errors of the paired differences."""

PAIRED_SPREAD = 0.07
"""Standard deviation of the differences of per-example losses between two runs whose losses are within 3 % of each
other, over the mean loss. Measured medians (quartiles): on the style task 0.07 (0.03, 0.12) over 15 pairs of
sweeps/quickstart.yaml and 0.14 (0.10, 0.16) over 5 of sweeps/loraplus.yaml, on facts 0.04 (0.02, 0.06) over 30 pairs of
sweeps/effective.yaml and 0.19 (0.03, 0.27) over 110 of sweeps/grid.yaml. One in their midst, since nobody knows
beforehand how alike the compared runs are."""

NEEDED_EXAMPLES = math.ceil((2 * PAIRED_SPREAD / SMALLEST_DIFFERENCE) ** 2)

MOST_HELD_OUT = 0.5
"""Share of a user's examples: above it, more data is the advice."""

FIRST_STEP_KEYS = {
    "MedianPruner": ("n_warmup_steps", 0),
    "PercentilePruner": ("n_warmup_steps", 0),
    "ThresholdPruner": ("n_warmup_steps", 0),
    "SuccessiveHalvingPruner": ("min_resource", "auto"),
    "HyperbandPruner": ("min_resource", 1),
}
"""Optuna's pruners that decide from a step on: the argument that says so, and its default."""


@dataclass(frozen=True)
class Pitfall:
    """One warning."""

    field: str
    """As the user types it."""
    sentence: str
    """Value, effect, what to do."""

    def __str__(self) -> str:
        return f"{self.field}: {self.sentence}"


@dataclass(frozen=True)
class EvaluationSize:
    """Of one data set."""

    examples: int
    """To evaluate on."""
    held_out: int
    """Before data.eval_size took so many of them."""

    @classmethod
    def of(cls, loaded: data.Data) -> "EvaluationSize":
        return cls(loaded.evaluation.examples, loaded.report.evaluation.examples)


@dataclass(frozen=True)
class _Point:
    """A cell of a grid, or a corner of a space that is drawn from."""

    name: str
    groups: Mapping[str, Any]
    """Group -> its section, faultless by itself."""


def pitfalls(sweep: Sweep, known: Mapping[str, EvaluationSize] | None = None) -> tuple[Pitfall, ...]:
    """Every warning of a sweep without faults; loads its data sets but for those `known` (by `data_key`)."""
    points = _points(sweep)
    listed = [*_rslora(points), *_warmup(points), *_rung(sweep.base(), points)]
    return (*listed, *_evaluation(points, known or {}))


def data_key(config: Config) -> str:
    """Equal where two cells have the same examples."""
    return _data_key(vars(config))


def _data_key(groups: Mapping[str, Any]) -> str:
    return repr((groups["model"], groups["data"]))


def _points(sweep: Sweep) -> list[_Point]:
    if sweep.base().sampler.name == "grid":
        return [_Point(cell.name, vars(sweep.config(cell))) for cell in sweep.cells()]
    points = []
    for params in _corners(sweep.axes):
        groups, faults = compose.sections(sweep.merged(params))
        shown = " ".join(f"{key}={written(value)}" for key, value in params.items())
        if not faults:
            points.append(_Point(shown, groups))
    return points


def _corners(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Values of the axes that the rules are about, each with each; of an interval its ends."""
    about = [axis for axis in axes if axis.key.partition(".")[0] in ("model", "data", "method", "train")]
    every = [axis.values or axis.ends for axis in about]
    if math.prod(map(len, every)) > MOST_CORNERS:
        every = [tuple(dict.fromkeys(axis.ends)) for axis in about]
    others = {axis.key: axis.ends[0] for axis in axes if axis not in about}
    keys = [axis.key for axis in about]
    return [others | dict(zip(keys, values, strict=True)) for values in itertools.product(*every)]


def _which(points: Sequence[_Point]) -> str:
    """`3 cells (0001, 0002, 0005)`."""
    names = [point.name for point in points]
    is_grid = all(name.isdigit() for name in names)
    shown = (", " if is_grid else "; ").join(names[:CELLS_SHOWN]) + (", ..." if len(names) > CELLS_SHOWN else "")
    if not is_grid:
        return f"cells drawn near {shown}" if any(names) else "every cell"
    return f"{len(names)} cell{'s' if len(names) > 1 else ''} ({shown})"


def _rslora(points: Sequence[_Point]) -> Iterator[Pitfall]:
    """A large s on a base that rounds."""
    narrow: dict[str, bool] = {}
    hit = []
    for point in points:
        method, base = point.groups["method"], point.groups["model"]
        if method.use_rslora and method.alpha >= RSLORA_ALPHA * method.rank:
            key = repr(base)
            if key not in narrow:
                narrow[key] = _is_below_fp32(base)
            hit += [point] if narrow[key] else []
    if hit:
        worst = max((point.groups["method"] for point in hit), key=lambda method: method.alpha / math.sqrt(method.rank))
        yield Pitfall(
            "method.alpha",
            f"under method.use_rslora=true {_which(hit)} have at least {RSLORA_ALPHA} x method.rank, s = alpha / "
            f"sqrt(rank) up to {worst.alpha / math.sqrt(worst.rank):.3g} (alpha {worst.alpha:g}, rank {worst.rank}), "
            "on a base below fp32, where training often becomes unstable; set 'method.alpha=${method.rank}', or hold "
            "the base in fp32 (model.dtype=fp32 model.quantization=null)",
        )


def _is_below_fp32(base: Any) -> bool:
    if base.quantization is not None or base.dtype == "bf16":
        return True
    if base.dtype != "auto":
        return False
    config = base_config.read_config(base)
    return config.dtype.itemsize < 4 or base_config.stored_quantization(config) is not None


def _warmup(points: Sequence[_Point]) -> Iterator[Pitfall]:
    """A rate that never reaches its top. A grid refuses such a cell; of drawn ones nobody knows before."""
    hit = [point for point in points if point.groups["train"].warmup_steps >= point.groups["train"].max_steps]
    if hit:
        longest = max(point.groups["train"].warmup_steps for point in hit)
        shortest = min(point.groups["train"].max_steps for point in hit)
        yield Pitfall(
            "train.warmup_steps",
            f"{longest} steps of warm-up are no fewer than train.max_steps={shortest} in {_which(hit)}: the learning "
            f"rate never reaches its top, and the study ends in an error where such a cell is drawn; keep "
            f"train.warmup_steps below {shortest}",
        )


def _rung(shared: Config, points: Sequence[_Point]) -> Iterator[Pitfall]:
    """A first rung at which health cannot say anything yet."""
    first = _first_rung(shared)
    if first is None:
        return
    step, key, got = first
    # The first step of a warm-up has a rate of 0.
    late = [(window(each.max_steps) + bool(each.warmup_steps), point)
            for point in points for each in [point.groups["train"]]]  # fmt: skip
    hit = [point for over, point in late if over > step]
    if not hit:
        return
    train, over = shared.train, max(over for over, _ in late)
    every = train.eval_every
    later = -(-over // every) * every
    lower = f"set {key}={over}" if later < train.max_steps else "set pruner=none, or train for more steps"
    yield Pitfall(
        key,
        f"{got} lets the pruner end trials at step {step}, before the first {over} steps are over, in which health can "
        f"tell no cause yet, so a trial that learns nothing is ended without a word ({_which(hit)}); {lower}",
    )


def _first_rung(config: Config) -> tuple[int, str, Any] | None:
    """(step of the first decision, the field that says so, its value); None where none is known before the end."""
    pruner, train = config.pruner, config.train
    if pruner.name == "asha":
        try:
            rungs = Asha(pruner.eta or 0, pruner.min_steps or 0, train.max_steps, train.eval_every).rungs
        except ConfigError:
            return None
        return rungs[0], "pruner.min_steps", pruner.min_steps
    if pruner.instance is None:
        return None
    arguments = FIRST_STEP_KEYS.get(str(pruner.instance.get("_target_", "")).rpartition(".")[2])
    if arguments is None:
        return None
    name, default = arguments
    got = pruner.instance.get(name, default)
    least = max(got, 1) if isinstance(got, int) else 1
    step = -(-least // train.eval_every) * train.eval_every
    return (step, f"pruner.instance.{name}", got) if step < train.max_steps else None


def _evaluation(points: Sequence[_Point], known: Mapping[str, EvaluationSize]) -> Iterator[Pitfall]:
    """Too few examples to compare runs on."""
    sets: dict[str, list[_Point]] = {}
    for point in points:
        sets.setdefault(_data_key(point.groups), []).append(point)
    smallest: tuple[EvaluationSize, Any] | None = None
    hit: list[_Point] = []
    for key, those in sets.items():
        data_config = those[0].groups["data"]
        size = known.get(key) or EvaluationSize.of(data.load(data_config, load_tokenizer(those[0].groups["model"])))
        if size.examples < NEEDED_EXAMPLES:
            hit += those
            if smallest is None or size.examples < smallest[0].examples:
                smallest = size, data_config
    if smallest is None:
        return
    size, data_config = smallest
    difference = 2 * PAIRED_SPREAD / math.sqrt(size.examples)
    where = "" if len(hit) == len(points) else f" ({_which(hit)})"
    yield Pitfall(
        "data.eval_size",
        f"{size.examples} evaluation examples{where} distinguish runs whose losses differ by about {difference:.1%}; "
        f"for {SMALLEST_DIFFERENCE:.0%} about {NEEDED_EXAMPLES} are needed; {_more_examples(data_config, size)}",
    )


def _more_examples(data_config: Any, size: EvaluationSize) -> str:
    needed = NEEDED_EXAMPLES
    if data_config.name == "style" or size.held_out >= needed:
        return f"set data.eval_size={needed}"
    if data_config.name in ("facts", "real_facts"):
        subjects = math.ceil((data_config.subjects or 1) * needed / size.held_out)
        return f"set data.subjects={subjects} data.eval_size={needed}, which is a larger task"
    if data_config.eval_path is None and data_config.eval_split is None:
        # Held out by a hash: some more, since the share is met on average only.
        share = 1.2 * data_config.eval_share * needed / max(size.held_out, 1)
        if share <= MOST_HELD_OUT:
            return f"hold more out: data.eval_share={share:.2g} data.eval_size={needed}"
        return f"bring more data, or evaluation data of its own by data.eval_path, and set data.eval_size={needed}"
    field = "data.eval_split" if data_config.eval_path is None else "data.eval_path"
    return f"give {field} more examples, and set data.eval_size={needed}"
