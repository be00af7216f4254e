"""Which cells are the same run: LoRA's symmetry under AdamW, in exact arithmetic. Pure: configurations in, classes out.

dW = s B A with s = alpha / r (rsLoRA: alpha / sqrt(r)) and B = 0 at the start. For any q > 0

    s -> s / q    lr_B -> q lr_B    eps_B -> eps_B / q    wd_B -> wd_B / q    (decay as lr x wd, PyTorch's form)

leaves every weight update and every loss of AdamW unchanged (Schulman 2025, "LoRA Without Regret", extended to eps and
decay): B is q times as large, its gradient 1 / q times, and nothing else tells. (The second such freedom, of A, needs
another initial A, which is PEFT's here.) Schedules are factors on each rate, so they keep it; dropout masks depend on
seed, step and place alone.

In floats it holds as long as nothing leaves their range. g_B = s G, where G is the same for all members; Adam's second
moment is of the order of (s G)^2, and B of lr_B. With n bits (fp32: 24), a smallest number 2^-a (149) and a largest 2^e
(128), members share a class where each has

    eps_B^2 (1 - beta2) >= 2^(2n - a)
        Each step rounds v by at most 2^-a, all steps by 2^-a / (1 - beta2), and sqrt(v) by at most the root of that.
        Where this is 2^-n of eps_B or less, it is below the rounding of the sum sqrt(v) + eps_B, however small G is.
    s <= 2^(e/2 - 24)
        (s |G|)^2, summed over all elements, is finite up to a norm |G| of 2^24.
    2^(2 - e/2) <= lr_B <= 2^(e/2 - 36)
        B^2 is neither rounded away nor infinite, summed over 2^32 elements that have moved by 2^20 lr_B.

For eps 1e-8 and beta2 0.999 this is s from 2e-6 to 1e12. Measured on the embedded base (style, rank 4, 20 steps, the
scaled rules, s = 2^k and lr_B = 3e-3 / 2^k against k = 0): the same bits for k from -36 to 62, under eps 1e-12 for k
from -30; losses off by 2e-7 at -40, 9e-5 at -48, by all of the loss at -60 and from 66 on, and not finite at -70.
"""

import json
import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from lora_sweep.config import Config
from lora_sweep.errors import ConfigError, Fault

Fold = Literal["exact", "near", "off"]
TrueFold = Literal["exact", "near"]
Form = Literal["lora", "rslora", "loraplus"]
Reason = Literal["eps", "clip", "rounding", "range"]

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

LARGEST_SIZE = 1e-2
"""Cells whose losses may differ by more, relative, share no class under any fold."""

EPS_SIZE, EPS = 2e-3, 1e-8
"""Two members under one eps for A and B: so much where the larger eps_B / s is this, in proportion elsewhere. Measured
on the embedded base over 50 steps, style and facts, rank 8, lr_A 5e-4 and 3e-3 with lr_B 16 times that over s: 2e-6 to
7e-4 at 1e-8, 1e-5 to 8e-3 at 1e-7, 9e-5 to 4e-2 at 1e-6; the hotter rate moves losses the more."""

CLIP_SIZE = 0.5
"""Members under torch's clipping, when the clip binds, which nobody knows beforehand. Measured likewise, s from 1 to
64, norms from 0.05 to 1: 3e-4 to 0.32, mostly above LARGEST_SIZE. So under torch's clipping s must be the same."""

ROUNDING_SIZE = 0.3
"""A base in bf16, or moments in 8 bits, round differently after another rounding of the adapter's part. Measured
likewise, factors of 3 and 10 under the scaled eps: in bf16 3e-3 at the cooler rate and 4e-2 at the hotter, on an NF4
base in bf16 4e-3 and 0.15. So only factors that change no bit are the same run."""

QUANTIZED_SIZE = 1e-4
"""A quantized base that computes in fp32 rounds as fp32 does. Measured likewise: 3e-7 at the cooler rate, 3e-5 at the
hotter."""


@dataclass(frozen=True)
class Grade:
    """How equal the members of a class are."""

    name: Literal["bitwise", "exact", "near"]
    """`bitwise`: the same bits in one kind of pack; `exact`: equal by algebra, rounded differently; `near`: equal but
    for `reasons`."""
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
    rounding_size: float
    """How far another rounding may move losses: 0 where base, adapters and their moments are in fp32 or fp64."""
    beyond_range: Fraction | None
    """s^2 where a float cannot hold what the symmetry makes of some value, so that only the same s is the same run."""

    @property
    def algebra(self) -> tuple[Any, ...]:
        """Equal where real numbers, no eps and no clip would make it the same run."""
        return self.rest, self.slope_squared, self.decay_B, self.own

    @property
    def eps_size(self) -> float:
        """How far eps alone may move the losses from those under a smaller eps_B / s."""
        return max(EPS_SIZE * math.sqrt(self.eps_over_s_squared) / EPS, EXACT_SIZE)

    def key(self, fold: TrueFold) -> Hashable:
        """`near` leaves out what moves losses by no more than LARGEST_SIZE, all together."""
        keeps_bits = self.rounding_size > (0 if fold == "exact" else LARGEST_SIZE)
        keeps_eps = fold == "exact" or self.eps_size + self.rounding_size > LARGEST_SIZE
        eps, bits = self.eps_over_s_squared if keeps_eps else None, self.bits if keeps_bits else ()
        return *self.algebra, eps, self.clip_weight_squared, bits, self.beyond_range


def decimal(value: float) -> Fraction:
    """The number as it was typed: 1e-3 is 1/1000, not the nearest double."""
    return Fraction(repr(value))


