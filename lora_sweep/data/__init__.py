"""Files, hub data sets and tasks -> token batches with a loss mask."""

from lora_sweep.data.prepare import BROUGHT, Data, Progress, check, load
from lora_sweep.data.report import Report
from lora_sweep.data.tokens import Batch, TokenSet, encode, order

__all__ = ["BROUGHT", "Batch", "Data", "Progress", "Report", "TokenSet", "check", "encode", "load", "order"]
