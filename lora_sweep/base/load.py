"""The base: where it lies, whether it fits, and loading it frozen."""

import hashlib
import json
import logging
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from lora_sweep.base import checkpoint_files, quant
from lora_sweep.base import cpu_bf16 as frozen
from lora_sweep.base.source import (
    EMBEDDED,
    UNREADABLE,
    Source,
    path_faults,
    size_faults,
    source,
    unreadable,
    weight_faults,
)
from lora_sweep.config import ModelConfig
from lora_sweep.errors import ConfigError, Fault, UserError
from lora_sweep.system import files
from lora_sweep.system.bounds import PATTERN_BYTES, PATTERN_SECONDS, BoundExceeded, bounded
from lora_sweep.system.disk import disk_errors

_log = logging.getLogger(__name__)

SKELETON_SECONDS, SKELETON_BYTES = 30.0, 2**32
"""Most that building the modules of a base without its weights may take; 126 layers take 2 s."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


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
    """Of the weights, and of what is computed with quantised ones."""

    @property
    def bytes(self) -> int:
        """Memory that the base really holds: frozen parameters, buffers and the scales of quantised weights."""
        return quant.held_bytes(self.model)

    @property
    def parameters(self) -> int:
        """Weights, tied ones once, quantised ones as many as they stand for."""
        return int(self.model.num_parameters())

    def skeleton(self) -> Any:
        """`skeleton` of this base, from its own class, each weight in the dtype in which PEFT draws its initial A.

        That is the weight's own, of a 4-bit weight the one it computes in; with 8-bit weights A stays in fp32.
        """
        with torch.device("meta"):
            shape = type(self.model)(self.model.config)
        named = self.model.named_parameters(remove_duplicate=False)
        return _hollow(shape, {name: self.dtype if quant.is_4bit(each) else each.dtype for name, each in named})


def check(model: ModelConfig, target_modules: Any) -> list[Fault]:
    """Whether the base can be read and quantised and the target modules exist in it; loads no weights."""
    faults = path_faults(model)
    if faults:
        return faults
    try:
        with _readable_errors(model, "cannot be read"):
            config = read_config(model)
            faults = _quantisation_faults(model, config) or weight_faults(source(model), model.path)
            if faults:
                return faults
            with bounded(SKELETON_SECONDS, SKELETON_BYTES):
                shape = skeleton(config, source(model))
            faults = size_faults(source(model), shape, model.path)
    except ConfigError as error:
        return list(error.faults)
    return faults or target_faults(shape, target_modules)


def _quantisation_faults(model: ModelConfig, config: Any) -> list[Fault]:
    key, stored = "model.quantization", stored_quantisation(config)
    if stored not in (None, "bitsandbytes"):
        remedy = "take the checkpoint in full precision, and model.quantization=nf4 where memory is short"
        return [Fault("model.path", f"is quantised by {stored}; only bitsandbytes is supported", model.path, remedy)]
    if stored and model.quantization:
        return [Fault(key, "the checkpoint is quantised already", model.quantization, f"{key}=null")]
    if not stored and not model.quantization:
        return []
    if not quant.is_installed():
        return [Fault(key, "needs the extra `quant`", model.quantization or stored, quant.INSTALL)]
    if config.dtype == torch.float64:
        return [Fault(key, "computes in fp32 or bf16, not in fp64", model.quantization or stored, "model.dtype=bf16")]
    return []


def stored_quantisation(config: Any) -> str | None:
    """The method by which a checkpoint's weights are quantised on disk."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    if isinstance(found, str):
        return found
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
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
    found = cached_file(
        at.name_or_path,
        name,
        revision=at.revision,
        _raise_exceptions_for_missing_entries=is_needed,
        _raise_exceptions_for_connection_errors=is_needed,
    )
    return str(found or "")


def _own_dtype(config: Any, at: Source) -> torch.dtype:
    """The checkpoint's own where one can train on it.

    fp32 where none is declared (GGUF: its weights come out as such) or where it is narrower than 16 bits. bf16 for
    fp16: the same memory, and activations that overflow fp16 stay finite.
    """
    own: Any = None if at.gguf_file else config.dtype or config.get_text_config().dtype
    if own == torch.float16:
        return torch.bfloat16
    return next((known for known in DTYPES.values() if known == own), torch.float32)


