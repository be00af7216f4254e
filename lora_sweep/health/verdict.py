"""From what a trial shows to what is said of it; `compared` compares it with its study."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lora_sweep.config import HealthConfig
from lora_sweep.health import loss_history, rules
from lora_sweep.health.loss_history import LossHistory
from lora_sweep.health.peers import Cooler, Peers
from lora_sweep.health.rules import RuleInput, TrainerSettings
from lora_sweep.records import UNDECIDED, Cause, Diagnosis, Estimate, Evaluation, Finding, HealthSnapshot

TRAPPED, PARTIALLY = 0.5, 0.1
"""Share of the modules that have a cause."""

UNTOUCHED = ("dead_product", "not_in_graph", "not_stepped")
"""Causes under which a module has changed nothing."""

HOPELESS = (*UNTOUCHED, "underflow")
"""Causes that more steps cannot mend."""

NEGLIGIBLE = 0.02
"""Of the least gain that counts: paired by example even the tenth of a millionth of a nat may be beyond chance."""

LITTLE = 0.2
"""Of the study's best gain: an adapter with a large update that cannot have gained more has wasted it."""

CERTAIN = 4.0
"""Standard errors of a fall that shows a signal: where B walks under random labels the first steps hurt and the next
ones make up for some of it, by 2.7 of them in what was seen."""

FAR = 0.5
"""s |BA| / |W| beyond which B has not just walked: random labels moved the embedded base by .25 at its best rate."""

COOL_DOWN = "lower optimizer.base_lr or method.alpha, to a tenth to begin with."


def rule_input(
    evaluation: Evaluation, trainer: TrainerSettings, config: HealthConfig, lost: Sequence[str] = ()
) -> RuleInput:
    return RuleInput(evaluation.snapshot, trainer, evaluation.delta_rel, config.min_delta_rel, frozenset(lost))


def diagnose(losses: LossHistory, inputs: RuleInput, own: Sequence[Finding], config: HealthConfig) -> Diagnosis:
    """What one trial shows by itself, after its last evaluation.

    A trial that diverged has no gain because of that: rules that ask why there is none have nothing to add.

    Args:
        own: its own findings.
    """
    base = losses.base
    gain, error = loss_history.paired_gain(base, losses.last)
    # One example alone has no error to be paired.
    chance = config.min_gain_standard_errors * error if np.isfinite(error) else 0.0
    noise = max(chance, config.min_gain_of_base * base.eval_loss)
    trapping, all_causes = rules.causes(inputs)
    diverged = any(finding.flag == "diverged" for finding in own)
    return Diagnosis(
        gain if np.isfinite(gain) else None,
        noise,
        trapping,
        trapping if diverged else all_causes,
        error=error if np.isfinite(error) else None,
        delta_rel=inputs.median_delta_rel,
        fall=loss_history.training_fall(base, losses.train_losses),
        probe_fall=loss_history.paired_fall(base, losses.last),
        window_is_over=inputs.window_is_over,
    )


def own_findings(
    inputs: RuleInput, losses: LossHistory | None, config: HealthConfig, was_pruned: bool = False
) -> tuple[Finding, ...]:
    """What needs no comparison with other trials, worst first."""
    diagnosis = [] if losses is None else list(loss_history.findings(losses, config))
    if losses is None or not losses.last.diverged:
        diagnosis += _of_causes(inputs, is_decided=inputs.window_is_over and not was_pruned)
    return tuple(diagnosis)


def certain(inputs: RuleInput, config: HealthConfig) -> tuple[Finding, ...]:
    """What holds of a training that goes on, however its rate and its losses do from here: worst first."""
    trapping, _ = rules.causes(inputs)
    diagnosis = Diagnosis(None, 0.0, trapping, trapping, window_is_over=False)
    ratio_lost = (finding for finding in _of_causes(inputs, is_decided=False) if finding.flag == "ratio_lost")
    return (*(each for each in verdict(diagnosis, None, config) if each.flag != UNDECIDED), *ratio_lost)


