"""The record of a trial: always on disk, and beside it one W&B run.

In the trial's folder: `metrics.jsonl`, one row a step; `evaluations/<step>.npz`, the per-example losses and the lora_B
histograms; `result.json`, written last, by rename: its presence alone says that the trial is finished. The disk is the
truth. A W&B run is made from the same rows, live or replayed from the files after an interruption, and whatever W&B
does or fails to do costs neither the training nor a row on disk.

`record` knows the files, `wandb_run` is the only place that imports wandb, and does so when the first run starts.
"""

from lora_sweep.tracking import seal
from lora_sweep.tracking.record import (
    METRICS,
    RESULT,
    Record,
    is_whole,
    read_base_losses,
    read_evaluation,
    read_losses,
    read_result,
    read_rows,
    replay,
)
from lora_sweep.tracking.wandb_run import Tracker

__all__ = [
    "METRICS",
    "RESULT",
    "Record",
    "is_whole",
    "Tracker",
    "read_base_losses",
    "read_evaluation",
    "read_losses",
    "read_result",
    "read_rows",
    "replay",
    "seal",
]
