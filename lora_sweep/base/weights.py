"""Weights and tokenizer of a base as they lie on disk."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_sweep.base import quant
from lora_sweep.base.base_config import checked_config, readable_errors, stored_quantization
from lora_sweep.base.source import UNREADABLE, Source, path_faults, source, unreadable
from lora_sweep.config import ModelConfig
from lora_sweep.errors import ConfigError, Fault


def located(model: ModelConfig) -> Source:
    """`source`, or ConfigError where nothing lies there."""
    faults = path_faults(model)
    if faults:
        raise ConfigError(faults)
    return source(model)


def read_tokenizer(model: ModelConfig, at: Source) -> Any:
    with readable_errors(model, "its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(at.name_or_path, **at.arguments)


def read_frozen(model: ModelConfig, at: Source, config: Any, **placed: Any) -> Any:
    """transformers' model with all its weights from the checkpoint, frozen, in eval mode. Raises UserError."""
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            at.name_or_path,
            dtype=config.dtype,
            attn_implementation=model.attn_implementation,
            # Not read from the folder again: there it says more than it may.
            **({} if at.gguf_file or at.trust_remote_code else {"config": config}),
            use_safetensors=None if at.gguf_file else True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **at.arguments,
            **placed,
        )
    except (*UNREADABLE, RecursionError) as error:
        raise ConfigError([unreadable(error, model, "cannot be loaded")]) from error
    # transformers would draw these at random, and only say so in its log.
    absent = sorted(info["missing_keys"])
    misfits = sorted(str(each[0]) for each in info["mismatched_keys"])
    for names, rule in ((absent, "are missing"), (misfits, "have another shape than its config.json says")):
        if names:
            raise ConfigError([Fault("model.path", f"{len(names)} weights {rule}, {names[0]} among them", model.path)])
    if at.gguf_file is not None:
        # Its weights were de-quantized on loading; what still says otherwise keeps them from being saved.
        loaded.hf_quantizer = None
        vars(loaded.config).pop("quantization_config", None)
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded


def weights(path: str) -> Any:
    """The base at `path` (as `model.path`) on the CPU for its weights alone: frozen, no tokenizer asked for.

    Raises ConfigError where it cannot be read.
    """
    model = ModelConfig("inspect", path, None, "auto", None, "eager", False)
    at = located(model)
    config = checked_config(model, at)
    return read_frozen(model, at, config, **({"device_map": {"": "cpu"}} if stored_quantization(config) else {}))


def weight_of(base: Any, name: str) -> torch.Tensor | None:
    """(d_out, d_in) weight of a module, PEFT's orientation for its lora_B lora_A; None where there is no such module.

    A convolution's kernel is flattened, an embedding is (dimension, vocabulary), quantized weights are de-quantized.
    """
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return None
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    weight = quant.dequantized(module)
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.flatten(1) if weight.ndim > 1 else None
