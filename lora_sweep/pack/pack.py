"""K adapters on one frozen base in one pass.

Rows never mix: the base sees one batch of K x b rows, each packed linear multiplies slot k's rows by slot k's A and B,
the loss is the sum of the slots' own mean losses, and each slot steps its own optimizer. So slot i gives what its trial
gives alone, whatever its co-tenants do: up to rounding, or bit for bit with `train.fixed_shapes`.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_sweep import health
from lora_sweep.adapters import reader
from lora_sweep.adapters.peft_template import PeftTemplate, peft_config
from lora_sweep.base.base_config import input_faults
from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data
from lora_sweep.errors import ConfigError, UserError
from lora_sweep.pack.bank import Banks
from lora_sweep.pack.capacity import MOST_SLOTS, Capacity
from lora_sweep.pack.checkpoint import CHECKPOINT
from lora_sweep.pack.linear import Pass
from lora_sweep.pack.loss import OutputLayer
from lora_sweep.pack.passes import Passes, split
from lora_sweep.pack.slot import Slot
from lora_sweep.pack.trial import PackOutOfMemory, Settings, Trial
from lora_sweep.pack.wrap import WrappedBase
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.system import memory
from lora_sweep.system.out_of_memory import is_out_of_memory

Result = TypeVar("Result")

BYTES_A_PARAMETER = 16
"""fp32 value, gradient and AdamW's two moments."""
TIMED_STEPS = 3
"""Where the number of slots is given."""
TIMED_BATCHES = 3
"""Of an evaluation; one more before them warms up."""
ADAPTERS_SHARE = 0.25
"""Of the free memory, for adapters, where their number is not given."""


def never() -> bool:
    return False


