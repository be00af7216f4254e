"""PEFT folders: anyone's LoRA, loaded by PEFT or read without a model."""

import math
import pickle
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_sweep.adapters import keys as adapter_keys
from lora_sweep.adapters.keys import Key
from lora_sweep.adapters.peft_template import peft_chatter_off
from lora_sweep.errors import UserError
from lora_sweep.system import files
from lora_sweep.system.bounds import PATTERN_BYTES, PATTERN_SECONDS, BoundExceeded, bounded
from lora_sweep.system.out_of_memory import is_out_of_memory

MAX_CONFIG_BYTES, MAX_PATTERNS = 2**22, 10_000
"""Of an adapter_config.json, and of the entries of its rank_pattern and alpha_pattern."""

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def refuse_pickles(folder: Path) -> None:
    """Raises UserError unless the folder is a PEFT adapter whose weights are safetensors."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds no {CONFIG}, so it is no PEFT adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / PICKLE).is_file()
        why = "its weights are a pickle, which can run code" if pickled else f"{WEIGHTS} is missing"
        raise UserError(f"{folder}: refused, {why}")


def load(model: Any, folder: Path) -> PeftModel:
    """PEFT's own model around `model`; safetensors only. Raises UserError."""
    refuse_pickles(folder)
    try:
        with peft_chatter_off():
            return PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: PEFT cannot load it: {_one_line(error)}") from error


@dataclass(frozen=True)
class Factors:
    """The LoRA of one module, as saved."""

    A: Tensor
    """(r, d_in); d_in is the vocabulary of an embedding, channels times kernel of a convolution."""
    B: Tensor
    """(d_out, r)."""
    scaling: float
    """s of W + s B A, as PEFT derives it from its configuration."""
    is_embedding: bool = False
    bias: Tensor | None = None
    """(d_out,) of lora_B, where `lora_bias` asked for one."""
    magnitude: Tensor | None = None
    """(d_out,) of DoRA."""


@dataclass(frozen=True)
class Unloaded:
    """Tensors of the file that PEFT passes over."""

    why: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """One adapter as it lies in its folder."""

    folder: Path
    config: Any
    """peft.LoraConfig."""
    factors: Mapping[str, Factors]
    """Module name in the base -> its LoRA, in the file's order."""
    extras: Mapping[str, Tensor]
    """Parameter name in the base -> what was saved whole: modules_to_save, biases, token rows, base embeddings."""
    bytes: int
    """Of the weights file."""
    notes: tuple[str, ...] = ()
    """What PEFT had to say about the configuration."""
    misnamed: tuple[Key, ...] = ()
    """Tensors that PEFT does not load for their names."""
    unasked: tuple[Unloaded, ...] = ()
    """Tensors that PEFT does not load for the configuration."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Name in the file -> shape, of all tensors."""


FOREIGN = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "target_parameters")
"""Fields of LoraConfig under which a module's update is not s B A."""


def find(folder: Path) -> list[Path]:
    """The adapters in a folder: its own and, as PEFT saves named ones, those of its sub-folders. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: must be a folder that PEFT saved{', got a file' if folder.exists() else ''}")
    folders = [each for each in (folder, *sorted(folder.iterdir())) if (each / CONFIG).is_file()]
    if not folders:
        raise UserError(f"{folder}: holds no {CONFIG}, nor does a sub-folder, so it is no PEFT adapter")
    return folders


def read(folder: Path, allow_pickle: bool = False) -> Saved:
    """Reads a LoRA adapter that PEFT saved, wherever it comes from; needs no model and runs no code.

    Raises UserError where a file is missing, broken, refused or no LoRA, or where weights and configuration disagree.

    Args:
        allow_pickle: where there are no safetensors, adapter_model.bin is read by torch.load(weights_only=True).
    """
    config, notes = _config(folder)
    if not (allow_pickle and (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file()):
        try:
            refuse_pickles(folder)
        except UserError as error:
            remedy = " (if you trust it: --allow-pickle)" if (folder / PICKLE).is_file() else ""
            raise UserError(f"{error}{remedy}") from None
    tensors, size = _tensors(folder)
    _check_patterns(folder / CONFIG, config, {key.target for key in map(adapter_keys.parse, tensors) if key.target})
    factors, extras, misnamed, unasked = _split(folder, tensors, config)
    named = [key for key in map(adapter_keys.parse, tensors) if key.has_adapter_name]
    if named:
        notes += (
            f"{len(named)} tensors carry the adapter's name, such as {named[0].name}: PEFT from 0.21 on loads them as "
            f"adapter {adapter_keys.ADAPTER!r} alone, older versions load none; {named[0].saved_as} loads everywhere",
        )
    notes += _ambiguous(config, factors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Saved(folder, config, factors, extras, size, notes, misnamed, unasked, shapes)


def lost(folder: Path, weights: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    """Modules whose A (r, d_in) or B (d_out, r) in memory is not what the folder's file holds, bit for bit."""
    saved = read(folder).factors
    return tuple(
        name
        for name, (A, B) in weights.items()
        if name not in saved
        or not (torch.equal(saved[name].A, A.detach().cpu()) and torch.equal(saved[name].B, B.detach().cpu()))
    )


