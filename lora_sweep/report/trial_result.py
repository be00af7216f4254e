"""The result of one trial, as the study it belongs to reads it."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lora_sweep import health
from lora_sweep.records import Diagnosis, Finding
from lora_sweep.system.files import Unsafe
from lora_sweep.tracking import read_losses, read_result


def read_ended(folder: Path) -> dict[str, Any] | None:
    """result.json of a trial that has ended, with all that `Run.finish` puts there; None of one that has not.

    Raises Unsafe where it cannot be read or holds something else.
    """
    result = read_result(folder)
    if result is not None and not _is_ended(result):
        raise Unsafe("is no record of a trial")
    return result


def _is_ended(result: Mapping[str, Any]) -> bool:
    match result:
        case {"base_loss": float(base), "eval_loss": float() | None as loss, "steps": int(), "params": dict()}:
            if not math.isfinite(base) or (loss is None and result["state"] == "COMPLETE"):
                return False
        case _:
            return False
    try:
        for each in result["findings"]:
            Finding.of_plain(each)
        if result.get("diagnosis") is not None:
            Diagnosis.of_plain(result["diagnosis"])
        peer(Path(), result)
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def peer(folder: Path, result: Mapping[str, Any]) -> health.Peer:
    """A trial as the others of its study see it.

    Args:
        result: its `cell`, `effective` and `curve`, as far as known.
    """
    coordinates = result.get("effective") or {}
    return health.Peer(
        result["cell"],
        float(coordinates.get("log_X", math.nan)),
        float(coordinates.get("log_Y", math.nan)),
        {int(step): float(loss) for step, loss in result.get("curve", {}).items() if loss is not None},
        partial(read_losses, folder),
    )
