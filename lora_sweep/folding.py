"""Which cells are the same run: LoRA's symmetry under AdamW, in exact arithmetic. Pure: configurations in, classes out.

dW = s B A with s = alpha / r (rsLoRA: alpha / sqrt(r)) and B = 0 at the start. For any q > 0

    s -> s / q    lr_B -> q lr_B    eps_B -> eps_B / q    wd_B -> wd_B / q    (decay as lr x wd, PyTorch's form)

leaves every weight update and every loss of AdamW unchanged (Schulman 2025, "LoRA Without Regret", extended to eps and
decay): B is q times as large, its gradient 1 / q times, and nothing else tells. (The second such freedom, of A, needs
another initial A, which is PEFT's here.) Schedules are factors on each rate, so they keep it; dropout masks depend on
seed, step and place alone.
"""

import json
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from lora_sweep.config import Config
from lora_sweep.errors import ConfigError
from lora_sweep.records import Fault

Fold = Literal["exact", "near", "off"]
Folding = Literal["exact", "near"]
Form = Literal["lora", "rslora", "loraplus"]
Reason = Literal["eps", "clip", "rounding"]

SYMMETRIC = ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit")
"""Values of optimizer.optim for which the symmetry is proved: AdamW's step, by its moments in any form that scales with
them. Elsewhere (SGD steps by g_B itself) cells must agree in s and lr_B themselves."""

EIGHT_BITS = ("adamw_8bit", "paged_adamw_8bit")
"""Moments are kept in units of their block's largest, so that what scales by a power of two keeps its 8 bits; any other
factor rounds some of them to their neighbours, which is far above the rounding of fp32."""

EXACT_SIZE = 1e-5
"""Largest relative difference of training losses in fp32 over HELD_STEPS: rounding, as between packed and alone."""

HELD_STEPS = 50
"""Rounding grows with training, so that classes that are not bitwise are compared so far and no further."""

EPS_SIZE, EPS = 1e-3, 1e-8
"""Two members under one eps for A and B: so much at this eps, in proportion below."""

CLIP_SIZE = 0.05
"""Two members under torch's clipping, when the clip binds: nobody knows beforehand whether it does."""

ROUNDING_SIZE = 0.02
"""A base in 16 bits or fewer, or moments in 8, round differently after another rounding of the adapter's part."""


