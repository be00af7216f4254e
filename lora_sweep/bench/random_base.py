"""A base of given dimensions with random weights, and random tokens to train it on: speed without a checkpoint."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_sweep.base.base_config import DTYPES
from lora_sweep.base.load import LoadedBase
from lora_sweep.config import DataConfig, ModelConfig
from lora_sweep.data import Data, TokenSet
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.sweep.compose import nearest

FIELD = "--random"
EXAMPLES = 256


@dataclass(frozen=True)
class Dimensions:
    """Of a Llama, its embeddings not tied."""

    width: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int = 0
    """0: as many as heads."""
    ffn: int = 0
    """Width inside an MLP; 0: 8/3 of the width, in steps of 64."""

    @classmethod
    def parse(cls, text: str) -> "Dimensions":
        """From `width=576,layers=8,heads=9,vocab=1024`. Raises ConfigError."""
        names = [field.name for field in fields(cls)]
        faults, given = [], {}
        for part in text.split(","):
            key, _, value = (word.strip() for word in part.partition("="))
            if key not in names:
                faults.append(
                    Fault(FIELD, "unknown dimension", key, nearest(key, names) or f"known: {', '.join(names)}")
                )
            elif not value.isdecimal() or int(value) < 1:
                faults.append(Fault(FIELD, f"{key} must be a whole number of at least 1", value))
            else:
                given[key] = int(value)
        absent = [key for key in names[:4] if key not in given]
        if absent and not faults:
            faults.append(Fault(FIELD, f"needs {', '.join(absent)}", text, "width=576,layers=8,heads=9,vocab=1024"))
        if faults:
            raise ConfigError(faults)
        dimensions = cls(**given)
        if dimensions.width % dimensions.heads or dimensions.width // dimensions.heads % 2:
            faults.append(Fault(FIELD, f"width must be an even multiple of heads={dimensions.heads}", dimensions.width))
        if dimensions.kv_heads and dimensions.heads % dimensions.kv_heads:
            faults.append(Fault(FIELD, f"kv_heads must divide heads={dimensions.heads}", dimensions.kv_heads))
        if faults:
            raise ConfigError(faults)
        return dimensions

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{key}={value}" for key, value in given.items() if value)


def load(dimensions: Dimensions, model: ModelConfig, data: DataConfig, device: torch.device) -> LoadedBase:
    """The base, drawn from data.seed on `device`, in model.dtype (auto: fp32)."""
    dtype = DTYPES["fp32" if model.dtype == "auto" else model.dtype]
    config = LlamaConfig(
        hidden_size=dimensions.width,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads or dimensions.heads,
        intermediate_size=dimensions.ffn or -(-dimensions.width * 8 // 3 // 64) * 64,
        vocab_size=dimensions.vocab,
        max_position_embeddings=max(2048, data.max_length),
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(data.seed)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=model.attn_implementation)
    base.requires_grad_(False)
    return LoadedBase(base.eval(), None, f"random:{dimensions}", None, dtype)


def tokens(dimensions: Dimensions, data: DataConfig) -> Data:
    """Examples of data.max_length tokens each, all counted.

    data.subjects of them (null: 256) to train on, data.eval_size (null: as many) and data.probe_size to evaluate on.
    """
    drawn = np.random.default_rng(data.seed)

    def part(examples: int) -> TokenSet:
        ids = drawn.integers(0, dimensions.vocab, (examples, data.max_length), dtype=np.int32)
        return TokenSet.of([(row, np.arange(len(row)) > 0) for row in ids])

    train = part(data.subjects or EXAMPLES)
    probe = train.take(np.arange(min(data.probe_size, train.examples)))
    return Data(train, part(data.eval_size or train.examples), probe)
