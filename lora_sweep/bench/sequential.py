"""Trials one after another in one process: PEFT on the resident base and a plain training loop.

What packing is measured against, so written to be fast: fused AdamW, no wait for the device inside a stretch of steps,
logits never copied to be shifted, batches padded to their own longest row.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_sweep.adapters.peft_template import peft_chatter_off, peft_config
from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data, TokenSet, order
from lora_sweep.data.tokens import LENGTH_BUCKET
from lora_sweep.pack import Trial

IGNORE_INDEX = -100
"""transformers' label of a token whose loss does not count."""


def by_row(part: TokenSet, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) sums of what each example has, (examples,): lengths, say."""
    if part.starts is None:
        return values
    sums: NDArray[np.int64] = np.add.reduceat(values, part.starts[:-1])
    return sums


class Feed:
    """A set as batches on a device, padded to the longest row of the batch in steps of LENGTH_BUCKET."""

    def __init__(self, part: TokenSet, device: torch.device) -> None:
        self._part, self._device = part, device
        self._lengths, self._counts = by_row(part, part.lengths), by_row(part, part.counts)

    def __len__(self) -> int:
        return len(self._part)

    def loss_tokens(self, rows: Tensor) -> int:
        """Tokens of these rows whose loss counts."""
        return int(self._counts[rows.numpy()].sum())

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(what the model is called with, labels (rows, T): the token that each position predicts, or IGNORE_INDEX)."""
        batch = self._part.batch(rows)
        longest = int(self._lengths[rows.numpy()].max())
        T = min(-(-longest // LENGTH_BUCKET) * LENGTH_BUCKET, batch.input_ids.shape[1])
        ids, loss_mask = batch.input_ids[:, :T], batch.loss_mask[:, :T]
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, :-1] = ids[:, 1:].masked_fill(~loss_mask[:, 1:], IGNORE_INDEX)
        inputs = {"input_ids": ids.to(self._device)}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids[:, :T].to(self._device)
        return inputs, labels.to(self._device)


def train(base: LoadedBase, data: Data, trial: Trial) -> tuple[float, Tensor]:
    """(last evaluation loss, mean loss of each step (max_steps,) on the CPU) of the trial on the resident base.

    The same samples, steps, masking, schedule and evaluations as in a pack; the base is left as it was found.
    """
    method, settings = trial.method, trial.train
    config = peft_config(method.rank, method.alpha, method.use_rslora, method.dropout, method.target_modules)
    with torch.random.fork_rng(devices=[]), peft_chatter_off():
        torch.manual_seed(settings.seed)
        model = get_peft_model(base.model, config)
    layers = [layer for layer in base.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        model.eval()  # no dropout of the base's own, as in a pack
        for layer in layers if settings.gradient_checkpointing else ():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return _run(model, data, trial)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        model.unload()


def _run(model: torch.nn.Module, data: Data, trial: Trial) -> tuple[float, Tensor]:
    settings = trial.train
    optimizer = _optimizer(model, trial)
    schedule = get_scheduler(
        "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_steps,
    )
    device = next(model.parameters()).device
    feed = Feed(data.train, device)
    measured = [Feed(part, device) for part in (data.evaluation, data.probe, data.retention) if part is not None]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rows = order(len(data.train), settings.seed)
    b, each = settings.batch_size, settings.batch_size * settings.gradient_accumulation_steps
    means: list[Tensor] = []
    eval_loss = float("nan")
    for step in range(1, settings.max_steps + 1):
        chosen = rows((step - 1) * each, each)
        total = feed.loss_tokens(chosen)
        mean = torch.zeros((), device=device)
        for first in range(0, each, b):
            inputs, labels = feed.batch(chosen[first : first + b])
            loss = _summed(model, inputs, labels) / total
            loss.backward()
            mean = mean + loss.detach()
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        means.append(mean)
        if step % settings.eval_every == 0 or step == settings.max_steps:
            eval_loss, *_ = [_mean_loss(model, part, settings.eval_batch_size) for part in measured]
    return eval_loss, torch.stack(means).double().cpu()


def _optimizer(model: torch.nn.Module, trial: Trial) -> torch.optim.AdamW:
    """One group of A and one of B: LoRA+ (2402.12354)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    A, B = ([parameter for name, parameter in named if kind in name] for kind in ("lora_A", "lora_B"))
    return torch.optim.AdamW(
        [
            {"params": A, "lr": trial.lr_A, "weight_decay": trial.optimizer.weight_decay},
            {"params": B, "lr": trial.lr_B, "weight_decay": trial.weight_decay_B},
        ],
        betas=(trial.optimizer.beta1, trial.optimizer.beta2),
        eps=trial.optimizer.eps,
        fused=True,
    )


def _summed(model: torch.nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**inputs, use_cache=False).logits
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _mean_loss(model: torch.nn.Module, feed: Feed, batch_size: int) -> float:
    """Over all counted tokens of the set; waits for the device once."""
    with torch.no_grad():
        batches = [torch.arange(len(feed))[first : first + batch_size] for first in range(0, len(feed), batch_size)]
        sums = [_summed(model, *feed.batch(rows)).double() for rows in batches]
    return float(torch.stack(sums).sum()) / feed.loss_tokens(torch.arange(len(feed)))
