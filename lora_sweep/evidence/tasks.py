"""Are the embedded tasks worth sweeping?"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional
from transformers import get_scheduler

from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.config import Config
from lora_sweep.data import Batch, Data, TokenSet, order
from lora_sweep.data import load as load_data
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.records import Cell
from lora_sweep.sweep import sweep_file

Say = Callable[[str], None]

SHARED = ("train.schedule=linear", "tracker=none", "model=tiny")
STYLE = (*SHARED, "data=style", "train.max_steps=60", "train.eval_every=60", "train.batch_size=4", "train.slots=6")
STYLE_LORA = ((2, 1e-2), (2, 2e-2), (8, 5e-3), (8, 1e-2), (32, 2e-3), (32, 5e-3))
"""(rank, base_lr): two rates a rank around its best."""
STYLE_FULL = (3e-4, 1e-3, 2e-3, 4e-3)
FACTS = (*SHARED, "data=facts", "train.max_steps=200", "train.eval_every=200", "train.batch_size=16", "train.slots=6")
FACTS_LORA = ((2, 5e-3), (2, 1e-2), (16, 3e-3), (16, 6e-3))
SEEDS = (0, 1, 2)


def tasks(say: Say) -> dict[str, Any]:
    """Are the embedded tasks worth sweeping? About 6 minutes on two CPU cores.

    style: the gain of the best LoRA cell over that of full fine-tuning at the same number of steps. facts: the loss of
    rank 2 minus that of rank 16, each at its better rate, paired by seed, in standard errors. Losses in nats per token.
    """
    config = _config(STYLE)
    base = load_base(config.model, torch.device("cpu"))
    say("style: full fine-tuning, then LoRA")
    data = load_data(config.data, base.tokenizer)
    start = _mean_loss(base.model, data.evaluation)
    full = {lr: _train_whole(config, data, lr) for lr in STYLE_FULL}
    lora = dict(zip(STYLE_LORA, _train_packed(config, base, data, [(*cell, 0) for cell in STYLE_LORA]), strict=True))
    style = {
        "base_loss": start,
        "full_loss": min(full.values()),
        "full_lr": min(full, key=lambda lr: full[lr]),
        "lora_loss": min(lora.values()),
        "lora_rank_and_lr": min(lora, key=lambda cell: lora[cell]),
        "share_of_full_gain": (start - min(lora.values())) / (start - min(full.values())),
    }
    say("facts: rank 2 against rank 16, three seeds")
    config = _config(FACTS)
    data = load_data(config.data, base.tokenizer)
    cells = [(rank, lr, seed) for rank, lr in FACTS_LORA for seed in SEEDS]
    losses = dict(zip(cells, _train_packed(config, base, data, cells), strict=True))
    low, high = (_best_of_rank(losses, rank) for rank in (2, 16))
    differences = [a - b for a, b in zip(low[1], high[1], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    facts = {
        "base_loss": _mean_loss(base.model, data.evaluation),
        "bits": data.bits,
        "rank_2_lr": low[0],
        "rank_2_losses": low[1],
        "rank_16_lr": high[0],
        "rank_16_losses": high[1],
        "gain_of_rank": statistics.mean(differences),
        "standard_error": error,
        "standard_errors": statistics.mean(differences) / error,
    }
    return {"style": style, "facts": facts}


def lines(measured: dict[str, Any]) -> Iterator[str]:
    """What `tasks` returned, a line a task."""
    style, facts = measured["style"], measured["facts"]
    yield (
        f"style  base {style['base_loss']:.3f}, full fine-tuning {style['full_loss']:.3f}, "
        f"LoRA {style['lora_loss']:.3f}: {style['share_of_full_gain']:.1%} of its gain"
    )
    means = [statistics.mean(facts[key]) for key in ("rank_2_losses", "rank_16_losses")]
    yield (
        f"facts  base {facts['base_loss']:.3f}, rank 2 {means[0]:.3f}, rank 16 {means[1]:.3f}: "
        f"{facts['gain_of_rank']:.3f} +- {facts['standard_error']:.3f}, {facts['standard_errors']:.1f} standard errors"
    )


def _config(overrides: Sequence[str]) -> Config:
    return sweep_file.read(None, overrides)[0].base()


def _best_of_rank(losses: dict[tuple[int, float, int], float], rank: int) -> tuple[float, list[float]]:
    """(the rate with the lower mean loss, its losses by seed)."""
    by_lr = {lr: [losses[rank, lr, seed] for seed in SEEDS] for r, lr, _ in losses if r == rank}
    return min(by_lr.items(), key=lambda item: statistics.mean(item[1]))


def _train_packed(
    config: Config, base: LoadedBase, data: Data, cells: Sequence[tuple[int, float, int]]
) -> Iterator[float]:
    """Final evaluation losses of (rank, base_lr, seed), alpha = 2 rank, in their order."""
    trials = []
    for number, (rank, lr, seed) in enumerate(cells):
        trial = Trial.of(Cell(number), config)
        method = replace(trial.method, rank=rank, alpha=2.0 * rank)
        optimizer, train = replace(trial.optimizer, base_lr=lr), replace(trial.train, seed=seed)
        trials.append(Trial(trial.cell, method, optimizer, train, trial.health))
    settings = Settings.of(trials[0])
    assert settings.slots is not None
    for first in range(0, len(trials), settings.slots):
        pack = Pack(base, data, settings, max(rank for rank, _, _ in cells))
        for trial in trials[first : first + settings.slots]:
            pack.admit(trial)
        yield from (evaluation.eval_loss for evaluation in pack.advance())
        pack.close()


def _train_whole(config: Config, data: Data, lr: float) -> float:
    """Final evaluation loss of full fine-tuning on the same examples in the same order."""
    model = load_base(config.model, torch.device("cpu")).model.requires_grad_(True)
    train = config.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=train.max_steps)
    rows = order(len(data.train), train.seed)
    for step in range(train.max_steps):
        chosen = rows(step * train.batch_size, train.batch_size)
        _loss(model, data.train.batch(chosen)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return _mean_loss(model, data.evaluation)


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    return nll[batch.loss_mask[:, 1:].flatten()].mean()


def _mean_loss(model: Any, part: TokenSet) -> float:
    with torch.no_grad():
        return float(_loss(model, part.batch(torch.arange(len(part)))))
