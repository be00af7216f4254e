"""The base with packed linears in the place of its target modules."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_sweep.base import quant
from lora_sweep.pack.linear import PackedLinear, Pass


class WrappedBase:
    """A base that is wrapped from `__init__` to `close`."""

    def __init__(
        self, model: nn.Module, targets: Iterable[str], now: Pass, compiles: bool, checkpoints_gradients: bool
    ) -> None:
        """`targets`: names of linears; `now`: the pass that all of them take part in."""
        self._model = model
        self.linears: dict[str, PackedLinear] = {}
        """Target module -> what stands in its place."""
        for name in targets:
            self.linears[name] = PackedLinear(name, model.get_submodule(name), now)
            _replace(model, name, self.linears[name])
        if compiles:
            # What is compiled is the base between its linears. A packed linear reads its pass under way and adds to the
            # banks' gradients: a trace would keep what was there when it was made.
            for linear in self.linears.values():
                linear.forward = torch.compiler.disable(linear.forward)  # type: ignore[method-assign]
        self.norms = {name: _weight_norm(linear.base) for name, linear in self.linears.items()}
        """Target module -> |W|_F."""
        self._layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in self._layers:
            if compiles:
                layer.forward = torch.compile(layer.forward)
            if checkpoints_gradients:
                layer.forward = partial(_checkpointed, layer.forward)

    def close(self) -> None:
        """Gives the base back as it was."""
        for name, linear in self.linears.items():
            _replace(self._model, name, linear.base)
        for layer in self._layers:
            layer.__dict__.pop("forward", None)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _weight_norm(linear: nn.Module) -> float:
    """|W|_F of the weight that is computed with, de-quantized where it is quantized."""
    return float(torch.linalg.vector_norm(quant.dequantized(linear), dtype=torch.float64))


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Masks are counter-based, so no generator's state has to be kept for the recomputation.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
