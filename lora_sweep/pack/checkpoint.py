"""A slot's checkpoint on disk: tensors and counters in one file, written whole and read with care."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_sweep.adapters.peft_template import save
from lora_sweep.pack.trial import Trial
from lora_sweep.system import files
from lora_sweep.system.out_of_memory import is_out_of_memory

CHECKPOINT = "checkpoint.safetensors"


class DamagedCheckpoint(Exception):
    """The checkpoint cannot be gone on from; the message is one clause that begins with a verb."""


UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)
"""What a file raises, when it is read or when a slot takes its content, that is no slot's checkpoint."""


def metadata(trial: Trial, counters: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the file beside the tensors: safetensors takes texts."""
    return {"counters": json.dumps(counters), "numbers": json.dumps(numbers), "trial": _identity(trial)}


def write(folder: Path, tensors: dict[str, Tensor], texts: dict[str, str]) -> None:
    """Writes the file whole or not at all. Raises OSError or SafetensorError."""
    if folder.is_symlink() or not folder.is_dir():
        files.remove(folder)
        folder.mkdir(parents=True)
    staging = files.staging(folder / CHECKPOINT)
    save(tensors, staging, texts)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    staging.rename(folder / CHECKPOINT)


def read(folder: Path, trial: Trial) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, counters, numbers) as `metadata` and `write` took them.

    Raises DamagedCheckpoint where they cannot be read, or are another trial's.
    """
    path = folder / CHECKPOINT
    try:
        with files.open_file(path, follow=False):  # no link, no FIFO
            pass
        with safe_open(str(path), framework="pt") as file:
            texts: dict[str, str] = file.metadata() or {}
            if texts.get("trial") != _identity(trial):
                raise files.Unsafe("is of a trial with other settings")
            keys: list[str] = file.keys()
            tensors = {key: file.get_tensor(key) for key in keys}
        return tensors, json.loads(texts["counters"]), json.loads(texts["numbers"])
    except files.Unsafe as error:
        raise DamagedCheckpoint(str(error)) from error
    except UNREADABLE as error:
        raise damaged(error) from error


def damaged(error: Exception) -> Exception:
    """DamagedCheckpoint with what one of UNREADABLE says; the error itself where it says that memory ran out."""
    if is_out_of_memory(error):
        return error
    message = " ".join(str(error).split())[:200]
    return DamagedCheckpoint(f"cannot be read ({type(error).__name__}: {message})")


def _identity(trial: Trial) -> str:
    whole: dict[str, Any] = asdict(trial) | {"cell": trial.cell.number}
    # How many share the pack changes no trial.
    whole["train"].pop("slots")
    # Nor do health checks.
    whole.pop("health")
    return json.dumps(whole, sort_keys=True)
