"""What passes between rooms: frozen, plain, no behavior beyond its own words."""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

State = Literal["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
"""Optuna's words for how far a cell is."""


def cell_name(number: int) -> str:
    """The number of a cell as it stands in paths, tables and W&B: `0007`."""
    return f"{number:04d}"


@dataclass(frozen=True)
class Cell:
    """What the user asked for once: a number and the value of every swept key."""

    number: int
    params: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key (or group name) -> value."""

    @property
    def name(self) -> str:
        return cell_name(self.number)


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
    moved_A: float
    """Fraction of elements of A whose bits the last step has changed."""
    moved_B: float
    v_over_eps_B: float
    """Median sqrt(v) / eps of the group's median module, bias corrected; nan without Adam's second moment."""
    stable_rank: float
    """|BA|_F^2 over its largest singular value squared, of the group's median module; nan where BA = 0."""
    delta_rel: float
    """s |BA|_F / |W|_F over the group's modules (root of summed squares each)."""
    rho: float
    """rms(B) / sqrt(sum of lr_B^2 over the steps taken); 0 before the first step."""
    histogram: Histogram
    """B in units of sqrt(sum of lr_B^2)."""


@dataclass(frozen=True)
class UpdateSums:
    """Sums over the optimizer steps that an adapter has taken."""

    stepped: int = 0
    """Steps with a learning rate of B above 0."""
    lr_A: float = 0.0
    lr_B: float = 0.0
    lr_B_squared: float = 0.0
    kappa_B: float = 0.0
    """Sum of lr_B x weight decay of B, decoupled."""
    kept_B: float = 0.0
    """Sum of lr_B, each by what decay has left of it since: over `lr_B` it tells how much of B's way decay took."""
    least_ratio: float = math.inf
    """Of lr_B over lr_A as stepped."""
    largest_ratio: float = 0.0

    def after(self, lr_A: float, lr_B: float, shrink_B: float) -> "UpdateSums":
        """One step later; `shrink_B` = 1 - lr_B x weight decay."""
        ratio = lr_B / lr_A if lr_A else None
        return UpdateSums(
            self.stepped + (lr_B > 0),
            self.lr_A + lr_A,
            self.lr_B + lr_B,
            self.lr_B_squared + lr_B**2,
            self.kappa_B + 1 - shrink_B,
            self.kept_B * shrink_B + lr_B,
            self.least_ratio if ratio is None else min(self.least_ratio, ratio),
            self.largest_ratio if ratio is None else max(self.largest_ratio, ratio),
        )

    def plain(self) -> list[float]:
        return [*astuple(self)]


@dataclass(frozen=True)
class HealthSnapshot:
    """All that was seen of one adapter until now, in plain numbers."""

    modules: tuple[str, ...]
    window: int
    """Steps with a learning rate above 0 that the early rules are about."""
    steps: tuple[int, ...]
    """After which its health was checked: L of them."""
    sums_by_check: tuple[UpdateSums, ...]
    """(L,) sums up to each."""
    values: Mapping[str, NDArray[np.float64]]
    """Metric (health.measure.METRICS) -> (L, modules)."""
    sums: UpdateSums
    """Sums up to now."""


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
    snapshot: HealthSnapshot
    delta_rel: NDArray[np.float64]
    """(modules,) s |BA|_F / |W|_F of each module of `snapshot`."""
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
    probe_losses: NDArray[np.float64] | None = None
    """(examples,) mean nats per token of each example of the train probe; None where they were not kept."""

    @property
    def gap(self) -> float:
        """Evaluation loss minus the train probe's, both in eval mode."""
        return self.eval_loss - self.probe_loss

    @property
    def diverged(self) -> bool:
        return self.last_finite_step is not None


@dataclass(frozen=True)
class BaselineLosses:
    """The losses of the base alone, adapters off, on the same sets."""

    eval_loss: float
    probe_loss: float
    eval_losses: NDArray[np.float64]
    retention_loss: float | None = None
    """None where no retention text was given."""
    probe_losses: NDArray[np.float64] | None = None
    """(examples,) of the train probe; None where they were not kept."""


@dataclass(frozen=True)
class Cause:
    """Why some modules of an adapter learned nothing, or may not have learned what they could."""

    name: str
    """Of the rule, e.g. `not_in_graph`."""
    modules: tuple[str, ...]
    share: float
    """Of all adapted modules."""
    evidence: Mapping[str, float]
    """Numbers, of the median module, and the thresholds they were compared with."""


class Estimate(NamedTuple):
    """A number that was measured, in nats per token, with its standard error."""

    value: float
    error: float

    @property
    def in_errors(self) -> float:
        return self.value / self.error if self.error else math.copysign(math.inf, self.value) if self.value else 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What one trial shows by itself, before it is compared with its study."""

    gain: float | None
    """Over the base, nats per token; None where it is not known."""
    noise: float
    """A gain below this could be chance, or is too small to count."""
    causes: tuple[Cause, ...]
    """Each module under the first rule that it meets whether the adapter gained or not."""
    causes_without_gain: tuple[Cause, ...]
    """The same, with the rules that mean something only where the adapter gained nothing."""
    error: float | None = None
    """Standard error of the gain, paired by example, nats per token; None where no examples are known."""
    delta_rel: float | None = None
    """s |BA|_F / |W|_F of the median module; None where |W| is not known."""
    fall: Estimate | None = None
    """How far the loss of the steps fell; None where it is not known."""
    probe_fall: Estimate | None = None
    """How far the loss fell on the train probe, paired by example; None where it is not known."""
    window_is_over: bool = True
    """Whether the training went beyond the steps that the early rules are about."""

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Diagnosis":
        """Inverse of dataclasses.asdict, by way of JSON."""
        causes, without = (
            tuple(Cause(**{**each, "modules": tuple(each["modules"])}) for each in plain[key])
            for key in ("causes", "causes_without_gain")
        )
        # Older versions wrote null where one evaluation example had no standard error, and knew less.
        values = {name: plain[name] for name in ("error", "delta_rel", "window_is_over") if name in plain}
        falls = {name: plain.get(name) for name in ("fall", "probe_fall")}
        values |= {name: Estimate(*fall) for name, fall in falls.items() if fall is not None and None not in fall}
        return cls(plain["gain"], plain["noise"] or 0.0, causes, without, **values)


UNDECIDED = "undecided"
"""The flag of a trial that was pruned, or stopped before its window ended: what needs more steps is not said of it."""


@dataclass(frozen=True)
class Finding:
    """Something about an adapter that its user must know."""

    flag: str
    """Name in tables and tags, e.g. `zero_trapped`."""
    evidence: Mapping[str, float]
    """Numbers and the thresholds they were compared with."""
    sentence: str
    """What it means and what to do."""
    cause: str | None = None
    """Of `zero_trapped` and `partially_trapped`: the rule that most modules meet."""
    is_fault: bool = True
    """Whether the trial must not be shipped; else a warning."""
    remedy: str = ""
    """What to do, the same words for every trial in this state; empty where nothing is to be done."""

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Finding":
        """Inverse of dataclasses.asdict, by way of JSON; older versions wrote neither warnings, causes nor remedies."""
        values = {each.name: plain[each.name] for each in fields(cls) if each.name in plain}
        return cls(**{"evidence": {}, "sentence": "", **values})


@dataclass(frozen=True)
class Example:
    """One text to learn from or to be measured on."""

    completion: str
    """Loss is counted here."""
    prompt: str = ""
    """Read but not counted; empty for plain text."""
