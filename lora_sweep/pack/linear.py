"""The packed linear: one frozen weight, K adapters, rows that never mix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_sweep.base import cpu_bf16
from lora_sweep.pack.bank import Bank
from lora_sweep.pack.dropout import keep_mask
from lora_sweep.pack.slot import Slot


class Segment:
    """Slots of one rank that are neighbours, both in a pass and in their bank."""

    def __init__(self, first: int, bank: Bank, row: int, slots: Sequence[Slot | None]) -> None:
        """`slots`: those from place `first` of the pass on, in the bank's rows from `row` on; None: an empty one."""
        self.places = slice(first, first + len(slots))
        rows = slice(row, row + len(slots))
        values, gradients = bank.values[rows], bank.gradients[rows]
        self.gradients = gradients
        self.dtype = values.dtype
        self.A, self.B = bank.layout.A(values), bank.layout.B(values)
        self.grad_A, self.grad_B = bank.layout.A(gradients), bank.layout.B(gradients)
        like = {"dtype": values.dtype, "device": values.device}
        scaling = [0.0 if slot is None else slot.trial.scaling for slot in slots]
        self.scaling = torch.tensor(scaling, **like).view(-1, 1, 1)  # type: ignore[arg-type]
        dropout = [0.0 if slot is None else slot.trial.method.dropout for slot in slots]
        self.dropout = torch.tensor(dropout, **like) if any(dropout) else None  # type: ignore[arg-type]


@dataclass
class Pass:
    """What every packed linear must know of the forward pass under way."""

    slots_per_pass: int = 0
    """Slots whose rows are in the batch: K."""
    segments: Sequence[Segment] = ()
    """None: the base alone."""
    keys: Mapping[str, Tensor] | None = None
    """Module name -> (K,) int32 on the device, what each slot's dropout mask is drawn from; None: no dropout."""
    first_position: int = 0
    """Of the chunk under way, where the output layer is adapted and its positions come in chunks."""
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    """Makes autograd come by where nothing before has a gradient."""


class PackedLinear(nn.Module):
    """Wraps a frozen linear (nn.Linear, quantized or not, or transformers' Conv1D); adds s B A to each slot's rows.

    Input (K x b, T, d_in), rows of the pass's slot k at [k b, (k + 1) b). Adapters compute in their own dtype, the sum
    is cast to the base's. Gradients of A and B are added to the banks' own.
    """

    def __init__(self, name: str, base: nn.Module, now: Pass) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.now = now

    def forward(self, x: Tensor) -> Tensor:
        now = self.now
        if not now.segments:
            alone: Tensor = self.base(x)
            return alone
        if x.dim() != 3 or x.shape[0] % now.slots_per_pass:
            raise RuntimeError(
                f"{self.name} is fed {tuple(x.shape)}, not (rows, positions, features): which rows belong "
                "to which slot cannot be known, so it cannot be packed. Leave it out of method.target_modules."
            )
        y: Tensor = _Adapted.apply(x, now.anchor, self)  # type: ignore[no-untyped-call]
        return y

    def keep(self, segment: Segment, shape: torch.Size, first_position: int) -> Tensor | None:
        """(n, b T, d_in) mask of the segment's n slots in rows of `shape` (K b, T, d_in), 0 or 1 / (1 - p).

        None: all stay.
        """
        now = self.now
        if segment.dropout is None or now.keys is None:
            return None
        keys = now.keys[self.name][segment.places]
        rows, positions, d_in = shape
        by_slot = (len(keys), rows // now.slots_per_pass, positions, d_in)
        kept = keep_mask(keys, segment.dropout, by_slot, first_position)
        return (kept / (1 - segment.dropout).view(-1, 1, 1, 1)).flatten(1, 2)

    def extra_repr(self) -> str:
        return self.name


class _Adapted(torch.autograd.Function):
    """y = W x + s B A x by slot; in either pass the adapters' part is added in place.

    The base's linear is frozen, so nothing but x is kept of it; casts and masks are made anew in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, linear: PackedLinear) -> Tensor:
        now, name = linear.now, linear.name
        wide = cpu_bf16.widened(linear.base, x)
        y = cpu_bf16.product(linear.base, wide).contiguous()
        rows, out = _by_slot(wide, now.slots_per_pass), _by_slot(y, now.slots_per_pass)
        lows = []
        for segment in now.segments:
            kept = linear.keep(segment, x.shape, now.first_position)
            part = _dropped(rows[segment.places], kept, segment.dtype)
            low = torch.bmm(part, segment.A[name].transpose(1, 2)).mul_(segment.scaling)
            _add_product(out[segment.places], low, segment.B[name])
            lows.append(low)
        ctx.save_for_backward(x, *lows)
        ctx.linear, ctx.slots_per_pass, ctx.segments, ctx.first = (
            linear,
            now.slots_per_pass,
            now.segments,
            now.first_position,
        )
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        x, *lows = ctx.saved_tensors
        linear: PackedLinear = ctx.linear
        slots_per_pass, name = ctx.slots_per_pass, linear.name
        wide = cpu_bf16.widened(linear.base, gradient)
        below = cpu_bf16.input_gradient(linear.base, wide).contiguous() if ctx.needs_input_grad[0] else None
        rows, above = _by_slot(x, slots_per_pass), _by_slot(wide, slots_per_pass)
        for segment, low in zip(ctx.segments, lows, strict=True):
            upper = _in(segment.dtype, above[segment.places])
            segment.grad_B[name].baddbmm_(low.transpose(1, 2), upper)
            low_gradient = torch.bmm(upper, segment.B[name].transpose(1, 2)).mul_(segment.scaling)
            kept = linear.keep(segment, x.shape, ctx.first)
            part = _dropped(rows[segment.places], kept, segment.dtype)
            segment.grad_A[name].baddbmm_(low_gradient.transpose(1, 2), part)
            if below is None:
                continue
            into = _by_slot(below, slots_per_pass)[segment.places]
            if kept is None:
                _add_product(into, low_gradient, segment.A[name])
            else:
                # Rounded once, as without a mask: a co-tenant's dropout must change no bit of a slot that has none.
                into.copy_(torch.bmm(low_gradient, segment.A[name]).mul_(kept).add_(into))
        return below, None, None


def _by_slot(rows: Tensor, slots_per_pass: int) -> Tensor:
    """(K x b, T, d) -> (K, b T, d): a view of what is contiguous, so that it can be added to."""
    return rows.reshape(slots_per_pass, -1, rows.shape[-1])


def _in(dtype: torch.dtype, each: Tensor) -> Tensor:
    # Asked a hundred thousand times a minute: `to` takes its time even where there is nothing to do.
    return each if each.dtype == dtype else each.to(dtype)


def _dropped(part: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A segment's rows (n, b T, d) in the adapters' dtype, after dropout."""
    wide = _in(dtype, part)
    return wide if kept is None else wide * kept


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right by slot, added in the adapters' dtype."""
    if into.dtype == left.dtype:
        into.baddbmm_(left, right)
    else:
        into.copy_(torch.baddbmm(into.to(left.dtype), left, right))
