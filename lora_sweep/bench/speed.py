"""How much faster packed trials are, against the same trials run in the two usual ways.

The same trials (same samples, same steps, same evaluations) run
  (a) HF Trainer: a process per trial, its Trainer and PEFT, start-up included          hf_trainer.py
  (b) sequential: one after another in one process, PEFT and a plain loop                  sequential.py
  (c) packed, at each number of slots, admission and eviction included                     pack/
Repetitions alternate (b) and every (c), each repetition beginning with another of them, and a ratio is taken within a
repetition: what else the machine does falls on both sides alike. A speed-up with other losses is none, so the losses
stand beside it.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lora_sweep.base import cpu_bf16, skeleton
from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.bench import gauge, packed, random_base, sequential
from lora_sweep.bench.hf_trainer_process import TrainerProcess, chosen, parts
from lora_sweep.bench.question import Question, trials_of
from lora_sweep.bench.reduction import Run, TrainerRun, Work, reduce
from lora_sweep.config import Config
from lora_sweep.data import Data
from lora_sweep.data import load as load_data
from lora_sweep.errors import ConfigError, UserError
from lora_sweep.pack import Pack, PackOutOfMemory, Settings, Trial
from lora_sweep.runner import worker

Say = Callable[[str], None]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative difference of a trial's evaluation losses up to which two ways have done the same."""


def run_sequential(base: LoadedBase, data: Data, trials: Sequence[Trial]) -> tuple[float, ...]:
    return tuple(sequential.train(base, data, trial)[0] for trial in trials)


def run_packed(base: LoadedBase, data: Data, trials: Sequence[Trial], slots: int) -> tuple[float, ...]:
    """The last evaluation losses. Raises UserError where so many slots a pass do not fit into memory."""
    together = [replace(trial, train=replace(trial.train, slots=slots)) for trial in trials]
    pack = Pack(base, data, Settings.of(together[0]), max(trial.method.rank for trial in trials))
    try:
        losses = {evaluation.cell: evaluation.eval_loss for evaluation in packed.run(pack, together)}
    except PackOutOfMemory as error:
        raise _too_many(slots) from error
    finally:
        pack.close()
    if pack.capacity.too_many is not None:
        # The pack went on with narrower passes, whose time is not what this row is about.
        raise _too_many(slots)
    return tuple(losses[trial.cell.number] for trial in trials)


def _too_many(slots: int) -> UserError:
    return UserError(f"--slots: {slots} trials do not fit into the device's memory (name fewer)")


def choice(base: LoadedBase, data: Data, trials: Sequence[Trial]) -> dict[str, Any]:
    """The number of slots that a worker would choose in the first steps of these trials, and why.

    A study chooses once for all its trials, so here too the search stands outside of what is timed.
    """
    free = [replace(trial, train=replace(trial.train, slots=None, max_steps=2**31)) for trial in trials]
    pack = Pack(base, data, Settings.of(free[0]), max(trial.method.rank for trial in trials))
    try:
        for trial in free[: pack.capacity.slots]:
            pack.admit(trial)
        capacity = pack.measure()
    except PackOutOfMemory as error:
        raise _too_many(error.slots) from error
    finally:
        pack.close()
    return {"slots": capacity.slots_per_pass, "reason": capacity.reason}


def timed(device: torch.device, resident: float | None, work: Callable[[], tuple[float, ...]]) -> Run:
    """What `work` takes.

    Args:
        resident: bytes held by the base alone; None where memory cannot be determined.
    """
    peak = gauge.fresh_peak(device)
    began = time.perf_counter()
    losses = work()
    gauge.wait(device)
    seconds = time.perf_counter() - began
    most = peak.most_bytes
    return Run(seconds, losses, None if resident is None or most is None else max(0, int(most - resident)))


