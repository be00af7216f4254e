"""Files, hub data sets and tasks -> token batches with a loss mask."""

from lora_sweep.data.faults import USER_DATA, check
from lora_sweep.data.prepare import Data, Progress, load
from lora_sweep.data.report import Report
from lora_sweep.data.tokens import Batch, TokenSet, encode, order

__all__ = ["USER_DATA", "Batch", "Data", "Progress", "Report", "TokenSet", "check", "encode", "load", "order"]
