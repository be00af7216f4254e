"""Attention of a bf16 base in fp32, where the processor has no bf16 instructions.

There torch's kernel takes a bf16 backward pass four times as long as an fp32 one (seen on AVX2, 64 to 256 tokens).
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IN_FP32 = "sdpa_in_fp32"
"""Among transformers' attention implementations."""


def widen(model: Any) -> None:
    """Makes a model that attends with torch's kernel (`sdpa`) do so in fp32; in place."""
    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(IN_FP32, _attend)
    AttentionMaskInterface.register(IN_FP32, sdpa_mask)
    model.set_attn_implementation(IN_FP32)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' own, of bf16 factors in fp32, rounded once to bf16."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    wide, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return wide.to(query.dtype), None
