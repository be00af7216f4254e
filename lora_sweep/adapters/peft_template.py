"""PEFT on a base's skeleton: targets, initial A and the saved format, without the base's weights."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lora_sweep.system import files
from lora_sweep.system.background import Background

KEPT_BYTES, KEPT_DRAWS = 2**29, 32
"""Of initial A's, drawn beforehand or kept for trials of the same rank and seed; one is kept whatever its size."""

Weights = Mapping[str, tuple[Tensor, Tensor]]
"""Module name in the base -> (A (r, d_in), B (d_out, r)), PEFT's orientation."""


Format = tuple[LoraConfig, dict[str, str]]
"""(a configuration as PEFT would save it, module name -> prefix of its tensors' names)."""


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
def peft_chatter_off() -> Iterator[None]:
    """PEFT reads an attribute that transformers is renaming, and tells that it set fan_in_fan_out right for Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


class PeftTemplate:
    """PEFT on the base's skeleton (model.skeleton): the authority on targets, initial A and saved format.

    PEFT is asked once a question: what it says of one rank's format holds for all, and equal draws are drawn once, in a
    thread of their own where somebody asks beforehand.
    """

    def __init__(self, skeleton: Any, base_name_or_path: str, revision: str | None = None) -> None:
        self._skeleton = skeleton
        self._base, self._revision = base_name_or_path, revision
        # PEFT wraps the one skeleton and draws from the one generator.
        self._lock = Lock()
        self._thread = Background("initial-A")
        self._draws: dict[tuple[int, str, int], tuple[Future[dict[str, Tensor]], int]] = {}
        """(rank, targets, seed) -> (the draw, its bytes), the one asked for last at the end."""
        self._widths: dict[str, int] = {}
        """Targets -> the sum of their d_in."""
        self._formats: dict[str, Future[Format]] = {}

    def close(self) -> None:
        """Ends the thread."""
        self._thread.close()

    def prepare(self, draws: Sequence[tuple[LoraConfig, int]]) -> None:
        """Begins to draw what `initial` will be asked for: (configuration, seed), the most urgent first.

        As many as can be kept; what is drawn already is kept before others. Behind them PEFT is asked for the format
        that `write` will need.
        """
        kept = 0
        for config, seed in draws[:KEPT_DRAWS]:
            kept += self._bytes(config)
            if kept > KEPT_BYTES:
                break
            self._drawn(config, seed)
        for config, _ in draws[:1]:
            self._format(config)

    def initial(self, config: LoraConfig, seed: int) -> dict[str, Tensor]:
        """Module name -> A (r, d_in), bit for bit what PEFT draws on the base after torch.manual_seed(seed).

        Not to be written into: who asks the same again gets the same tensors.
        """
        return self._thread.result(self._drawn(config, seed))

    def _drawn(self, config: LoraConfig, seed: int) -> Future[dict[str, Tensor]]:
        key = (config.r, str(config.target_modules), seed)
        kept = self._draws.pop(key, None)
        if kept is None:
            size = self._bytes(config)
            while self._draws and (len(self._draws) >= KEPT_DRAWS or self._kept_bytes + size > KEPT_BYTES):
                del self._draws[next(iter(self._draws))]
            kept = self._thread.submit(self._draw, config, seed), size
        # The one asked for last goes last.
        self._draws[key] = kept
        return kept[0]

    @property
    def _kept_bytes(self) -> int:
        return sum(each for _, each in self._draws.values())

    def _bytes(self, config: LoraConfig) -> int:
        """Of an initial A, fp32."""
        targets = str(config.target_modules)
        if targets not in self._widths:
            self._widths[targets] = sum(d_in for d_in, _ in self.shapes(config.target_modules).values())
        return 4 * int(config.r) * self._widths[targets]

    def _draw(self, config: LoraConfig, seed: int) -> dict[str, Tensor]:
        with self._adapted(config, seed) as adapted:
            return {name: layer.lora_A["default"].weight.detach().clone() for name, layer in _layers(adapted)}

    def shapes(self, target_modules: Any) -> dict[str, tuple[int, int]]:
        """Module name -> (d_in, d_out) of every module that the targets name."""
        with self._adapted(peft_config(1, 1.0, False, 0.0, target_modules)) as adapted:
            return {name: (layer.in_features, layer.out_features) for name, layer in _layers(adapted)}

    def write(self, folder: Path, config: LoraConfig, weights: Weights) -> None:
        """Writes adapter_config.json and adapter_model.safetensors as PEFT does; the folder need not exist."""
        format_, keys = self._thread.result(self._format(config))
        resolved = deepcopy(format_)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("r", "lora_alpha", "use_rslora", "lora_dropout"):
            setattr(resolved, name, getattr(config, name))
        resolved.save_pretrained(str(folder))
        tensors = {}
        for name, (A, B) in weights.items():
            tensors[f"{keys[name]}.lora_A.weight"] = A.detach().cpu().contiguous()
            tensors[f"{keys[name]}.lora_B.weight"] = B.detach().cpu().contiguous()
        save(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    def _format(self, config: LoraConfig) -> Future[Format]:
        targets = str(config.target_modules)
        if targets not in self._formats:
            self._formats[targets] = self._thread.submit(self._requested_format, config)
        return self._formats[targets]

    def _requested_format(self, config: LoraConfig) -> Format:
        smallest = deepcopy(config)
        smallest.r = 1
        with self._adapted(smallest) as adapted:
            resolved = deepcopy(adapted.peft_config["default"])
            saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            prefixes = [key.removesuffix(".lora_A.weight") for key in saved if key.endswith(".lora_A.weight")]
            names = [name for name, _ in _layers(adapted)]
        resolved.base_model_name_or_path, resolved.revision = self._base, self._revision
        resolved.inference_mode = True
        return resolved, dict(zip(names, prefixes, strict=True))

    @contextmanager
    def _adapted(self, config: LoraConfig, seed: int = 0) -> Iterator[Any]:
        # PEFT draws, whatever it is asked: nobody else's randomness is touched.
        with self._lock, torch.random.fork_rng(devices=[]), peft_chatter_off():
            torch.manual_seed(seed)
            # A copy: PEFT writes the base's name and the matched modules into what it is given.
            adapted = get_peft_model(self._skeleton, deepcopy(config))
            try:
                yield adapted
            finally:
                adapted.unload()


def save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """As safetensors. Raises OSError where it cannot be written: theirs is another."""
    try:
        save_file(tensors, file, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    files.share(file)


def _layers(adapted: Any) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, layer) for name, layer in adapted.base_model.model.named_modules() if isinstance(layer, LoraLayer))
