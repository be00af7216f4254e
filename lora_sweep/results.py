"""A study as rows: one line a cell, derived from the ledger and the trials' own results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_sweep.study import CellStatus, StudyView
from lora_sweep.tracking import read_result, read_rows, write_whole

Row = dict[str, Any]
"""A line of trials.jsonl; its keys are kept stable and told in the README."""

_FROM_RESULT = ("eval_loss", "base_loss", "train_loss", "gap", "forgetting", "steps", "seconds", "flags", "wandb_id")


def rows(view: StudyView) -> list[Row]:
    """One per cell that was asked for, by number; losses in nats per token."""
    return [_row(view.trial_folder(status.cell.number), status) for status in view.statuses()]


def _row(trial: Path, status: CellStatus) -> Row:
    row: Row = {"number": status.cell.number, "state": status.state, "params": dict(status.cell.params)}
    row |= dict.fromkeys(_FROM_RESULT)
    row |= {"flags": [], "reason": status.reason, "same_run_as": None}
    result = read_result(trial)
    if status.state in ("COMPLETE", "PRUNED", "FAIL") and result is not None:
        row |= {key: result.get(key) for key in _FROM_RESULT}
    elif status.state == "RUNNING":
        seen = [each for each in read_rows(trial) if each.get("eval/loss") is not None]
        if seen:
            last = seen[-1]
            best = min(each["eval/loss"] for each in seen)
            row |= {"eval_loss": best, "train_loss": last.get("train/loss"), "gap": last.get("eval/gap")}
            row |= {"steps": last["step"]}
    return row


def write(view: StudyView) -> list[Row]:
    """Writes trials.jsonl anew, whole or not at all; returns its rows."""
    table = rows(view)
    write_whole(view.folder / "trials.jsonl", "".join(json.dumps(row) + "\n" for row in table))
    return table


def ranked(table: Sequence[Row]) -> list[Row]:
    """Finished cells with a loss, best first; then by number."""
    done = [row for row in table if row["state"] == "COMPLETE" and row["eval_loss"] is not None]
    return sorted(done, key=lambda row: (row["eval_loss"], row["number"]))


def is_healthy(row: Row) -> bool:
    return row["state"] == "COMPLETE" and not row["flags"]


def summary(view: StudyView, table: Sequence[Row], slots: int) -> dict[str, Any]:
    """What `status --json` says of the study and its rows: cells, counts by state, best, eta_seconds, slots."""
    statuses = view.statuses()
    counts = view.counts()
    waiting = view.size - len(statuses) + counts["WAITING"]
    best = next(iter(ranked(table)), None)
    return {
        "study": view.name,
        "cells": view.size,
        **{state: waiting if state == "WAITING" else count for state, count in counts.items()},
        "best": best and {key: best[key] for key in ("number", "params", "eval_loss", "base_loss", "flags")},
        "eta_seconds": _eta_seconds(statuses, waiting + counts["RUNNING"], slots),
        "slots": slots,
    }


def _eta_seconds(statuses: Sequence[CellStatus], left: int, slots: int) -> float | None:
    """Mean wall time of a finished cell x cells left / slots; None before the first is finished."""
    walls = [(s.finished - s.started).total_seconds() for s in statuses if s.started and s.finished]
    return sum(walls) / len(walls) * left / slots if walls else None
