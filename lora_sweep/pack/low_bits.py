"""bitsandbytes' optimizers as slots step them: the same numbers, fewer waits, and paged memory that is used again.

Imported only for a pack that asks for one of them: bitsandbytes is the extra `quant`.
"""

from typing import Any

import torch
from bitsandbytes import functional, optim
from torch import Tensor, nn

_free: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
"""Paged memory of slots that have left: bitsandbytes never gives any back to the system."""


class _Stepped:
    """Comes before one of bitsandbytes' classes."""

    @torch.no_grad()
    def step(self: Any, closure: None = None) -> None:
        """As bitsandbytes', which waits for the device after each tensor.

        Its kernels go to the default stream, as all that the pack does, so they are in order anyway. Paged memory lies
        open to the host, so there it still waits, once.
        """
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        stepped: nn.Parameter | None = None
        for place, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, place, number)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, place, number)
                stepped = parameter
        if self.is_paged and stepped is not None and stepped.is_cuda:
            torch.cuda.synchronize(stepped.device)

    def get_state_buffer(self: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros like `p`; large ones paged, where the optimizer is."""
        free = _free.get((p.shape, dtype, p.device))
        if not (self.is_paged and free):
            buffer: Tensor = super().get_state_buffer(p, dtype)  # type: ignore[misc]
            return buffer
        again = free.pop()
        functional.fill(again, 0)
        self.page_mng.paged_tensors.append(again)
        return again

    def leave(self: Any) -> None:
        """Gives up the paged memory; the optimizer is not stepped any more."""
        for parameter, state in self.state.items():
            for paged in (value for value in state.values() if getattr(value, "is_paged", False)):
                _free.setdefault((parameter.shape, paged.dtype, parameter.device), []).append(paged)
                kept = self.page_mng.paged_tensors
                self.page_mng.paged_tensors = [tensor for tensor in kept if tensor is not paged]
        self.state.clear()


class AdamW8bit(_Stepped, optim.AdamW8bit):
    pass


class PagedAdamW32bit(_Stepped, optim.PagedAdamW32bit):
    pass


class PagedAdamW8bit(_Stepped, optim.PagedAdamW8bit):
    pass
