"""Measurements of an adapter -> findings with a cause. Pure functions over named tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_sweep.config import HealthConfig
from lora_sweep.records import Base, Evaluation, Finding, Histogram, Measurement

DECADES = (-3, 2)
BINS_PER_DECADE = 5

_POSITIVE = np.logspace(*DECADES, (DECADES[1] - DECADES[0]) * BINS_PER_DECADE + 1)
BIN_EDGES: NDArray[np.float64] = np.concatenate([-_POSITIVE[::-1], _POSITIVE])
"""(52,) edges of 51 bins, the same for every trial: symmetric, logarithmic, the middle one around 0.

In units of sqrt(sum of lr_B^2) (lr_B sqrt(steps) under a constant rate): the size to which Adam's updates would add up
if their signs were random. What lies outside is counted in the outermost bins.
"""


@dataclass(frozen=True)
class AdaptedModule:
    """The tensors of one adapted module, as the pack or any other trainer holds them."""

    A: Tensor
    """(r, d_in)."""
    B: Tensor
    """(r, d_out) or any layout with the rank first."""
    base_norm: float
    """|W|_F of the frozen weight."""


def measure(modules: Mapping[str, AdaptedModule], scaling: float, lr_B_squared: float) -> tuple[Measurement, ...]:
    """One measurement per group of modules of the same last name (`q_proj`, ...), in order of first appearance.

    `lr_B_squared`: sum of lr_B^2 over the steps taken. |BA|_F^2 = tr((B'B)(AA')), so BA itself is never formed.
    """
    groups: dict[str, list[AdaptedModule]] = {}
    for name, module in modules.items():
        groups.setdefault(name.rpartition(".")[2], []).append(module)
    unit = math.sqrt(lr_B_squared)
    return tuple(_measure_group(name, group, scaling, unit) for name, group in groups.items())


def _measure_group(name: str, modules: Sequence[AdaptedModule], scaling: float, unit: float) -> Measurement:
    A = torch.cat([module.A.detach().flatten() for module in modules])
    B = torch.cat([module.B.detach().flatten() for module in modules])
    delta = sum(float(((m.B @ m.B.T) * (m.A @ m.A.T)).sum().clamp(min=0)) for m in (_plain(m) for m in modules))
    base = math.sqrt(sum(module.base_norm**2 for module in modules))
    rms_B = float(B.square().mean().sqrt())
    return Measurement(
        group=name,
        rms_A=float(A.square().mean().sqrt()),
        rms_B=rms_B,
        absmax_B=float(B.abs().max()),
        exact_zero_B=float((B == 0).double().mean()),
        delta_rel=scaling * math.sqrt(delta) / base if base else math.inf,
        rho=rms_B / unit if unit else 0.0,
        histogram=Histogram(_histogram(B, unit)),
    )


def _plain(module: AdaptedModule) -> AdaptedModule:
    return AdaptedModule(module.A.detach().float(), module.B.detach().float(), module.base_norm)


def _histogram(B: Tensor, unit: float) -> NDArray[np.int64]:
    scaled = (B / unit if unit else B).clamp(float(BIN_EDGES[0]), float(BIN_EDGES[-1]))
    # Not-a-number has no bin.
    finite = scaled[~scaled.isnan()]
    inner = torch.as_tensor(BIN_EDGES[1:-1], dtype=finite.dtype, device=finite.device)
    counts = torch.bincount(torch.bucketize(finite, inner), minlength=len(BIN_EDGES) - 1)
    return counts.cpu().numpy().astype(np.int64)


def paired_gain(base: Base, evaluation: Evaluation) -> tuple[float, float]:
    """(gain of the adapter over the base, its standard error paired by example), nats per token.

    The gain is of the token-weighted losses; the error is that of the mean of per-example differences.
    """
    difference = base.eval_losses - evaluation.eval_losses
    error = float(np.std(difference, ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else math.inf
    return base.eval_loss - evaluation.eval_loss, error


def forgetting(base: Base, evaluation: Evaluation) -> float | None:
    """Loss on the retention text, adapter on minus off, nats per token; None where there is no such text."""
    if evaluation.retention_loss is None or base.retention_loss is None:
        return None
    return evaluation.retention_loss - base.retention_loss


def findings(base: Base, last: Evaluation, rules: HealthConfig) -> tuple[Finding, ...]:
    """The trial's own findings after its last evaluation.

    `zero_trapped` needs both: no gain over the base, and an update too small to matter. Its full diagnosis needs more.
    """
    if last.diverged:
        sentence = f"The loss was last finite at step {last.last_finite_step}: lower optimizer.base_lr or method.alpha."
        return (Finding("diverged", {"last_finite_step": float(last.last_finite_step or 0)}, sentence),)
    gain, error = paired_gain(base, last)
    needed = max(rules.min_gain_standard_errors * error, rules.min_gain_of_base * base.eval_loss)
    moved = float(np.median([measurement.delta_rel for measurement in last.measurements]))
    if gain < needed and moved < rules.min_delta_rel:
        evidence = {"gain": gain, "gain_needed": needed, "delta_rel": moved, "delta_rel_needed": rules.min_delta_rel}
        sentence = (
            f"The adapter gained {gain:.2g} nats over its base (at least {needed:.2g} would count) and its update is "
            f"{moved:.1e} of the weights: raise optimizer.base_lr, method.alpha or train.max_steps."
        )
        return (Finding("zero_trapped", evidence, sentence),)
    return ()
