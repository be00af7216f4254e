"""PEFT folders: the adapter as PEFT draws it, saves it and loads it."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor

from lora_sweep.errors import UserError

Weights = Mapping[str, tuple[Tensor, Tensor]]
"""Module name in the base -> (A (r, d_in), B (d_out, r)), PEFT's orientation."""


def peft_config(rank: int, alpha: float, use_rslora: bool, dropout: float, target_modules: Any) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )


@contextmanager
def _peft_chatter_off() -> Iterator[None]:
    """PEFT reads an attribute that transformers is renaming, and tells that it set fan_in_fan_out right for Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


@dataclass(frozen=True)
class Blueprint:
    """PEFT on the base's skeleton (model.skeleton): the authority on targets, initial A and saved format."""

    skeleton: Any
    base_name_or_path: str
    revision: str | None = None

    def _adapt(self, config: LoraConfig) -> Any:
        with _peft_chatter_off():
            # A copy: PEFT writes the base's name and the matched modules into what it is given.
            return get_peft_model(self.skeleton, deepcopy(config))

    def initial(self, config: LoraConfig, seed: int) -> dict[str, Tensor]:
        """Module name -> A (r, d_in), bit for bit what PEFT draws on the base after torch.manual_seed(seed)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = self._adapt(config)
        try:
            return {
                name: layer.lora_A["default"].weight.detach().clone()
                for name, layer in adapted.base_model.model.named_modules()
                if isinstance(layer, LoraLayer)
            }
        finally:
            adapted.unload()

    def shapes(self, target_modules: Any) -> dict[str, tuple[int, int]]:
        """Module name -> (d_in, d_out) of every module that the targets name."""
        adapted = self._adapt(peft_config(1, 1.0, False, 0.0, target_modules))
        try:
            return {
                name: (layer.in_features, layer.out_features)
                for name, layer in adapted.base_model.model.named_modules()
                if isinstance(layer, LoraLayer)
            }
        finally:
            adapted.unload()

    def write(self, folder: Path, config: LoraConfig, weights: Weights) -> None:
        """Writes adapter_config.json and adapter_model.safetensors as PEFT does; the folder need not exist."""
        adapted = self._adapt(config)
        try:
            for name, (A, B) in weights.items():
                layer = adapted.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.data = A.detach().cpu().contiguous()
                layer.lora_B["default"].weight.data = B.detach().cpu().contiguous()
            adapted.peft_config["default"].base_model_name_or_path = self.base_name_or_path
            adapted.peft_config["default"].revision = self.revision
            # "auto" would ask the hub whether the vocabulary was resized; embeddings are never trained here.
            adapted.save_pretrained(str(folder), save_embedding_layers=False)
        finally:
            adapted.unload()
        # PEFT's model card is a form with every field empty.
        (folder / "README.md").unlink(missing_ok=True)


def refuse_pickles(folder: Path) -> None:
    """Raises UserError unless the folder is a PEFT adapter whose weights are safetensors."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds no adapter_config.json, so it is no PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "its weights are a pickle, which can run code" if pickled else "adapter_model.safetensors is missing"
        raise UserError(f"{folder}: refused, {why}")


def load(model: Any, folder: Path) -> PeftModel:
    """PEFT's own model around `model`; safetensors only. Raises UserError."""
    refuse_pickles(folder)
    try:
        with _peft_chatter_off():
            return PeftModel.from_pretrained(model, str(folder), use_safetensors=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: PEFT cannot load it: {' '.join(str(error).split())}") from error
