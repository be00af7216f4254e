"""One trial as anybody would run it: a process of its own, transformers' Trainer and PEFT.

    python -m lora_sweep.bench.hf_trainer FILE.json

FILE.json is a `Job`, the result goes to the file that it names. What it is spared: tokenizing, composing a
configuration, attention masks (padding is on the right), saving, logging, and a key-value cache.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from lora_sweep.bench import gauge

IGNORE_INDEX = -100
PADDED_TO = 8
"""Batches are padded to their longest row in steps of this many tokens."""


@dataclass(frozen=True)
class Job:
    """What an HF Trainer trial takes; plain values only."""

    base: str
    """What from_pretrained takes."""
    base_arguments: dict[str, Any]
    """revision, trust_remote_code, attn_implementation."""
    dtype: str
    """torch's name of it."""
    quantization: str | None
    is_quantized: bool
    """Now by `quantization`, or already as stored."""
    adapter: dict[str, Any]
    """Of LoraConfig."""
    lr_A: float
    lr_B: float
    weight_decay_A: float
    weight_decay_B: float
    betas: tuple[float, float]
    eps: float
    train: dict[str, Any]
    """config.TrainConfig."""
    device: str
    """cpu or cuda."""
    threads: int
    data: str
    """.npz; `Rows` says what is in it. The training rows lie in the order in which they are taken."""
    parts: tuple[str, ...]
    """Sets to evaluate on; the first one's loss is the trial's."""
    result: str


class Rows(Dataset[dict[str, Tensor]]):
    """A set in an .npz: NAME_ids, NAME_counted and NAME_positions (all tokens,), NAME_offsets (rows + 1,)."""

    def __init__(self, arrays: Any, name: str) -> None:
        self._ids, self._loss_mask = arrays[f"{name}_ids"].astype(np.int64), arrays[f"{name}_counted"]
        self._positions = arrays.get(f"{name}_positions")
        self._offsets = arrays[f"{name}_offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        begin, end = self._offsets[row], self._offsets[row + 1]
        ids = torch.from_numpy(self._ids[begin:end])
        one = {"input_ids": ids, "labels": ids.masked_fill(~torch.from_numpy(self._loss_mask[begin:end]), IGNORE_INDEX)}
        if self._positions is not None:
            one["position_ids"] = torch.from_numpy(self._positions[begin:end])
        return one


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)
    T = -(-longest // PADDED_TO) * PADDED_TO
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    return {
        key: torch.stack([functional.pad(row[key], (0, T - len(row[key])), value=fill[key]) for row in rows])
        for key in rows[0]
    }


class FirstStep(TrainerCallback):
    """When the first step began."""

    began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.began = time.time()


def main(file: Path) -> None:
    job = Job(**json.loads(file.read_text()))
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    model = _base(job, device)
    peak = gauge.fresh_peak(device)
    torch.manual_seed(job.train["seed"])
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job.adapter))
    arrays = np.load(job.data)
    settings = job.train
    optimizer = _optimizer(model, job)
    schedule = get_scheduler(
        "constant_with_warmup" if settings["schedule"] == "constant" else settings["schedule"],
        optimizer,
        num_warmup_steps=settings["warmup_steps"],
        num_training_steps=settings["max_steps"],
    )
    first_step = FirstStep()
    trainer = Trainer(
        model,
        _arguments(job),
        data_collator=collate,
        train_dataset=Rows(arrays, "train"),
        eval_dataset={part: Rows(arrays, part) for part in job.parts},
        optimizers=(optimizer, schedule),
        callbacks=[first_step],
        preprocess_logits_for_metrics=_sums,
        compute_metrics=_token_mean,
    )
    trainer.train()
    key = f"eval_{job.parts[0]}_token_loss"
    if not any(key in row and row["step"] == settings["max_steps"] for row in trainer.state.log_history):
        trainer.evaluate()
    gauge.wait(device)
    ended = time.time()
    losses = [row[key] for row in trainer.state.log_history if key in row]
    result = {
        "eval_loss": losses[-1],
        "evaluations": len(losses),
        "first_step_at": first_step.began,
        "ended_at": ended,
        "peak_bytes": None if peak.bytes is None else int(peak.bytes),
    }
    Path(job.result).write_text(json.dumps(result))


def _base(job: Job, device: torch.device) -> Any:
    dtype = getattr(torch, job.dtype)
    arguments: dict[str, Any] = dict(job.base_arguments)
    if job.is_quantized:
        arguments["device_map"] = {"": str(device)}
    if job.quantization:
        from lora_sweep.base import quant

        arguments["quantization_config"] = quant.settings(job.quantization, dtype)
    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype, use_safetensors=True, **arguments)
    if job.is_quantized:
        from lora_sweep.base import quant

        quant.patch_linears(model, dtype)
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # Trainer switches it on; the other ways train without it
    return model if job.is_quantized else model.to(device)


def _optimizer(model: nn.Module, job: Job) -> torch.optim.AdamW:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    A, B = ([parameter for name, parameter in named if kind in name] for kind in ("lora_A", "lora_B"))
    groups = [
        {"params": A, "lr": job.lr_A, "weight_decay": job.weight_decay_A},
        {"params": B, "lr": job.lr_B, "weight_decay": job.weight_decay_B},
    ]
    return torch.optim.AdamW(groups, betas=job.betas, eps=job.eps, fused=True)


def _arguments(job: Job) -> TrainingArguments:
    settings = job.train
    return TrainingArguments(
        output_dir=str(Path(job.result).parent),
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["eval_batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings["gradient_checkpointing"] else None,
        max_grad_norm=settings["max_grad_norm"] or 0.0,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=settings["eval_every"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings["seed"],
        use_cpu=job.device == "cpu",
    )


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, 2): summed loss and number of counted tokens of each row. Trainer's own mean is over batches."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    nll = functional.cross_entropy(wide.transpose(1, 2), shifted, ignore_index=IGNORE_INDEX, reduction="none")
    return torch.stack([nll.double().sum(dim=1), (shifted != IGNORE_INDEX).sum(dim=1).double()], dim=1)


def _token_mean(predicted: Any) -> dict[str, float]:
    sums: NDArray[np.float64] = predicted.predictions.sum(axis=0)
    return {"token_loss": float(sums[0] / sums[1])}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
