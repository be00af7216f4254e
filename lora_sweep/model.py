"""The base: where it lies, whether it fits, and loading it frozen."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from lora_sweep.config import ModelConfig
from lora_sweep.errors import UserError
from lora_sweep.records import Fault

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

UNREADABLE = (OSError, ValueError, ImportError, KeyError, StrictDataclassError, SafetensorError)
"""What transformers raises on a checkpoint that it cannot read."""

EMBEDDED = "embedded:"
"""Prefix of bases that lie in the package."""


@dataclass(frozen=True)
class Source:
    """Where transformers finds a base."""

    name_or_path: str
    """Folder or hub id."""
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` of this base needs; code that lies beside a checkpoint is never run."""
        optional = {"gguf_file": self.gguf_file, "revision": self.revision}
        return {"trust_remote_code": False} | {key: value for key, value in optional.items() if value is not None}

    @property
    def is_hub(self) -> bool:
        return not Path(self.name_or_path).exists()


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


def source(model: ModelConfig) -> Source:
    """Resolves `model.path`: embedded, folder, .gguf file or hub id."""
    path = str(model.path)
    if path.startswith(EMBEDDED):
        return Source(str(Path(__file__).parent / path.removeprefix(EMBEDDED) / "weights"))
    if path.endswith(".gguf"):
        file = Path(path).expanduser().resolve()
        return Source(str(file.parent), gguf_file=file.name)
    folder = Path(path).expanduser()
    return Source(str(folder.resolve()) if folder.exists() else path, revision=model.revision)


def check(model: ModelConfig, target_modules: Any) -> list[Fault]:
    """Whether the base can be read and the target modules exist in it; loads no weights."""
    faults = _path_faults(model)
    if faults:
        return faults
    try:
        shape = skeleton(read_config(model))
    except UNREADABLE as error:
        return [Fault("model.path", f"cannot be read: {_one_line(error)}", model.path)]
    return _target_faults(shape, target_modules)


def _path_faults(model: ModelConfig) -> list[Fault]:
    at = source(model)
    path = Path(at.name_or_path)
    if str(model.path).startswith(EMBEDDED):
        return [] if path.is_dir() else [Fault("model.path", "no such embedded base", model.path, "embedded:tiny")]
    if at.gguf_file is not None:
        if not (path / at.gguf_file).is_file():
            return [Fault("model.path", "no such file", model.path)]
        try:
            import gguf  # noqa: F401
        except ImportError:
            return [Fault("model.path", "GGUF files need the extra `gguf`", None, 'pip install "lora-sweep[gguf]"')]
        return []
    if path.is_dir():
        if not (path / "config.json").is_file():
            return [
                Fault("model.path", "holds no config.json", model.path, "give the folder of a transformers checkpoint")
            ]
        if not any(path.glob("*.safetensors")):
            return [
                Fault("model.path", "holds no safetensors; pickled weights can run code and are refused", model.path)
            ]
        return []
    if path.exists() or str(model.path).startswith((".", "/", "~")) or str(model.path).count("/") > 1:
        return [Fault("model.path", "no such checkpoint folder", model.path)]
    return []


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def read_config(model: ModelConfig) -> Any:
    """transformers' configuration of the base, attention implementation and dtype set."""
    at = source(model)
    return AutoConfig.from_pretrained(
        at.name_or_path, attn_implementation=model.attn_implementation, dtype=DTYPES[model.dtype], **at.arguments
    )


def _target_faults(shape: Any, target_modules: Any) -> list[Fault]:
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
            hit = [name for name, _ in shape.named_modules() if name and check_target_module_exists(settings, name)]
        except re.error as error:
            faults.append(Fault(key, f"is no regular expression: {error}", one))
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


def skeleton(config: Any) -> Any:
    """The base's modules without its memory: every parameter is one zero, expanded to its shape.

    PEFT adapts it like the base itself: it draws the same initial A and saves the same format.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zero, requires_grad=False))
    return model


def load(model: ModelConfig, device: torch.device, keep_in: Path | None = None) -> LoadedBase:
    """Loads the base frozen, in eval mode.

    A base that is reachable by no name (embedded, GGUF) is written once as safetensors to `keep_in`/base, so that an
    adapter's `base_model_name_or_path` loads it. Raises UserError where transformers cannot read it.
    """
    at = source(model)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            at.name_or_path,
            dtype=DTYPES[model.dtype],
            attn_implementation=model.attn_implementation,
            use_safetensors=None if at.gguf_file else True,
            **at.arguments,
        )
        tokenizer = AutoTokenizer.from_pretrained(at.name_or_path, **at.arguments)
    except UNREADABLE as error:
        raise UserError(f"model.path: cannot be loaded: {_one_line(error)}, got {model.path!r}") from error
    if at.gguf_file is not None:
        # Its weights were de-quantised on loading; what still says otherwise keeps them from being saved.
        loaded.hf_quantizer = None
        vars(loaded.config).pop("quantization_config", None)
    loaded.requires_grad_(False)
    loaded.eval()
    name = at.name_or_path
    if keep_in is not None and (at.gguf_file or str(model.path).startswith(EMBEDDED)):
        name = str(_keep(loaded, tokenizer, keep_in / "base"))
    return LoadedBase(loaded.to(device), tokenizer, name, at.revision, DTYPES[model.dtype])


def _keep(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Writes a base once; the folder appears whole or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".base-", dir=folder.parent))
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            aside.chmod(0o755)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder.resolve()
