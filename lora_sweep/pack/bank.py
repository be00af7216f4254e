"""Where adapters lie: one bank a rank, each slot's A and B of all modules in one piece of memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

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
    """Adapters of one rank: a row each, for whoever has taken it."""

    def __init__(self, layout: Layout, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layout = layout
        self.values = torch.zeros(rows, layout.size, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.values)
        self.taken: list[Bind | None] = [None] * rows
        """What binds each row's holder to it; None: the row is free."""

    def give(self, row: int, bind: "Bind") -> None:
        """Gives the row, whose values are in place, to the holder that `bind` binds to it."""
        self.taken[row] = bind
        bind(self, row)


Bind = Callable[[Bank, int], None]
"""Points a holder of a row at it: called when the row is given, and again whenever its values have moved."""


class Banks:
    """The banks of a pack.

    A row that is freed goes to the next holder of its rank. `close_gaps` moves rows where one stayed empty, so that the
    rows of a rank are neighbours, none of them free. With fixed rows there is one bank of the largest rank, and nothing
    ever moves.
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

    def take(self, rank: int, fixed_row: int, bind: Bind) -> None:
        """Gives out a row of zeros: `fixed_row` where rows are fixed, else the first free one of the rank."""
        if self._fixed is not None:
            self._fixed.give(fixed_row, bind)
            return
        bank = self._of_rank.get(rank) or self._bank(rank, 0)
        if None not in bank.taken:
            bank = self._moved(bank, len(bank.taken) + 1)
        bank.give(bank.taken.index(None), bind)

    def free(self, bank: Bank, row: int) -> None:
        """Leaves zeros behind."""
        bank.values[row].zero_()
        bank.gradients[row].zero_()
        bank.taken[row] = None

    def close_gaps(self) -> None:
        for rank, bank in list(self._of_rank.items()):
            held = len(bank.taken) - bank.taken.count(None)
            if held == 0:
                del self._of_rank[rank]
            elif held < len(bank.taken):
                self._moved(bank, held)

    def _moved(self, old: Bank, rows: int) -> Bank:
        """The rows of `old` that are taken, in their order, in a new bank of `rows` rows."""
        new = self._bank(old.layout.rank, rows)
        held = [(before, bind) for before, bind in enumerate(old.taken) if bind is not None]
        for row, (before, bind) in enumerate(held):
            new.values[row].copy_(old.values[before])
            new.give(row, bind)
        self._of_rank[old.layout.rank] = new
        return new

    def _bank(self, rank: int, rows: int) -> Bank:
        return Bank(Layout(self._shapes, rank), rows, self._dtype, self._device)
