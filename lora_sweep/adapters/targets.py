"""What an adapter's configuration promises and its file lacks: from the names alone, or from PEFT on the base."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists

from lora_sweep.adapters import keys as adapter_keys
from lora_sweep.adapters.keys import ADAPTER, PREFIX
from lora_sweep.adapters.reader import Saved, names_targets
from lora_sweep.errors import UserError

HEADS = {"classifier", "score", "qa_outputs"}
"""PEFT adds these to modules_to_save of a task with a head, though a base has one of them at most."""

UNKNOWN = "unless the base has no such module, which --base checks"
AGAIN = "save it again from the trained model, or take out of the configuration what was not trained"
UNTOUCHED = f"PEFT leaves them as they are in the base: {AGAIN}"
BASE_NORMS = f"PEFT takes the norms of the base's rows: {AGAIN}"
REFUSES = f"PEFT refuses to load it (KeyError): {AGAIN}"


@dataclass(frozen=True)
class Missing:
    """Something promised that PEFT does not find in the file."""

    names: tuple[str, ...]
    """Modules, or where only the base could name them what the configuration calls them."""
    part: str
    """What is missing of them."""
    effect: str
    """What PEFT does without, and what to do."""
    refused: bool = False
    """Whether PEFT ends with an error."""


def missing(saved: Saved) -> list[Missing]:
    """What the configuration and the file's own names show, without the base.

    A layer that has none of a block's modules is no finding: hybrid models have such layers.
    """
    targets = list(_targets(saved))
    named = {name for each in targets for name in each.names}
    return [*targets, *_gaps(saved, named), *_beside(saved), *_magnitudes(saved)]


def _targets(saved: Saved) -> Iterator[Missing]:
    targets = saved.config.target_modules
    if not names_targets(saved.config) or isinstance(targets, str) or not saved.factors:
        return
    none = [
        target
        for target in sorted(targets)
        if not _held(saved, target) and check_target_module_exists(saved.config, target) is True
    ]
    if none:
        yield Missing(tuple(none), "no LoRA for what target_modules names", f"{UNTOUCHED}, {UNKNOWN}")


def _gaps(saved: Saved, known: set[str]) -> Iterator[Missing]:
    if not saved.factors:
        return
    config = saved.config
    whole = dict.fromkeys((*_siblings(saved.factors), *_promised_layers(config, saved.factors)))
    names = [name for name in whole if name not in saved.factors and name not in known]
    names += [name for name in _patterns(config) if name not in known and name not in whole and not _held(saved, name)]
    none = [name for name in names if not names_targets(config) or check_target_module_exists(config, name)]
    if none:
        yield Missing(tuple(none), "no LoRA of modules that others of their kind have", f"{UNTOUCHED}, {UNKNOWN}")


def _held(saved: Saved, name: str) -> bool:
    return name in saved.factors or any(module.endswith(f".{name}") for module in saved.factors)


def thin_blocks(saved: Saved) -> str | None:
    """A note where a kind of block has LoRA in fewer layers than another: hybrid models are so, and torn files."""
    layers: dict[str, dict[int, None]] = {}
    for module in saved.factors:
        number = re.match(r"(?:.*?\.)?(\d+)\.(.+)\.[^.]+$", module)
        if number:
            layers.setdefault(re.sub(r"\b\d+\b", "*", number[2]), {})[int(number[1])] = None
    every = {layer for each in layers.values() for layer in each}
    for block, each in layers.items():
        lacking = sorted(every - each.keys())
        if lacking:
            shown = ", ".join(map(str, lacking[:8])) + (", ..." if len(lacking) > 8 else "")
            return (
                f"{block} has LoRA in {len(each)} of the {len(every)} layers that the file names, not in {shown}: as "
                "in a hybrid model, or lost; --base distinguishes them"
            )
    return None


def _siblings(modules: Iterable[str]) -> Iterator[str]:
    """Names that a block (`layers.3.self_attn`) has in one layer, for each layer whose block has some."""
    blocks: dict[str, dict[str, None]] = {}
    leaves: dict[str, dict[str, None]] = {}
    for module in modules:
        block, _, leaf = module.rpartition(".")
        kind = re.sub(r"\b\d+\b", "*", block)
        blocks.setdefault(kind, {})[block] = None
        leaves.setdefault(kind, {})[leaf] = None
    for kind, each in blocks.items():
        yield from (f"{block}.{leaf}".removeprefix(".") for block in each for leaf in leaves[kind])


def _promised_layers(config: Any, modules: Iterable[str]) -> Iterator[str]:
    """The modules of the file, in each layer that layers_to_transform names; PEFT counts in the first number."""
    layers = config.layers_to_transform
    if layers is None or isinstance(config.target_modules, str):
        return
    for module in modules:
        number = re.match(r"(.*?\.)\d+(\..+)", module)
        if number:
            yield from (f"{number[1]}{layer}{number[2]}" for layer in ([layers] if isinstance(layers, int) else layers))


def _patterns(config: Any) -> Iterator[str]:
    """Keys of rank_pattern and alpha_pattern that name one module of one layer, and no expression."""
    for key in (*config.rank_pattern, *config.alpha_pattern):
        name = key.removeprefix("^")
        if re.fullmatch(r"\w+(\.\w+)*", name) and re.search(r"\.\d+\.", name):
            yield name


def _beside(saved: Saved) -> Iterator[Missing]:
    """modules_to_save and trained tokens: where the base has them, PEFT raises KeyError."""
    # A dump of the whole model has the base's own copy too.
    saved_whole = [f".{name}" for name in saved.extras if ".original_module." not in name]
    promised = [
        each for each in saved.config.modules_to_save or () if not any(f".{each}." in name for name in saved_whole)
    ]
    if set(promised) <= HEADS and any(f".{head}." in name for head in HEADS for name in saved_whole):
        promised = []
    if promised:
        yield Missing(tuple(sorted(promised)), "no weights of modules_to_save", f"{REFUSES}, {UNKNOWN}", True)
    if saved.config.trainable_token_indices and not any("trainable_tokens" in name for name in saved_whole):
        yield Missing(("trainable_token_indices",), "no rows of trained tokens", REFUSES, True)


def _magnitudes(saved: Saved) -> Iterator[Missing]:
    none = [module for module, each in saved.factors.items() if saved.config.use_dora and each.magnitude is None]
    if none:
        yield Missing(tuple(none), "no lora_magnitude_vector, though use_dora is true", BASE_NORMS)


def missing_on(saved: Saved, base: Any) -> tuple[list[Missing], tuple[str, ...]]:
    """(what PEFT does not find for the base, other LoRA tensors that it has no place for), by PEFT itself.

    Raises UserError.

    Args:
        base: transformers' model, of which only class and configuration are used.
    """
    config = deepcopy(saved.config)
    # Neither what draws the start nor a task's own class changes which names PEFT asks for.
    config.init_lora_weights, config.task_type, config.inference_mode = False, None, True
    config.loftq_config, config.eva_config, config.corda_config, config.lora_ga_config = {}, None, None, None
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(type(base)(base.config), config, low_cpu_mem_usage=True)
        except ValueError as error:
            reason = f"PEFT refuses to load it: {' '.join(str(error).split())[:300]}"
            targets = saved.config.target_modules
            names = (targets,) if isinstance(targets, str) else tuple(sorted(targets or ()))
            return [Missing(names, "no place in the base for target_modules", reason, True)], ()
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        held = {name: torch.empty(size) for name, size in saved.shapes.items()}
        refused = []
        while True:
            try:
                # A vocabulary that was resized is no fault: who loads it resizes the base first.
                result = set_peft_model_state_dict(adapted, held, ignore_mismatched_sizes=True)
                break
            except KeyError as error:
                # So PEFT ends where a tensor saved whole is missing; what else it would say is wanted too.
                name = str(error.args[0])
                if name in held or name not in wanted:
                    raise UserError(f"{saved.folder}: PEFT cannot load it: KeyError {name}") from error
                refused.append(name)
                held[name] = wanted[name]
    biases = {name for name in wanted if name.endswith(".bias")}
    modules = {key.name for key in saved.misnamed}.union(*(each.names for each in saved.unasked))
    passed = tuple(name for name in result.unexpected_keys if name in held.keys() - modules and ".lora_" in name)
    return list(_absent(result.missing_keys, biases, refused)), passed


def _absent(keys: Iterable[str], biases: set[str], refused: list[str]) -> Iterator[Missing]:
    absent: Mapping[str, dict[str, None]] = {part: {} for part in ("A", "B", "bias", "magnitude")}
    for name in keys:
        key = adapter_keys.parse(name)
        if key.is_lora and key.part is not None and f".{ADAPTER}" in name:
            absent[key.part][key.target] = None
    factors = {**absent["A"], **absent["B"]}
    if factors:
        yield Missing(tuple(factors), "no LoRA of modules that the configuration names", UNTOUCHED)
    magnitudes = tuple(each for each in absent["magnitude"] if each not in factors)
    if magnitudes:
        fault = "no lora_magnitude_vector, though use_dora is true"
        yield Missing(magnitudes, fault, BASE_NORMS)
    lora_biases = tuple(each for each in absent["bias"] if each not in factors)
    if lora_biases:
        yield Missing(lora_biases, "no lora_B.bias, though lora_bias is true", f"PEFT leaves it at zero: {AGAIN}")
    if refused:
        names = tuple(name.removeprefix(PREFIX) for name in refused)
        yield Missing(names, "no weights that modules_to_save or trainable_token_indices ask for", REFUSES, True)
    own = tuple(name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in keys if name in biases)
    if own:
        yield Missing(own, "no trained biases, though bias is not 'none'", f"PEFT leaves the base's: {AGAIN}")
