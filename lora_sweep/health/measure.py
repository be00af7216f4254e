"""One health check of adapters as they stand after an optimizer step: tensors -> numbers, a row a module.

Pure, and on the device: modules of one shape, of whatever adapter, are measured at once, and nothing waits for the
device. |BA|_F^2 = tr((B'B)(AA')), so BA itself is never formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = (
    "rms_A", "rms_B", "absmax_B", "zero_B", "product", "stable_rank",
    "gradmax_A", "gradmax_B", "gradrms_B", "gradzero_B", "v_over_eps_B", "moved_A", "moved_B", "lr_A", "lr_B",
)  # fmt: skip
"""Columns of a check.

rms, absmax: of all elements. zero_B: share of elements that are exactly 0. product: |BA|_F. stable_rank: |BA|_F^2 over
its largest singular value squared; nan where BA = 0. The others are of a sample, and nan where not known. gradmax,
gradrms, gradzero: of the gradient that was stepped on, the share of elements that are exactly 0; a gradmax of -1 says
that there is none. v_over_eps_B: median sqrt(v) / eps, bias corrected. moved: share of elements whose bits the step has
changed. lr: the rate at which Adam has moved them, by what moved.
"""

MOMENTS = {"exp_avg": "m", "exp_avg_sq": "v", "state1": "m", "state2": "v"}
"""Adam's moments by the names that torch and bitsandbytes give them in an optimizer's state."""

SAMPLE = 1024
"""Elements of a tensor that a sample holds, or a few more, evenly spread: a share is known to +- 1.6 % at worst."""

RATE_SAMPLE = 256
"""Elements of those that a rate is measured on, or a few more: it is the same for all."""

POWER_STEPS = 16
"""Of the power iteration for the largest singular value, which they give from below."""

CERTAIN_ULPS = 64.0
"""A rate is measured on elements that move by so many spacings of their own floating-point numbers at least."""


@dataclass(frozen=True)
class Stepped:
    """How the optimizer has just stepped a parameter."""

    shrink: float
    """1 - lr x weight decay where decay is decoupled, else 1: what the step has multiplied the value by."""
    eps: float
    betas: tuple[float, float]
    t: int
    """Steps in the moments, for the bias correction."""


@dataclass(frozen=True)
class Side:
    """A or B of a module with what its optimizer has of it; all tensors of one shape and layout."""

    value: Tensor
    """(r, d), the rank first: B comes transposed."""
    gradient: Tensor | None
    """As the optimizer saw it, clipped; None where backward left none."""
    m: Tensor | None
    """Adam's first moment; None of other optimizers, and of states in 8 bits."""
    v: Tensor | None
    stepped: Stepped


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted module of one adapter."""

    A: Side
    B: Side


WeightSamples = Sequence[tuple[Tensor, Tensor]]
"""Samples of A and B of each module before a step."""


def sample_weights(values: Sequence[tuple[Tensor, Tensor]]) -> WeightSamples:
    """What `measure` must know of (A, B) of each module as they were before the step."""
    return [(_sample(A).clone(), _sample(B).clone()) for A, B in values]


def measure(modules: Sequence[AdaptedModule], before: WeightSamples) -> Tensor:
    """(modules, METRICS) float64 on the device."""
    if len(modules) != len(before):
        raise ValueError(f"{len(modules)} modules, but {len(before)} of the snapshot")
    alike: dict[object, list[int]] = {}
    for place, module in enumerate(modules):
        alike.setdefault(_kind(module), []).append(place)
    device = modules[0].A.value.device
    rows = torch.empty(len(modules), len(METRICS), dtype=torch.float64, device=device)
    for places in alike.values():
        columns = _columns([modules[place] for place in places], [before[place] for place in places])
        ordered = torch.stack([columns[name].double() for name in METRICS], dim=1)
        rows[torch.tensor(places, device=device)] = ordered
    return rows


def _kind(module: AdaptedModule) -> object:
    """What modules must have in common to be stacked."""
    sides = [
        (
            side.value.shape,
            side.value.dtype,
            side.gradient is None,
            side.m is None or side.v is None,
            side.stepped.betas,
        )
        for side in (module.A, module.B)
    ]
    return tuple(sides)


def _columns(modules: Sequence[AdaptedModule], before: WeightSamples) -> dict[str, Tensor]:
    """Each (n,) of n modules of one kind."""
    A, B = (_wide(torch.stack([getattr(module, side).value for module in modules])) for side in ("A", "B"))
    gram_A, gram_B = torch.bmm(A, A.transpose(1, 2)), torch.bmm(B, B.transpose(1, 2))
    squared = (gram_B * gram_A).sum((1, 2)).clamp(min=0)
    none = torch.full((len(modules),), torch.nan, device=A.device)
    columns = {
        "rms_A": _traces(gram_A).div(A[0].numel()).sqrt(),
        "rms_B": _traces(gram_B).div(B[0].numel()).sqrt(),
        "absmax_B": B.abs().amax((1, 2)),
        "zero_B": (B == 0).float().mean((1, 2)),
        "product": squared.sqrt(),
        "stable_rank": squared / _largest_squared(torch.bmm(gram_B, gram_A)),
        "gradmax_A": torch.full_like(none, -1),
        "gradmax_B": torch.full_like(none, -1),
        "gradrms_B": none,
        "gradzero_B": none,
        "v_over_eps_B": none,
    }
    if modules[0].A.gradient is not None:
        columns["gradmax_A"] = _sampled_gradients(modules, "A").abs().amax(1)
    if modules[0].B.gradient is not None:
        gradient = _sampled_gradients(modules, "B")
        columns["gradmax_B"] = gradient.abs().amax(1)
        columns["gradrms_B"] = gradient.square().mean(1).sqrt()
        columns["gradzero_B"] = (gradient == 0).float().mean(1)
    for name, place in (("A", 0), ("B", 1)):
        sides: list[Side] = [getattr(module, name) for module in modules]
        was = torch.stack([each[place] for each in before])
        now = torch.stack([_sample(side.value) for side in sides])
        columns[f"moved_{name}"] = (now != was).float().mean(1)
        columns[f"lr_{name}"], ratio = _rates(sides, was, now, none)
        if name == "B":
            columns["v_over_eps_B"] = ratio
    return columns


def _sampled_gradients(modules: Sequence[AdaptedModule], side: str) -> Tensor:
    """(n, about SAMPLE)."""
    return _wide(torch.stack([_sample(getattr(module, side).gradient) for module in modules]))


def _traces(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).sum(1)


def _rates(sides: Sequence[Side], was: Tensor, now: Tensor, none: Tensor) -> tuple[Tensor, Tensor]:
    """((n,) rate at which each was moved, (n,) median sqrt(v) / eps).

    A step of AdamW is P <- shrink P - lr D with D = m' / (sqrt(v') + eps), m' and v' bias corrected. So (shrink P - P')
    / D is the rate, of every element the same; the median is taken where the change is far above rounding.
    """
    if sides[0].m is None or sides[0].v is None:
        return none, none
    every = _stride(was.shape[1], RATE_SAMPLE, sides[0].value.numel())
    was, now = was[:, ::every], now[:, ::every]
    m = torch.stack([_sample(_given(side.m))[::every] for side in sides]).double()
    v = torch.stack([_sample(_given(side.v))[::every] for side in sides]).double()
    beta1, beta2 = sides[0].stepped.betas

    corrections = [
        (1 - beta1 ** max(each.t, 1), 1 - beta2 ** max(each.t, 1), each.eps, each.shrink)
        for each in (side.stepped for side in sides)
    ]
    for_m, for_v, eps, shrink = torch.tensor(corrections, dtype=torch.float64, device=was.device).split(1, dim=1)
    m /= for_m
    root = v.div_(for_v).sqrt_()
    direction = m / (root + eps)
    change = was.double() * shrink - now.double()
    spacing = torch.finfo(now.dtype).eps * torch.maximum(was.abs(), now.abs()).double()
    is_certain = (direction != 0) & (change.abs() > CERTAIN_ULPS * spacing)
    rates = torch.where(is_certain, change / direction, torch.nan).nanmedian(1).values
    return rates, (root / eps).median(1).values


def _largest_squared(gram: Tensor) -> Tensor:
    """(n,) largest eigenvalue of (n, r, r), the product of two positive ones: largest singular value of BA squared."""
    r = gram.shape[1]
    vector = torch.linspace(1, 2, r, dtype=gram.dtype, device=gram.device).expand(len(gram), r).unsqueeze(2)
    size = torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(POWER_STEPS):
        vector = torch.bmm(gram, vector)
        size = torch.linalg.vector_norm(vector, dim=(1, 2))
        vector = vector / size.view(-1, 1, 1)
    return size


def _sample(tensor: Tensor) -> Tensor:
    """(about SAMPLE,) elements, a view; in the order of the memory, so that a transposed tensor need not be copied."""
    if not (tensor.is_contiguous() or tensor.T.is_contiguous()):
        tensor = tensor.contiguous()
    every = _stride(tensor.numel(), SAMPLE, tensor.numel())
    return tensor.detach().as_strided((-(-tensor.numel() // every),), (every,))


def _stride(length: int, wanted: int, numel: int) -> int:
    """Takes about `wanted` of `length` elements of a tensor of `numel`, or of a sample of it.

    It has no divisor in common with the rows or columns, else whole ranks, or whole inputs, would never be taken.
    """
    widest = -(-length // wanted)
    return next(every for every in range(widest, 0, -1) if math.gcd(every, numel) == 1)


def _wide(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