class Pack:
    """Slots on one base and one data set. Close it to get the base back as it was.

    >>> trials = [Trial.of(cell, sweep.config(cell)) for cell in sweep.cells()[:2]]
    >>> pack = Pack(base, data, Settings.of(trials[0]), bank_rank=4)
    >>> [pack.admit(trial) for trial in trials]
    [0, 1]
    >>> [(each.cell, each.step, each.eval_loss < 6) for each in pack.advance()]
    [(0, 12, True), (1, 12, True)]
    >>> pack.close()
    """

    def __init__(
        self,
        base: LoadedBase,
        data: Data,
        settings: Settings,
        bank_rank: int,
        too_many: int | None = None,
        fits: int = 0,
    ) -> None:
        """`bank_rank`: the largest rank that can be admitted, with fixed shapes the rank of all banks.

        `too_many`, `fits`: so many slots a pass are known not to fit into memory, and to fit.
        """
        if faults := input_faults(base.name_or_path, base.model.config, data.length, data.largest_id):
            raise ConfigError(faults)
        self.settings = settings
        self.bank_rank = bank_rank
        self._model = base.model
        self._device = base.model.device
        self._template = PeftTemplate(base.skeleton(), base.name_or_path, base.revision)
        targets = settings.target_modules
        shapes = self._template.shapes(targets if isinstance(targets, str) else list(targets))
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self.capacity = self._capacity_of(shapes, too_many, fits)
        fixed = (bank_rank, self.capacity.slots) if settings.fixed_shapes else None
        self._banks = Banks(shapes, dtype, self._device, fixed)
        now = Pass(anchor=torch.zeros((), device=self._device, requires_grad=True))
        self._wrapped = WrappedBase(self._model, shapes, now, settings.compile, settings.gradient_checkpointing)
        output = OutputLayer(self._model, now)
        if data.train.starts is not None and not output.separates():
            self.close()
            raise UserError("data.pack_examples: in this base examples of one row see one another; set it to false")
        self._passes = Passes(self._banks, output, now, data, settings, dtype, self._device)
        self._slots: list[Slot | None] = [None] * self.capacity.slots
        self._trained_tokens = 0
        self._training_since: float | None = None
        """When the first step after the last evaluation began."""

    # -- who is in --------------------------------------------------------------------------------------------------

    @property
    def live(self) -> dict[int, Cell]:
        """Slot -> the cell in it."""
        return {slot.index: slot.trial.cell for slot in self._live()}

    @property
    def has_room(self) -> bool:
        return len(self._live()) < self.capacity.slots

    def step(self, slot: int) -> int:
        """Optimizer steps that the slot has done."""
        return self._at(slot).step

    def fits(self, trial: Trial) -> bool:
        """Whether the trial can be admitted now."""
        return self.has_room and self.suits(trial)

    def suits(self, trial: Trial) -> bool:
        """Whether the trial could be admitted if there were room."""
        return Settings.of(trial) == self.settings and trial.method.rank <= self.bank_rank

    def prepare(self, trials: Sequence[Trial]) -> None:
        """Draws the initial A's of the trials that will come next, in a thread of its own while the slots train."""
        self._template.prepare([(self._peft_config(trial), trial.train.seed) for trial in trials])

    def admit(self, trial: Trial) -> int:
        """Puts the trial into a free slot at step 0; returns the slot."""
        if not self.fits(trial):
            raise ValueError(f"cell {trial.cell.number} does not fit this pack: {Settings.of(trial)}, {self.settings}")
        index = self._slots.index(None)
        initial_A = self._template.initial(self._peft_config(trial), trial.train.seed)
        self._slots[index] = Slot(index, trial, self._banks, initial_A)
        self._passes.changed()
        return index

    def evict(self, slot: int) -> None:
        """Frees the slot and leaves zeros behind."""
        gone = self._at(slot)
        gone.leave()
        self._banks.free(*gone.home)
        self._slots[slot] = None
        self._passes.changed()

    def checkpoint(self, slot: int) -> Callable[[Path], None]:
        """Copies the slot as of now, an evaluation boundary; what is returned writes the copy, in any thread."""
        return self._at(slot).copied()

    @staticmethod
    def has_checkpoint(folder: Path) -> bool:
        """Whether anything lies there under its name."""
        return os.path.lexists(folder / CHECKPOINT)

    def restore(self, trial: Trial, folder: Path) -> int:
        """Admits the trial as of its checkpoint in `folder`; returns the slot.

        Raises DamagedCheckpoint where it cannot go on from there; the pack is then as before.
        """
        index = self.admit(trial)
        try:
            self._at(index).load(folder)
        except BaseException:
            self.evict(index)
            raise
        return index

    def export(self, slot: int) -> Callable[[Path], tuple[str, ...]]:
        """Copies the slot's adapter as of now; what is returned writes it as a PEFT folder, in any thread.

        That returns the modules that the file, read again, does not hold.
        """
        at = self._at(slot)
        weights = {
            name: (at.A[name].to("cpu", copy=True), at.B[name].T.to("cpu", copy=True)) for name in self._wrapped.linears
        }
        config = self._peft_config(at.trial)

        def write(folder: Path) -> tuple[str, ...]:
            self._template.write(folder, config, weights)
            return reader.lost(folder, weights)

        return write

    def close(self) -> None:
        """Unwraps the base."""
        self._wrapped.close()
        self._template.close()

    # -- the way forward --------------------------------------------------------------------------------------------

    def advance(self, stop: Callable[[], bool] = never) -> list[Evaluation]:
        """Trains all slots until at least one reaches its next evaluation, and evaluates those.

        `stop` is asked before each step; when it says so the list is empty, and the steps since the last evaluation are
        the price. Raises PackOutOfMemory when a trial does not fit into memory by itself.
        """
        while not any(slot.is_due for slot in self._live()):
            if stop() or not self._live():
                return []
            self._train_step()
        return self._evaluate()

    def measure(self) -> Capacity:
        """Trains for as many steps as it takes to know how many slots are fastest, and what a step costs."""
        while not self.capacity.is_chosen:
            self._train_step()
        for _ in range(0 if self.capacity.measured else TIMED_STEPS):
            self._train_step(measures=True)
        while not self.capacity.measured:
            # All of them had to shrink, which ends at a width that fits.
            self._train_step(measures=True)
        return self.capacity

    def seconds_a_row(self) -> float:
        """Of an evaluation of all slots, by slot and row: from some of its batches, of short rows to long ones."""
        live = self._passes.order(self._live())
        batches = torch.from_numpy(self._passes.data.evaluation.by_length).split(self.settings.eval_batch_size)
        chosen = [batches[(2 * place + 1) * len(batches) // (2 * TIMED_BATCHES)] for place in range(TIMED_BATCHES)]
        began = math.nan
        for place, rows in enumerate([chosen[-1], *chosen]):
            if place == 1:
                began = time.monotonic()
            for slots in split(live, self.capacity.known_slots_per_pass(len(live))):
                self._within_memory(partial(self._passes.batch_evaluated, rows), slots)
            self._wait()
        return (time.monotonic() - began) / (len(live) * sum(map(len, chosen)))

    def evaluate_base(self) -> BaselineLosses:
        """The losses of the base alone on the evaluation set, the train probe and the retention text."""
        evaluation, probe, retention = self._passes.losses(None)
        kept = None if retention is None else retention[0][0]
        return BaselineLosses(evaluation[0][0], probe[0][0], evaluation[1][0], kept, probe[1][0])

    def _train_step(self, measures: bool = False) -> None:
        """One optimizer step of each slot.

        1. choose how many slots go through the base at once
        2. forward and backward: the gradients of each slot lie in its row of the banks
        3. sample the weights of the slots whose health is checked after this step
        4. clip, step and schedule each slot by itself
        5. check health
        6. record what the step has cost

        Args:
            measures: whether its cost is recorded in any case.
        """
        began = time.monotonic()
        measures = measures or not self.capacity.is_chosen
        peak = memory.Peak(self._device) if measures else None

        # 1. K slots, those of one rank beside one another; with fixed shapes None where a place is empty
        slots = self._passes.order(self._live())
        slots_per_pass = self._slots_per_pass(len(slots))

        # 2. of each pass (its k slots, mean losses (k,) on the device, loss tokens of each slot)
        passes = [
            each for part in split(slots, slots_per_pass) for each in self._within_memory(self._passes.train, part)
        ]
        peak_bytes = None if peak is None else peak.bytes

        # 3. (about 1024,) elements of A and of B of each module
        checked = [slot for slot in slots if slot is not None and slot.is_checked_next]
        before = health.sample_weights([each for slot in checked for each in slot.factors()])

        # 4. A (r, d_in) and B (r, d_out) of each module, views of the slot's row, are stepped in place
        for part, mean_losses, loss_tokens in passes:
            self.capacity.fitted(len(part))
            for slot, mean_loss, tokens in zip(part, mean_losses.unbind(), loss_tokens, strict=True):
                if slot is not None:
                    slot.update(mean_loss, tokens)
                    self._trained_tokens += tokens

        # 5. (modules of all checked slots, health.METRICS), still on the device
        self._check_health(checked, before)

        # 6. the only point at which a step waits for the device
        if measures:
            self._wait()
            self.capacity.took(slots_per_pass, len(slots), time.monotonic() - began, peak_bytes)
        self._training_since = self._training_since or began

    def _slots_per_pass(self, live: int) -> int:
        if math.isinf(self.capacity.free_bytes) and not self.capacity.is_chosen:
            self.capacity.free_bytes = memory.free_bytes(self._device)
        return self.capacity.next_slots_per_pass(live)

    def _check_health(self, slots: Sequence[Slot], before: health.WeightSamples) -> None:
        """Measures the adapters of these slots at once, on the device."""
        if slots:
            rows = health.measure([module for slot in slots for module in slot.adapted_modules()], before)
            for slot, each in zip(slots, rows.chunk(len(slots)), strict=True):
                slot.history.take(slot.step, each)

    def _evaluate(self) -> list[Evaluation]:
        # With fixed shapes those that are not due are evaluated too: a slot's place in a pass is its row in the bank.
        fixed = self.settings.fixed_shapes
        due = [slot for slot in self._passes.order(self._live()) if fixed or (slot is not None and slot.is_due)]
        # The host is ahead of the device: only here it waits.
        self._wait()
        spent = time.monotonic() - (self._training_since or math.nan)
        parts = split(due, self.capacity.known_slots_per_pass(len(due)))
        # All losses before the first report, which takes a slot's steps: where one trial does not fit into memory, the
        # others stay due.
        measured = [each for part in parts for each in self._within_memory(self._passes.evaluated, part)]
        speed = self._trained_tokens / spent
        self._trained_tokens, self._training_since = 0, None
        reports = {}
        for slots, (evaluation, probe, retention) in measured:
            for place, slot in enumerate(slots):
                if slot is not None and slot.is_due:
                    report = self._report(slot, evaluation[0][place], probe[0][place], evaluation[1][place], speed)
                    kept = None if retention is None else retention[0][place]
                    reports[slot.index] = replace(report, retention_loss=kept, probe_losses=probe[1][place])
        return [report for _, report in sorted(reports.items())]

    def _within_memory(
        self, work: Callable[[Sequence[Slot | None]], Result], slots: Sequence[Slot | None]
    ) -> list[Result]:
        """`work` on all slots at once, or on halves where that exhausts the memory. Raises PackOutOfMemory."""
        try:
            return [work(slots)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(slots) == 1 or self.settings.fixed_shapes:
                full = next(slot for slot in slots if slot is not None)
                raise PackOutOfMemory(full.index, len(slots)) from error
        # Here the error, and all the tensors that its traceback holds, are gone.
        self.capacity.failed(len(slots))
        self._passes.leave()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = -(-len(slots) // 2)
        return [each for part in (slots[:half], slots[half:]) for each in self._within_memory(work, part)]

    def _report(self, slot: Slot, eval_loss: float, probe_loss: float, each: Any, speed: float) -> Evaluation:
        steps, snapshot = slot.take_steps(), slot.history.snapshot()
        factors = dict(zip(slot.A, slot.factors(), strict=True))
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
            measurements=health.measurements(snapshot, factors, slot.trial.scaling, self._wrapped.norms),
            snapshot=snapshot,
            delta_rel=health.delta_rel(snapshot, slot.trial.scaling, self._wrapped.norms),
            steps=steps,
            seconds=slot.seconds,
            tokens_per_second=speed,
            last_finite_step=None if all_finite else first_broken - 1,
        )

    # -- inside -----------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _live(self) -> list[Slot]:
        return [slot for slot in self._slots if slot is not None]

    def _at(self, index: int) -> Slot:
        slot = self._slots[index]
        if slot is None:
            raise ValueError(f"slot {index} is empty")
        return slot

    def _capacity_of(self, shapes: Any, too_many: int | None, fits: int) -> Capacity:
        slots = self.settings.slots
        if slots is not None:
            return Capacity(slots, is_chosen=True, too_many=too_many, fits=fits)
        each = BYTES_A_PARAMETER * self.bank_rank * sum(d_in + d_out for d_in, d_out in shapes.values())
        affordable = ADAPTERS_SHARE * memory.free_bytes(self._device) / each
        most = int(min(MOST_SLOTS[self._device.type], max(1.0, affordable)))
        return Capacity(most, too_many=too_many, fits=fits)

    def _peft_config(self, trial: Trial) -> Any:
        method = trial.method
        return peft_config(method.rank, method.alpha, method.use_rslora, method.dropout, method.target_modules)
