"""Modules of the same last name (`q_proj`, ...) as one: what a person compares between trials."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_sweep.health import histogram
from lora_sweep.records import HealthSnapshot, Histogram, Measurement

Numbers = NDArray[np.float64]


def delta_rel(snapshot: HealthSnapshot, scaling: float, base_norms: Mapping[str, float]) -> Numbers:
    """(modules,) s |BA|_F / |W|_F at the last check; infinite where W = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes: Numbers = scaling * snapshot.values["product"][-1] / np.array([base_norms[m] for m in snapshot.modules])
    return sizes


def measurements(
    snapshot: HealthSnapshot,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
    base_norms: Mapping[str, float],
) -> tuple[Measurement, ...]:
    """One per group as of the last check, in order of first appearance.

    Args:
        factors: module -> (A, B) as they were at that check, in any layout.
        base_norms: module -> |W|_F.
    """
    named: dict[str, list[int]] = {}
    for place, name in enumerate(snapshot.modules):
        named.setdefault(name.rpartition(".")[2], []).append(place)
    unit = math.sqrt(snapshot.sums.lr_B_squared)
    return tuple(_group(name, places, snapshot, factors, scaling, base_norms, unit) for name, places in named.items())


def _group(
    name: str,
    places: Sequence[int],
    snapshot: HealthSnapshot,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scaling: float,
    base_norms: Mapping[str, float],
    unit: float,
) -> Measurement:
    modules = [snapshot.modules[place] for place in places]
    last = {metric: values[-1][list(places)] for metric, values in snapshot.values.items()}
    sizes_A, sizes_B = (np.array([factors[module][side].numel() for module in modules]) for side in (0, 1))
    rms_B = math.sqrt(np.average(last["rms_B"] ** 2, weights=sizes_B))
    base = math.sqrt(sum(base_norms[module] ** 2 for module in modules))
    whole = torch.cat([factors[module][1].detach().flatten() for module in modules])
    return Measurement(
        group=name,
        rms_A=math.sqrt(np.average(last["rms_A"] ** 2, weights=sizes_A)),
        rms_B=rms_B,
        absmax_B=float(last["absmax_B"].max()),
        exact_zero_B=float(np.average(last["zero_B"], weights=sizes_B)),
        moved_A=float(last["moved_A"].mean()),
        moved_B=float(last["moved_B"].mean()),
        v_over_eps_B=float(np.median(last["v_over_eps_B"])),
        stable_rank=float(np.median(last["stable_rank"])),
        delta_rel=scaling * math.sqrt((last["product"] ** 2).sum()) / base if base else math.inf,
        rho=rms_B / unit if unit else 0.0,
        histogram=Histogram(histogram.counts(whole, unit)),
    )
