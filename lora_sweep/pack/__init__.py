"""The packed trainer: K adapters on one frozen base in one pass, each exactly as if alone."""

from lora_sweep.pack.capacity import Capacity
from lora_sweep.pack.checkpoint import DamagedCheckpoint
from lora_sweep.pack.optimizers import check
from lora_sweep.pack.pack import Pack
from lora_sweep.pack.trial import PackOutOfMemory, Settings, Trial

__all__ = ["Capacity", "DamagedCheckpoint", "PackOutOfMemory", "Pack", "Settings", "Trial", "check"]
