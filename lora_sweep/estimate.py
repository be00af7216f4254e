"""What a sweep will cost, measured on its own base before anything is trained."""

import time
from typing import Any

import torch

from lora_sweep import data as data_room
from lora_sweep import model as model_room
from lora_sweep import worker
from lora_sweep.adapters import Blueprint
from lora_sweep.pack import Settings, Trial
from lora_sweep.space import Sweep

BYTES_AN_ADAPTER_PARAMETER = 16
"""fp32 value, gradient and AdamW's two moments."""

TIMED_PASSES = 3


def plan(sweep: Sweep) -> dict[str, Any]:
    """Cells, sizes and estimates; loads the base and the data of the first cell.

    Time: forward passes of one full batch, the median of a few; a training step costs two (the frozen weights need no
    gradient: 4 N flop a token against 2 N), an evaluation pass one.
    """
    config = sweep.base()
    device = worker.device(config.launcher)
    base = model_room.load(config.model, device)
    data = data_room.load(config.data, base.tokenizer)
    train, is_grid = config.train, config.sampler.name == "grid"
    cells = len(sweep.cells()) if is_grid else config.sampler.n_trials or 0
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    stored = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    a_rank = _parameters_a_rank(base, config.method.target_modules)
    ranks = sorted({config.method.rank, sweep.largest_rank()})
    rows = train.slots * train.batch_size
    per_row = _seconds_a_row(base, rows, data.train.input_ids.shape[1], device)
    micro_batches = train.max_steps * train.gradient_accumulation_steps
    evaluations = -(-train.max_steps // train.eval_every)
    seen = evaluations * (len(data.evaluation) + len(data.probe))
    seconds = cells * per_row * (2 * micro_batches * train.batch_size + seen)
    counted = int(data.train.counted.sum())
    each_step = train.batch_size * train.gradient_accumulation_steps
    return {
        "study": config.study.name,
        "cells": cells,
        "is_grid": is_grid,
        "axes": {axis.key: str(axis) for axis in sweep.axes},
        "packs": _packs(sweep) if is_grid else 1,
        "slots": train.slots,
        "device": str(device),
        "dtype": config.model.dtype,
        "base_parameters": parameters,
        "base_mib": stored / 2**20,
        "adapter_parameters": {rank: rank * a_rank for rank in ranks},
        "train_examples": len(data.train),
        "eval_examples": len(data.evaluation),
        "train_tokens": counted,
        "examples_cut": data.train.cut,
        "epochs": train.max_steps * each_step / len(data.train),
        "memory_mib": (stored + train.slots * ranks[-1] * a_rank * BYTES_AN_ADAPTER_PARAMETER) / 2**20,
        "seconds": seconds,
    }


def _parameters_a_rank(base: model_room.LoadedBase, target_modules: Any) -> int:
    """Adapter parameters per unit of rank: the sum of d_in + d_out over the targets."""
    blueprint = Blueprint(model_room.skeleton(base.model.config), base.name_or_path)
    return sum(d_in + d_out for d_in, d_out in blueprint.shapes(target_modules).values())


def _packs(sweep: Sweep) -> int:
    """How many kinds of pack the grid needs."""
    configs = [(cell, sweep.config(cell)) for cell in sweep.cells()]
    return len({(str(c.model), str(c.data), Settings.of(Trial.of(cell, c))) for cell, c in configs})


def _seconds_a_row(base: model_room.LoadedBase, rows: int, length: int, device: torch.device) -> float:
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    times = []
    with torch.no_grad():
        for _ in range(1 + TIMED_PASSES):
            began = time.perf_counter()
            base.model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return sorted(times[1:])[TIMED_PASSES // 2] / rows
