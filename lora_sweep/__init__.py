"""lora_sweep: pick LoRA hyperparameters for production."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_sweep.callback import HealthCallback

__version__ = "0.1.0"
__all__ = ["HealthCallback", "__version__"]


def __getattr__(name: str) -> Any:
    # Only when asked for: it brings torch, transformers and peft.
    if name == "HealthCallback":
        from lora_sweep.callback import HealthCallback

        return HealthCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
