"""What a study says of trials that were trained without one."""

import math
from collections.abc import Sequence

from lora_sweep import health
from lora_sweep.config import Config
from lora_sweep.pack import Trial
from lora_sweep.records import BaselineLosses, Cell, Evaluation, Finding
from lora_sweep.sweep import equivalence


def judged(
    alone: BaselineLosses, configs: Sequence[Config], records: Sequence[Sequence[Evaluation]]
) -> list[tuple[Finding, ...]]:
    """What is said of each trial after its last evaluation, all of them compared as one study.

    Args:
        alone: the losses of the base.
        records: the evaluations of each config's trial, in order.
    """
    peers = health.Peers(alone.eval_loss)
    for place, (config, evaluations) in enumerate(zip(configs, records, strict=True)):
        curve = {each.step: each.eval_loss for each in evaluations if not each.diverged}
        effective = equivalence.coordinates(config)
        log_X, log_Y = (effective.log_X, effective.log_Y) if effective else (math.nan, math.nan)
        of_examples = {each.step: each.eval_losses for each in evaluations}
        peers.add(health.Peer(place, log_X, log_Y, curve, of_examples.get))
    verdicts = []
    for place, (config, evaluations) in enumerate(zip(configs, records, strict=True)):
        rules, last = config.health, evaluations[-1]
        losses = [step.train_loss for each in evaluations for step in each.steps]
        inputs = health.rule_input(last, Trial.of(Cell(place), config).trainer_settings, rules)
        history = health.LossHistory(alone, losses, 0, min(evaluations, key=lambda each: each.eval_loss), last)
        own = health.own_findings(inputs, history, rules)
        diagnosis = None if last.diverged else health.diagnose(history, inputs, own, rules)
        verdicts.append((*health.compared(diagnosis, own, rules, peers, place, last.step), *own))
    return verdicts


def words(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Flags and causes."""
    return tuple(word for each in findings for word in (each.flag, each.cause) if word is not None)
