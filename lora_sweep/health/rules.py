"""The rules by which a module's trouble is named: the first that it meets, in the order of CAUSES.

Thresholds are of the table of causes that LoRA's mathematics gives; those that only measuring can set were measured on
the embedded transformer by `lora-sweep bench diagnosis`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_sweep.records import Cause, HealthSnapshot

Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]

DEAD_RMS = 1e-12
STEPS_TO_MOVE = 3
UNDERFLOWN = 0.5
"""Share of exact zeros."""
EPS_FAULT, EPS_WARNING = 0.1, 1.0
"""Of median sqrt(v) / eps: below, eps and not the gradient's size decides how far an element moves."""
DECAY_KAPPA, DECAY_KEPT, COUPLED = 3.0, 0.35, 0.5
RATIO_OCTAVES = 0.1
STALLED, NEARLY_STALLED = 0.75, 0.95
"""Share of the elements of B that a step moves, in a precision below fp32."""
MOVING = 1.0
"""rho of a B that walks in one direction, after the window; at random it stays at 1 whatever the rate."""
RANDOM_WALK = (0.5, 1.5)
A_STILL, A_SLOW = 0.25, 50.0
"""Share of elements that a step moves; A's own size over the sum of its rates: 3 to 17 in healthy trainings, above 200
at a ratio of 1000."""
IDLE = 0.3


@dataclass(frozen=True)
class TrainerSettings:
    """What the trainer was set to, as far as the rules must know."""

    ratio: float | None
    """lr of B over lr of A; None where nobody said."""
    coupled_decay: float = 0.0
    """Weight decay of B that is added to its gradient (L2), which decoupled decay is not."""
    is_low_precision: bool = False
    """Whether adapters are held in fewer than 32 bits."""
    fp16_gradients: bool = False


@dataclass(frozen=True)
class RuleInput:
    """A reading with what the rules ask of it."""

    snapshot: HealthSnapshot
    trainer: TrainerSettings
    delta_rel: Numbers
    """(modules,) s |BA|_F / |W|_F; nan where |W| is not known."""
    min_delta_rel: float
    lost: Collection[str] = ()
    """Modules whose file does not hold what memory does."""
    knows_way: bool = True
    """Whether the sums are over every step since the start, at the rates it was taken at. Else nothing is said of how
    far A and B came on their way."""

    @property
    def never_stepped(self) -> bool:
        """Whether B's rate was 0 at every step, nothing moved it, and there were enough steps to know."""
        steps = self.snapshot.steps
        enough = bool(steps) and self.snapshot.sums.stepped == 0 and steps[-1] >= STEPS_TO_MOVE
        return enough and not (self.snapshot.values["moved_B"] > 0).any()

    @property
    def window_is_over(self) -> bool:
        """Whether rules that need the window may speak; that the rate was 0 throughout needs none.

        Where the way is not known there were more steps than were seen.
        """
        return self.never_stepped or not self.knows_way or self.snapshot.sums.stepped >= self.snapshot.window

    @property
    def median_delta_rel(self) -> float | None:
        """Of the modules whose |W| is known; None where none is."""
        finite = self.delta_rel[~np.isnan(self.delta_rel)]
        return float(np.median(finite)) if len(finite) else None

    @cached_property
    def checks(self) -> list[int]:
        """Checks after a step with a learning rate above 0."""
        counts = [sums.stepped for sums in self.snapshot.sums_by_check]
        return [place for place, count in enumerate(counts) if count > (counts[place - 1] if place else 0)]

    @cached_property
    def early(self) -> int:
        """The check that ended the window, or the last one before."""
        over = [i for i in self.checks if self.snapshot.sums_by_check[i].stepped >= self.snapshot.window]
        return over[0] if over else self.checks[-1]

    @cached_property
    def early_checks(self) -> list[int]:
        return [i for i in self.checks if i <= self.early]

    @cached_property
    def rho(self) -> Numbers:
        """(modules,) rms(B) / sqrt(sum of lr_B^2) at the end of the window; nan where the way is not known."""
        if not self.knows_way:
            return np.full(len(self.snapshot.modules), np.nan)
        hits: Numbers = self.of("rms_B", [self.early])[0] / np.sqrt(
            self.snapshot.sums_by_check[self.early].lr_B_squared
        )
        return hits

    @cached_property
    def late(self) -> list[int]:
        """The last checks, after the window if there are any."""
        return [i for i in self.checks if i >= self.early][-3:]

    @cached_property
    def ratios(self) -> Numbers:
        """Ratio of the rates at which B and A were moved, at each check that shows it; else as the groups have it."""
        with np.errstate(all="ignore"):
            pairs = [(_median(self.of("lr_B", [i])[0]), _median(self.of("lr_A", [i])[0])) for i in self.checks]
        hits = [b / a for b, a in pairs if np.isfinite(b) and np.isfinite(a) and a > 0]
        sums = self.snapshot.sums
        return np.array(hits or [each for each in (sums.least_ratio, sums.largest_ratio) if np.isfinite(each)])

    def of(self, metric: str, checks: list[int]) -> Numbers:
        """(checks, modules)."""
        return self.snapshot.values[metric][checks]

    def everywhere(self, value: bool) -> Mask:
        return np.full(len(self.snapshot.modules), value)


