"""Where adapters lie: one bank a rank, each slot's A and B of all modules in one piece of memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_sweep.pack.slot import Slot

Which = Literal["A", "B"]

Shapes = Mapping[str, tuple[int, int]]
"""Module name -> (d_in, d_out)."""


@dataclass(frozen=True)
class Layout:
    """Where A and B of each module lie in a slot's row of numbers: all A first, then all B."""

    shapes: Shapes
    rank: int

    @cached_property
    def size_A(self) -> int:
        return self.rank * sum(d_in for d_in, _ in self.shapes.values())

    @cached_property
    def size(self) -> int:
        return self.size_A + self.rank * sum(d_out for _, d_out in self.shapes.values())

    def A(self, rows: Tensor, rank: int | None = None) -> dict[str, Tensor]:
        """Module name -> (..., rank, d_in) views of `rows` (..., size)."""
        return self.side("A", rows[..., : self.size_A], rank)

    def B(self, rows: Tensor, rank: int | None = None) -> dict[str, Tensor]:
        """Module name -> (..., rank, d_out) views of `rows` (..., size)."""
        return self.side("B", rows[..., self.size_A :], rank)

    def side(self, side: Which, part: Tensor, rank: int | None = None) -> dict[str, Tensor]:
        """Module name -> (..., rank, d) views of all A or all B of some rows; of the first `rank` ranks, if given."""
        widths = {name: d_in if side == "A" else d_out for name, (d_in, d_out) in self.shapes.items()}
        pieces = part.split([self.rank * d for d in widths.values()], dim=-1)
        lead = part.shape[:-1]
        # At each refill, of hundreds of modules: `view` takes a fifth of what `unflatten` does.
        views = {name: piece.view(*lead, self.rank, d) for (name, d), piece in zip(widths.items(), pieces, strict=True)}
        return views if rank in (None, self.rank) else {name: view[..., :rank, :] for name, view in views.items()}


class Bank:
    """Adapters of one rank: a row each."""

    def __init__(self, layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.values = torch.zeros(rows, layout.size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.slots: list[Slot | None] = [None] * rows
        """Whose row it is."""

    def put(self, slot: "Slot", row: int) -> None:
        self.slots[row] = slot
        slot.bind(self, row)


class Banks:
    """The banks of a pack.

    A slot that is freed leaves its row to the next one of its rank. `close_gaps` moves rows where one stayed empty, so
    that the rows of a rank are neighbours, none without a slot. With fixed rows there is one bank of the largest rank,
    slot i in row i, and nothing ever moves.
    """

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, fixed: tuple[int, int] | None = None
    ) -> None:
        """`fixed`: (rank, rows) of the one bank."""
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._fixed = None if fixed is None else self._bank(*fixed)
        self._of_rank: dict[int, Bank] = {}

    def __iter__(self) -> Iterator[Bank]:
        """By rank."""
        if self._fixed is not None:
            yield self._fixed
        else:
            yield from (bank for _, bank in sorted(self._of_rank.items()))

    def place(self, slot: "Slot") -> None:
        """Gives the slot a row of zeros."""
        if self._fixed is not None:
            self._fixed.put(slot, slot.index)
            return
        rank = slot.trial.method.rank
        bank = self._of_rank.get(rank) or self._bank(rank, 0)
        if None not in bank.slots:
            bank = self._moved(bank, len(bank.slots) + 1)
        bank.put(slot, bank.slots.index(None))

    def free(self, slot: "Slot") -> None:
        """Leaves zeros behind."""
        bank, row = slot.home
        bank.values[row].zero_()
        bank.gradients[row].zero_()
        bank.slots[row] = None

    def close_gaps(self) -> None:
        for rank, bank in list(self._of_rank.items()):
            live = len(bank.slots) - bank.slots.count(None)
            if live == 0:
                del self._of_rank[rank]
            elif live < len(bank.slots):
                self._moved(bank, live)

    def _moved(self, old: Bank, rows: int) -> Bank:
        """The slots of `old`, in their order, in a new bank of so many rows."""
        new = self._bank(old.layout.rank, rows)
        for row, slot in enumerate(slot for slot in old.slots if slot is not None):
            new.values[row].copy_(old.values[slot.home[1]])
            new.put(slot, row)
        self._of_rank[old.layout.rank] = new
        return new

    def _bank(self, rank: int, rows: int) -> Bank:
        return Bank(Layout(self._shapes, rank), rows, self._dtype, self._device)
