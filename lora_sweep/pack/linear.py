"""The packed linear: one frozen weight, K adapters, rows that never mix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_sweep.pack.dropout import keep_mask, slot_key


@dataclass
class Pass:
    """What every packed linear must know of the forward pass under way."""

    slots: int
    enabled: bool = True
    """False: the base alone."""
    scaling: Tensor = field(default_factory=lambda: torch.zeros(0))
    """(K,) s of each slot, 0 where the slot is empty; in the banks' dtype."""
    dropout: Tensor | None = None
    """(K,) probabilities in training when any slot has one; None: no masks at all."""
    counters: tuple[tuple[int, int], ...] = ()
    """(seed, step) of each slot: what its masks are drawn from."""
    micro_batch: int = 0
    first_position: int = 0
    """Of the chunk under way, where the output layer is adapted and its positions come in chunks."""


class PackedLinear(nn.Module):
    """Wraps a frozen linear layer (nn.Linear or transformers' Conv1D) and adds slot k's s B A to slot k's rows.

    Input (K x b, T, d_in), rows of slot k at [k b, (k + 1) b). Banks: A (K, R, d_in), B (K, R, d_out); a rank r < R
    leaves zero rows, whose gradients are zero. Adapters compute in the banks' dtype, the sum is cast to the base's.
    """

    def __init__(
        self, name: str, base: nn.Module, shape: tuple[int, int], rank: int, dtype: torch.dtype, now: Pass
    ) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self._now = now
        d_in, d_out = shape
        device = next(base.parameters()).device
        self.A = nn.Parameter(torch.zeros(now.slots, rank, d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(now.slots, rank, d_out, dtype=dtype, device=device))
        self.A.grad = torch.zeros_like(self.A)
        self.B.grad = torch.zeros_like(self.B)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        now = self._now
        if not now.enabled:
            return y
        if x.dim() != 3 or x.shape[0] % now.slots:
            raise RuntimeError(
                f"{self.name} is fed {tuple(x.shape)}, not (rows, positions, features): its rows cannot be told apart "
                "by slot, so it cannot be packed. Leave it out of method.target_modules."
            )
        rows = x.to(self.A.dtype)
        if now.dropout is not None:
            rows = self._drop(rows, now.dropout)
        K = now.slots
        low = torch.bmm(rows.reshape(K, -1, x.shape[-1]), self.A.transpose(1, 2)) * now.scaling.view(K, 1, 1)
        total = torch.baddbmm(y.reshape(K, -1, y.shape[-1]).to(self.B.dtype), low, self.B)
        return total.to(y.dtype).view_as(y)

    def _drop(self, rows: Tensor, p: Tensor) -> Tensor:
        now = self._now
        drawn = [slot_key(seed, step, now.micro_batch, self.name) for seed, step in now.counters]
        keys = torch.tensor(drawn, dtype=torch.int32, device=rows.device)
        shape = (now.slots, rows.shape[0] // now.slots, rows.shape[1], rows.shape[2])
        keep = keep_mask(keys, p, shape, now.first_position)
        return (rows.view(shape) * keep / (1 - p).to(rows.dtype).view(-1, 1, 1, 1)).view_as(rows)

    def extra_repr(self) -> str:
        return f"slots={self.A.shape[0]}, rank={self.A.shape[1]}"
