"""Measurements of an adapter -> findings with a cause. Knows neither study nor pack: tensors and numbers in, words out.

`look` measures tensors, `Chart` keeps what was seen of one adapter, `rules` names the cause of each module's trouble,
`course` reads the losses (`logged` those of a trainer that is not ours), `verdict` says it all. A trial stores what it
shows by itself (`diagnose`, `own_findings`); `compared` judges it beside its study (`Peers`) whenever that is shown.
"""

from lora_sweep.health.chart import Chart, window
from lora_sweep.health.course import Course, forgetting, paired_gain
from lora_sweep.health.group import delta_rel, measurements
from lora_sweep.health.histogram import BIN_EDGES
from lora_sweep.health.logged import Logged
from lora_sweep.health.look import MOMENTS, AdaptedModule, Side, Snapshot, Stepped, look, snapshot
from lora_sweep.health.peers import Cooler, Peer, Peers
from lora_sweep.health.rules import CAUSES, Asked, Seen, causes
from lora_sweep.health.verdict import cannot_learn, certain, compared, diagnose, own_findings, seen, verdict

__all__ = [
    "BIN_EDGES",
    "CAUSES",
    "MOMENTS",
    "AdaptedModule",
    "Asked",
    "Chart",
    "Cooler",
    "Course",
    "Logged",
    "Peer",
    "Peers",
    "Seen",
    "Side",
    "Snapshot",
    "Stepped",
    "cannot_learn",
    "causes",
    "certain",
    "compared",
    "delta_rel",
    "diagnose",
    "forgetting",
    "look",
    "measurements",
    "own_findings",
    "paired_gain",
    "seen",
    "snapshot",
    "verdict",
    "window",
]
