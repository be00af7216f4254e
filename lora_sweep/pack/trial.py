"""What a pack is asked to train: one trial, and the settings all its trials share."""

from dataclasses import dataclass

from lora_sweep.config import Config, HealthConfig, MethodConfig, OptimizerConfig, TrainConfig
from lora_sweep.health import TrainerSettings
from lora_sweep.records import Cell


@dataclass(frozen=True)
class Trial:
    """One cell as the trainer sees it."""

    cell: Cell
    method: MethodConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    health: HealthConfig

    @classmethod
    def of(cls, cell: Cell, config: Config) -> "Trial":
        return cls(cell, config.method, config.optimizer, config.train, config.health)

    @property
    def scaling(self) -> float:
        """alpha / r (LoRA, 2106.09685) or alpha / sqrt(r) (rsLoRA, 2312.03732)."""
        return self.method.alpha / (self.method.rank**0.5 if self.method.use_rslora else self.method.rank)

    @property
    def lr_A(self) -> float:
        return self.optimizer.base_lr

    @property
    def lr_B(self) -> float:
        return self.optimizer.base_lr * self.optimizer.ratio

    @property
    def weight_decay_B(self) -> float:
        """As AdamW takes it: a step decays B by lr_B times this."""
        decay = self.optimizer.weight_decay_B
        requested = self.optimizer.weight_decay if decay is None else decay
        return requested / self.optimizer.ratio if self.optimizer.decay_rule == "scaled" else requested

    @property
    def eps_B(self) -> float:
        return self.optimizer.eps * self.scaling if self.optimizer.eps_rule == "scaled" else self.optimizer.eps

    @property
    def trainer_settings(self) -> TrainerSettings:
        """What health must know of it; adapters and their gradients are never below fp32 here."""
        return TrainerSettings(self.optimizer.ratio, coupled_decay=0.0 if self.decays_apart else self.weight_decay_B)

    @property
    def decays_apart(self) -> bool:
        """Whether weight decay is decoupled from the gradient, as AdamW has it."""
        return self.optimizer.optim != "sgd"

    @property
    def clip_scale_B(self) -> float:
        """What |g_B| is divided by in the norm that is clipped."""
        return self.scaling if self.optimizer.clip_rule == "scaled" else 1.0


class PackOutOfMemory(Exception):
    """A trial does not fit into the device's memory, or with fixed shapes a whole pass."""

    def __init__(self, slot: int, slots: int) -> None:
        super().__init__(f"slot {slot}: out of memory with {slots} in a pass")
        self.slot, self.slots = slot, slots


@dataclass(frozen=True)
class Settings:
    """What trials must agree on to share a pack."""

    slots: int | None
    """None: auto, the fastest measured."""
    max_steps: int
    eval_every: int
    batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    gradient_checkpointing: bool
    fixed_shapes: bool
    compile: bool
    optim: str
    target_modules: str | tuple[str, ...]

    @classmethod
    def of(cls, trial: Trial) -> "Settings":
        targets = trial.method.target_modules
        return cls(
            slots=trial.train.slots,
            max_steps=trial.train.max_steps,
            eval_every=trial.train.eval_every,
            batch_size=trial.train.batch_size,
            gradient_accumulation_steps=trial.train.gradient_accumulation_steps,
            eval_batch_size=trial.train.eval_batch_size,
            gradient_checkpointing=trial.train.gradient_checkpointing,
            fixed_shapes=trial.train.fixed_shapes,
            compile=trial.train.compile,
            optim=trial.optimizer.optim,
            target_modules=targets if isinstance(targets, str) else tuple(targets),
        )