def _odd(value: Fraction) -> Fraction:
    """The value without its powers of two."""
    top, bottom = value.numerator, value.denominator
    return Fraction(top // (top & -top), bottom // (bottom & -bottom))


def _is_within_range(config: Config, s_squared: Fraction, lr_B: Fraction, eps_B_squared: Fraction) -> bool:
    """Whether AdamW's step on B stays within the adapter's floats; the bounds are derived above."""
    bits, smallest, largest = (53, 1074, 1024) if config.model.dtype == "fp64" else (24, 149, 128)
    two = Fraction(2)
    return (
        eps_B_squared * (1 - decimal(config.optimizer.beta2)) >= two ** (2 * bits - smallest)
        and s_squared <= two ** (largest - 48)
        and two ** (4 - largest) <= lr_B**2 <= two ** (largest - 72)
    )


def _rounding_size(config: Config) -> float:
    if config.model.dtype not in ("fp32", "fp64") or config.optimizer.optim in EIGHT_BITS:
        return ROUNDING_SIZE
    return 0.0 if config.model.quantization is None else QUANTIZED_SIZE


def _is_symmetric(config: Config) -> bool:
    return config.optimizer.optim in SYMMETRIC and config.method.name == "lora"


def _run(config: Config) -> _Run:
    method, optimizer, train = config.method, config.optimizer, config.train
    rank, alpha, lr_A, ratio = method.rank, decimal(method.alpha), decimal(optimizer.base_lr), decimal(optimizer.ratio)
    lr_B = lr_A * ratio
    s_squared = alpha**2 / (rank if method.use_rslora else rank**2)
    decay = optimizer.weight_decay if optimizer.weight_decay_B is None else optimizer.weight_decay_B
    decay_B = (lr_A if optimizer.decay_rule == "scaled" else lr_B) * decimal(decay)
    eps_squared = decimal(optimizer.eps) ** 2
    rest = {name: asdict(part) for name, part in (("model", config.model), ("data", config.data), ("method", method))}
    rest |= {"optimizer": asdict(optimizer), "train": asdict(train)}
    described_otherwise = ("alpha", "use_rslora"), ("ratio", "weight_decay_B", "eps_rule", "decay_rule", "clip_rule")
    for group, names in (
        ("method", described_otherwise[0]),
        ("optimizer", described_otherwise[1]),
        ("train", ("slots",)),
    ):
        for name in names:
            del rest[group][name]
    if train.max_grad_norm is None:
        clip_weight_squared = None
    else:
        clip_weight_squared = Fraction(1) if optimizer.clip_rule == "scaled" else s_squared
    # A rank that is a power of four has a root that is a power of two: there rsLoRA's s has LoRA's bits.
    power_of_four = rank & (rank - 1) == 0 and rank.bit_length() % 2 == 1
    is_symmetric = _is_symmetric(config)
    eps_B_squared = eps_squared * s_squared if optimizer.eps_rule == "scaled" else eps_squared
    return _Run(
        rest=json.dumps(rest, sort_keys=True),
        slope_squared=s_squared * lr_B**2,
        decay_B=decay_B,
        own=() if is_symmetric else (s_squared, lr_B),
        eps_over_s_squared=eps_B_squared / s_squared,
        clip_weight_squared=clip_weight_squared,
        bits=(_odd(lr_B), power_of_four or method.use_rslora, decay_B == 0 or optimizer.decay_rule),
        rounding_size=_rounding_size(config),
        beyond_range=s_squared
        if is_symmetric and not _is_within_range(config, s_squared, lr_B, eps_B_squared)
        else None,
    )


def _grade(runs: Sequence[_Run]) -> Grade:
    """Of cells that are the same run by algebra, whether or not they share a class."""
    sizes: dict[Reason, float] = {}
    if len({run.eps_over_s_squared for run in runs}) > 1:
        sizes["eps"] = max(run.eps_size for run in runs)
    if len({run.clip_weight_squared for run in runs}) > 1:
        sizes["clip"] = CLIP_SIZE
    same_bits = len({run.bits for run in runs}) == 1
    if runs[0].rounding_size and (sizes or not same_bits):
        sizes["rounding"] = runs[0].rounding_size
    if len({run.beyond_range for run in runs}) > 1:
        sizes["range"] = math.inf
    if sizes:
        return Grade("near", sum(sizes.values()), tuple(sizes))
    return Grade("bitwise", 0.0) if same_bits else Grade("exact", EXACT_SIZE)


def run_key(config: Config, fold: TrueFold) -> Hashable:
    """Equal for those configurations that `classes` would put into one class."""
    return _run(config).key(fold)


def classes(configs: Mapping[int, Config], fold: Fold) -> tuple[SameRun, ...]:
    """The cells in classes of the same run, by their lowest number; each cell is in one.

    Args:
        configs: number of a cell -> its configuration.
        fold: how equal the cells of a class are.

    >>> found = classes({cell.number: sweep.config(cell) for cell in sweep.cells()}, "exact")
    >>> len(found), found[1].cells, str(found[1].grade)
    (24, (1,), 'bitwise')

    `exact`: only cells that are equal by algebra share a class; `near`: also those that eps or the rounding of a
    quantized base in fp32 tells apart, by no more than LARGEST_SIZE; `off`: none. A clip that may bind, the rounding of
    a 16-bit base or of 8-bit moments, and values beyond the range of floats move losses by more, so they keep cells
    apart under every fold.
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
    rounded = before.algebra != after.algebra
    return written, _grade([before, replace(after, bits=(*after.bits, rounded)) if rounded else after])


@dataclass(frozen=True)
class Check:
    """Two cells of one class, both to be run and compared."""

    one: int
    other: int
    grade: Grade


def checks(classes: Sequence[SameRun], count: int) -> tuple[Check, ...]:
    """Of `count` classes of several cells, drawn at random but always the same, the first cell and another one."""
    several = [each for each in classes if len(each.cells) > 1]
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