class RuleHit(NamedTuple):
    hit: Mask
    """(modules,)."""
    evidence: Mapping[str, Numbers | float]
    """Name -> (modules,) numbers, or a threshold."""


def _dead_product(inputs: RuleInput) -> RuleHit:
    A, B = (inputs.of(f"rms_{side}", [inputs.checks[-1]])[0] for side in "AB")
    return RuleHit((A < DEAD_RMS) & (B < DEAD_RMS), {"rms_A": A, "rms_B": B, "rms_needed": DEAD_RMS})


def _not_in_graph(inputs: RuleInput) -> RuleHit:
    A, B = (inputs.of(f"gradmax_{side}", inputs.early_checks).max(0) for side in "AB")
    # fp16 makes zeros of small gradients; that there is none at all it cannot make.
    nothing = -1.0 if inputs.trainer.fp16_gradients else 0.0
    return RuleHit(
        (nothing >= A) & (nothing >= B) & inputs.window_is_over, {"largest_gradient_A": A, "largest_gradient_B": B}
    )


def _not_stepped(inputs: RuleInput) -> RuleHit:
    if inputs.never_stepped:
        # A B that does not start at 0 may be held as it is on purpose.
        return RuleHit(
            inputs.snapshot.values["rms_B"][-1] == 0, {"lr_B": 0.0, "steps": float(inputs.snapshot.steps[-1])}
        )
    gradient, moved = inputs.of("gradmax_B", inputs.checks).max(0), inputs.of("moved_B", inputs.checks).max(0)
    sizes = inputs.of("rms_B", inputs.checks)
    still = (moved == 0) & (sizes.max(0) == sizes.min(0))
    steps = inputs.snapshot.sums_by_check[inputs.checks[-1]].stepped
    evidence = {"largest_gradient_B": gradient, "moved_B": moved, "steps": float(steps)}
    return RuleHit(still & (gradient > 0) & (steps >= STEPS_TO_MOVE), evidence)


def _underflow(inputs: RuleInput) -> RuleHit:
    zeros, gradient = inputs.of("zero_B", [inputs.early])[0], np.median(inputs.of("gradzero_B", inputs.early_checks), 0)
    rounded_off = inputs.trainer.fp16_gradients | (gradient > UNDERFLOWN)
    over = inputs.snapshot.sums_by_check[inputs.early].stepped >= inputs.snapshot.window
    evidence = {"exact_zero_B": zeros, "exact_zero_gradient_B": gradient, "share_needed": UNDERFLOWN}
    return RuleHit((zeros > UNDERFLOWN) & rounded_off & over, evidence)


def _eps_limited(inputs: RuleInput) -> RuleHit:
    size = inputs.of("v_over_eps_B", inputs.late).max(0)
    return RuleHit(size < EPS_FAULT, {"v_over_eps_B": size, "needed": EPS_FAULT})


def _decay_trapped(inputs: RuleInput) -> RuleHit:
    sums = inputs.snapshot.sums
    if inputs.trainer.coupled_decay:
        rms_B, gradient = (inputs.of(name, [inputs.checks[-1]])[0] for name in ("rms_B", "gradrms_B"))
        with np.errstate(all="ignore"):
            pull = inputs.trainer.coupled_decay * rms_B / gradient
        return RuleHit(pull > COUPLED, {"decay_over_gradient": pull, "needed": COUPLED})
    kept = sums.kept_B / sums.lr_B
    hit = sums.kappa_B > DECAY_KAPPA and kept < DECAY_KEPT
    evidence: dict[str, Numbers | float] = {"kappa_B": sums.kappa_B, "kappa_needed": DECAY_KAPPA}
    return RuleHit(inputs.everywhere(hit), evidence | {"kept": kept, "kept_needed": DECAY_KEPT})