def _of_causes(inputs: RuleInput, is_decided: bool) -> Iterator[Finding]:
    """`is_decided`: whether rules that need the whole window may speak."""
    # A that hardly moves where B does is LoRA-FA by accident; where neither does it says nothing new.
    update = inputs.median_delta_rel
    works = update is None or update >= inputs.min_delta_rel
    for name, needed, is_fault, needs_window in (
        ("lost_on_save", 0.0, True, False),
        ("ratio_lost", TRAPPED, True, False),
        ("precision_stalled", TRAPPED, False, True),
        ("A_frozen", TRAPPED, False, True),
    ):
        if needs_window and not is_decided:
            continue
        cause = rules.alone(inputs, name)
        if cause is not None and cause.share >= needed and (works or name != "A_frozen"):
            yield Finding(name, cause.evidence, _sentence(cause), is_fault=is_fault, remedy=rules.remedy(cause))
    edge = rules.near_precision(inputs) if is_decided else None
    if edge is not None and edge.share >= TRAPPED:
        sentence = f"B moves at the edge of what eps or its precision lets through in {_modules(edge)}."
        yield Finding("edge_of_precision", edge.evidence, sentence, is_fault=False)


def compared(
    diagnosis: Diagnosis | None,
    own: Sequence[Finding],
    config: HealthConfig,
    peers: Peers | None = None,
    cell: int = 0,
    step: int = 0,
    was_pruned: bool = False,
) -> tuple[Finding, ...]:
    """The verdict on a trial, to stand before its `own` findings.

    Args:
        diagnosis: after its last evaluation, at `step`; None of a trial whose loss is not finite.
        peers: the trials of its study, `cell` among them; None where there is none.
    """
    if diagnosis is None:
        return ()
    best_gain = None if peers is None else peers.best_gain(step)
    cooler = None if peers is None else peers.cooler(cell, step, config.min_gain_standard_errors)
    faults = {each.flag for each in own if each.is_fault}
    # Diverged is the stronger word for a rate that is too high; and with a fault of its own a trial is decided.
    hidden = {UNDECIDED} if faults else set()
    if "diverged" in faults:
        hidden.add("rate_too_high")
    findings = verdict(diagnosis, best_gain, config, cooler, was_pruned)
    return tuple(each for each in findings if each.flag not in hidden)


def verdict(
    diagnosis: Diagnosis,
    best_gain: float | None,
    config: HealthConfig,
    cooler: Cooler | None = None,
    was_pruned: bool = False,
) -> tuple[Finding, ...]:
    """`zero_trapped`, `partially_trapped`, `barely_learned`, `rate_too_high`, `undecided` or nothing, worst first.

    Args:
        best_gain: of the study's trials on the same base and data at equal steps, nats per token; None where no other
            is known.
        cooler: a trial of the study that does better at a tenth of the rate.
    """
    # What others have learned from the same data is no matter of chance.
    labels_are_sound = best_gain is not None and best_gain > diagnosis.noise
    hot = _rate_too_high(diagnosis, config, cooler, best_gain, labels_are_sound) if diagnosis.window_is_over else None
    if was_pruned or not diagnosis.window_is_over:
        # That it is worse than its base, or than a slower trial at the same step, needs no more steps.
        sure = [cause for cause in diagnosis.causes if cause.name in HOPELESS]
        return (_trapped(diagnosis, sure, "partially_trapped") or hot or _undecided(diagnosis, was_pruned),)
    needed = max(diagnosis.noise, config.min_gain_of_best * (best_gain or 0.0))
    # An adapter that hurts does something: why it gained nothing is no question.
    gained_little = diagnosis.gain is not None and diagnosis.gain < needed and not (hot is not None and hot.is_fault)
    if not gained_little:
        trapped = _trapped(diagnosis, diagnosis.causes, "partially_trapped")
    elif does_nothing(diagnosis, config):
        trapped = _trapped(
            diagnosis, _explained(diagnosis, config, labels_are_sound, is_idle=True), "zero_trapped", needed
        )
    else:
        findings = _explained(diagnosis, config, labels_are_sound, is_idle=False)
        many = sum(cause.share for cause in findings) >= TRAPPED
        trapped = _trapped(diagnosis, findings if many else diagnosis.causes, "barely_learned", needed)
    return tuple(each for each in (trapped, hot) if each is not None)


