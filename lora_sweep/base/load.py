"""Loading a base frozen, on its device, ready to be adapted."""

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_sweep.base import cpu_bf16, quant
from lora_sweep.base.base_config import checked_config, stored_quantization
from lora_sweep.base.kept import kept
from lora_sweep.base.skeleton import hollow
from lora_sweep.base.source import EMBEDDED
from lora_sweep.base.weights import located, read_frozen, read_tokenizer
from lora_sweep.config import ModelConfig


@dataclass(frozen=True)
class LoadedBase:
    """A frozen causal language model, ready to be adapted."""

    model: Any
    """transformers' PreTrainedModel in eval mode, no parameter requiring a gradient."""
    tokenizer: Any
    name_or_path: str
    """What an adapter names so that PEFT alone finds this base again: hub id or absolute folder."""
    revision: str | None
    dtype: torch.dtype
    """Of the weights, and of what is computed with quantized ones."""

    @property
    def bytes(self) -> int:
        """Memory that the base really holds: frozen parameters, buffers and the scales of quantized weights."""
        return quant.held_bytes(self.model)

    @property
    def parameters(self) -> int:
        """Weights, tied ones once, quantized ones as many as they stand for."""
        return int(self.model.num_parameters())

    def skeleton(self) -> Any:
        """`skeleton` of this base, from its own class, each weight in the dtype in which PEFT draws its initial A.

        That is the weight's own, of a 4-bit weight the one it computes in; with 8-bit weights A stays in fp32.
        """
        with torch.device("meta"):
            shape = type(self.model)(self.model.config)
        named = self.model.named_parameters(remove_duplicate=False)
        return hollow(shape, {name: self.dtype if quant.is_4bit(each) else each.dtype for name, each in named})


def load(model: ModelConfig, device: torch.device, keep_in: Path | None = None) -> LoadedBase:
    """Loads the base frozen, in eval mode.

    >>> base = load(sweep.base().model, torch.device("cpu"))
    >>> base.parameters, base.dtype
    (922752, torch.float32)

    A base that is reachable by no name (embedded, GGUF) is written once, un-quantized, as safetensors to `keep_in`, so
    that an adapter's `base_model_name_or_path` loads it. Raises ConfigError where it cannot be read.
    """
    at = located(model)
    name, revision = at.name_or_path, at.revision
    with ExitStack() as stack:
        if keep_in is not None and (at.gguf_file is not None or str(model.path).startswith(EMBEDDED)):
            at = kept(model, at, keep_in)
            name = at.name_or_path
        elif at.gguf_file is not None and model.quantization:
            # Only what is read from safetensors can be quantized on the way.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-sweep-"))
            at = kept(model, at, Path(folder))
        config = checked_config(model, at)
        tokens = read_tokenizer(model, at)
        placed: dict[str, Any] = {}
        if model.quantization:
            placed["quantization_config"] = quant.settings(model.quantization, config.dtype)
        if model.quantization or stored_quantization(config):
            # A quantized model is made on its device and not moved.
            placed["device_map"] = {"": str(device)}
        loaded = read_frozen(model, at, config, **placed)
    if placed:
        quant.patch_linears(loaded, config.dtype)
    else:
        loaded = loaded.to(device)
    cpu_bf16.patch_linears(loaded, device)
    return LoadedBase(loaded, tokens, name, revision, config.dtype)


def tokenizer(model: ModelConfig) -> Any:
    """The base's tokenizer alone; no weights are read. Raises ConfigError."""
    return read_tokenizer(model, located(model))
