"""Measurements of an adapter -> findings with a cause. Knows neither study nor pack: tensors and numbers in, words out.

`measure` measures tensors, `HealthHistory` keeps the measurements of one adapter, `rules` names the cause of each
module's trouble, `loss_history` reads the losses (`logged` those of a third-party trainer), `verdict` concludes. A
trial stores what it shows by itself (`diagnose`, `own_findings`); `compared` judges it beside its study (`Peers`)
whenever that is shown.
"""

from lora_sweep.health.group import delta_rel, measurements
from lora_sweep.health.histogram import BIN_EDGES
from lora_sweep.health.history import HealthHistory, window
from lora_sweep.health.logged import Logged
from lora_sweep.health.loss_history import LossHistory, forgetting, paired_gain
from lora_sweep.health.measure import MOMENTS, AdaptedModule, Side, Stepped, WeightSamples, measure, sample_weights
from lora_sweep.health.peers import Cooler, Peer, Peers
from lora_sweep.health.rules import CAUSES, RuleInput, TrainerSettings, causes
from lora_sweep.health.verdict import cannot_learn, certain, compared, diagnose, own_findings, rule_input, verdict

__all__ = [
    "BIN_EDGES",
    "CAUSES",
    "MOMENTS",
    "AdaptedModule",
    "TrainerSettings",
    "HealthHistory",
    "Cooler",
    "LossHistory",
    "Logged",
    "Peer",
    "Peers",
    "RuleInput",
    "Side",
    "WeightSamples",
    "Stepped",
    "cannot_learn",
    "causes",
    "certain",
    "compared",
    "delta_rel",
    "diagnose",
    "forgetting",
    "measure",
    "measurements",
    "own_findings",
    "paired_gain",
    "rule_input",
    "sample_weights",
    "verdict",
    "window",
]
