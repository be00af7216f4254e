"""Starts HF Trainer trials, hands them what they train on, and times them from the outside."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_sweep.base import base_config
from lora_sweep.base.load import LoadedBase
from lora_sweep.bench import sequential
from lora_sweep.bench.hf_trainer import Job
from lora_sweep.bench.reduction import TrainerRun
from lora_sweep.config import Config
from lora_sweep.data import Data, TokenSet, order
from lora_sweep.pack import Trial


class TrainerProcess:
    """TrainerProcess trials of one base and data set; files lie in `folder`."""

    def __init__(self, config: Config, base: LoadedBase, data: Data, folder: Path) -> None:
        self._config, self._data, self._folder = config, data, folder
        self._device = base.model.device
        self._dtype = str(base.dtype).removeprefix("torch.")
        self._is_quantized = base_config.stored_quantization(base.model.config) is not None
        self._name, self._revision = base.name_or_path, base.revision
        if base.tokenizer is None:
            self._name = str(folder / "drawn")
            base.model.save_pretrained(self._name)

    def run(self, trial: Trial) -> TrainerRun:
        """Raises RuntimeError with the end of what the process said when it fails."""
        file, result = self._folder / "job.json", self._folder / "result.json"
        file.write_text(json.dumps(asdict(self._job(trial, result))))
        began = time.time()
        command = [sys.executable, "-m", "lora_sweep.bench.hf_trainer", str(file)]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, check=False)
        ended = time.time()
        if done.returncode:
            raise RuntimeError(f"the HF Trainer process of trial {trial.cell.number} failed:\n{done.stderr[-2000:]}")
        measured = json.loads(result.read_text())
        return TrainerRun(
            measured["eval_loss"],
            measured["first_step_at"] - began,
            measured["ended_at"] - measured["first_step_at"],
            ended - began,
            measured["peak_bytes"],
        )

    def _environment(self) -> dict[str, str]:
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        if self._device.type == "cuda":
            # Of several visible devices Trainer would take all.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            index = self._device.index or 0
            environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible != [""] else str(index)
        return environment

    def _job(self, trial: Trial, result: Path) -> Job:
        model, method, optimizer = self._config.model, trial.method, trial.optimizer
        arguments: dict[str, Any] = {"attn_implementation": model.attn_implementation}
        if self._revision is not None:
            arguments["revision"] = self._revision
        if model.trust_remote_code:
            arguments["trust_remote_code"] = True
        return Job(
            base=self._name,
            base_arguments=arguments,
            dtype=self._dtype,
            quantization=model.quantization,
            is_quantized=self._is_quantized,
            adapter={
                "r": method.rank,
                "lora_alpha": method.alpha,
                "use_rslora": method.use_rslora,
                "target_modules": method.target_modules,
            },
            lr_A=trial.lr_A,
            lr_B=trial.lr_B,
            weight_decay_A=optimizer.weight_decay,
            weight_decay_B=trial.weight_decay_B,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            train=asdict(trial.train),
            device=self._device.type,
            threads=torch.get_num_threads(),
            data=str(self._write(trial)),
            parts=tuple(parts(self._data)),
            result=str(result),
        )

    def _write(self, trial: Trial) -> Path:
        arrays = _rows(self._data.train, chosen(self._data, trial), "train")
        for name, part in parts(self._data).items():
            arrays |= _rows(part, torch.arange(len(part)), name)
        file = self._folder / "data.npz"
        np.savez(file, **arrays)
        return file


def parts(data: Data) -> dict[str, TokenSet]:
    parts = {"evaluation": data.evaluation, "probe": data.probe, "retention": data.retention}
    return {name: part for name, part in parts.items() if part is not None}


def chosen(data: Data, trial: Trial) -> torch.Tensor:
    """Training rows of the trial in the order in which it takes them."""
    train = trial.train
    total = train.max_steps * train.batch_size * train.gradient_accumulation_steps
    return order(len(data.train), train.seed)(0, total)


def _rows(part: TokenSet, rows: torch.Tensor, name: str) -> dict[str, Any]:
    """The rows without padding, as trainer_runs.Rows reads them."""
    batch, lengths = part.batch(rows), sequential.by_row(part, part.lengths)[rows.numpy()]
    inside = torch.arange(part.length) < torch.from_numpy(lengths)[:, None]
    arrays = {"ids": batch.input_ids, "counted": batch.loss_mask}
    if batch.position_ids is not None:
        arrays["positions"] = batch.position_ids
    flat = {f"{name}_{key}": array[inside].numpy() for key, array in arrays.items()}
    return flat | {f"{name}_offsets": np.cumsum([0, *lengths])}
