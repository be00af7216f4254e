"""The course of a trial's losses -> diverged, spiking, overfit, forgetting. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_sweep.config import HealthConfig
from lora_sweep.records import Base, Evaluation, Finding

SMOOTHED_STEPS, SMOOTHED_SHARE = 5, 0.05
"""A loss is smoothed over max(5, 5 %) steps."""
ABOVE_START, ABOVE_SHARE = 0.1, 0.05
"""Diverged: the smoothed loss is a tenth above that of the base for 5 % of the steps."""
GIVEN_BACK = 0.5
"""Of the best gain."""
SPIKE_STEPS, SPIKE_DEVIATIONS, SPIKE_OF_START, SPIKE_SHARE = 10, 6.0, 0.25, 0.02
"""A spike is so far above the median of the steps before: by so many median deviations, and this share of L0."""
SURE = 2.0
"""Paired standard errors."""
REMEDY = "lower optimizer.base_lr or method.alpha, or warm up for longer"


@dataclass(frozen=True)
class Course:
    """How a trial went; losses in nats per token."""

    base: Base
    train_losses: Sequence[float]
    """Of each step."""
    warmup_steps: int
    best: Evaluation
    """The evaluation with the lowest loss."""
    last: Evaluation

    @property
    def L0(self) -> float:
        """The loss of the training data at step 0, which is the base's."""
        return self.base.probe_loss


def paired_gain(base: Base, evaluation: Evaluation) -> tuple[float, float]:
    """(gain of the adapter over the base, its standard error paired by example), nats per token.

    The gain is of the token-weighted losses; the error is that of the mean of per-example differences.
    """
    return base.eval_loss - evaluation.eval_loss, _paired_error(base.eval_losses - evaluation.eval_losses)


def forgetting(base: Base, evaluation: Evaluation) -> float | None:
    """Loss on the retention text, adapter on minus off, nats per token; None where there is no such text."""
    if evaluation.retention_loss is None or base.retention_loss is None:
        return None
    return evaluation.retention_loss - base.retention_loss


def findings(course: Course, rules: HealthConfig) -> Iterator[Finding]:
    """Worst first."""
    if course.last.diverged:
        yield not_finite(course.last.last_finite_step or 0)
        return
    best, error = paired_gain(course.base, course.best)
    kept, _ = paired_gain(course.base, course.last)
    diverged = above_start(course.train_losses[course.warmup_steps :], course.L0) or given_back(best, error, kept)
    if diverged is not None:
        yield diverged
    spikes = spiking(course.train_losses, course.warmup_steps, course.L0)
    if spikes is not None:
        yield spikes
    if diverged is None:
        yield from _overfit(course)
    yield from _forgetting(course, rules)


def not_finite(last_finite_step: int) -> Finding:
    sentence = f"The loss was last finite at step {last_finite_step}: lower optimizer.base_lr or method.alpha."
    return Finding("diverged", {"last_finite_step": float(last_finite_step)}, sentence)


def above_start(train_losses: Sequence[float], L0: float) -> Finding | None:
    """`train_losses`: of each step after warm-up; `L0`: of the training data at step 0."""
    losses = np.asarray(train_losses, np.float64)
    width = max(SMOOTHED_STEPS, math.ceil(SMOOTHED_SHARE * len(losses)))
    if len(losses) < 2 * width:
        return None
    smoothed = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    share = float((smoothed > (1 + ABOVE_START) * L0).mean())
    if share <= ABOVE_SHARE:
        return None
    evidence = {"share_above_start": share, "allowed": ABOVE_SHARE, "loss_at_start": L0}
    sentence = f"The training loss was above the base's for {share:.0%} of the steps: {REMEDY}."
    return Finding("diverged", evidence, sentence)


def given_back(best: float, error: float, kept: float) -> Finding | None:
    """`best`: gain over the base, nats per token, with its standard error; `kept`: what was left of it in the end."""
    if best <= SURE * error or kept >= (1 - GIVEN_BACK) * best:
        return None
    evidence = {"best_gain": best, "last_gain": kept, "share_allowed": GIVEN_BACK}
    return Finding("diverged", evidence, f"Of the best gain of {best:.2g} nats {kept:.2g} were left: {REMEDY}.")


def spiking(train_losses: Sequence[float], warmup_steps: int, L0: float) -> Finding | None:
    """`train_losses`: of each step; `L0`: of the training data at step 0."""
    losses = np.asarray(train_losses, np.float64)
    begin = max(SPIKE_STEPS, warmup_steps)
    if len(losses) <= begin:
        return None
    before = np.lib.stride_tricks.sliding_window_view(losses, SPIKE_STEPS)[begin - SPIKE_STEPS : -1]
    middle = np.median(before, axis=1)
    deviation = 1.4826 * np.median(np.abs(before - middle[:, None]), axis=1)
    limit = middle + np.maximum(SPIKE_DEVIATIONS * deviation, SPIKE_OF_START * L0)
    spikes = int((losses[begin:] > limit).sum())
    share = spikes / (len(losses) - begin)
    if spikes <= 1 or share <= SPIKE_SHARE:
        return None
    sentence = f"The training loss jumped at {spikes} steps: lower optimizer.base_lr, or clip (train.max_grad_norm)."
    evidence = {"spikes": float(spikes), "share": share, "allowed": SPIKE_SHARE}
    return Finding("spiking", evidence, sentence, is_fault=False)


def _overfit(course: Course) -> Iterator[Finding]:
    best, last = course.best, course.last
    rise = last.eval_loss - best.eval_loss
    error = _paired_error(last.eval_losses - best.eval_losses)
    if last.step > best.step and rise > SURE * error and last.probe_loss < best.probe_loss:
        evidence = {"rise": rise, "allowed": SURE * error, "best_step": float(best.step), "last_step": float(last.step)}
        sentence = (
            f"The evaluation loss rose by {rise:.2g} nats after step {best.step} while the training data's still fell: "
            f"lower train.max_steps to about {best.step}, add data or dropout, or lower the rank."
        )
        yield Finding("overfit", evidence, sentence)


def _forgetting(course: Course, rules: HealthConfig) -> Iterator[Finding]:
    lost = forgetting(course.base, course.last)
    if lost is not None and lost > rules.max_forgetting:
        sentence = (
            f"The retention text costs {lost:.2g} nats per token more than without the adapter: lower "
            "optimizer.base_lr, method.alpha or the rank, or mix such text into the training data."
        )
        yield Finding("forgetting", {"forgetting": lost, "allowed": rules.max_forgetting}, sentence, is_fault=False)


def _paired_error(differences: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.inf
