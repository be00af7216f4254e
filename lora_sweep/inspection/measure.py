"""Tensors of one adapter -> measurements -> verdict. Pure; everything is computed in fp64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_sweep.adapters.reader import Factors

Verdict = Literal["healthy", "untrained", "partially_dead", "negligible", "incomplete", "dead", "broken", "empty"]
ZeroStart = Literal["A", "B", "BA"]

CANCELLED = 1e-6
"""|BA| / (|A| |B|) below which the product is rounding: `orthogonal` starts so; independent factors have 1/sqrt(r)."""

MIN_DELTA_REL = 1e-4
"""Update relative to the weight below which a module is negligible: a merge into bf16 loses it.

A tenth of health.min_delta_rel, which judges with the loss: short preference trainings end near there and work.
"""

MANY = 0.5
"""Share of negligible modules that decides the verdict; of fewer each is listed."""

BF16_KEEPS = 2.0**-9
"""Of a bf16 element: half the least distance to the next; a merge rounds smaller changes away."""

ROWS = 1024
"""Rows of a base weight that are turned into fp64 at a time."""


@dataclass(frozen=True)
class ModuleMeasurement:
    """One adapted module. Norms are Frobenius; what is not finite or not known is None."""

    name: str
    rank: int
    scaling: float
    """s of W + s B A."""
    d_in: int
    d_out: int
    dtype: str
    parameters: int
    zero_start: ZeroStart | None
    """What starts at zero: B, of embeddings and under MiCA A, under `orthogonal` the product; None: nothing does."""
    norm_A: float | None
    norm_B: float | None
    rms_A: float | None
    rms_B: float | None
    absmax_A: float | None
    absmax_B: float | None
    exact_zero_A: float
    """Share of elements that are exactly 0."""
    exact_zero_B: float
    nonfinite: int
    """Elements that are NaN or infinite, of all its tensors."""
    delta_norm: float | None
    """s |BA|; None where a factor is not finite, or so large that the product is not."""
    stable_rank: float | None
    """|BA|^2 / (largest singular value of BA)^2, between 1 and rank; None where BA = 0."""
    delta_rel: float | None
    """|W' - W| / |W| with W' what the module computes with; without DoRA that is s |BA| / |W|. None without a base."""
    magnitude_deviation: float | None
    """DoRA: largest |m / |W_row| - 1| over the rows, 0 as initialized. None without a base."""
    dead: str | None
    """Why the module changes nothing, or None where it changes something (or is not finite)."""
    negligible: bool
    """Whether it changes its weight by less than MIN_DELTA_REL, though by something; False without a base."""

    @property
    def group(self) -> str:
        """Last part of the name, e.g. `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def exact_zero(self) -> float:
        """Share of exact zeros in the factor that starts at zero (B where none does)."""
        return self.exact_zero_A if self.zero_start == "A" else self.exact_zero_B


@dataclass(frozen=True)
class ExtraMeasurement:
    """A tensor that was saved whole beside the LoRA factors."""

    name: str
    kind: Literal["modules_to_save", "bias", "tokens", "other"]
    shape: tuple[int, ...]
    dtype: str
    norm: float | None
    nonfinite: int
    delta_rel: float | None
    """|saved - base| / |base|; None without a base, or where the base has no such parameter of this shape."""


def zero_start(init: object, is_embedding: bool) -> ZeroStart | None:
    """What PEFT starts at zero under `init_lora_weights` (lora/layer.py, reset_lora_parameters, *_init)."""
    if init == "orthogonal":
        return "BA"
    if init == "mica" or (is_embedding and init is True):
        return "A"
    if init is True or init in ("gaussian", "eva"):
        return "A" if is_embedding else "B"
    return None


def measure(name: str, factors: Factors, start: ZeroStart | None, weight: Tensor | None = None) -> ModuleMeasurement:
    """Sizes of one module's A, B and BA.

    With A' = Q R and B = P S (QR), BA = P (S R') Q', so its singular values are those of the r x r matrix S R': BA is
    never formed.

    Args:
        weight: (d_out, d_in) of the base, in the orientation of BA; None where none is given.
    """
    A, B = factors.A.detach().double(), factors.B.detach().double()
    held = [A, B, *(each.double() for each in (factors.bias, factors.magnitude) if each is not None)]
    nonfinite = sum(int((~each.isfinite()).sum()) for each in held)
    delta_norm = stable_rank = delta_rel = deviation = None
    most = abs(factors.scaling) * float(torch.linalg.vector_norm(A)) * float(torch.linalg.vector_norm(B))
    # Of fp64 factors the product, or its square, may be too large for fp64.
    if nonfinite == 0 and math.isfinite(most * most):
        core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T
        singular = torch.linalg.svdvals(core)
        norm = float(torch.linalg.vector_norm(singular))
        delta_norm = abs(factors.scaling) * norm
        # Scaled first: squares of tiny values would vanish.
        stable_rank = float((singular / singular[0]).square().sum()) if norm else None
        if weight is not None:
            delta_rel, deviation = _against(weight, A, B, factors)
    dead = _dead(A, B, factors, delta_norm, deviation, weight) if delta_norm is not None else None
    has_bias = factors.bias is not None and bool(factors.bias.any())
    return ModuleMeasurement(
        name=name,
        rank=A.shape[0],
        scaling=factors.scaling,
        d_in=A.shape[1],
        d_out=B.shape[0],
        dtype=str(factors.A.dtype).removeprefix("torch."),
        parameters=sum(each.numel() for each in held),
        zero_start=start,
        norm_A=_finite(torch.linalg.vector_norm(A)),
        norm_B=_finite(torch.linalg.vector_norm(B)),
        rms_A=_finite(A.square().mean().sqrt()),
        rms_B=_finite(B.square().mean().sqrt()),
        absmax_A=_finite(A.abs().max()),
        absmax_B=_finite(B.abs().max()),
        exact_zero_A=float((A == 0).double().mean()),
        exact_zero_B=float((B == 0).double().mean()),
        nonfinite=nonfinite,
        delta_norm=delta_norm,
        stable_rank=stable_rank,
        delta_rel=delta_rel,
        magnitude_deviation=deviation,
        dead=dead,
        negligible=dead is None and delta_rel is not None and delta_rel < MIN_DELTA_REL and not has_bias,
    )


def _dead(
    A: Tensor, B: Tensor, factors: Factors, delta_norm: float, deviation: float | None, weight: Tensor | None
) -> str | None:
    least = CANCELLED * abs(factors.scaling) * float(torch.linalg.vector_norm(A) * torch.linalg.vector_norm(B))
    if delta_norm > least or (factors.bias is not None and bool(factors.bias.any())):
        return None
    if deviation is not None and weight is not None and factors.magnitude is not None:
        # PEFT rounds the rows' norms to the weight's dtype.
        coarse = max(torch.finfo(each.dtype).eps for each in (weight, factors.magnitude))
        if deviation > 4 * coarse:
            return None
    zero_A, zero_B = not bool(A.any()), not bool(B.any())
    if zero_A and zero_B:
        return "A = B = 0, which no training leaves"
    return "A = 0" if zero_A else "B = 0" if zero_B else "s = 0" if factors.scaling == 0 else "BA = 0 but for rounding"


def _against(weight: Tensor, A: Tensor, B: Tensor, factors: Factors) -> tuple[float | None, float | None]:
    """(delta_rel, magnitude_deviation) against the base's weight.

    DoRA (2402.09353): W' = m / |W + D| (W + D), norms by row, D = s B A. With c = m / |W + D|, a row of W' - W is
    (c - 1) W + c D, whose square needs |W|, W.D and |D| alone.
    """
    base = change = deviation = 0.0
    gram = A @ A.T
    for rows in torch.arange(weight.shape[0]).split(ROWS):
        W, b = weight[rows].double(), factors.scaling * B[rows]
        squares = W.square().sum(1)
        own = ((b @ gram) * b).sum(1).clamp(min=0)
        base += float(squares.sum())
        if factors.magnitude is None:
            change += float(own.sum())
            continue
        m, mixed = factors.magnitude[rows].double(), ((W @ A.T) * b).sum(1)
        norms = (squares + 2 * mixed + own).clamp(min=0).sqrt()
        c = m / norms
        change += float(((c - 1).square() * squares + 2 * (c - 1) * c * mixed + c.square() * own).clamp(min=0).sum())
        deviation = max(deviation, float((m / squares.sqrt() - 1).abs().max()))
    relative = (change / base) ** 0.5 if base and math.isfinite(change) else None
    return relative, deviation if factors.magnitude is not None and math.isfinite(deviation) else None


def measure_extra(
    name: str, tensor: Tensor, modules_to_save: Sequence[str], base: Tensor | None = None
) -> ExtraMeasurement:
    """`base`: the parameter of this name in the base, if there is one."""
    plain = tensor.detach().double()
    nonfinite = int((~plain.isfinite()).sum())
    delta_rel = None
    if base is not None and base.shape == tensor.shape and not nonfinite:
        whole = base.detach().double()
        norm = float(torch.linalg.vector_norm(whole))
        moved = _finite(torch.linalg.vector_norm(plain - whole))
        delta_rel = moved / norm if norm and moved is not None else None
    parts = name.split(".")[:-1]
    kind: Literal["modules_to_save", "bias", "tokens", "other"] = "other"
    if "trainable_tokens" in name:
        kind = "tokens"
    elif any(each.split(".")[-1] in parts for each in modules_to_save):
        kind = "modules_to_save"
    elif name.endswith(".bias"):
        kind = "bias"
    norm_of = _finite(torch.linalg.vector_norm(plain))
    return ExtraMeasurement(
        name, kind, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), norm_of, nonfinite, delta_rel
    )


def judge(
    modules: Sequence[ModuleMeasurement],
    extras: Sequence[ExtraMeasurement],
    missing: Sequence[str] = (),
) -> tuple[Verdict, str]:
    """(verdict, what it means in a sentence).

    Args:
        missing: clauses on what the configuration promises and PEFT does not find, and on what it passes over.
    """
    beside = f"; the {len(extras)} tensors saved beside it may still change the model" if extras else ""
    also = "".join(f"; {each}" for each in missing)
    broken = [each.name for each in modules if each.nonfinite] + [each.name for each in extras if each.nonfinite]
    if broken:
        return "broken", f"NaN or infinite values in {named(broken)}{also}"
    too_large = [each.name for each in modules if each.delta_norm is None]
    if too_large:
        return "broken", f"values so large that BA is not finite in {named(too_large)}{also}"
    if not modules:
        return "empty", f"no LoRA weights at all{beside}" if not missing else f"no LoRA that PEFT loads{beside}{also}"
    dead = {each.name: each.dead for each in modules if each.dead is not None}
    if len(dead) == len(modules):
        verdict, sentence = _all_dead(modules, list(dict.fromkeys(dead.values())))
        return verdict, f"{sentence}{beside}{also}"
    verdicts = _weak(modules, dead)
    if missing:
        return "incomplete", "; ".join((*missing, *(verdicts[1:] if verdicts else ())))
    return verdicts or (
        "healthy",
        "every module is finite and changes its weight; what it learned, only its loss shows",
    )


def _all_dead(modules: Sequence[ModuleMeasurement], reasons: Sequence[str]) -> tuple[Verdict, str]:
    why = ", ".join(reasons)
    if all(_as_started(each) for each in modules):
        fresh = f"as in a fresh adapter, or as one lost on save ({why})"
        return "untrained", f"what starts at zero is still zero in every module, {fresh}"
    return "dead", f"no module changes anything ({why}), though not for a start at zero: lost on save?"


def _weak(modules: Sequence[ModuleMeasurement], dead: Mapping[str, str]) -> tuple[Verdict, str] | None:
    """Of modules that are not all dead: what those are that change nothing, or too little to matter."""
    small = {each.name: f"{each.delta_rel:.1e}" for each in modules if each.negligible and each.delta_rel is not None}
    clauses = []
    if dead:
        clauses.append(f"{len(dead)} of {len(modules)} modules change nothing: {named(list(dead), dead)}")
    if len(small) + len(dead) >= MANY * len(modules) and small:
        most = max(each.delta_rel or 0.0 for each in modules if each.negligible)
        clauses.append(
            f"{len(small)} of {len(modules)} modules change their weight by less than {MIN_DELTA_REL:g} of it "
            f"at most by {most:.1e}: {named(list(small), small)}; merged into a bf16 base, "
            f"what is below {BF16_KEEPS:.1e} of an element is rounded away; train longer or with a larger rate"
        )
    if not clauses:
        return None
    return "negligible" if len(dead) + len(small) == len(modules) else "partially_dead", "; ".join(clauses)


def _as_started(module: ModuleMeasurement) -> bool:
    return module.zero_start == "BA" or (module.zero_start is not None and module.exact_zero == 1)


def named(names: Sequence[str], why: Mapping[str, str] | None = None) -> str:
    shown = [f"{name} ({why[name]})" if why else name for name in names[:4]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None