def _ambiguous(config: Any, modules: Iterable[str]) -> tuple[str, ...]:
    """PEFT takes the first pattern that matches, but saves them sorted: two that match may have changed places."""
    keys = list(config.alpha_pattern)
    for module in modules:
        first = get_pattern_key(keys, module)
        second = get_pattern_key([key for key in keys if key != first], module)
        if second in keys and config.alpha_pattern[first] != config.alpha_pattern[second]:
            return (
                f"alpha_pattern {first!r} and {second!r} both match {module}: s here is that of the saved order, as "
                "PEFT loads it; saving sorts them, so it may have been trained with the other",
            )
    return ()


def _config(folder: Path) -> tuple[Any, tuple[str, ...]]:
    file = folder / CONFIG
    try:
        plain = files.read_json(file, MAX_CONFIG_BYTES)
    except (OSError, files.Unsafe) as error:
        raise UserError(f"{file}: cannot be read as JSON: {_one_line(error)}") from error
    kind = plain.get("peft_type") if isinstance(plain, dict) else None
    if kind is None:
        raise UserError(f"{file}: names no peft_type, so it is no PEFT adapter")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type must be LORA, got {kind!r}; no other kind is read")
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(folder))
        for field in ("rank_pattern", "alpha_pattern"):
            # PEFT fails later, and on its own line, on what is no mapping or no expression.
            keys = getattr(config, field).keys()
            if len(keys) > MAX_PATTERNS:
                raise ValueError(f"{field} must have at most {MAX_PATTERNS:,} entries, got {len(keys):,}")
            get_pattern_key(keys, "")
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, re.error) as error:
        raise UserError(f"{file}: PEFT cannot read it: {_one_line(error)}") from error
    foreign = [field for field in FOREIGN if getattr(config, field, None)]
    if foreign:
        raise UserError(f"{file}: {foreign[0]} is set; under it the update is not s B A, which alone is read")
    return config, tuple(_one_line(each.message) for each in warned)


UNREADABLE = (
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
)
"""What safetensors and torch raise on a file that they cannot read."""


def _check_patterns(file: Path, config: Any, modules: Iterable[str]) -> None:
    """Raises UserError where a pattern takes too long for the names of the modules, which PEFT would wait for."""
    names = list(modules)
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        patterns: Any = getattr(config, key, None)
        is_suffix = key.endswith("_pattern")
        for pattern in list(patterns) if is_suffix else [patterns] if isinstance(patterns, str) else []:
            where = f"{file}: {key} {pattern[:200]!r}"
            try:
                with bounded(PATTERN_SECONDS, PATTERN_BYTES):
                    for name in names:
                        get_pattern_key([pattern], name) if is_suffix else re.fullmatch(pattern, name)
            except BoundExceeded as error:
                raise UserError(f"{where} {error} to match the names of the modules") from error
            except re.error as error:
                raise UserError(f"{where} is no regular expression: {error}") from error