def _ratio_lost(inputs: RuleInput) -> RuleHit:
    if inputs.trainer.ratio is None or not (inputs.never_stepped or len(inputs.ratios)):
        return RuleHit(inputs.everywhere(False), {})
    if inputs.never_stepped:
        return RuleHit(
            inputs.everywhere(True), {"ratio": 0.0, "asked": inputs.trainer.ratio, "octaves_allowed": RATIO_OCTAVES}
        )
    octaves = np.log2(inputs.ratios / inputs.trainer.ratio)
    worst = int(np.abs(octaves).argmax())
    evidence = {"ratio": float(inputs.ratios[worst]), "asked": inputs.trainer.ratio, "octaves_allowed": RATIO_OCTAVES}
    return RuleHit(inputs.everywhere(bool(abs(octaves[worst]) > RATIO_OCTAVES)), evidence)


def _precision_stalled(inputs: RuleInput) -> RuleHit:
    moved = inputs.of("moved_B", inputs.late).mean(0)
    return RuleHit((moved < STALLED) & inputs.trainer.is_low_precision, {"moved_B": moved, "needed": STALLED})


def _lr_too_small(inputs: RuleInput) -> RuleHit:
    hit = (inputs.rho > MOVING) & (inputs.delta_rel < inputs.min_delta_rel)
    return RuleHit(hit, {"rho": inputs.rho, "delta_rel": inputs.delta_rel, "delta_rel_needed": inputs.min_delta_rel})


def _no_signal(inputs: RuleInput) -> RuleHit:
    low, high = RANDOM_WALK
    return RuleHit((inputs.rho >= low) & (inputs.rho <= high), {"rho": inputs.rho, "from": low, "to": high})


def _lost_on_save(inputs: RuleInput) -> RuleHit:
    return RuleHit(np.isin(np.array(inputs.snapshot.modules), list(inputs.lost)), {})


def _a_frozen(inputs: RuleInput) -> RuleHit:
    # Before B has moved, A has no gradient.
    later = [i for i in inputs.checks if inputs.snapshot.sums_by_check[i].stepped > 1]
    if not later:
        return RuleHit(inputs.everywhere(False), {})
    moved = inputs.of("moved_A", later).mean(0)
    with np.errstate(all="ignore"):
        slow = inputs.of("rms_A", inputs.checks[:1])[0] / (inputs.snapshot.sums.lr_A if inputs.knows_way else np.nan)
    evidence: dict[str, Numbers | float] = {"moved_A": moved, "moved_needed": A_STILL}
    evidence |= {"size_over_way": slow, "size_over_way_allowed": A_SLOW}
    if len(inputs.ratios):
        evidence["ratio"] = float(np.median(inputs.ratios))
    return RuleHit((moved < A_STILL) | (slow > A_SLOW), evidence)


def _generic(inputs: RuleInput) -> RuleHit:
    return RuleHit(inputs.rho < IDLE, {"rho": inputs.rho, "needed": IDLE})


class Rule(NamedTuple):
    find: Callable[[RuleInput], RuleHit]
    traps: bool
    """Whether a module that meets it learns nothing, whatever the others do; else only a trial without gain tells."""
    remedy: str


CAUSES: Mapping[str, Rule] = {
    "dead_product": Rule(_dead_product, True, "A and B are both zero, which no training leaves: start A at random."),
    "not_in_graph": Rule(
        _not_in_graph,
        True,
        "no gradient ever reached A or B: leave the modules out of target_modules, or see that the forward pass calls "
        "them (under gradient checkpointing its input must require a gradient).",
    ),
    "not_stepped": Rule(
        _not_stepped,
        True,
        "there is a gradient, but no bit of B moved: give the optimizer the parameters that the model has now.",
    ),
    "underflow": Rule(
        _underflow, True, "gradients round to zero in fp16: train in bf16, or scale the loss (GradScaler)."
    ),
    "eps_limited": Rule(
        _eps_limited, True, "eps swamps the gradients: lower optimizer.eps, or raise the scale of the loss."
    ),
    "decay_trapped": Rule(
        _decay_trapped, False, "weight decay takes what training gives: lower optimizer.weight_decay_B."
    ),
    "ratio_lost": Rule(
        _ratio_lost,
        False,
        "B and A were not stepped at the ratio that was asked: use a schedule that multiplies each group's own rate.",
    ),
    "precision_stalled": Rule(
        _precision_stalled, False, "updates are smaller than the spacing of the numbers: hold the adapter in fp32."
    ),
    "lr_too_small": Rule(
        _lr_too_small,
        False,
        "B moves as it should, but too slowly for this many steps: raise optimizer.base_lr, method.alpha or "
        "train.max_steps.",
    ),
    "no_signal": Rule(
        _no_signal, False, "B walks at random: look at the data, the labels may have nothing to do with the inputs."
    ),
    "lost_on_save": Rule(_lost_on_save, False, "the file does not hold what was trained: save the adapter again."),
    "A_frozen": Rule(
        _a_frozen,
        False,
        "A hardly moves: raise optimizer.base_lr, and lower optimizer.ratio or method.alpha by the same factor.",
    ),
    "generic": Rule(_generic, False, "B hardly moves, for none of the known reasons: please report this adapter."),
}


