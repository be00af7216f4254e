"""One slot: views into the banks, an optimizer and schedule of its own, and what it has done so far."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import get_scheduler

from lora_sweep.pack.linear import PackedLinear
from lora_sweep.pack.trial import Trial
from lora_sweep.records import Step

CHECKPOINT = "checkpoint.safetensors"


class Slot:
    """The trial in row `index` of every bank.

    Its parameters are views of the banks and their gradients views of the banks' gradients, so a plain torch optimizer
    steps them in place and knows nothing of the other slots.
    """

    def __init__(self, index: int, trial: Trial, linears: Mapping[str, PackedLinear], initial_A: Mapping[str, Tensor]):
        self.index = index
        self.trial = trial
        self.A: dict[str, nn.Parameter] = {}
        self.B: dict[str, nn.Parameter] = {}
        for name, linear in linears.items():
            _clear(linear, index)
            rank = trial.method.rank
            self.A[name] = _view(linear.A, index, rank)
            self.B[name] = _view(linear.B, index, rank)
            with torch.no_grad():
                self.A[name].copy_(initial_A[name])
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.A.values()), "lr": trial.lr_A, "weight_decay": trial.optimizer.weight_decay},
                {"params": list(self.B.values()), "lr": trial.lr_B, "weight_decay": trial.weight_decay_B},
            ],
            betas=(trial.optimizer.beta1, trial.optimizer.beta2),
            eps=trial.optimizer.eps,
            fused=True,
        )
        # Every schedule is a factor on each group's own rate: an absolute floor would flatten LoRA+'s ratio.
        schedule = trial.train.schedule
        self.schedule = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self.optimizer,
            num_warmup_steps=trial.train.warmup_steps,
            num_training_steps=trial.train.max_steps,
        )
        self.step = 0
        self.tokens = 0
        self.lr_B_squared = 0.0
        self.pending: list[tuple[int, Tensor, float, float]] = []
        """(step, mean losses of all slots (K,), lr_A, lr_B) since the last evaluation; losses stay on the device."""
        self.grad_norms: tuple[Tensor, Tensor] | None = None
        """(|g_A|, |g_B|) of the last step before an evaluation."""
        self._admitted_at = time.monotonic()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._admitted_at

    @property
    def is_finished(self) -> bool:
        return self.step >= self.trial.train.max_steps

    @property
    def is_due(self) -> bool:
        """At an evaluation boundary with steps not yet reported."""
        return bool(self.pending) and (self.step % self.trial.train.eval_every == 0 or self.is_finished)

    def update(self, losses: Tensor, tokens: int) -> None:
        """Steps on the gradients that lie in the banks; `losses` (K,) are the step's mean losses."""
        parameters = [*self.A.values(), *self.B.values()]
        next_step = self.step + 1
        if next_step % self.trial.train.eval_every == 0 or next_step == self.trial.train.max_steps:
            norms = [
                torch.nn.utils.get_total_norm([p.grad for p in group.values() if p.grad is not None])
                for group in (self.A, self.B)
            ]
            self.grad_norms = (norms[0], norms[1])
        if self.trial.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.trial.train.max_grad_norm)
        lr_A, lr_B = (float(group["lr"]) for group in self.optimizer.param_groups)
        self.optimizer.step()
        self.schedule.step()
        self.step = next_step
        self.tokens += tokens
        self.lr_B_squared += lr_B**2
        self.pending.append((self.step, losses, lr_A, lr_B))

    def take_steps(self) -> tuple[Step, ...]:
        """The steps since the last evaluation, which are then forgotten."""
        losses = torch.stack([row[1] for row in self.pending])[:, self.index].tolist() if self.pending else []
        steps = tuple(
            Step(step, loss, lr_A, lr_B) for (step, _, lr_A, lr_B), loss in zip(self.pending, losses, strict=True)
        )
        self.pending.clear()
        return steps

    def save(self, folder: Path) -> None:
        """Writes all that `load` needs to go on bit for bit; whole or not at all."""
        tensors = {f"A/{name}": view for name, view in self.A.items()}
        tensors |= {f"B/{name}": view for name, view in self.B.items()}
        for kind, views in (("A", self.A), ("B", self.B)):
            for name, view in views.items():
                for key, value in self.optimizer.state.get(view, {}).items():
                    tensors[f"{key}/{kind}/{name}"] = value
        counters = {"step": self.step, "tokens": self.tokens, "lr_B_squared": self.lr_B_squared}
        metadata = {"counters": json.dumps(counters | {"seconds": self.seconds}), "trial": _identity(self.trial)}
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{CHECKPOINT}"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, aside, metadata)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.rename(folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint of the same trial. Raises ValueError when it is another's."""
        with safe_open(str(folder / CHECKPOINT), framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
            if metadata.get("trial") != _identity(self.trial):
                raise ValueError(f"{folder}: the checkpoint is of a trial with other settings")
            keys = set(file.keys())
            with torch.no_grad():
                for kind, views in (("A", self.A), ("B", self.B)):
                    for name, view in views.items():
                        view.copy_(file.get_tensor(f"{kind}/{name}"))
                        state = {
                            key: file.get_tensor(f"{key}/{kind}/{name}")
                            for key in ("step", "exp_avg", "exp_avg_sq")
                            if f"{key}/{kind}/{name}" in keys
                        }
                        self.optimizer.state[view] = {key: value.to(view.device) for key, value in state.items()}
        counters = json.loads(metadata["counters"])
        self.step, self.tokens = counters["step"], counters["tokens"]
        self.lr_B_squared, self._seconds_before = counters["lr_B_squared"], counters["seconds"]
        self.schedule.last_epoch = self.step
        lambdas = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, base_lr, factor in lambdas:
            group["lr"] = base_lr * factor(self.step)


def _identity(trial: Trial) -> str:
    whole: dict[str, Any] = asdict(trial) | {"cell": trial.cell.number}
    # How many share the pack changes no trial.
    whole["train"].pop("slots")
    return json.dumps(whole, sort_keys=True)


def _clear(linear: PackedLinear, index: int) -> None:
    with torch.no_grad():
        for bank in (linear.A, linear.B):
            bank[index].zero_()
            assert bank.grad is not None
            bank.grad[index].zero_()


def _view(bank: nn.Parameter, index: int, rank: int) -> nn.Parameter:
    """(rank, d) leaf that shares memory with the bank, its gradient with the bank's gradient."""
    assert bank.grad is not None
    view = nn.Parameter(bank.detach()[index, :rank])
    view.grad = bank.grad[index, :rank]
    return view
