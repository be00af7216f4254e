"""lora_B as counts in bins that are the same for every trial of every study."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DECADES = (-3, 2)
BINS_PER_DECADE = 5

_POSITIVE = np.logspace(*DECADES, (DECADES[1] - DECADES[0]) * BINS_PER_DECADE + 1)
BIN_EDGES: NDArray[np.float64] = np.concatenate([-_POSITIVE[::-1], _POSITIVE])
"""(52,) edges of 51 bins, the same for every trial: symmetric, logarithmic, the middle one around 0.

In units of sqrt(sum of lr_B^2) (lr_B sqrt(steps) under a constant rate): the size to which Adam's updates would add up
if their signs were random. What lies outside is counted in the outermost bins.
"""


def counts(B: Tensor, unit: float) -> NDArray[np.int64]:
    """(51,) elements of B, of any shape, in the bins; not-a-number has none. A `unit` of 0 counts as 1."""
    scaled = (B / unit if unit else B).clamp(float(BIN_EDGES[0]), float(BIN_EDGES[-1]))
    finite = scaled[~scaled.isnan()]
    inner = torch.as_tensor(BIN_EDGES[1:-1], dtype=finite.dtype, device=finite.device)
    totals = torch.bincount(torch.bucketize(finite, inner), minlength=len(BIN_EDGES) - 1)
    return totals.cpu().numpy().astype(np.int64)
