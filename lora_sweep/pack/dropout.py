"""Dropout masks that know neither padding nor neighbours.

An element is dropped by a counter-based function of (seed, step, micro-batch, module, example, position, feature): a
global generator would make masks depend on who shares the pack, and recomputation under gradient checkpointing would
draw other ones.
"""

import hashlib

import torch
from torch import Tensor

_C1, _C2 = -2048144789, -1028477387  # 0x85ebca6b, 0xc2b2ae35 as int32: murmur3's finalizer
_GOLDEN = -1640531527  # 0x9e3779b9 as int32
_PRIME = 668265263  # 0x27d4eb2f


def _mix(x: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer on int32 (shifts keep the sign; products wrap)."""
    x = (x ^ (x >> 16)) * _C1
    x = (x ^ (x >> 13)) * _C2
    return x ^ (x >> 16)


def slot_key(seed: int, step: int, micro_batch: int, module: str) -> int:
    """int32 key of one slot's mask in one module of one micro-batch."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}/{module}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, signed=True)


def keep_mask(keys: Tensor, p: Tensor, shape: tuple[int, int, int, int], first_position: int = 0) -> Tensor:
    """(K, b, T, d) bool, True where an element stays, with probability 1 - p[k].

    Args:
        keys: (K,) int32, one per slot.
        p: (K,) float.
        shape: (K, b, T, d).
        first_position: of a chunk of positions.
    """
    K, b, T, d = shape
    device = keys.device
    examples = torch.arange(b, dtype=torch.int32, device=device).view(1, b, 1)
    positions = torch.arange(first_position, first_position + T, dtype=torch.int32, device=device).view(1, 1, T)
    rows = _mix(_mix(keys.view(K, 1, 1) + (examples + 1) * _GOLDEN) + (positions + 1) * _PRIME)
    features = (torch.arange(d, dtype=torch.int32, device=device) + 1) * _GOLDEN
    drawn = _mix(rows.unsqueeze(-1) ^ features) & 0x7FFFFFFF
    threshold = (p.double() * 2**31).to(torch.int64).clamp(max=2**31 - 1).to(torch.int32)
    return drawn >= threshold.view(K, 1, 1, 1)
