"""What a sweep will cost, measured on its own base before anything is trained."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lora_sweep import data as data_room
from lora_sweep import model as model_room
from lora_sweep import worker
from lora_sweep.adapters import Blueprint
from lora_sweep.data import Data
from lora_sweep.folding import SameRun
from lora_sweep.pack import Settings, Trial
from lora_sweep.space import Sweep

BYTES_AN_ADAPTER_PARAMETER = 16
"""fp32 value, gradient and AdamW's two moments."""

BYTES_AN_ADAPTER_ON_DISK = 4
"""Of a parameter: fp32."""

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
    classes = sweep.classes(config.study.fold) if is_grid else ()
    cells = len(sweep.cells()) if is_grid else config.sampler.n_trials or 0
    runs = min(len(classes) + config.study.verify_fold, cells) if is_grid else cells
    stored = base.bytes
    a_rank = _parameters_a_rank(base, config.method.target_modules)
    ranks = sorted({config.method.rank, sweep.largest_rank()})
    rows = train.slots * train.batch_size
    per_row = _seconds_a_row(base, rows, data.train.length, device)
    micro_batches = train.max_steps * train.gradient_accumulation_steps
    evaluations = -(-train.max_steps // train.eval_every)
    seen = evaluations * sum(len(each) for each in (data.evaluation, data.probe, data.retention) if each is not None)
    seconds = runs * per_row * (2 * micro_batches * train.batch_size + seen)
    each_step = train.batch_size * train.gradient_accumulation_steps
    return {
        "study": config.study.name,
        "cells": cells,
        "distinct_runs": len(classes) if is_grid else cells,
        "classes": [_class(each) for each in classes if len(each.cells) > 1],
        "near": _near(sweep, classes) if config.study.fold == "exact" else None,
        "is_grid": is_grid,
        "axes": {axis.key: str(axis) for axis in sweep.axes},
        "packs": _packs(sweep) if is_grid else 1,
        "slots": train.slots,
        "device": str(device),
        "dtype": next(word for word, dtype in model_room.DTYPES.items() if dtype == base.dtype),
        "quantization": config.model.quantization,
        "base_parameters": base.parameters,
        "base_mib": stored / 2**20,
        "adapter_parameters": {rank: rank * a_rank for rank in ranks},
        "adapter_mib": {rank: rank * a_rank * BYTES_AN_ADAPTER_ON_DISK / 2**20 for rank in ranks},
        **_data(data),
        "steps_per_epoch": len(data.train) / each_step,
        "epochs": train.max_steps * each_step / len(data.train),
        "memory_mib": (stored + train.slots * ranks[-1] * a_rank * BYTES_AN_ADAPTER_PARAMETER) / 2**20,
        "seconds": seconds,
    }


def _class(each: SameRun) -> dict[str, Any]:
    grade = each.grade
    return {"cells": each.cells, "grade": grade.name, "reasons": grade.reasons, "size": grade.size}


def _near(sweep: Sweep, exact: Sequence[SameRun]) -> dict[str, Any] | None:
    """What `study.fold=near` would leave to run, and what keeps those cells apart; None where it is nothing more."""
    near = sweep.classes("near") if exact else ()
    if len(near) == len(exact):
        return None
    reasons = {reason for each in near for reason in each.grade.reasons}
    return {"distinct_runs": len(near), "reasons": sorted(reasons), "size": max(each.grade.size for each in near)}


def _data(data: Data) -> dict[str, Any]:
    """What the trials will learn from: counts, lengths in tokens, and what was left out."""
    report, lengths = data.report, data.train.lengths
    cut = report.train.cut.count
    return {
        "train_examples": report.train.examples,
        "eval_examples": data.evaluation.examples,
        "train_rows": len(data.train),
        "tokens": report.train.tokens,
        "train_tokens": report.train.counted,
        "lengths": {
            "median": int(np.median(lengths)),
            "p95": int(np.quantile(lengths, 0.95)),
            "max": int(lengths.max()),
            "padded": data.train.length,
        },
        "examples_cut": cut,
        "share_cut": cut / (report.train.examples + report.train.emptied.count),
        "rows_skipped": report.broken.count + report.train.emptied.count,
        "duplicates_removed": report.duplicates.count,
    }


def _parameters_a_rank(base: model_room.LoadedBase, target_modules: Any) -> int:
    """Adapter parameters per unit of rank: the sum of d_in + d_out over the targets."""
    blueprint = Blueprint(base.skeleton(), base.name_or_path)
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
