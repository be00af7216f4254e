"""Frozen linears: the weight they compute with, the gradient they pass down, and bf16 where the processor has none.

A processor without bf16 instructions multiplies bf16 matrices up to sixty times slower than fp32 ones (seen on AVX2, in
the backward pass). There the factors are widened to fp32 on the way, which is exact, and the product is rounded to
bf16, as the instructions themselves would do.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_sweep import quant

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Any of them multiplies bf16; by torch's names, for x86 and ARM."""


def settle(model: Any, device: torch.device) -> None:
    """Makes the linears of a bf16 base multiply in fp32 where the processor has no bf16; in place."""
    if device.type != "cpu" or model.dtype != torch.bfloat16 or _has_bf16():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.__dict__["forward"] = partial(_widened, module)


def weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(d_out, d_in), detached, de-quantised where it is quantised."""
    stored = quant.dequantised(linear, dtype)
    return stored.T if isinstance(linear, Conv1D) else stored


def input_gradient(linear: nn.Module, gradient: Tensor) -> Tensor:
    """(..., d_in) of the gradient (..., d_out) of the linear's output, in its dtype."""
    at = weight(linear, gradient.dtype)
    return (gradient.float() @ at.float()).to(gradient.dtype) if _is_widened(linear) else gradient @ at


def _has_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _INSTRUCTIONS)


def _is_widened(linear: nn.Module) -> bool:
    forward = linear.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _widened


def _widened(linear: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = _Widened.apply(x, linear)  # type: ignore[no-untyped-call]
    return y


class _Widened(torch.autograd.Function):
    """y = x W^T + b in fp32 of bf16 factors, rounded once; the wide weight lives no longer than its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.float()
        return functional.linear(x.float(), weight(linear, x.dtype).float(), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return input_gradient(ctx.linear, gradient), None
