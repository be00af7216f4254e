"""Passes: the rows of some slots through the base at once, forward and backward or forward alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lora_sweep.data import Data, TokenSet, order
from lora_sweep.pack.bank import Banks
from lora_sweep.pack.dropout import slot_key
from lora_sweep.pack.linear import Pass, Segment
from lora_sweep.pack.loss import OutputLayer
from lora_sweep.pack.slot import Slot
from lora_sweep.pack.trial import Settings

Slots = Sequence[Slot | None]
"""Of a pass, in the order of its rows; None where a fixed shape leaves a place empty."""

SetLosses = tuple[list[float], NDArray[np.float64]]
"""(mean loss over all counted tokens of each slot (K,), mean of each example (K, examples))."""

Losses = tuple[SetLosses, SetLosses, SetLosses | None]
"""On the evaluation set, the train probe, and the retention text where there is one."""


@dataclass
class Passes:
    """Runs passes; what it must know of the slots lies in their banks."""

    banks: Banks
    output: OutputLayer
    now: Pass
    data: Data
    settings: Settings
    dtype: torch.dtype
    """Of the adapters."""
    device: torch.device

    def __post_init__(self) -> None:
        self._segments: dict[tuple[int, ...], tuple[Segment, ...]] = {}
        self._orders: dict[int, Callable[[int, int], Tensor]] = {}

    def changed(self) -> None:
        """Has to be called whenever a slot comes or goes."""
        self._segments.clear()

    def order(self, live: Sequence[Slot]) -> list[Slot | None]:
        """The slots as their rows lie: by rank, so that those of one rank are multiplied at once.

        With fixed shapes all places, taken or not.
        """
        if not self._segments:
            self.banks.close_gaps()
            seeds = {slot.trial.train.seed for slot in live}
            self._orders = {seed: rows for seed, rows in self._orders.items() if seed in seeds}
        if self.settings.fixed_shapes:
            (bank,) = self.banks
            by_row = {slot.home[1]: slot for slot in live}
            return [by_row.get(row) for row in range(len(bank.taken))]
        return [*sorted(live, key=lambda slot: (slot.trial.method.rank, slot.home[1]))]

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, slots: Slots) -> tuple[Slots, Tensor, list[int]]:
        """Leaves the gradients of one optimizer step in the banks.

        Returns (slots, their mean losses (K,) on the device, loss tokens of each).
        """
        K, b, micro_batches = len(slots), self.settings.batch_size, self.settings.gradient_accumulation_steps
        # (micro-batches, K, b, T) ids and positions, (micro-batches, K, b, T - 1) weights: 1 / loss tokens, or 0
        ids, weights, positions, loss_places, loss_tokens = self._batch(slots)
        T = ids.shape[-1]
        means = torch.zeros(K, dtype=self.dtype, device=self.device)
        self._enter(slots)
        for segment in self.now.segments:
            segment.gradients.zero_()
        for micro_batch in range(micro_batches):
            self.now.keys = self._mask_keys(slots, micro_batch)
            # The base sees K b rows, slot k's at [k b, (k + 1) b).
            rows = ids[micro_batch].view(K * b, T)
            row_weights = weights[micro_batch].view(K * b, T - 1)
            row_positions = None if positions is None else positions[micro_batch].view(K * b, T)
            # (K b, T - 1) nats of each next token; backward runs with the sum of row_weights x losses as the loss.
            losses = self.output.backward(rows, row_weights, row_positions, loss_places[micro_batch])
            means += (losses.to(self.dtype) * row_weights).view(K, -1).sum(dim=1)
        self.leave()
        return slots, means, loss_tokens

    def _batch(self, slots: Slots) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor | None], list[int]]:
        """(ids (micro-batches, K, b, T), weights (..., T - 1), positions like ids or None, where a next token counts of
        each micro-batch, loss tokens of each slot)."""
        train = self.data.train
        K, b, micro_batches = len(slots), self.settings.batch_size, self.settings.gradient_accumulation_steps
        rows = {
            (slot.trial.train.seed, slot.step): self._rows(slot.trial.train.seed, slot.step)
            for slot in slots
            if slot is not None
        }
        T = train.length if self.settings.fixed_shapes else max(train.padded_length(each) for each in rows.values())
        batches = {key: train.batch(each, T) for key, each in rows.items()}
        ids = torch.zeros(micro_batches, K, b, T, dtype=torch.int64)
        weights = torch.zeros(micro_batches, K, b, T - 1, dtype=self.dtype)
        positions = None if train.starts is None else torch.arange(T).repeat(micro_batches, K, b, 1)
        tokens = [0] * K
        for place, slot in enumerate(slots):
            if slot is None:
                continue
            batch = batches[slot.trial.train.seed, slot.step]
            targets = batch.loss_mask[:, 1:]
            tokens[place] = int(targets.sum())
            ids[:, place] = batch.input_ids.view(micro_batches, b, T)
            weights[:, place] = targets.view(micro_batches, b, T - 1) / tokens[place]
            if positions is not None and batch.position_ids is not None:
                positions[:, place] = batch.position_ids.view(micro_batches, b, T)
        loss_places = [self._places(each.view(K * b, T - 1) != 0) for each in weights]
        where = None if positions is None else self._there(positions)
        return self._there(ids), self._there(weights), where, loss_places, tokens

    def _places(self, loss_mask: Tensor) -> Tensor | None:
        """(n,) places in the flattened (rows, T) before those of (rows, T - 1) that count, on the device.

        None for all, where the number must not depend on what the batch holds, or the output layer needs them.
        """
        if self.settings.fixed_shapes or not self.output.selects:
            return None
        places = functional.pad(loss_mask, (0, 1)).flatten().nonzero().flatten()
        return self._there(places) if len(places) else None

    def _mask_keys(self, slots: Slots, micro_batch: int) -> dict[str, Tensor] | None:
        """What dropout masks are drawn from, of all modules in one piece: one of its own would wait for the device."""
        if all(segment.dropout is None for segment in self.now.segments):
            return None
        names = list(self.now.segments[0].A)
        drawn = [
            [0 if slot is None else slot_key(slot.trial.train.seed, slot.step, micro_batch, name) for slot in slots]
            for name in names
        ]
        keys = self._there(torch.tensor(drawn, dtype=torch.int32))
        return dict(zip(names, keys.unbind(), strict=True))

    def _rows(self, seed: int, step: int) -> Tensor:
        """The examples of an optimizer step: (micro-batches x batch size,)."""
        if seed not in self._orders:
            self._orders[seed] = order(len(self.data.train), seed)
        each = self.settings.batch_size * self.settings.gradient_accumulation_steps
        return self._orders[seed](step * each, each)

    def _there(self, tensor: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    # -- measuring --------------------------------------------------------------------------------------------------

    def evaluated(self, slots: Slots) -> tuple[Slots, Losses]:
        return slots, self.losses(slots)

    def losses(self, slots: Slots | None) -> Losses:
        """Of each slot on the data's sets; None: of the base alone, in the place of one slot."""
        if slots is not None:
            self._enter(slots)
        K = 1 if slots is None else len(slots)
        retention = self.data.retention
        try:
            return (
                self._set_losses(self.data.evaluation, K),
                self._set_losses(self.data.probe, K),
                None if retention is None else self._set_losses(retention, K),
            )
        finally:
            self.leave()

    def batch_evaluated(self, rows: Tensor, slots: Slots) -> None:
        """A batch of the evaluation set alone, of which nothing is kept: for its time."""
        self._enter(slots)
        part = self.data.evaluation
        self._add_rows(torch.zeros(len(slots), part.examples, dtype=torch.float64, device=self.device), part, rows)
        self.leave()

    def _set_losses(self, part: TokenSet, K: int) -> SetLosses:
        sums = torch.zeros(K, part.examples, dtype=torch.float64, device=self.device)
        for rows in torch.from_numpy(part.by_length).split(self.settings.eval_batch_size):
            self._add_rows(sums, part, rows)
        counts = torch.from_numpy(part.counts).to(self.device)
        means = (sums.sum(dim=1) / counts.sum()).tolist()
        return means, (sums / counts).cpu().numpy().astype(np.float64)

    def _add_rows(self, sums: Tensor, part: TokenSet, rows: Tensor) -> None:
        """Adds the losses of these rows to the sums (K, examples) of their examples."""
        K, batch = len(sums), part.batch(rows, None if self.settings.fixed_shapes else part.padded_length(rows))
        positions = None if batch.position_ids is None else self._there(batch.position_ids).repeat(K, 1)
        loss_places = self._places(batch.loss_mask[:, 1:].repeat(K, 1))
        losses = self.output.losses(self._there(batch.input_ids).repeat(K, 1), positions, loss_places)
        by_token = losses.view(K, len(rows), -1).double() * self._there(batch.loss_mask[:, 1:].contiguous())
        if batch.examples is None:
            sums[:, rows.to(self.device)] = by_token.sum(dim=2)
        else:
            sums.index_add_(1, self._there(batch.examples[:, 1:].flatten()), by_token.flatten(1))

    # -- the pass under way -----------------------------------------------------------------------------------------

    def _enter(self, slots: Slots) -> None:
        key = tuple(-1 if slot is None else slot.index for slot in slots)
        if key not in self._segments:
            self._segments[key] = self._segmented(slots)
        self.now.slots_per_pass, self.now.segments = len(slots), self._segments[key]

    def leave(self) -> None:
        """The base alone again."""
        self.now.segments, self.now.keys = (), None

    def _segmented(self, slots: Slots) -> tuple[Segment, ...]:
        if self.settings.fixed_shapes:
            (bank,) = self.banks
            return (Segment(0, bank, 0, slots),)
        segments = []
        places = [(place, *slot.home) for place, slot in enumerate(slots) if slot is not None]
        # Where both the place and the row go up by one, in one bank.
        for _, run in groupby(places, key=lambda at: (id(at[1]), at[2] - at[0])):
            neighbours: list[tuple[int, Any, int]] = list(run)
            first, bank, row = neighbours[0]
            segments.append(Segment(first, bank, row, slots[first : first + len(neighbours)]))
        return tuple(segments)


def split(slots: Slots, slots_per_pass: int) -> list[Slots]:
    """In parts of at most `slots_per_pass`, as equal as can be."""
    parts = -(-len(slots) // slots_per_pass)
    ends = [len(slots) * part // parts for part in range(parts + 1)]
    return [slots[a:b] for a, b in pairwise(ends)]
