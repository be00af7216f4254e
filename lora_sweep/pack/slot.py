"""One slot: views into a bank, an optimizer and schedule of its own, and what it has done so far."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lora_sweep import health
from lora_sweep.health import MOMENTS, AdaptedModule, HealthHistory, Side, Stepped
from lora_sweep.pack import checkpoint, optimizers
from lora_sweep.pack.bank import Bank, Banks, Which
from lora_sweep.pack.trial import Trial
from lora_sweep.records import Step


class Slot:
    """The trial with number `index` of its pack.

    Its parameters are views of a bank and their gradients views of the bank's gradients, so a plain torch optimizer
    steps them in place and knows nothing of the other slots. Where each number is stepped by itself, all A together
    are one parameter, and all B.
    """

    def __init__(self, index: int, trial: Trial, banks: Banks, initial_A: Mapping[str, Tensor]) -> None:
        self.index = index
        self.trial = trial
        self.A: dict[str, Tensor] = {}
        """Module name -> (r, d_in) view."""
        self.B: dict[str, Tensor] = {}
        """Module name -> (r, d_out) view."""
        self.home: tuple[Bank, int]
        """The bank and the row in it."""
        self._gradients: dict[str, dict[str, Tensor]]
        """"A" or "B" -> module name -> view like that of the value."""
        self._parameters: dict[str, nn.Parameter] = {}
        """What the optimizer steps: "A" and "B", or "A/<module>" and "B/<module>"."""
        banks.take(trial.method.rank, index, self._bind)
        for name, view in self.A.items():
            view.copy_(initial_A[name])
        self.optimizer = optimizers.build(
            trial.optimizer,
            [
                {"params": self.group("A"), "lr": trial.lr_A, "weight_decay": trial.optimizer.weight_decay},
                {
                    "params": self.group("B"),
                    "lr": trial.lr_B,
                    "weight_decay": trial.weight_decay_B,
                    "eps": trial.eps_B,
                },
            ],
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
        self.history = HealthHistory(tuple(self.A), trial.train.max_steps, trial.health.check_every)
        self._is_hopeless: bool | None = None
        self._rates = (0.0, 0.0)
        """lr of A and of B as last stepped."""
        self.pending: list[tuple[int, Tensor, float, float]] = []
        """(step, mean loss, lr_A, lr_B) since the last evaluation; losses stay on the device."""
        self.grad_norms: tuple[Tensor, Tensor] | None = None
        """(|g_A|, |g_B|) of the last step before an evaluation."""
        self._admitted_at = time.monotonic()
        self._seconds_before = 0.0

    def _bind(self, bank: Bank, row: int) -> None:
        """Lets everything point into this row, where the bank has put the values."""
        self.home = (bank, row)
        values, gradients, layout = bank.values[row], bank.gradients[row], bank.layout
        rank, size_A = self.trial.method.rank, layout.size_A
        self.A, self.B = layout.A(values, rank), layout.B(values, rank)
        self._gradients = {"A": layout.A(gradients, rank), "B": layout.B(gradients, rank)}
        if optimizers.is_elementwise(self.trial.optimizer):
            pieces = {
                "A": (values[:size_A], gradients[:size_A]),
                "B": (values[size_A:], gradients[size_A:]),
            }
        else:
            pieces = {
                f"{side}/{name}": (view, self._gradients[side][name])
                for side, views in (("A", self.A), ("B", self.B))
                for name, view in views.items()
            }
        for name, (value, gradient) in pieces.items():
            if name in self._parameters:
                self._parameters[name].data = value
            else:
                self._parameters[name] = nn.Parameter(value)
            self._parameters[name].grad = gradient

    def group(self, side: Which) -> list[nn.Parameter]:
        """The parameters of all A ("A") or of all B ("B")."""
        return [parameter for name, parameter in self._parameters.items() if name[0] == side]

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._admitted_at

    @property
    def is_finished(self) -> bool:
        return self.step >= self.trial.train.max_steps

    @property
    def is_given_up(self) -> bool:
        """Under health.action=stop, once the window is over: it cannot learn any more. Waits for the device."""
        if self.trial.health.action != "stop" or not self.history.window_is_over:
            return False
        if self._is_hopeless is None:
            self._is_hopeless = health.cannot_learn(self.history.snapshot(), self.trial.trainer_settings)
        return self._is_hopeless

    @property
    def is_due(self) -> bool:
        """At an evaluation boundary with steps not yet reported."""
        return bool(self.pending) and (self._is_evaluated_after(self.step) or self.is_finished or self.is_given_up)

    def _is_evaluated_after(self, step: int) -> bool:
        return step % self.trial.train.eval_every == 0 or step == self.trial.train.max_steps

    @property
    def is_checked_next(self) -> bool:
        """Whether health is checked after the next step."""
        return self.history.is_due(self.step + 1, self._is_evaluated_after(self.step + 1))

    def update(self, loss: Tensor, tokens: int) -> None:
        """Steps on the gradients that lie in the bank; `loss` () is the step's mean loss."""
        next_step = self.step + 1
        if self._is_evaluated_after(next_step):
            norms = [
                torch.nn.utils.get_total_norm([p.grad for p in self.group(side) if p.grad is not None])
                for side in ("A", "B")
            ]
            self.grad_norms = (norms[0], norms[1])
        if self.trial.train.max_grad_norm is not None:
            self._clip(self.trial.train.max_grad_norm)
        lr_A, lr_B = (float(group["lr"]) for group in self.optimizer.param_groups)
        self.optimizer.step()
        self.schedule.step()
        self.step = next_step
        self.tokens += tokens
        self._rates = (lr_A, lr_B)
        self.history.stepped(lr_A, lr_B, self._shrink("B"))
        self.pending.append((self.step, loss, lr_A, lr_B))

    def _shrink(self, side: Which) -> float:
        """What decoupled decay has multiplied A or B by in the last step."""
        group = self.optimizer.param_groups["AB".index(side)]
        return 1 - self._rates["AB".index(side)] * float(group["weight_decay"]) if self.trial.decays_apart else 1.0

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each module."""
        return list(zip(self.A.values(), self.B.values(), strict=True))

    def adapted_modules(self) -> list[AdaptedModule]:
        """Each module as the last step left it, for a health check."""
        A, B = self._sides("A", self.A), self._sides("B", self.B)
        return [AdaptedModule(a, b) for a, b in zip(A, B, strict=True)]

    def _sides(self, which: Which, values: Mapping[str, Tensor]) -> list[Side]:
        moments = self._moments(which)
        group = self.optimizer.param_groups["AB".index(which)]
        betas = self.trial.optimizer.beta1, self.trial.optimizer.beta2
        stepped = Stepped(self._shrink(which), float(group.get("eps", 0.0)), betas, self.step)
        unknown = None, None
        both = {name: moments.get(name, unknown) for name in values}
        return [
            Side(value, self._gradients[which][name], both[name][0], both[name][1], stepped)
            for name, value in values.items()
        ]

    def _moments(self, which: Which) -> dict[str, tuple[Tensor, Tensor]]:
        """Module -> Adam's first and second moment (r, d), where they are on the device in full precision."""
        moments: dict[str, dict[str, Tensor]] = {}
        for key, path, value in self._state():
            side, _, module = path.partition("/")
            place = MOMENTS.get(key)
            if side != which or place is None or not isinstance(value, Tensor):
                continue
            if value.dtype.itemsize >= 4 and not optimizers.is_paged(value):
                moments.setdefault(module, {})[place] = value
        return {name: (each["m"], each["v"]) for name, each in moments.items() if len(each) == 2}

    def _clip(self, max_norm: float) -> None:
        """Scales all gradients by max_norm / norm where the norm of (g_A, g_B / clip_scale_B) is above it."""
        gradients = [[p.grad for p in self.group(side) if p.grad is not None] for side in ("A", "B")]
        norm_A, norm_B = (torch.nn.utils.get_total_norm(group) for group in gradients)
        total = torch.linalg.vector_norm(torch.stack([norm_A, norm_B / self.trial.clip_scale_B]))
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), max_norm, total)

    def take_steps(self) -> tuple[Step, ...]:
        """The steps since the last evaluation, which are then forgotten."""
        losses = torch.stack([row[1] for row in self.pending]).tolist() if self.pending else []
        steps = tuple(
            Step(step, loss, lr_A, lr_B) for (step, _, lr_A, lr_B), loss in zip(self.pending, losses, strict=True)
        )
        self.pending.clear()
        return steps

    def leave(self) -> None:
        """Lets go of what is kept outside the slot."""
        optimizers.forget(self.optimizer)

    def copied(self) -> Callable[[Path], None]:
        """Copies all that `load` needs to go on bit for bit; what is returned writes it, whole or not at all."""
        tensors = {f"A/{name}": view for name, view in self.A.items()}
        tensors |= {f"B/{name}": view for name, view in self.B.items()}
        numbers: dict[str, Any] = {}
        for key, name, value in self._state():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = value
            else:
                numbers[f"{key}/{name}"] = value
        history, rows = self.history.state()
        tensors["chart"] = rows
        counters = {"step": self.step, "tokens": self.tokens, "chart": history}
        texts = checkpoint.metadata(self.trial, counters | {"seconds": self.seconds}, numbers)
        # Copies too because bitsandbytes lets all tensors share their quantization maps, which a file cannot.
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        return lambda folder: checkpoint.write(folder, copies, texts)

    def _state(self) -> Iterator[tuple[str, str, Any]]:
        """(key of the optimizer's state, parameter or module, tensor or number).

        What has the form of all A or of all B goes module by module, without the rows that fill a bank up to its rank.
        """
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if name in ("A", "B") and isinstance(value, Tensor) and value.shape == parameter.shape:
                    yield from (
                        (key, f"{name}/{module}", view)
                        for module, view in self._modules(cast(Which, name), value).items()
                    )
                else:
                    yield key, name, value

    def _modules(self, side: Which, flat: Tensor) -> dict[str, Tensor]:
        """Module name -> (r, d) views of what has the form of all A or all B."""
        bank, _ = self.home
        rank = self.trial.method.rank
        return bank.layout.side(side, flat, rank)

    def load(self, folder: Path) -> None:
        """Goes on from a checkpoint of the same trial. Raises DamagedCheckpoint, and leaves the slot unusable then."""
        tensors, counters, numbers = checkpoint.read(folder, self.trial)
        try:
            self._take(tensors, counters, numbers)
        except checkpoint.UNREADABLE as error:
            raise checkpoint.damaged(error) from error

    def _take(self, tensors: dict[str, Tensor], counters: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        rows = tensors.pop("chart")
        for side, views in (("A", self.A), ("B", self.B)):
            for name, view in views.items():
                view.copy_(tensors.pop(f"{side}/{name}"))
        self._load_state({**tensors, **numbers})
        self.step, self.tokens = counters["step"], counters["tokens"]
        self.history.restore(counters["chart"], rows)
        self._seconds_before = counters["seconds"]
        self.schedule.last_epoch = self.step
        lambdas = zip(self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        for group, base_lr, factor in lambdas:
            group["lr"] = base_lr * factor(self.step)

    def _load_state(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `_state`: "key/parameter" or "key/side/module" -> tensor or number."""
        for path, value in saved.items():
            key, _, name = path.partition("/")
            if name in self._parameters:
                parameter = self._parameters[name]
                is_tensor = isinstance(value, Tensor)
                placed = optimizers.placed(self.optimizer, parameter, value) if is_tensor else value
                self.optimizer.state[parameter][key] = placed
                continue
            side, _, module = name.partition("/")
            parameter = self._parameters[side]
            state = self.optimizer.state[parameter]
            if key not in state:
                state[key] = torch.zeros_like(parameter)
            self._modules(cast(Which, side), state[key])[module].copy_(value)
