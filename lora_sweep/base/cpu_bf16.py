"""Frozen linears: the weight they compute with, the gradient they pass down, and bf16 where the processor has none.

A processor without bf16 instructions multiplies bf16 matrices up to sixty times slower than fp32 ones (seen on AVX2, in
the backward pass). There the factors are widened to fp32 on the way, which is exact, and the product is rounded to
bf16, as the instructions themselves would do.
"""

import os
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_sweep.base import attention, quant

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Any of them multiplies bf16; by torch's names, for x86 and ARM."""
_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""The first that is set tells oneDNN, and torch through it, which instructions to leave alone."""
_ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of theirs under which bf16 products are slower than widened ones."""


def patch_linears(model: Any, device: torch.device) -> None:
    """Makes a bf16 base multiply in fp32 where the processor has no bf16, linears and attention; in place."""
    if device.type != "cpu" or model.dtype != torch.bfloat16 or _has_bf16():
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.__dict__["forward"] = partial(_widened, module)
    attention.widen(model)


def multiplied_dtype(model: Any) -> torch.dtype:
    """What the linears of a base multiply in."""
    widens = any(_is_widened(module) for module in model.modules())
    return torch.float32 if widens else cast(torch.dtype, model.dtype)


def weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """(d_out, d_in), detached, de-quantized where it is quantized."""
    stored = quant.dequantized(linear, dtype)
    return stored.T if isinstance(linear, Conv1D) else stored


def widened(linear: nn.Module, x: Tensor) -> Tensor:
    """x in the dtype that the linear multiplies in."""
    return x.float() if _is_widened(linear) else x


def product(linear: nn.Module, wide: Tensor) -> Tensor:
    """W x + b, (..., d_out) of a `widened` x (..., d_in), rounded to the base's dtype.

    Before an adapter's part is added, as PEFT has it: bf16 swallows what is too small beside it, and evaluation losses
    of adapters near their start come out 3 % lower where only the sum is rounded (seen on SmolLM2-135M).
    """
    if not _is_widened(linear):
        y: Tensor = linear(wide)
        return y
    bias: Any = linear.bias
    full = functional.linear(wide, _multiplied(linear), None if bias is None else bias.float())
    return full.to(torch.bfloat16)


def input_gradient(linear: nn.Module, wide: Tensor) -> Tensor:
    """(..., d_in) of a `widened` gradient (..., d_out) of the linear's output, rounded to the base's dtype."""
    if not _is_widened(linear):
        return wide @ weight(linear, wide.dtype)
    return (wide @ _multiplied(linear)).to(torch.bfloat16)


def _has_bf16() -> bool:
    isa = next((os.environ[name] for name in _ISA_VARIABLES if name in os.environ), "")
    if isa.upper() in _ISA_WITHOUT_BF16:
        return False
    flags = torch.cpu.get_capabilities()
    return any(flags.get(name, False) for name in _INSTRUCTIONS)


def _is_widened(linear: nn.Module) -> bool:
    forward = linear.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _widened


def _multiplied(linear: nn.Module) -> Tensor:
    """The bf16 weight of a widened linear in fp32."""
    return weight(linear, torch.bfloat16).float()


def _widened(linear: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = _Widened.apply(x, linear)  # type: ignore[no-untyped-call]
    return y


class _Widened(torch.autograd.Function):
    """y = x W^T + b in fp32 of bf16 factors, rounded once; the wide weight lives no longer than its product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        return product(linear, x.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return input_gradient(ctx.linear, gradient.float()), None