def input_faults(path: str | None, config: Any, length: int, largest_id: int) -> list[Fault]:
    """Whether the base can read such data: rows of `length` tokens, ids up to `largest_id`.

    On a GPU either would end the process in the middle of a pass. Rotary positions never end, `beyond_training` tells.
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


def target_faults(shape: Any, target_modules: Any) -> list[Fault]:
    key = "method.target_modules"
    if isinstance(target_modules, str):
        wanted: str | list[str] = target_modules
    elif isinstance(target_modules, list) and target_modules and all(isinstance(name, str) for name in target_modules):
        wanted = target_modules
    else:
        return [Fault(key, "must be `all-linear`, a list of module names or a regular expression", target_modules)]
    known = [name for name, module in shape.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    tails = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in known))
    faults = []
    for one in [wanted] if isinstance(wanted, str) else [[name] for name in wanted]:
        if one == "all-linear":
            continue
        settings = LoraConfig(target_modules=one)
        try:
            with bounded(PATTERN_SECONDS, PATTERN_BYTES):
                hit = [name for name, _ in shape.named_modules() if name and check_target_module_exists(settings, name)]
        except re.error as error:
            faults.append(Fault(key, f"is no regular expression: {error}", one))
            continue
        except BoundExceeded as error:
            faults.append(Fault(key, f"{error} to match the modules of the base", one))
            continue
        if not hit:
            faults.append(
                Fault(
                    key,
                    "matches no module of the base",
                    one if isinstance(one, str) else one[0],
                    f"linears are {tails}",
                )
            )
        elif not set(hit) <= set(known):
            other = sorted(set(hit) - set(known))[0]
            faults.append(Fault(key, f"matches {other}, which is no linear layer", one, f"linears are {tails}"))
    return faults


def skeleton(config: Any, at: Source | None = None) -> Any:
    """The base's modules without its memory: every parameter is one zero, expanded to its shape.

    PEFT adapts it like the base itself: it draws the same initial A and saves the same format. Code that lies beside
    a checkpoint is asked for its modules only where `at` trusts it.
    """
    code: dict[str, Any] = {"trust_remote_code": at is not None and at.trust_remote_code}
    if at is not None and at.revision and at.trust_remote_code:
        code["code_revision"] = at.revision
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, **code)
    return _hollow(model, {})


def _hollow(model: Any, dtypes: dict[str, torch.dtype]) -> Any:
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = dtypes.get(f"{prefix}.{name}" if prefix else name, parameter.dtype)
            zero = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))
    return model


@contextmanager
def _readable_errors(model: ModelConfig, rule: str) -> Iterator[None]:
    """ConfigError, in one line, for whatever is raised on files that cannot be understood.

    tokenizers raises a bare Exception on a file newer than itself, and configurations fail in the code of each model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError([unreadable(error, model, rule)]) from error


def tokenizer(model: ModelConfig) -> Any:
    """The base's tokenizer alone; no weights are read. Raises ConfigError."""
    return _tokenizer(model, _located(model))


def _located(model: ModelConfig) -> Source:
    """`source`, or ConfigError where nothing lies there."""
    faults = path_faults(model)
    if faults:
        raise ConfigError(faults)
    return source(model)


