"""K adapters on one frozen base in one pass.

Rows never mix: the base sees one batch of K x b rows, each packed linear multiplies slot k's rows by slot k's A and B,
the loss is the sum of the slots' own mean losses, and each slot steps its own optimizer. So slot i gives what its trial
gives alone, whatever its co-tenants do.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_sweep import health, quant
from lora_sweep.adapters import Blueprint, peft_config
from lora_sweep.data import Data, TokenSet, order
from lora_sweep.errors import UserError
from lora_sweep.model import LoadedBase
from lora_sweep.pack.linear import PackedLinear, Pass
from lora_sweep.pack.loss import OutputLayer
from lora_sweep.pack.slot import CHECKPOINT, Slot
from lora_sweep.pack.trial import Settings, Trial
from lora_sweep.records import Base, Cell, Evaluation


def never() -> bool:
    return False


class Pack:
    """Slots on one base and one data set. Close it to get the base back as it was."""

    def __init__(self, base: LoadedBase, data: Data, settings: Settings, bank_rank: int) -> None:
        """`bank_rank`: R of the banks, the largest rank that can be admitted. Equal K, R and T give equal bits."""
        self.settings = settings
        self.bank_rank = bank_rank
        self._model = base.model
        self._device = base.model.device
        self._data = data
        self._blueprint = Blueprint(base.skeleton(), base.name_or_path, base.revision)
        self._now = Pass(settings.slots, enabled=False)
        self._dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self._linears = self._wrap()
        self._base_norms = {name: _weight_norm(linear.base) for name, linear in self._linears.items()}
        self._layers = [layer for layer in self._model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if settings.gradient_checkpointing:
            for layer in self._layers:
                layer.forward = partial(_checkpointed, layer.forward)
        self._output = OutputLayer(self._model, self._now)
        if data.train.starts is not None and not self._output.separates():
            self.close()
            raise UserError("data.pack_examples: in this base examples of one row see one another; set it to false")
        self._slots: list[Slot | None] = [None] * settings.slots
        self._orders: dict[int, Callable[[int, int], Tensor]] = {}
        self._trained_tokens, self._trained_seconds = 0, 0.0
        self._set_pass()

    # -- who is in --------------------------------------------------------------------------------------------------

    @property
    def live(self) -> dict[int, Cell]:
        """Slot -> the cell in it."""
        return {slot.index: slot.trial.cell for slot in self._slots if slot is not None}

    @property
    def has_room(self) -> bool:
        return None in self._slots

    def step(self, slot: int) -> int:
        """Optimizer steps that the slot has done."""
        return self._at(slot).step

    def fits(self, trial: Trial) -> bool:
        """Whether the trial can be admitted now."""
        return None in self._slots and Settings.of(trial) == self.settings and trial.method.rank <= self.bank_rank

    def admit(self, trial: Trial) -> int:
        """Puts the trial into a free slot at step 0; returns the slot."""
        if not self.fits(trial):
            raise ValueError(f"cell {trial.cell.number} does not fit this pack: {Settings.of(trial)}, {self.settings}")
        index = self._slots.index(None)
        initial_A = self._blueprint.initial(self._peft_config(trial), trial.train.seed)
        self._slots[index] = Slot(index, trial, self._linears, initial_A)
        self._set_pass()
        return index

    def evict(self, slot: int) -> None:
        """Frees the slot and leaves zeros behind."""
        self._at(slot)
        self._slots[slot] = None
        with torch.no_grad():
            for linear in self._linears.values():
                linear.A[slot].zero_()
                linear.B[slot].zero_()
        self._set_pass()

    def checkpoint(self, slot: int, folder: Path) -> None:
        """Writes the slot as of now, to be called at an evaluation boundary."""
        self._at(slot).save(folder)

    @staticmethod
    def has_checkpoint(folder: Path) -> bool:
        return (folder / CHECKPOINT).is_file()

    def restore(self, trial: Trial, folder: Path) -> int:
        """Admits the trial as of its checkpoint in `folder`; returns the slot."""
        index = self.admit(trial)
        self._at(index).load(folder)
        return index

    def export(self, slot: int, folder: Path) -> None:
        """Writes the slot's adapter as a PEFT folder."""
        at = self._at(slot)
        weights = {name: (at.A[name], at.B[name].T) for name in self._linears}
        self._blueprint.write(folder, self._peft_config(at.trial), weights)

    def close(self) -> None:
        """Unwraps the base."""
        for name, linear in self._linears.items():
            _replace(self._model, name, linear.base)
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    # -- the way forward --------------------------------------------------------------------------------------------

    def advance(self, stop: Callable[[], bool] = never) -> list[Evaluation]:
        """Trains all slots until at least one reaches its next evaluation, and evaluates those.

        `stop` is asked before each step; when it says so the list is empty, and the steps since the last evaluation are
        the price.
        """
        while not any(slot.is_due for slot in self._live()):
            if stop() or not self._live():
                return []
            self._train_step()
        return self._evaluate()

    def evaluate_base(self) -> Base:
        """The losses of the base alone on the evaluation set, the train probe and the retention text."""
        self._now.enabled = False
        try:
            evaluation, probe = (self._set_losses(part) for part in (self._data.evaluation, self._data.probe))
            retention = self._retention_losses()
        finally:
            self._now.enabled = True
        return Base(evaluation[0][0], probe[0][0], evaluation[1][0], retention[0])

    def _train_step(self) -> None:
        began = time.monotonic()
        settings, live, T = self.settings, self._live(), self._data.train.length
        K, b, micro_batches = settings.slots, settings.batch_size, settings.gradient_accumulation_steps
        input_ids = torch.zeros(micro_batches, K, b, T, dtype=torch.int64)
        weights = torch.zeros(micro_batches, K, b, T - 1, dtype=self._dtype)
        positions = None if self._data.train.starts is None else torch.arange(T).repeat(micro_batches, K, b, 1)
        tokens = [0] * K
        for slot in live:
            batch = self._data.train.batch(self._rows(slot))
            counted = batch.counted[:, 1:]
            tokens[slot.index] = int(counted.sum())
            input_ids[:, slot.index] = batch.input_ids.view(micro_batches, b, T)
            weights[:, slot.index] = counted.view(micro_batches, b, T - 1) / tokens[slot.index]
            if positions is not None and batch.position_ids is not None:
                positions[:, slot.index] = batch.position_ids.view(micro_batches, b, T)
        input_ids, weights = input_ids.to(self._device), weights.to(self._device)
        if positions is not None:
            positions = positions.to(self._device)
        counters = [(0, 0)] * K
        for slot in live:
            counters[slot.index] = (slot.trial.train.seed, slot.step)
        self._now.counters = tuple(counters)
        torch._foreach_zero_(self._gradients())
        self._now.dropout = self._dropout
        means = torch.zeros(K, dtype=self._dtype, device=self._device)
        for micro_batch in range(micro_batches):
            self._now.micro_batch = micro_batch
            share = weights[micro_batch].view(K * b, T - 1)
            where = None if positions is None else positions[micro_batch].view(K * b, T)
            losses = self._output.backward(input_ids[micro_batch].view(K * b, T), share, where)
            means += (losses.to(self._dtype) * share).view(K, -1).sum(dim=1)
        self._now.dropout = None
        for slot in live:
            slot.update(means, tokens[slot.index])
        self._trained_tokens += sum(tokens)
        self._trained_seconds += time.monotonic() - began

    def _rows(self, slot: Slot) -> Tensor:
        """The examples of the slot's next optimizer step: (micro-batches x batch size,)."""
        seed = slot.trial.train.seed
        if seed not in self._orders:
            self._orders[seed] = order(len(self._data.train), seed)
        each = self.settings.batch_size * self.settings.gradient_accumulation_steps
        return self._orders[seed](slot.step * each, each)

    def _evaluate(self) -> list[Evaluation]:
        evaluation, probe = (self._set_losses(part) for part in (self._data.evaluation, self._data.probe))
        retention = self._retention_losses()
        speed = self._trained_tokens / self._trained_seconds if self._trained_seconds else math.nan
        self._trained_tokens, self._trained_seconds = 0, 0.0
        return [
            replace(
                self._report(slot, evaluation[0][slot.index], probe[0][slot.index], evaluation[1][slot.index], speed),
                retention_loss=retention[slot.index],
            )
            for slot in self._live()
            if slot.is_due
        ]

    def _retention_losses(self) -> Sequence[float | None]:
        """Mean loss of each slot on the text not to be forgotten; None each where there is none."""
        if self._data.retention is None:
            return [None] * self.settings.slots
        return self._set_losses(self._data.retention)[0]

    def _report(self, slot: Slot, eval_loss: float, probe_loss: float, each: Any, speed: float) -> Evaluation:
        modules = {
            name: health.AdaptedModule(slot.A[name], slot.B[name], self._base_norms[name]) for name in self._linears
        }
        steps = slot.take_steps()
        finite = [step.step for step in steps if math.isfinite(step.train_loss)]
        all_finite = len(finite) == len(steps) and math.isfinite(eval_loss)
        first_broken = next((step.step for step in steps if not math.isfinite(step.train_loss)), slot.step + 1)
        grad_A, grad_B = slot.grad_norms or (torch.tensor(math.nan), torch.tensor(math.nan))
        return Evaluation(
            cell=slot.trial.cell.number,
            step=slot.step,
            tokens=slot.tokens,
            train_loss=sum(step.train_loss for step in steps) / len(steps),
            eval_loss=eval_loss,
            probe_loss=probe_loss,
            eval_losses=each,
            grad_norm_A=float(grad_A),
            grad_norm_B_over_s=float(grad_B) / slot.trial.scaling,
            measurements=health.measure(modules, slot.trial.scaling, slot.lr_B_squared),
            steps=steps,
            seconds=slot.seconds,
            tokens_per_second=speed,
            last_finite_step=None if all_finite else first_broken - 1,
        )

    def _set_losses(self, part: TokenSet) -> tuple[list[float], Any]:
        """(mean loss over all counted tokens of each slot (K,), mean of each example (K, examples)).

        With the adapters off all slots are the same, and one stands for them: K = 1.
        """
        K, each = self.settings.slots if self._now.enabled else 1, self.settings.eval_batch_size
        total = len(part)
        sums = torch.zeros(K, part.examples, dtype=torch.float64, device=self._device)
        for first in range(0, total, each):
            rows = torch.arange(first, min(first + each, total))
            # The last batch is filled up, so that every forward pass has one shape.
            batch = part.batch(torch.cat([rows, rows.new_zeros(each - len(rows))]))
            positions = None if batch.position_ids is None else batch.position_ids.to(self._device).repeat(K, 1)
            losses = self._output.losses(batch.input_ids.to(self._device).repeat(K, 1), positions)
            counted = batch.counted[: len(rows), 1:].to(self._device)
            by_token = losses.view(K, each, -1)[:, : len(rows)].double() * counted
            if batch.examples is None:
                sums[:, first : first + len(rows)] = by_token.sum(dim=2)
            else:
                examples = batch.examples[: len(rows), 1:].to(self._device).flatten()
                sums.index_add_(1, examples, by_token.flatten(1))
        counts = torch.from_numpy(part.counts).to(self._device)
        means = (sums.sum(dim=1) / counts.sum()).tolist()
        return means, (sums / counts).cpu().numpy().astype(np.float64)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _live(self) -> list[Slot]:
        return [slot for slot in self._slots if slot is not None]

    def _at(self, index: int) -> Slot:
        slot = self._slots[index]
        if slot is None:
            raise ValueError(f"slot {index} is empty")
        return slot

    def _peft_config(self, trial: Trial) -> Any:
        method = trial.method
        return peft_config(method.rank, method.alpha, method.use_rslora, method.dropout, method.target_modules)

    def _gradients(self) -> list[Tensor]:
        banks = [bank for linear in self._linears.values() for bank in (linear.A, linear.B)]
        return [bank.grad for bank in banks if bank.grad is not None]

    def _set_pass(self) -> None:
        scaling = [0.0 if slot is None else slot.trial.scaling for slot in self._slots]
        dropout = [0.0 if slot is None else slot.trial.method.dropout for slot in self._slots]
        self._now.scaling = torch.tensor(scaling, dtype=self._dtype, device=self._device)
        self._dropout = torch.tensor(dropout, dtype=self._dtype, device=self._device) if any(dropout) else None
        self._now.enabled = True

    def _wrap(self) -> dict[str, PackedLinear]:
        targets = self.settings.target_modules
        linears = {}
        for name, shape in self._blueprint.shapes(targets if isinstance(targets, str) else list(targets)).items():
            inner = self._model.get_submodule(name)
            linears[name] = PackedLinear(name, inner, shape, self.bank_rank, self._dtype, self._now)
            _replace(self._model, name, linears[name])
        return linears


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Masks are counter-based, so no generator's state has to be kept for the recomputation.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _weight_norm(linear: nn.Module) -> float:
    """|W|_F of the weight that is computed with, de-quantised where it is quantised."""
    return float(torch.linalg.vector_norm(quant.dequantised(linear), dtype=torch.float64))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