def remedy(cause: Cause) -> str:
    """What to do about it: the rule's own words, or those that fit what was measured."""
    if cause.name == "not_stepped" and cause.evidence.get("lr_B") == 0:
        return (
            "the learning rate of B was 0 at every step: raise that of its parameter group, or its schedule's factor."
        )
    if cause.name == "A_frozen":
        if cause.evidence["moved_A"] < A_STILL:
            return "A's steps are smaller than the spacing of its numbers: hold the adapter in fp32, or raise A's rate."
        if cause.evidence.get("ratio", math.inf) <= 2**RATIO_OCTAVES:
            return (
                "A hardly moves: raise optimizer.base_lr, and lower method.alpha by the same factor to keep B's part."
            )
    return CAUSES[cause.name].remedy


def causes(inputs: RuleInput) -> tuple[tuple[Cause, ...], tuple[Cause, ...]]:
    """(each module under the first rule that traps it, each under the first of all rules)."""
    if inputs.never_stepped:
        only = _first_hits(inputs, {"not_stepped": _not_stepped(inputs)})
        return only, only
    if not inputs.checks:
        return (), ()
    with np.errstate(invalid="ignore"):
        hits = {name: rule.find(inputs) for name, rule in CAUSES.items()}
    trapping = {name: each for name, each in hits.items() if CAUSES[name].traps}
    return _first_hits(inputs, trapping), _first_hits(inputs, hits)


def alone(inputs: RuleInput, name: str) -> Cause | None:
    """The rule by itself, whatever else the modules meet; None where none does."""
    if not inputs.checks and not (inputs.never_stepped and name == "ratio_lost"):
        return None
    with np.errstate(invalid="ignore"):
        hits = _first_hits(inputs, {name: CAUSES[name].find(inputs)})
    return hits[0] if hits else None


def near_precision(inputs: RuleInput) -> Cause | None:
    """Modules whose B moves at the edge of what eps or the precision lets through."""
    if not inputs.checks:
        return None
    with np.errstate(invalid="ignore"):
        size, moved = inputs.of("v_over_eps_B", inputs.late).max(0), inputs.of("moved_B", inputs.late).mean(0)
        small = (size >= EPS_FAULT) & (size < EPS_WARNING)
        few = (moved >= STALLED) & (moved < NEARLY_STALLED) & inputs.trainer.is_low_precision
    evidence = {
        "v_over_eps_B": size,
        "v_over_eps_needed": EPS_WARNING,
        "moved_B": moved,
        "moved_needed": NEARLY_STALLED,
    }
    hits = _first_hits(inputs, {"edge_of_precision": RuleHit(small | few, evidence)})
    return hits[0] if hits else None


def _first_hits(inputs: RuleInput, hits: Mapping[str, RuleHit]) -> tuple[Cause, ...]:
    """The largest share first."""
    free, named = inputs.everywhere(True), []
    for name, (hit, evidence) in hits.items():
        here = free & hit
        free &= ~hit
        if here.any():
            names = tuple(module for module, is_hit in zip(inputs.snapshot.modules, here, strict=True) if is_hit)
            numbers = {key: _number(value, here) for key, value in evidence.items()}
            named.append(Cause(name, names, float(here.mean()), numbers))
    return tuple(sorted(named, key=lambda cause: -cause.share))


def _number(value: Numbers | float, here: Mask) -> float:
    return float(np.median(value[here])) if isinstance(value, np.ndarray) else float(value)


def _median(values: Numbers) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")