@dataclass(frozen=True)
class Grade:
    """How equal the members of a class are."""

    name: Literal["bitwise", "exact", "near"]
    """`bitwise`: the same bits in one kind of pack, unless something underflows fp32; `exact`: equal by algebra,
    rounded differently; `near`: equal but for `reasons`."""
    size: float
    """Largest relative difference of losses that is no surprise; 0 for bitwise."""
    reasons: tuple[Reason, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {' and '.join(self.reasons)}, up to {self.size:.0e}" if self.reasons else self.name


@dataclass(frozen=True)
class SameRun:
    """Cells of which one is run for all."""

    cells: tuple[int, ...]
    """Numbers, ascending, at least one."""
    grade: Grade
    """Of the two members that are least equal; bitwise for a single cell."""


@dataclass(frozen=True)
class _Run:
    """What a cell's run depends on; every number exact."""

    rest: str
    """All that is compared as it is."""
    slope_squared: Fraction
    """(s lr_B)^2: a square, so that rsLoRA's root of the rank stays rational."""
    decay_B: Fraction
    """lr_B wd_B of a step at the top of the schedule."""
    own: tuple[Fraction, ...]
    """Where the symmetry is not proved: s^2 and lr_B."""
    eps_over_s_squared: Fraction
    """(eps_B / s)^2."""
    clip_weight_squared: Fraction | None
    """Of |g_B / s| in the norm that is clipped; None without clipping."""
    bits: tuple[Any, ...]
    """Equal where q is a power of two and every float is then a power of two times the other."""
    in_full: bool
    """Base, adapters and their moments in fp32 or fp64."""
    eps: float

    @property
    def near(self) -> tuple[Any, ...]:
        return self.rest, self.slope_squared, self.decay_B, self.own

    @property
    def exact(self) -> tuple[Any, ...]:
        rounded = () if self.in_full else self.bits
        return *self.near, self.eps_over_s_squared, self.clip_weight_squared, rounded

    def key(self, fold: Folding) -> Hashable:
        return self.exact if fold == "exact" else self.near


def decimal(value: float) -> Fraction:
    """The number as it was typed: 1e-3 is 1/1000, not the nearest double."""
    return Fraction(repr(value))


def _odd(value: Fraction) -> Fraction:
    """The value without its powers of two."""
    top, bottom = value.numerator, value.denominator
    return Fraction(top // (top & -top), bottom // (bottom & -bottom))


def _is_symmetric(config: Config) -> bool:
    return config.optimizer.optim in SYMMETRIC and config.method.name == "lora"


def _run(config: Config) -> _Run:
    method, optimizer, train = config.method, config.optimizer, config.train
    rank, alpha, lr_A, ratio = method.rank, decimal(method.alpha), decimal(optimizer.base_lr), decimal(optimizer.ratio)
    lr_B = lr_A * ratio
    s_squared = alpha**2 / (rank if method.use_rslora else rank**2)
    asked = optimizer.weight_decay if optimizer.weight_decay_B is None else optimizer.weight_decay_B
    decay_B = (lr_A if optimizer.decay_rule == "scaled" else lr_B) * decimal(asked)
    eps_squared = decimal(optimizer.eps) ** 2
    rest = {name: asdict(part) for name, part in (("model", config.model), ("data", config.data), ("method", method))}
    rest |= {"optimizer": asdict(optimizer), "train": asdict(train)}
    told_otherwise = ("alpha", "use_rslora"), ("ratio", "weight_decay_B", "eps_rule", "decay_rule", "clip_rule")
    for group, names in (("method", told_otherwise[0]), ("optimizer", told_otherwise[1]), ("train", ("slots",))):
        for name in names:
            del rest[group][name]
    if train.max_grad_norm is None:
        clip_weight_squared = None
    else:
        clip_weight_squared = Fraction(1) if optimizer.clip_rule == "scaled" else s_squared
    # A rank that is a power of four has a root that is a power of two: there rsLoRA's s has LoRA's bits.
    power_of_four = rank & (rank - 1) == 0 and rank.bit_length() % 2 == 1
    return _Run(
        rest=json.dumps(rest, sort_keys=True),
        slope_squared=s_squared * lr_B**2,
        decay_B=decay_B,
        own=() if _is_symmetric(config) else (s_squared, lr_B),
        eps_over_s_squared=eps_squared if optimizer.eps_rule == "scaled" else eps_squared / s_squared,
        clip_weight_squared=clip_weight_squared,
        bits=(_odd(lr_B), power_of_four or method.use_rslora, decay_B == 0 or optimizer.decay_rule),
        in_full=config.model.dtype in ("fp32", "fp64")
        and config.model.quantization is None
        and optimizer.optim not in EIGHT_BITS,
        eps=optimizer.eps,
    )


def _grade(runs: Sequence[_Run]) -> Grade:
    """Of cells that are at least near one another."""
    sizes: dict[Reason, float] = {}
    if len({run.eps_over_s_squared for run in runs}) > 1:
        sizes["eps"] = max(EPS_SIZE * runs[0].eps / EPS, EXACT_SIZE)
    if len({run.clip_weight_squared for run in runs}) > 1:
        sizes["clip"] = CLIP_SIZE
    same_bits = len({run.bits for run in runs}) == 1
    if not runs[0].in_full and (sizes or not same_bits):
        sizes["rounding"] = ROUNDING_SIZE
    if sizes:
        return Grade("near", sum(sizes.values()), tuple(sizes))
    return Grade("bitwise", 0.0) if same_bits else Grade("exact", EXACT_SIZE)


def run_key(config: Config, fold: Folding) -> Hashable:
    """Equal for those configurations that `classes` would put into one class."""
    return _run(config).key(fold)


def classes(configs: Mapping[int, Config], fold: Fold) -> tuple[SameRun, ...]:
    """{cell number: its configuration} in classes, by their lowest number; each cell is in one.

    `exact`: only cells that are equal by algebra share a class; `near`: also those that differ by eps, a clip that may
    bind, or the rounding of a 16-bit base or of 8-bit moments; `off`: none.
    """
    groups: dict[Hashable, list[tuple[int, _Run]]] = {}
    for number in sorted(configs):
        run = _run(configs[number])
        groups.setdefault(number if fold == "off" else run.key(fold), []).append((number, run))
    return tuple(
        SameRun(tuple(number for number, _ in group), _grade([run for _, run in group])) for group in groups.values()
    )


def in_form(config: Config, form: Form) -> tuple[Config, Grade]:
    """The same run as LoRA or rsLoRA with ratio 1, or as LoRA+ with alpha = rank; and how equal it is.

    alpha and the ratio are rounded to doubles. Raises ConfigError where the symmetry is not proved.
    """
    method, optimizer = config.method, config.optimizer
    if not _is_symmetric(config):
        rule = f"under optimizer.optim={optimizer.optim} no other form is known to be the same run"
        remedy = f"leave it out; there is one for {', '.join(SYMMETRIC)}"
        raise ConfigError([Fault("pick.form", rule, form, remedy)])
    rank = method.rank
    s = method.alpha / (math.sqrt(rank) if method.use_rslora else rank)
    alpha, ratio = {
        "lora": (s * optimizer.ratio * rank, 1.0),
        "rslora": (s * optimizer.ratio * math.sqrt(rank), 1.0),
        "loraplus": (float(rank), s * optimizer.ratio),
    }[form]
    decay = optimizer.weight_decay if optimizer.weight_decay_B is None else optimizer.weight_decay_B
    if optimizer.decay_rule == "torch":
        decay *= optimizer.ratio / ratio
    written = replace(
        config,
        method=replace(method, alpha=alpha, use_rslora=form == "rslora"),
        optimizer=replace(optimizer, ratio=ratio, weight_decay_B=None if decay == optimizer.weight_decay else decay),
    )
    # Graded by what differs, since a rounded alpha would be another run to exact arithmetic.
    before, after = _run(config), _run(written)
    rounded = before.near != after.near
    return written, _grade([before, replace(after, bits=(*after.bits, rounded)) if rounded else after])


@dataclass(frozen=True)
class Check:
    """Two cells of one class, both to be run and compared."""

    one: int
    other: int
    grade: Grade


def checks(found: Sequence[SameRun], count: int) -> tuple[Check, ...]:
    """Of `count` classes of several cells, drawn at random but always the same, the first cell and another one."""
    several = [each for each in found if len(each.cells) > 1]
    random.Random(0).shuffle(several)
    return tuple(
        Check(each.cells[0], random.Random(each.cells[0]).choice(each.cells[1:]), each.grade)
        for each in several[:count]
    )


def largest_difference(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    """Relative, of two curves as far as both go; None is what is not finite."""
    pairs = list(zip(one, other, strict=False))
    if any((a is None) != (b is None) for a, b in pairs):
        return math.inf
    return max((abs(a - b) / abs(b) for a, b in pairs if a is not None and b is not None and a != b), default=0.0)


@dataclass(frozen=True)
class Coordinates:
    """What a cell of the symmetric optimizers really varies: all members of a class have the same."""

    log_X: float
    """Natural log of s r lr_B: the slope of the learning curve at the start, in units of the initial A's size."""
    log_Y: float
    """Natural log of 1 / lr_A: steps for A to move by its own initial size, in units of that size."""
    log2_rank: float
    kappa_B: float
    """Sum over the steps of lr_B wd_B."""
    dropout: float


def coordinates(config: Config) -> Coordinates | None:
    """The effective coordinates of a trial, or None where the symmetry is not proved, so that there are none.

    The initial A's size, 1 / sqrt(3 d_in), is the base's and left out.
    """
    if not _is_symmetric(config):
        return None
    method, optimizer = config.method, config.optimizer
    run = _run(config)
    return Coordinates(
        log_X=_log(run.slope_squared) / 2 + math.log(method.rank),
        log_Y=-math.log(optimizer.base_lr),
        log2_rank=math.log2(method.rank),
        kappa_B=float(run.decay_B) * _schedule_sum(config),
        dropout=method.dropout,
    )


def _log(value: Fraction) -> float:
    return math.log(value.numerator) - math.log(value.denominator)


def _schedule_sum(config: Config) -> float:
    """Sum over the steps of the schedule's factor, as transformers' schedules have it."""
    train = config.train
    warm, left = train.warmup_steps, train.max_steps - train.warmup_steps
    after: dict[str, float] = {
        "constant": left,
        "linear": (left + 1) / 2,
        "cosine": math.fsum((1 + math.cos(math.pi * step / left)) / 2 for step in range(left)),
    }
    return (warm - 1) / 2 + after[train.schedule] if warm else after[train.schedule]
