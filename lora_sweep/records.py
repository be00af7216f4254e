"""What passes between rooms: frozen, plain, no behaviour beyond its own words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

State = Literal["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
"""Optuna's words for how far a cell is."""


@dataclass(frozen=True)
class Fault:
    """One mistake in what the user asked for."""

    field: str
    """The field as the user types it, e.g. `method.rank`."""
    rule: str
    """What must hold, e.g. `must be at least 1`."""
    got: Any = None
    """The value found; None where there is none to show."""
    remedy: str = ""
    """What to do, one clause; may be empty when the rule says it."""

    def __str__(self) -> str:
        got = "" if self.got is None else f", got {self.got!r}"
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{self.field}: {self.rule}{got}{remedy}"


@dataclass(frozen=True)
class Cell:
    """What the user asked for once: a number and the value of every swept key."""

    number: int
    params: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key (or group name) -> value."""

    @property
    def folder(self) -> str:
        return f"{self.number:04d}"


@dataclass(frozen=True)
class Step:
    """One optimizer step of one slot."""

    step: int
    """1-based: the number of optimizer steps done."""
    train_loss: float
    """Mean over the counted tokens of the step, nats per token."""
    lr_A: float
    lr_B: float
    """Learning rates as stepped, schedule included."""


@dataclass(frozen=True)
class Histogram:
    """Counts of lora_B elements in the fixed symmetric-log bins of health.BIN_EDGES."""

    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Measurement:
    """One group of modules (all `q_proj`, say) of one adapter at one evaluation."""

    group: str
    rms_A: float
    rms_B: float
    absmax_B: float
    exact_zero_B: float
    """Fraction of elements of B that are exactly 0."""
    delta_rel: float
    """s |BA|_F / |W|_F over the group's modules (root of summed squares each)."""
    rho: float
    """rms(B) / sqrt(sum of lr_B^2 over the steps taken); 0 before the first step."""
    histogram: Histogram
    """B in units of sqrt(sum of lr_B^2)."""


@dataclass(frozen=True)
class Evaluation:
    """What one slot reports at one evaluation boundary."""

    cell: int
    step: int
    """Optimizer steps done."""
    tokens: int
    """Counted (loss-bearing) training tokens seen."""
    train_loss: float
    """Mean train loss of the steps since the last evaluation, nats per token; nan before the first."""
    eval_loss: float
    """Nats per token over the evaluation set."""
    probe_loss: float
    """The fixed train probe, measured the same way."""
    eval_losses: NDArray[np.float64]
    """(examples,) mean nats per token of each evaluation example."""
    grad_norm_A: float
    """|g_A| over all modules at the last step, before clipping."""
    grad_norm_B_over_s: float
    """|g_B| / s over all modules at the last step, before clipping."""
    measurements: tuple[Measurement, ...]
    steps: tuple[Step, ...]
    """Every step since the last evaluation."""
    seconds: float
    """Wall time of the slot since admission (shared with its co-tenants)."""
    tokens_per_second: float
    """Non-padding training tokens a second of the whole pack since the last evaluation."""
    last_finite_step: int | None = None
    """None while all is finite; else the last step whose loss was finite: the slot has diverged."""
    retention_loss: float | None = None
    """Nats per token over the retention text; None where there is none."""

    @property
    def gap(self) -> float:
        """Evaluation loss minus the train probe's, both in eval mode."""
        return self.eval_loss - self.probe_loss

    @property
    def diverged(self) -> bool:
        return self.last_finite_step is not None


@dataclass(frozen=True)
class Base:
    """The losses of the base alone, adapters off, on the same sets."""

    eval_loss: float
    probe_loss: float
    eval_losses: NDArray[np.float64]
    retention_loss: float | None = None
    """None where no retention text was given."""


@dataclass(frozen=True)
class Finding:
    """Something about an adapter that its user must know."""

    flag: str
    """Name in tables and tags, e.g. `zero_trapped`."""
    evidence: Mapping[str, float]
    """Numbers and the thresholds they were held against."""
    sentence: str
    """What it means and what to do."""


@dataclass(frozen=True)
class Example:
    """One text to learn from or to be measured on."""

    completion: str
    """Loss is counted here."""
    prompt: str = ""
    """Read but not counted; empty for plain text."""