def _explained(diagnosis: Diagnosis, config: HealthConfig, labels_are_sound: bool, is_idle: bool) -> list[Cause]:
    """Why it gained nothing. Of labels without a signal only where the training loss is known not to fall.

    Over labels that others learn from, a walk so short that the adapter is idle has not gone far enough.
    """
    if diagnosis.fall is not None and not labels_are_sound and not _fell(diagnosis.fall, diagnosis, config, CERTAIN):
        return [*diagnosis.causes_without_gain]
    walks = [cause for cause in diagnosis.causes_without_gain if cause.name == "no_signal"]
    others = [cause for cause in diagnosis.causes_without_gain if cause.name != "no_signal"]
    if not (is_idle and labels_are_sound and walks):
        return others
    slow = [*walks, *(cause for cause in others if cause.name == "lr_too_small")]
    modules = tuple(module for cause in slow for module in cause.modules)
    merged = Cause("lr_too_small", modules, sum(cause.share for cause in slow), walks[0].evidence)
    return sorted([merged, *(cause for cause in others if cause.name != "lr_too_small")], key=lambda each: -each.share)


def does_nothing(diagnosis: Diagnosis, config: HealthConfig) -> bool:
    """Whether its evaluation is the base's but for chance, its update small and its training loss not fallen."""
    small = diagnosis.delta_rel is None or diagnosis.delta_rel < config.max_trapped_delta_rel
    errors = config.min_gain_standard_errors
    fell = any(_fell(fall, diagnosis, config, errors) for fall in (diagnosis.fall, diagnosis.probe_fall))
    return diagnosis.gain is not None and abs(diagnosis.gain) <= _chance(diagnosis, config) and small and not fell


def _chance(diagnosis: Diagnosis, config: HealthConfig) -> float:
    """A difference from the base up to which there is none, nats per token."""
    if diagnosis.error is None:
        return diagnosis.noise
    return max(config.min_gain_standard_errors * diagnosis.error, NEGLIGIBLE * diagnosis.noise)


def _fell(fall: Estimate | None, diagnosis: Diagnosis, config: HealthConfig, errors: float) -> bool:
    """Whether the training loss fell beyond so many of its standard errors, and beyond what is nothing in a gain."""
    return fall is not None and fall.value > max(errors * fall.error, _chance(diagnosis, config))


