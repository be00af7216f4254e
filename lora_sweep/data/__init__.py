"""Files, hub data sets and tasks -> token batches with a loss mask."""

from lora_sweep.data.prepare import USER_DATA, Data, Progress, check, load
from lora_sweep.data.report import Report
from lora_sweep.data.tokens import Batch, TokenSet, encode, order

__all__ = ["USER_DATA", "Batch", "Data", "Progress", "Report", "TokenSet", "check", "encode", "load", "order"]