def measure(config: Config, question: Question, say: Say) -> dict[str, Any]:
    """Everything, ready for JSON: seconds, tokens, bytes; what is not finite or cannot be determined is None.

    Raises UserError.
    """
    worker.use_threads(config.launcher)
    device = worker.device(config.launcher)
    with tempfile.TemporaryDirectory(prefix="lora-sweep-bench-") as name:
        folder = Path(name)
        base, data = _loaded(config, question, device, folder)
        trials = trials_of(config, question.trials)
        ways: dict[str, Callable[[], tuple[float, ...]]] = {"sequential": partial(run_sequential, base, data, trials)}
        say("warming up")
        brief = [replace(trial, train=replace(trial.train, max_steps=1, eval_every=1)) for trial in trials]
        run_sequential(base, data, brief[:1])
        chosen_slots = choice(base, data, trials) if question.chooses else None
        if chosen_slots is not None:
            say(chosen_slots["reason"])
        numbers = set(question.slots) if chosen_slots is None else {*question.slots, chosen_slots["slots"]}
        for K in sorted(numbers):
            ways[f"packed {K}"] = partial(run_packed, base, data, trials, K)
            run_packed(base, data, brief[:K], K)
        resident = gauge.fresh_peak(device).held_bytes
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        names = list(ways)
        for repetition in range(question.repetitions):
            for place in range(len(names)):
                name = names[(repetition + place) % len(names)]
                runs[name].append(timed(device, resident, ways[name]))
            took = ", ".join(f"{name} {runs[name][-1].seconds:.2f} s" for name in names)
            say(f"repetition {repetition + 1} of {question.repetitions}: {took}")
        trainer_runs: list[list[TrainerRun]] = []
        if question.trainer_repetitions:
            process = TrainerProcess(config, base, data, folder)
            for repetition in range(question.trainer_repetitions):
                say(f"HF Trainer {repetition + 1} of {question.trainer_repetitions}: {len(trials)} processes")
                trainer_runs.append([process.run(trial) for trial in trials])
        peak = gauge.peak_flops(device, cpu_bf16.multiplied_dtype(base.model))
        described = _described(config, question, base, data, trials, peak) | {"chosen": chosen_slots}
        return described | reduce(runs, trainer_runs, _work(base, data, trials), peak, TOLERANCE[base.dtype])


def _loaded(config: Config, question: Question, device: torch.device, folder: Path) -> tuple[LoadedBase, Data]:
    if question.dimensions is not None:
        base = random_base.load(question.dimensions, config.model, config.data, device)
        faults = skeleton.target_faults(base.skeleton(), config.method.target_modules)
        if faults:
            raise ConfigError(faults)
        return base, random_base.tokens(question.dimensions, config.data)
    base = load_base(config.model, device, folder)
    return base, load_data(config.data, base.tokenizer)


def _work(base: LoadedBase, data: Data, trials: Sequence[Trial]) -> Work:
    lengths, train = sequential.by_row(data.train, data.train.lengths), trials[0].train
    trained = sum(int(lengths[chosen(data, trial).numpy()].sum()) for trial in trials)
    evaluations = -(-train.max_steps // train.eval_every) * len(trials)
    evaluated = evaluations * sum(int(part.lengths.sum()) for part in parts(data).values())
    return Work(trained, evaluated, gauge.multiplied_parameters(base.model))


def _described(
    config: Config, question: Question, base: LoadedBase, data: Data, trials: Sequence[Trial], peak: float
) -> dict[str, Any]:
    device, train = base.model.device, config.train
    varied = [
        {
            "rank": trial.method.rank,
            "alpha": trial.method.alpha,
            "base_lr": trial.optimizer.base_lr,
            "ratio": trial.optimizer.ratio,
            "seed": trial.train.seed,
        }
        for trial in trials
    ]
    return {
        "device": gauge.device_name(device),
        "device_type": device.type,
        "peak_matmul_flops": peak,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "model": config.model.name if question.dimensions is None else base.name_or_path,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": config.model.quantization,
        "base_parameters": base.parameters,
        "multiplied_parameters": gauge.multiplied_parameters(base.model),
        "base_mib": base.bytes / 2**20,
        "steps": train.max_steps,
        "evaluations": -(-train.max_steps // train.eval_every),
        "rows_a_slot_step": train.batch_size * train.gradient_accumulation_steps,
        "padded_length": data.train.length,
        "repetitions": question.repetitions,
        "trials": varied,
    }
