"""What the configuration of a base says: its dtype, whether it is quantized, and which data it can read."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import cached_file

from lora_sweep.base import checkpoint_files, quant
from lora_sweep.base.source import Source, source, unreadable
from lora_sweep.config import ModelConfig
from lora_sweep.errors import ConfigError, Fault, UserError
from lora_sweep.system import files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def stored_quantization(config: Any) -> str | None:
    """The method by which a checkpoint's weights are quantized on disk."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    if isinstance(settings, str):
        return settings
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "bitsandbytes")


def read_config(model: ModelConfig, at: Source | None = None) -> Any:
    """transformers' configuration of the base (as it lies `at`), attention implementation and dtype set."""
    at = at or source(model)
    implementation: dict[str, Any] = {"attn_implementation": model.attn_implementation}
    if at.gguf_file is not None or at.trust_remote_code:
        # GGUF has none of these files, and whoever trusts the code trusts what stands beside it.
        config = AutoConfig.from_pretrained(at.name_or_path, **implementation, **at.arguments)
    else:
        with tempfile.TemporaryDirectory(prefix="lora-sweep-") as folder:
            heard = _heard_config(model, at)
            (Path(folder) / checkpoint_files.CONFIG).write_text(json.dumps(heard))
            config = AutoConfig.from_pretrained(folder, **implementation, trust_remote_code=False)
        config.name_or_path = at.name_or_path
    config.dtype = DTYPES[model.dtype] if model.dtype != "auto" else _own_dtype(config, at)
    return config


def _heard_config(model: ModelConfig, at: Source) -> dict[str, Any]:
    """Of a checkpoint's config.json what it may decide. Raises ConfigError, or what the hub's client raises."""
    if Path(at.name_or_path).is_dir():
        file = Path(at.name_or_path) / checkpoint_files.CONFIG
    else:
        file = Path(_from_hub(at, checkpoint_files.CONFIG, is_needed=True))
        if _from_hub(at, "adapter_config.json"):
            remedy = "merge it into its base first, or give that base"
            raise ConfigError([Fault("model.path", "is an adapter, no base", model.path, remedy)])
    try:
        heard = checkpoint_files.read_config(file)
        if checkpoint_files.needs_code(file) and heard.get("model_type") not in CONFIG_MAPPING:
            rule = f"cannot be read: its model type {heard.get('model_type')!r} needs code that lies beside it"
            remedy = "if you trust it: model.trust_remote_code=true on the command line"
            raise ConfigError([Fault("model.path", rule, model.path, remedy)])
        checkpoint_files.check_folder(file.parent)
    except files.Unsafe as error:
        clause = str(error) if str(error).startswith("its ") else f"its {file.name} {error}"
        raise ConfigError([Fault("model.path", f"cannot be read: {clause}", model.path)]) from error
    return heard


def _from_hub(at: Source, name: str, is_needed: bool = False) -> str:
    """Where the hub's cache keeps a file of a repository, downloaded if it is not there; empty where there is none."""
    file = cached_file(
        at.name_or_path,
        name,
        revision=at.revision,
        _raise_exceptions_for_missing_entries=is_needed,
        _raise_exceptions_for_connection_errors=is_needed,
    )
    return str(file or "")


def _own_dtype(config: Any, at: Source) -> torch.dtype:
    """The checkpoint's own where one can train on it.

    fp32 where none is declared (GGUF: its weights come out as such) or where it is narrower than 16 bits. bf16 for
    fp16: the same memory, and activations that overflow fp16 stay finite.
    """
    own: Any = None if at.gguf_file else config.dtype or config.get_text_config().dtype
    if own == torch.float16:
        return torch.bfloat16
    return next((dtype for dtype in DTYPES.values() if dtype == own), torch.float32)


def input_faults(path: str | None, config: Any, length: int, largest_id: int) -> list[Fault]:
    """Whether the base can read such data: rows of `length` tokens, ids up to `largest_id`.

    On a GPU either would end the process in the middle of a pass. Rotary positions never end, `beyond_training` warns.
    """
    text, faults = config.get_text_config(), []
    if largest_id >= text.vocab_size:
        rule = f"its tokenizer gives the id {largest_id}, its embedding ends at {text.vocab_size - 1}"
        remedy = "save the checkpoint after model.resize_token_embeddings(len(tokenizer))"
        faults.append(Fault("model.path", rule, path, remedy))
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and length > positions and not _is_rotary(text):
        rule = f"must be at most {positions // 8 * 8}: the base has {positions} positions, rows have up to {length}"
        faults.append(Fault("data.max_length", rule))
    return faults


def beyond_training(config: Any, length: int) -> str:
    """A line where rows are longer than the base has ever seen; empty where they are not."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or length <= positions or not _is_rotary(text):
        return ""
    return f"data.max_length: rows have up to {length} tokens, the base was made for {positions}"


def _is_rotary(text: Any) -> bool:
    return bool(getattr(text, "rope_parameters", None))


def quantization_faults(model: ModelConfig, config: Any) -> list[Fault]:
    key, stored = "model.quantization", stored_quantization(config)
    if stored not in (None, "bitsandbytes"):
        remedy = "take the checkpoint in full precision, and model.quantization=nf4 where memory is short"
        return [Fault("model.path", f"is quantized by {stored}; only bitsandbytes is supported", model.path, remedy)]
    if stored and model.quantization:
        return [Fault(key, "the checkpoint is quantized already", model.quantization, f"{key}=null")]
    if not stored and not model.quantization:
        return []
    if not quant.is_installed():
        return [Fault(key, "needs the extra `quant`", model.quantization or stored, quant.INSTALL)]
    if config.dtype == torch.float64:
        return [Fault(key, "computes in fp32 or bf16, not in fp64", model.quantization or stored, "model.dtype=bf16")]
    return []


def checked_config(model: ModelConfig, at: Source) -> Any:
    """`read_config`, or ConfigError where it cannot be read or not be quantized as asked."""
    with readable_errors(model, "cannot be loaded"):
        config = read_config(model, at)
    faults = quantization_faults(model, config)
    if faults:
        raise ConfigError(faults)
    return config


@contextmanager
def readable_errors(model: ModelConfig, rule: str) -> Iterator[None]:
    """ConfigError, in one line, for whatever is raised on files that cannot be understood.

    tokenizers raises a bare Exception on a file newer than itself, and configurations fail in the code of each model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError([unreadable(error, model, rule)]) from error
