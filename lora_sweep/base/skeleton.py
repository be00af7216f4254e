"""The modules of a base without its memory, and whether target modules are among them."""

import re
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_sweep.base.base_config import quantization_faults, read_config, readable_errors
from lora_sweep.base.source import Source, path_faults, size_faults, source, weight_faults
from lora_sweep.config import ModelConfig
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.system.bounds import PATTERN_BYTES, PATTERN_SECONDS, BoundExceeded, bounded

SKELETON_SECONDS, SKELETON_BYTES = 30.0, 2**32
"""Most that building the modules of a base without its weights may take; 126 layers take 2 s."""


def check(model: ModelConfig, target_modules: Any) -> list[Fault]:
    """Whether the base can be read and quantized and the target modules exist in it; loads no weights."""
    faults = path_faults(model)
    if faults:
        return faults
    try:
        with readable_errors(model, "cannot be read"):
            config = read_config(model)
            faults = quantization_faults(model, config) or weight_faults(source(model), model.path)
            if faults:
                return faults
            with bounded(SKELETON_SECONDS, SKELETON_BYTES):
                shape = skeleton(config, source(model))
            faults = size_faults(source(model), shape, model.path)
    except ConfigError as error:
        return list(error.faults)
    return faults or target_faults(shape, target_modules)


def target_faults(shape: Any, target_modules: Any) -> list[Fault]:
    key = "method.target_modules"
    if isinstance(target_modules, str):
        wanted: str | list[str] = target_modules
    elif isinstance(target_modules, list) and target_modules and all(isinstance(name, str) for name in target_modules):
        wanted = target_modules
    else:
        return [Fault(key, "must be `all-linear`, a list of module names or a regular expression", target_modules)]
    linears = [name for name, module in shape.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    tails = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
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
        elif not set(hit) <= set(linears):
            other = sorted(set(hit) - set(linears))[0]
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
    return hollow(model, {})


def hollow(model: Any, dtypes: dict[str, torch.dtype]) -> Any:
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = dtypes.get(f"{prefix}.{name}" if prefix else name, parameter.dtype)
            zero = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))
    return model