def _rate_too_high(
    diagnosis: Diagnosis, config: HealthConfig, cooler: Cooler | None, best_gain: float | None, labels_are_sound: bool
) -> Finding | None:
    """A fault where the adapter is worse than its base; else a warning, since it has learned."""
    size, chance = diagnosis.delta_rel, _chance(diagnosis, config)
    # Labels without a signal hurt too: B walks at random, and the training loss does not fall.
    walk = sum(cause.share for cause in diagnosis.causes_without_gain if cause.name == "no_signal")
    may_walk = walk >= TRAPPED and not labels_are_sound and not _fell(diagnosis.fall, diagnosis, config, CERTAIN)
    if size is None or size >= (FAR if may_walk else config.max_trapped_delta_rel):
        hurts = diagnosis.gain is not None and diagnosis.gain < -chance
    else:
        # A small update must hurt more than what counts, or it may be chance.
        hurts = (
            diagnosis.gain is not None
            and diagnosis.gain < -diagnosis.noise
            and size >= config.min_delta_rel
            and not may_walk
        )
    little = best_gain is not None and diagnosis.gain is not None and diagnosis.gain + chance < LITTLE * best_gain
    nothing = diagnosis.gain is not None and diagnosis.gain <= chance
    wasted = size is not None and nothing and (size >= FAR or (little and size >= config.max_trapped_delta_rel))
    evidence = {} if size is None else {"delta_rel": size, "delta_rel_allowed": config.max_delta_rel}
    if hurts:
        of_weights = "" if size is None else f" under an update of {size:.2g} times the weights"
        evidence |= {"loss_over_base": -(diagnosis.gain or 0.0), "loss_allowed": chance}
        sentence = (
            f"The evaluation loss is {-(diagnosis.gain or 0.0):.2g} nats above the base's{of_weights}: {COOL_DOWN}"
        )
    elif wasted:
        sentence = f"An update of {size:.2g} times the weights gained nothing: {COOL_DOWN}"
    elif cooler is not None:
        evidence |= {"cell": float(cooler.cell), "better_by": cooler.gain, "standard_error": cooler.error}
        evidence["rate_lower_by"] = cooler.factor
        slower = f"at a rate that is lower by a factor of {cooler.factor:.2g}"
        sentence = f"Cell {cooler.cell} does better by {cooler.gain:.2g} nats {slower}: {COOL_DOWN}"
    elif size is not None and size > config.max_delta_rel:
        sentence = f"The update outweighs the weights ({size:.2g} times their size): {COOL_DOWN}"
    else:
        return None
    return Finding("rate_too_high", evidence, sentence, is_fault=hurts or wasted, remedy=COOL_DOWN)


def _undecided(diagnosis: Diagnosis, was_pruned: bool) -> Finding:
    when = "was pruned" if was_pruned else "ended before its health window did"
    evidence = {} if diagnosis.gain is None else {"gain": diagnosis.gain, "gain_needed": diagnosis.noise}
    return Finding(UNDECIDED, evidence, f"The trial {when}, so whether it learns is not known.", is_fault=False)


def _trapped(diagnosis: Diagnosis, findings: Sequence[Cause], flag: str, needed: float | None = None) -> Finding | None:
    """`flag` if half of the modules have a cause, `partially_trapped` if a tenth have; None of fewer.

    Args:
        needed: the gain that would have counted.
    """
    share = sum(cause.share for cause in findings)
    if share < PARTIALLY:
        return None
    # Where no module could learn, what looks like a gain is chance.
    if math.isclose(sum(cause.share for cause in findings if cause.name in UNTOUCHED), 1):
        flag = "zero_trapped"
    elif share < TRAPPED:
        flag = "partially_trapped"
    worst = findings[0]
    evidence = {**worst.evidence, "share_of_modules": share}
    sentence = _sentence(worst)
    if diagnosis.gain is not None:
        evidence["gain"] = diagnosis.gain
        if needed is not None:
            evidence["gain_needed"] = needed
            sentence = f"It gained {diagnosis.gain:.2g} nats over its base ({needed:.2g} would count): {sentence}"
    return Finding(flag, evidence, sentence, cause=worst.name, remedy=rules.remedy(worst))


def cannot_learn(snapshot: HealthSnapshot, trainer: TrainerSettings) -> bool:
    """Whether half of the modules learn nothing for a cause that more steps cannot mend."""
    inputs = RuleInput(snapshot, trainer, np.full(len(snapshot.modules), np.nan), 0.0)
    if inputs.never_stepped:
        # The rate may still rise.
        return False
    trapping, _ = rules.causes(inputs)
    return sum(cause.share for cause in trapping if cause.name in HOPELESS) >= TRAPPED


def _sentence(cause: Cause) -> str:
    return f"{cause.name} in {_modules(cause)}: {rules.remedy(cause)}"


def _modules(cause: Cause) -> str:
    every = round(len(cause.modules) / cause.share)
    named = f" ({', '.join(cause.modules[:2])}, ...)" if len(cause.modules) < every else ""
    return f"{len(cause.modules)} of {every} modules{named}"
