"""The packed trainer: K adapters on one frozen base in one pass, each exactly as if alone."""

from lora_sweep.pack.pack import Pack
from lora_sweep.pack.trial import Settings, Trial

__all__ = ["Pack", "Settings", "Trial"]