def _tokenizer(model: ModelConfig, at: Source) -> Any:
    with _readable_errors(model, "its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(at.name_or_path, **at.arguments)


def load(model: ModelConfig, device: torch.device, keep_in: Path | None = None) -> LoadedBase:
    """Loads the base frozen, in eval mode.

    A base that is reachable by no name (embedded, GGUF) is written once, un-quantised, as safetensors to `keep_in`, so
    that an adapter's `base_model_name_or_path` loads it. Raises ConfigError where it cannot be read.
    """
    at = _located(model)
    name, revision = at.name_or_path, at.revision
    with ExitStack() as stack:
        if keep_in is not None and (at.gguf_file is not None or str(model.path).startswith(EMBEDDED)):
            at = _kept(model, at, keep_in)
            name = at.name_or_path
        elif at.gguf_file is not None and model.quantization:
            # Only what is read from safetensors can be quantised on the way.
            aside = stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-sweep-"))
            at = _kept(model, at, Path(aside))
        config = _config(model, at)
        tokens = _tokenizer(model, at)
        placed: dict[str, Any] = {}
        if model.quantization:
            placed["quantization_config"] = quant.settings(model.quantization, config.dtype)
        if model.quantization or stored_quantisation(config):
            # A quantised model is made on its device and not moved.
            placed["device_map"] = {"": str(device)}
        loaded = _read(model, at, config, **placed)
    if placed:
        quant.patch_linears(loaded, config.dtype)
    else:
        loaded = loaded.to(device)
    frozen.patch_linears(loaded, device)
    return LoadedBase(loaded, tokens, name, revision, config.dtype)


def weights(path: str) -> Any:
    """The base at `path` (as `model.path`) on the CPU for its weights alone: frozen, no tokenizer asked for.

    Raises ConfigError where it cannot be read.
    """
    model = ModelConfig("inspect", path, None, "auto", None, "eager", False)
    at = _located(model)
    config = _config(model, at)
    return _read(model, at, config, **({"device_map": {"": "cpu"}} if stored_quantisation(config) else {}))


def weight_of(base: Any, name: str) -> torch.Tensor | None:
    """(d_out, d_in) weight of a module, PEFT's orientation for its lora_B lora_A; None where there is no such module.

    A convolution's kernel is flattened, an embedding is (dimension, vocabulary), quantised weights are de-quantised.
    """
    try:
        module = base.get_submodule(name)
    except AttributeError:
        return None
    if not isinstance(getattr(module, "weight", None), torch.Tensor):
        return None
    weight = quant.dequantised(module)
    return weight.T if isinstance(module, Conv1D | nn.Embedding) else weight.flatten(1) if weight.ndim > 1 else None


def _config(model: ModelConfig, at: Source) -> Any:
    """`read_config`, or ConfigError where it cannot be read or not be quantised as asked."""
    with _readable_errors(model, "cannot be loaded"):
        config = read_config(model, at)
    faults = _quantisation_faults(model, config)
    if faults:
        raise ConfigError(faults)
    return config


def _read(model: ModelConfig, at: Source, config: Any, **placed: Any) -> Any:
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
        # Its weights were de-quantised on loading; what still says otherwise keeps them from being saved.
        loaded.hf_quantizer = None
        vars(loaded.config).pop("quantization_config", None)
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded


ORIGIN = "origin.json"
"""Which base a kept folder was made from, and the sha256 of each of its files."""


def _kept(model: ModelConfig, at: Source, root: Path) -> Source:
    """The base as safetensors under root/base; a further one of the same study lies in a folder beside it.

    Written when first asked for, and anew where its files are not what was written; a folder appears whole or not at
    all. Raises StudyError or StorageUnavailable where it cannot be written.
    """
    origin = {"path": model.path, "dtype": model.dtype}
    mark = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:8]
    with disk_errors(root):
        for folder in (root / "base", root / f"base-{mark}"):
            found = _origin(folder)
            if found.items() >= origin.items() and _is_as_written(folder, found):
                return Source(str(folder.resolve()))
            if not folder.exists():
                _write(model, at, folder, origin)
                return Source(str(folder.resolve()))
            if not found or found.items() >= origin.items():
                damaged = folder.with_name(f"damaged-{folder.name}-{secrets.token_hex(4)}")
                folder.rename(damaged)
                _log.warning("%s: is not the base that was written; moved to %s and written anew", folder, damaged.name)
                _write(model, at, folder, origin)
                return Source(str(folder.resolve()))
    raise UserError(f"{folder}: holds no base that this study kept; move it away")


def _origin(folder: Path) -> dict[str, Any]:
    """Empty where there is none to be read."""
    try:
        origin = files.read_json(folder / ORIGIN, follow=False)
    except (OSError, files.Unsafe):
        return {}
    return origin if isinstance(origin, dict) else {}


def _is_as_written(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether the files are those that were written; older versions noted no digests."""
    try:
        return all(_digest(folder / name) == each for name, each in origin.get("files", {}).items())
    except (OSError, files.Unsafe, AttributeError):
        return False


def _digest(file: Path) -> str:
    with files.open_file(file, follow=False) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write(model: ModelConfig, at: Source, folder: Path, origin: dict[str, Any]) -> None:
    config, tokens = _config(model, at), _tokenizer(model, at)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = files.staging(folder)
    staging.mkdir()
    try:
        try:
            _read(model, at, config).save_pretrained(staging)
            tokens.save_pretrained(staging)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        digests = {file.name: _digest(file) for file in sorted(staging.iterdir()) if file.is_file()}
        (staging / ORIGIN).write_text(json.dumps({**origin, "files": digests}, indent=2))
        files.share(staging)
        try:
            staging.rename(folder)
        except OSError:
            # Another worker may have been faster.
            if not (folder / ORIGIN).is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
