"""From what a trial shows to what is said of it; `zero_trapped` compares it with its study."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lora_sweep.config import HealthConfig
from lora_sweep.health import course, rules
from lora_sweep.health.course import Course
from lora_sweep.health.rules import Asked, Seen
from lora_sweep.records import Base, Cause, Diagnosis, Evaluation, Finding, Reading

TRAPPED, PARTIALLY = 0.5, 0.1
"""Share of the modules that have a cause."""

UNTOUCHED = ("dead_product", "not_in_graph", "not_stepped")
"""Causes under which a module has changed nothing."""

HOPELESS = (*UNTOUCHED, "underflow")
"""Causes that more steps cannot mend."""


def seen(evaluation: Evaluation, asked: Asked, config: HealthConfig, lost: Sequence[str] = ()) -> Seen:
    return Seen(evaluation.reading, asked, evaluation.delta_rel, config.min_delta_rel, frozenset(lost))


def diagnose(base: Base, last: Evaluation, what: Seen, own: Sequence[Finding], config: HealthConfig) -> Diagnosis:
    """Of one trial by itself, after its last evaluation; `own`: its own findings.

    A trial that diverged has no gain because of that: rules that ask why there is none have nothing to add.
    """
    gain, error = course.paired_gain(base, last)
    # One example alone has no error to be paired.
    chance = config.min_gain_standard_errors * error if np.isfinite(error) else 0.0
    noise = max(chance, config.min_gain_of_base * base.eval_loss)
    trapping, all_found = rules.causes(what)
    diverged = any(finding.flag == "diverged" for finding in own)
    return Diagnosis(gain if np.isfinite(gain) else None, noise, trapping, trapping if diverged else all_found)


def own_findings(what: Seen, how: Course | None, config: HealthConfig) -> tuple[Finding, ...]:
    """What needs no comparison with other trials, worst first."""
    made = [] if how is None else list(course.findings(how, config))
    if how is None or not how.last.diverged:
        made += _of_causes(what)
    return tuple(made)


def certain(what: Seen, config: HealthConfig) -> tuple[Finding, ...]:
    """What holds of a training that goes on, however its rate and its losses do from here: worst first."""
    trapping, _ = rules.causes(what)
    hopeless = tuple(cause for cause in trapping if cause.name in HOPELESS)
    ratio_lost = (finding for finding in _of_causes(what) if finding.flag == "ratio_lost")
    return (*verdict(Diagnosis(None, 0.0, hopeless, hopeless), None, config), *ratio_lost)


def _of_causes(what: Seen) -> Iterator[Finding]:
    # A that hardly moves where B does is LoRA-FA by accident; where neither does it says nothing new.
    works = bool(np.nanmedian(what.delta_rel) >= what.min_delta_rel) if np.isfinite(what.delta_rel).any() else True
    for name, needed, is_fault in (
        ("lost_on_save", 0.0, True),
        ("ratio_lost", TRAPPED, True),
        ("precision_stalled", TRAPPED, False),
        ("A_frozen", TRAPPED, False),
    ):
        cause = rules.alone(what, name)
        if cause is not None and cause.share >= needed and (works or name != "A_frozen"):
            yield Finding(name, cause.evidence, _sentence(cause), is_fault=is_fault)
    edge = rules.near_precision(what)
    if edge is not None and edge.share >= TRAPPED:
        sentence = f"B moves at the edge of what eps or its precision lets through in {_modules(edge)}."
        yield Finding("edge_of_precision", edge.evidence, sentence, is_fault=False)


def verdict(made: Diagnosis, best_gain: float | None, config: HealthConfig) -> tuple[Finding, ...]:
    """`zero_trapped`, `partially_trapped` or nothing.

    `best_gain`: of the study's trials on the same base and data at equal steps, nats per token; None where no other is
    known.
    """
    needed = max(made.noise, config.min_gain_of_best * (best_gain or 0.0))
    # Where no module could learn, what looks like a gain is chance.
    untouched = sum(cause.share for cause in made.causes if cause.name in UNTOUCHED) == 1
    gained_nothing = untouched or (made.gain is not None and made.gain < needed)
    found = made.causes_without_gain if gained_nothing else made.causes
    share = sum(cause.share for cause in found)
    if share < PARTIALLY:
        return ()
    worst = found[0]
    evidence = {**worst.evidence, "share_of_modules": share}
    if made.gain is not None:
        evidence |= {"gain": made.gain, "gain_needed": needed}
    if gained_nothing and share >= TRAPPED:
        sentence = _sentence(worst)
        if made.gain is not None:
            sentence = f"It gained {made.gain:.2g} nats over its base ({needed:.2g} would count): {sentence}"
        return (Finding("zero_trapped", evidence, sentence, cause=worst.name),)
    return (Finding("partially_trapped", evidence, _sentence(worst), cause=worst.name),)


def best_gains(results: Iterable[Mapping[str, Any]]) -> dict[float, dict[int, float]]:
    """{loss of the base: {step: best gain of the trials that were evaluated there}}, nats per token.

    `results`: of trials, with `base_loss` and `curve` (step -> evaluation loss). Trials with one base loss are those on
    one base and one data set.
    """
    found: dict[float, dict[int, float]] = {}
    for result in results:
        best = found.setdefault(result["base_loss"], {})
        for step, loss in result.get("curve", {}).items():
            gain = result["base_loss"] - loss
            best[int(step)] = max(gain, best.get(int(step), gain))
    return found


def cannot_learn(reading: Reading, asked: Asked) -> bool:
    """Whether half of the modules learn nothing for a cause that more steps cannot mend."""
    unknown = np.full(len(reading.modules), np.nan)
    trapping, _ = rules.causes(Seen(reading, asked, unknown, 0.0))
    return sum(cause.share for cause in trapping if cause.name in HOPELESS) >= TRAPPED


def _sentence(cause: Cause) -> str:
    return f"{cause.name} in {_modules(cause)}: {rules.CAUSES[cause.name].remedy}"


def _modules(cause: Cause) -> str:
    every = round(len(cause.modules) / cause.share)
    named = f" ({', '.join(cause.modules[:2])}, ...)" if len(cause.modules) < every else ""
    return f"{len(cause.modules)} of {every} modules{named}"
