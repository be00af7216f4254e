"""The files beside a checkpoint's weights: read within bounds, and heard in what they may decide.

A config.json may give sizes and names of known parts. What makes transformers fetch a kernel, run code or open a file
elsewhere is dropped before transformers sees it: `_attn_implementation: org/kernel` and its like.
"""

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lora_sweep.system import files
from lora_sweep.system.files import Unsafe

CONFIG, INDEX = "config.json", "model.safetensors.index.json"

MAX_CONFIG_BYTES = 2**24
"""Of a config.json and each of SMALL; the largest known, a tokenizer_config.json, has a quarter of it."""
MAX_TOKENIZER_BYTES = 2**28
"""Of a tokenizer.json; the largest known has an eighth of it."""
SMALL = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", INDEX,
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""JSON files that transformers reads as a whole where they lie beside a checkpoint."""
LARGE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "tokenizer.model")
"""Others that it reads."""

EXECUTION = frozenset(
    {
        "attn_implementation", "experts_implementation", "use_kernels", "kernel_config", "allow_all_kernels",
        "auto_map", "custom_pipelines", "custom_generate", "name_or_path", "base_model_name_or_path",
        "transformers_weights",
        "gguf_file", "tp_plan", "base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "distributed_config",
        "trust_remote_code", "code_revision", "adapter_kwargs", "subfolder", "cache_dir", "proxies", "token",
    }
)  # fmt: skip
"""Keys that say how a model is run or where it lies, not what it is; so do all that begin with an underscore."""

_ELSEWHERE = re.compile(r"[/\\:\x00-\x1f]")
"""What the name of a part never holds, and a path, an address or the id of a repository does."""

MAX_LAYERS = 1024
"""Of a base: each is built as modules before any weight is read. The deepest known has 126."""
MAX_WIDTH = 2**20
"""Of a hidden state, a projection or a number of heads or experts."""
MAX_COUNT = 2**40
"""Of any other whole number: positions, ids, vocabularies."""
_LAYERS = re.compile(r"(?:num|n)_(?:\w+_)?layers?|num_(?:\w+_)?blocks?|n_layer|num_hidden_groups")
_WIDTHS = re.compile(
    r"(?!vocab)\w*(?:hidden|intermediate|inner|ffn|embd|embedding|d_model|head|kv|state|conv|rank|channel|expert)\w*"
    r"(?:size|dim|dims|width|heads|experts|channels|rank|kernel)?|dim|d_\w+"
)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json in what it may decide. Raises Unsafe, one clause, where it cannot be read or is out of bounds."""
    plain = files.read_json(file, MAX_CONFIG_BYTES)
    if not isinstance(plain, dict):
        raise Unsafe("holds no object")
    _check_sizes(plain, "")
    heard: dict[str, Any] = _heard(plain)
    return heard


def needs_code(file: Path) -> bool:
    """Whether a config.json names code that lies beside it. Raises as `read_config`."""
    plain = files.read_json(file, MAX_CONFIG_BYTES)
    return isinstance(plain, dict) and bool(plain.get("auto_map"))


def check_folder(folder: Path) -> None:
    """Raises Unsafe, one clause that names the file, where one that transformers reads is out of bounds or no file."""
    for name in SMALL:
        if (folder / name).exists():
            try:
                plain = files.read_json(folder / name, MAX_CONFIG_BYTES)
            except Unsafe as error:
                raise Unsafe(f"its {name} {error}") from error
            if not isinstance(plain, dict):
                raise Unsafe(f"its {name} holds no object")
    for name in LARGE:
        if (folder / name).exists():
            try:
                with files.open_file(folder / name):
                    pass
            except Unsafe as error:
                raise Unsafe(f"its {name} {error}") from error
            if (folder / name).stat().st_size > MAX_TOKENIZER_BYTES:
                raise Unsafe(f"its {name} is larger than {MAX_TOKENIZER_BYTES:,} bytes")


def weight_names(index: Path) -> set[str]:
    """The files that an index names. Raises Unsafe where one is no safetensors file of the folder itself."""
    plain = files.read_json(index, MAX_CONFIG_BYTES)
    weights = plain.get("weight_map") if isinstance(plain, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise Unsafe("holds no weight_map")
    names = set(weights.values())
    for name in sorted(names):
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise Unsafe(f"names {name!r}, which is no safetensors file of its folder")
    return names


def _heard(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _heard(value) for key, value in plain.items() if _is_heard(str(key), value)}
    return [_heard(value) for value in plain] if isinstance(plain, list) else plain


def _is_heard(key: str, value: Any) -> bool:
    if key.startswith("_") or key in EXECUTION:
        return False
    return not (isinstance(value, str) and _ELSEWHERE.search(value))


def _check_sizes(plain: Mapping[str, Any], above: str) -> None:
    for key, value in plain.items():
        if isinstance(value, dict):
            _check_sizes(value, f"{above}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = MAX_LAYERS if _LAYERS.fullmatch(key) else MAX_WIDTH if _WIDTHS.fullmatch(key) else MAX_COUNT
            if abs(value) > most:
                raise Unsafe(f"says {above}{key}={value:.10g}; at most {most:,} is read")
