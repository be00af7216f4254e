"""What a sweep will cost, measured on its own base before anything is trained."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from lora_sweep.adapters.peft_template import PeftTemplate
from lora_sweep.base import base_config
from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.data import Data
from lora_sweep.data import load as load_data
from lora_sweep.errors import UserError
from lora_sweep.pack import Capacity, Pack, PackOutOfMemory, Settings, Trial
from lora_sweep.pack.pack import BYTES_A_PARAMETER
from lora_sweep.records import Cell
from lora_sweep.runner import worker
from lora_sweep.runner.pitfalls import EvaluationSize, data_key, pitfalls
from lora_sweep.runner.verify_equivalence import GridRuns
from lora_sweep.sweep import equivalence
from lora_sweep.sweep.equivalence import SameRun
from lora_sweep.sweep.sweep import Sweep

BYTES_AN_ADAPTER_ON_DISK = 4
"""Of a parameter: fp32."""


def plan(sweep: Sweep) -> dict[str, Any]:
    """Cells, sizes and estimates; loads the base and the data of the first cell.

    Time of a step and memory of a pass: from the first steps of the first runs, as a launch takes them; they are thrown
    away. Time of an evaluation: from some of its batches.
    """
    config = sweep.base()
    worker.use_threads(config.launcher)
    device = worker.device(config.launcher)
    base = load_base(config.model, device)
    data = load_data(config.data, base.tokenizer)
    train, is_grid = config.train, config.sampler.name == "grid"
    grid = GridRuns.of(sweep) if is_grid else None
    classes = () if grid is None else grid.classes
    cells = len(sweep.cells()) if is_grid else config.sampler.n_trials or 0
    runs = cells if grid is None else grid.count
    stored = base.bytes
    a_rank = _parameters_a_rank(base, config.method.target_modules)
    ranks = sorted({config.method.rank, sweep.largest_rank()})
    capacity, per_row = _measured(sweep, base, data, runs)
    slots = min(capacity.slots, runs)
    evaluations = -(-train.max_steps // train.eval_every)
    evaluated = evaluations * sum(
        len(each) for each in (data.evaluation, data.probe, data.retention) if each is not None
    )
    seconds = runs * (train.max_steps * capacity.slot_seconds + per_row * evaluated)
    each_step = train.batch_size * train.gradient_accumulation_steps
    adapters = slots * ranks[-1] * a_rank * BYTES_A_PARAMETER
    return {
        "study": config.study.name,
        "cells": cells,
        "distinct_runs": len(classes) if is_grid else cells,
        "classes": [_class(each) for each in classes if len(each.cells) > 1],
        "near": _near(sweep, classes) if config.study.fold == "exact" else None,
        "scaled_runs": _scaled_runs(sweep, len(classes)) if classes and config.study.fold != "off" else None,
        "warnings": [asdict(each) for each in pitfalls(sweep, {data_key(config): EvaluationSize.of(data)})],
        "is_grid": is_grid,
        "axes": {axis.key: str(axis) for axis in sweep.axes},
        "packs": _packs(sweep) if is_grid else 1,
        "slots": slots,
        "slots_reason": capacity.reason,
        "device": str(device),
        "dtype": next(word for word, dtype in base_config.DTYPES.items() if dtype == base.dtype),
        "quantization": config.model.quantization,
        "base_parameters": base.parameters,
        "base_mib": stored / 2**20,
        "adapter_parameters": {rank: rank * a_rank for rank in ranks},
        "adapter_mib": {rank: rank * a_rank * BYTES_AN_ADAPTER_ON_DISK / 2**20 for rank in ranks},
        **_data(data),
        "steps_per_epoch": len(data.train) / each_step,
        "epochs": train.max_steps * each_step / len(data.train),
        "memory_mib": (stored + adapters + (capacity.peak_bytes or 0.0)) / 2**20,
        "seconds": seconds,
    }


def _measured(sweep: Sweep, base: LoadedBase, data: Data, runs: int) -> tuple[Capacity, float]:
    """(how many slots are fastest and what a step costs, seconds of a trial's row in an evaluation).

    Of the grid's first runs, or of so many equal ones.
    """
    first = sweep.base()
    settings = Settings.of(Trial.of(Cell(0), first))
    if first.sampler.name == "grid":
        candidates = [Trial.of(cell, sweep.config(cell)) for cell in sweep.cells()]
        trials = [trial for trial in candidates if Settings.of(trial) == settings]
    else:
        trials = [Trial.of(Cell(number), first) for number in range(runs)]
    pack = Pack(base, data, settings, max(trial.method.rank for trial in trials))
    try:
        for trial in trials[:runs]:
            if not pack.has_room:
                break
            pack.admit(trial)
        return pack.measure(), pack.seconds_a_row()
    except PackOutOfMemory as error:
        remedy = "lower train.batch_size or data.max_length, or set train.gradient_checkpointing=true"
        raise UserError(f"train.slots: {error.slots} trials do not fit into the device's memory ({remedy})") from error
    finally:
        pack.close()


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


def _scaled_runs(sweep: Sweep, runs: int) -> int | None:
    """How many runs the grid would have under the scaled rules; None where it is no fewer."""
    scaled = {}
    for cell in sweep.cells():
        config = sweep.config(cell)
        rules = replace(config.optimizer, eps_rule="scaled", decay_rule="scaled", clip_rule="scaled")
        scaled[cell.number] = replace(config, optimizer=rules)
    fewest = len(equivalence.classes(scaled, "exact"))
    return fewest if fewest < runs else None


def _data(data: Data) -> dict[str, Any]:
    """What the trials will learn from: counts, lengths in tokens, and what was left out."""
    report, lengths = data.report, data.train.lengths
    cut = report.train.cut.count
    return {
        "train_examples": report.train.examples,
        "eval_examples": data.evaluation.examples,
        "eval_examples_held_out": report.evaluation.examples,
        "train_rows": len(data.train),
        "tokens": report.train.tokens,
        "train_tokens": report.train.loss_tokens,
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


def _parameters_a_rank(base: LoadedBase, target_modules: Any) -> int:
    """Adapter parameters per unit of rank: the sum of d_in + d_out over the targets."""
    template = PeftTemplate(base.skeleton(), base.name_or_path)
    return sum(d_in + d_out for d_in, d_out in template.shapes(target_modules).values())


def _packs(sweep: Sweep) -> int:
    """How many kinds of pack the grid needs."""
    configs = [(cell, sweep.config(cell)) for cell in sweep.cells()]
    return len({(str(c.model), str(c.data), Settings.of(Trial.of(cell, c))) for cell, c in configs})