def _tensors(folder: Path) -> tuple[dict[str, Tensor], int]:
    file = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLE
    try:
        with files.open_file(file) as opened:
            if opened.read(8) == b"version ":
                raise UserError(f"{file}: is a pointer of git-lfs, not the weights (git lfs pull)")
        if file.name == WEIGHTS:
            tensors: Any = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
                tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (*UNREADABLE, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{file}: there is not enough memory to read it; free some") from error
        by = "" if file.name == WEIGHTS else "by torch.load(weights_only=True) "
        raise UserError(f"{file}: cannot be read {by}(truncated or damaged?): {_one_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise UserError(f"{file}: must hold named tensors and nothing else")
    return tensors, file.stat().st_size


def _split(
    folder: Path, tensors: dict[str, Tensor], config: Any
) -> tuple[dict[str, Factors], dict[str, Tensor], tuple[Key, ...], tuple[Unloaded, ...]]:
    """(LoRA by module, what is saved whole by parameter, what PEFT passes over: by name, by configuration)."""
    parts: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    extras: dict[str, Tensor] = {}
    misnamed: list[Key] = []
    unasked: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        key = adapter_keys.parse(name)
        if not key.loads:
            misnamed.append(key)
        elif key.part is None:
            extras[key.target] = tensor
        elif (reason := _unasked(key, config)) is not None:
            unasked.setdefault(reason, []).append(name)
        else:
            parts.setdefault(key.target, {})[key.part] = tensor
            if key.is_embedding:
                embeddings.add(key.target)
    torn = [key for key in misnamed if key.is_lora and not {"A", "B"} <= parts.get(key.target, {"A": 0, "B": 0}).keys()]
    if torn:
        raise UserError(f"{folder}: {torn[0].target}: has half a LoRA: {adapter_keys.passed_over(torn)}")
    factors = {
        module: _factors(f"{folder}: {module}", module, by_part, config, module in embeddings)
        for module, by_part in parts.items()
    }
    return factors, extras, tuple(misnamed), tuple(Unloaded(why, tuple(names)) for why, names in unasked.items())


def _unasked(key: Key, config: Any) -> str | None:
    """Why PEFT has no place for a tensor under this configuration, or None where it has."""
    if key.part == "magnitude" and not config.use_dora:
        return "use_dora is false"
    if key.part == "bias" and not config.lora_bias:
        return "lora_bias is false"
    # A tied module is adapted though nothing names it, and all-linear names what only the base can tell.
    if config.ensure_weight_tying or not names_targets(config) or check_target_module_exists(config, key.target):
        return None
    return "target_modules (less exclude_modules, in layers_to_transform) does not name their modules"


def names_targets(config: Any) -> bool:
    """Whether target_modules names modules; else PEFT takes those of the base's kind."""
    targets = config.target_modules
    return bool(targets) and not (isinstance(targets, str) and targets.lower() == "all-linear")


def _factors(where: str, module: str, tensors: dict[str, Tensor], config: Any, is_embedding: bool) -> Factors:
    for part in "AB":
        if part not in tensors:
            raise UserError(f"{where}: has no lora_{part}")
        if tensors[part].ndim < 2 or not tensors[part].numel():
            shape = tuple(tensors[part].shape)
            why = "as when sharded weights are saved without being gathered"
            raise UserError(f"{where}: lora_{part} must be a matrix, got the shape {shape} ({why})")
    A, B = tensors["A"].flatten(1), tensors["B"].flatten(1)
    rank, alpha = (
        pattern.get(get_pattern_key(pattern.keys(), module), default)
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    if not A.shape[0] == B.shape[1] == rank:
        raise UserError(f"{where}: rank must be {rank!r} as {CONFIG} says, got A {tuple(A.shape)}, B {tuple(B.shape)}")
    # Python reads NaN, Infinity and whole numbers of any size from JSON.
    if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise UserError(f"{where}: lora_alpha must be a finite number, got {str(alpha)[:40]!r}")
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    magnitude = tensors.get("magnitude")
    for part, each in (("lora_magnitude_vector", magnitude), ("lora_B.bias", tensors.get("bias"))):
        if each is not None and each.numel() != B.shape[0]:
            raise UserError(f"{where}: {part} must have {B.shape[0]} elements, got {each.numel()}")
    return Factors(A, B, scaling, is_embedding, tensors.get("bias"), None if magnitude is None else magnitude.flatten())


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
