"""The course of a trial's losses -> diverged, spiking, overfit, forgetting. Pure."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_sweep.config import HealthConfig
from lora_sweep.records import BaselineLosses, Estimate, Evaluation, Finding

Numbers = NDArray[np.float64]

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
LEAST_LOSSES = 4
"""Of which a trend has a standard error worth the name."""
REMEDY = "lower optimizer.base_lr or method.alpha, or warm up for longer."
CLIP = "lower optimizer.base_lr, or clip (train.max_grad_norm)."
STOP_EARLIER = "lower train.max_steps, add data or dropout, or lower the rank."
REMEMBER = "lower optimizer.base_lr, method.alpha or the rank, or mix such text into the training data."


@dataclass(frozen=True)
class LossHistory:
    """How a trial went; losses in nats per token."""

    base: BaselineLosses
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

    @property
    def highest_start(self) -> float:
        """What that can have been at most: the train probe is a sample, and the steps see other examples."""
        sample = self.base.probe_losses
        return self.L0 + (0.0 if sample is None or len(sample) < 2 else SURE * _error_of_mean(sample))


def paired_gain(base: BaselineLosses, evaluation: Evaluation) -> tuple[float, float]:
    """(gain of the adapter over the base, its standard error paired by example), nats per token.

    The gain is of the token-weighted losses; the error is that of the mean of per-example differences.
    """
    return base.eval_loss - evaluation.eval_loss, paired_error(base.eval_losses - evaluation.eval_losses)


def paired_fall(base: BaselineLosses, evaluation: Evaluation) -> Estimate | None:
    """How far the loss fell on the train probe, paired by example; None where its examples were not kept."""
    before, after = base.probe_losses, evaluation.probe_losses
    if before is None or after is None or len(before) < 2:
        return None
    return Estimate(base.probe_loss - evaluation.probe_loss, paired_error(before - after))


def training_fall(base: BaselineLosses, train_losses: Sequence[float]) -> Estimate | None:
    """How far the loss of the steps fell: along its trend, or below the base's, whichever is surer.

    Steps see other examples each, so what was learned by heart does not count.

    Args:
        train_losses: of each step.
    """
    falls = [trend(range(len(train_losses)), train_losses)]
    late = np.asarray(train_losses[len(train_losses) // 2 :], np.float64)
    if base.probe_losses is not None and len(base.probe_losses) > 1 and len(late) >= LEAST_LOSSES:
        error = math.hypot(_error_of_mean(late), _error_of_mean(base.probe_losses))
        falls.append(Estimate(base.probe_loss - float(late.mean()), error))
    return max((each for each in falls if each is not None), key=lambda each: each.in_errors, default=None)


def trend(steps: Sequence[int], losses: Sequence[float]) -> Estimate | None:
    """How far a noisy loss fell from the first to the last step, by least squares; None of fewer than four.

    The slope times the steps between, with the error of the slope.
    """
    if len(losses) < LEAST_LOSSES:
        return None
    x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    x -= x.mean()
    slope = float(x @ y / (x @ x))
    rest = y - y.mean() - slope * x
    span = float(x[-1] - x[0])
    return Estimate(-slope * span, math.sqrt(float(rest @ rest) / (len(y) - 2) / float(x @ x)) * span)


def forgetting(base: BaselineLosses, evaluation: Evaluation) -> float | None:
    """Loss on the retention text, adapter on minus off, nats per token; None where there is no such text."""
    if evaluation.retention_loss is None or base.retention_loss is None:
        return None
    return evaluation.retention_loss - base.retention_loss


def findings(history: LossHistory, rules: HealthConfig) -> Iterator[Finding]:
    """Worst first."""
    if history.last.diverged:
        yield not_finite(history.last.last_finite_step or 0)
        return
    best, error = paired_gain(history.base, history.best)
    kept, _ = paired_gain(history.base, history.last)
    diverged = above_start(history.train_losses[history.warmup_steps :], history.highest_start) or given_back(
        best, error, kept
    )
    if diverged is not None:
        yield diverged
    spikes = spiking(history.train_losses, history.warmup_steps, history.L0)
    if spikes is not None:
        yield spikes
    if diverged is None:
        yield from _overfit(history)
    yield from _forgetting(history, rules)


def not_finite(last_finite_step: int) -> Finding:
    sentence = f"The loss was last finite at step {last_finite_step}: {REMEDY}"
    return Finding("diverged", {"last_finite_step": float(last_finite_step)}, sentence, remedy=REMEDY)


def above_start(train_losses: Sequence[float], L0: float) -> Finding | None:
    """`train_losses`: of each step after warm-up; `L0`: of the training data at step 0."""
    losses = np.asarray(train_losses, np.float64)
    window = max(SMOOTHED_STEPS, math.ceil(SMOOTHED_SHARE * len(losses)))
    if len(losses) < 2 * window:
        return None
    smoothed = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    share = float((smoothed > (1 + ABOVE_START) * L0).mean())
    if share <= ABOVE_SHARE:
        return None
    evidence = {"share_above_start": share, "allowed": ABOVE_SHARE, "loss_at_start": L0}
    sentence = f"The training loss was above the base's for {share:.0%} of the steps: {REMEDY}"
    return Finding("diverged", evidence, sentence, remedy=REMEDY)


def given_back(best: float, error: float, kept: float) -> Finding | None:
    """`best`: gain over the base, nats per token, with its standard error; `kept`: what was left of it in the end."""
    if best <= SURE * error or kept >= (1 - GIVEN_BACK) * best:
        return None
    evidence = {"best_gain": best, "last_gain": kept, "share_allowed": GIVEN_BACK}
    sentence = f"Of the best gain of {best:.2g} nats {kept:.2g} were left: {REMEDY}"
    return Finding("diverged", evidence, sentence, remedy=REMEDY)


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
    sentence = f"The training loss jumped at {spikes} steps: {CLIP}"
    evidence = {"spikes": float(spikes), "share": share, "allowed": SPIKE_SHARE}
    return Finding("spiking", evidence, sentence, is_fault=False, remedy=CLIP)


def _overfit(history: LossHistory) -> Iterator[Finding]:
    best, last = history.best, history.last
    rise = last.eval_loss - best.eval_loss
    error = paired_error(last.eval_losses - best.eval_losses)
    if last.step > best.step and rise > SURE * error and last.probe_loss < best.probe_loss:
        evidence = {"rise": rise, "allowed": SURE * error, "best_step": float(best.step), "last_step": float(last.step)}
        sentence = (
            f"The evaluation loss rose by {rise:.2g} nats after step {best.step} while the training data's still fell: "
            f"lower train.max_steps to about {best.step}, add data or dropout, or lower the rank."
        )
        yield Finding("overfit", evidence, sentence, remedy=STOP_EARLIER)
        return
    # The base itself was the best: what was learned is the training data, by heart.
    gain, error = paired_gain(history.base, last)
    worse, learned = -gain, history.base.probe_loss - last.probe_loss
    if worse > SURE * error and learned > worse:
        evidence = {"rise": worse, "allowed": SURE * error, "best_step": 0.0, "last_step": float(last.step)}
        sentence = (
            f"The evaluation loss rose by {worse:.2g} nats over the base's while the training data's fell by "
            f"{learned:.2g}: {STOP_EARLIER}"
        )
        yield Finding("overfit", evidence, sentence, remedy=STOP_EARLIER)


def _forgetting(history: LossHistory, rules: HealthConfig) -> Iterator[Finding]:
    lost = forgetting(history.base, history.last)
    if lost is not None and lost > rules.max_forgetting:
        sentence = f"The retention text costs {lost:.2g} nats per token more than without the adapter: {REMEMBER}"
        evidence = {"forgetting": lost, "allowed": rules.max_forgetting}
        yield Finding("forgetting", evidence, sentence, is_fault=False, remedy=REMEMBER)


def paired_error(differences: Numbers) -> float:
    """Standard error of the mean; infinite of one difference."""
    return _error_of_mean(differences) if len(differences) > 1 else math.inf


def _error_of_mean(values: Numbers) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))
