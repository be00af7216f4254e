"""The optimizers a slot can step with; those of bitsandbytes (extra `quant`) are imported only where asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_sweep.base import quant
from lora_sweep.config import OptimizerConfig
from lora_sweep.errors import Fault

_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit"}


def check(optimizer: OptimizerConfig, device: torch.device) -> list[Fault]:
    """Whether the optimizer is installed and runs on the device."""
    if optimizer.optim not in _BITSANDBYTES:
        return []
    if not quant.is_installed():
        return [Fault("optimizer.optim", "needs bitsandbytes, which is not installed", optimizer.optim, quant.INSTALL)]
    if optimizer.optim.startswith("paged_") and device.type != "cuda":
        remedy = "optimizer.optim=" + optimizer.optim.removeprefix("paged_")
        return [
            Fault("optimizer.optim", "pages between a GPU and the host, so it needs a GPU", optimizer.optim, remedy)
        ]
    return []


def is_elementwise(optimizer: OptimizerConfig) -> bool:
    """Whether a step treats each number by itself, so that all modules can be one tensor.

    8-bit states are scaled by blocks of a tensor; so is each module's own tensor in any other trainer.
    """
    return optimizer.optim not in _BITSANDBYTES


def build(optimizer: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over groups of `params`, `lr` and `weight_decay`."""
    if optimizer.optim == "sgd":
        return torch.optim.SGD(groups, momentum=optimizer.momentum, fused=True)
    shared: dict[str, Any] = {"betas": (optimizer.beta1, optimizer.beta2), "eps": optimizer.eps}
    if optimizer.optim == "adamw":
        return torch.optim.AdamW(groups, fused=True, **shared)
    from lora_sweep.pack import low_bits

    built: torch.optim.Optimizer = getattr(low_bits, _BITSANDBYTES[optimizer.optim])(groups, **shared)
    return built


def placed(optimizer: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a saved part of the parameter's state where the optimizer keeps its like: on the device, or paged."""
    if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
        state: Tensor = optimizer.get_state_buffer(parameter, value.dtype)  # type: ignore[attr-defined]
        return state.copy_(value)
    # A fused step wants the number of steps, too, beside the moments.
    return value.to(parameter.device)


def is_paged(value: Tensor) -> bool:
    """Whether it is bitsandbytes' paged memory, which torch takes for the host's."""
    return bool(getattr(value, "is_paged", False))


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Drops what is kept of the optimizer outside of it."""
    if getattr(optimizer, "is_paged", False):
        optimizer.leave()  # type: ignore[attr-defined]
