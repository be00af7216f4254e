"""4-bit and 8-bit linears of bitsandbytes: what they are made by, hold and stand for, and how they train in a pack.

bitsandbytes (extra `quant`) is imported only where a quantized base is at hand.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig

INSTALL = 'pip install "lora-sweep[quant]"'


def is_installed() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def settings(kind: str, dtype: torch.dtype) -> Any:
    """What makes `from_pretrained` quantize the linears (but for the output layer) while it loads.

    nf4: 4-bit normal floats in blocks of 64, their scales in 8 bits (2305.14314), 4.13 bits a weight. int8: 8 bits,
    one scale a row (2208.07339).
    """
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def patch_linears(model: Any, dtype: torch.dtype) -> None:
    """Makes the quantized linears of a base compute in `dtype`, each row by itself; in place.

    8-bit: bitsandbytes rounds the activations too, and takes those columns out in which ANY row has an outlier: rows
    of different slots would mix, and a step function would amplify the rounding that packing brings. So weights
    only, as bitsandbytes itself trains on a CPU. 4-bit: without the repacking that its CPU kernel for evaluation does
    in place, whose numbers are not those of training.
    """
    for module in model.modules():
        if is_8bit(_weight(module)):
            module.forward = partial(_weights_only, module)
        elif is_4bit(_weight(module)):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            module.support_avx512bf16_for_cpu = False


def dequantized(linear: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that a linear computes with, detached: (d_out, d_in), as stored where it is not quantized."""
    weight: Any = linear.weight
    if is_4bit(weight):
        from bitsandbytes.functional import dequantize_4bit

        full: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return full if dtype is None else full.to(dtype)
    if is_8bit(weight):
        # In this order as in bitsandbytes, so that the bits are the same.
        eight: Tensor = weight.data.to(dtype or torch.float32)
        return eight.mul_(_row_scales(linear).unsqueeze(1).mul(1.0 / 127.0))
    detached: Tensor = weight.detach()
    return detached if dtype is None else detached.to(dtype)


def held_bytes(model: Any) -> int:
    """Memory of the frozen parameters and the buffers, the scales of quantized weights among them."""
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in _held(model)}
    return sum(sizes.values())


def _held(model: Any) -> Iterator[Tensor]:
    yield from (parameter.data for parameter in model.parameters() if not parameter.requires_grad)
    yield from model.buffers()
    for module in model.modules():
        if is_8bit(_weight(module)):
            yield _row_scales(module)
        elif is_4bit(_weight(module)):
            state = module.weight.quant_state
            for level in (state, state.state2):
                if level is not None:
                    yield from (level.absmax, level.code)


def is_4bit(weight: Any) -> bool:
    return type(weight).__name__ == "Params4bit"


def is_8bit(weight: Any) -> bool:
    return type(weight).__name__ == "Int8Params"


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def _row_scales(linear: Any) -> Tensor:
    """(d_out,) largest magnitude of each row; they move from the weight to the layer when first used."""
    scales: Tensor = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    return scales


def _weights_only(linear: Any, x: Tensor) -> Tensor:
    y: Tensor = _WeightsOnly.apply(x, linear)  # type: ignore[no-untyped-call]
    return y


class _WeightsOnly(torch.autograd.Function):
    """y = x W^T + b with W made from 8 bits in either pass, so that no full copy of it lives in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return functional.linear(x, dequantized(linear, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ dequantized(ctx.linear, gradient.dtype), None
