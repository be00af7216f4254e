"""A study as rows: one line a cell, derived from the ledger and the trials' own results."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

from lora_sweep import health
from lora_sweep.config import HealthConfig
from lora_sweep.records import Cell, Diagnosis, Evaluation, Finding, State
from lora_sweep.report.trial_result import peer, read_ended
from lora_sweep.study.view import CellStatus, StudyView
from lora_sweep.sweep import compose, saved
from lora_sweep.system.files import Unsafe
from lora_sweep.tracking import RESULT, read_rows, seal

Row = dict[str, Any]
"""A line of trials.jsonl; its keys are kept stable and listed in study/README.md."""

ENDED = ("COMPLETE", "PRUNED", "FAIL")

_FROM_RESULT = (
    "eval_loss", "base_loss", "train_loss", "gap", "forgetting", "steps", "seconds", "effective", "wandb_id",
)  # fmt: skip


def rows(view: StudyView, rules: HealthConfig | None = None) -> list[Row]:
    """One per cell that was asked for, by number; losses in nats per token.

    A duplicate has all from the cell that is run for it, which `same_run_as` names, but its own number and params.

    Args:
        rules: by which trials are judged, where they are known: else those that the study was launched with.

    >>> [(row["number"], row["state"], row["eval_loss"]) for row in rows(view)]
    [(0, 'COMPLETE', 1.25), (1, 'WAITING', None)]
    """
    return StudyTable(view, rules).rows()


class StudyTable:
    """The rows of a study, each trial's result read once; a study that runs reports what happens to it."""

    def __init__(self, view: StudyView, rules: HealthConfig | None = None) -> None:
        """`rules`: see `rows`."""
        self._view = view
        plain = launched(view)
        self._rules = rules or saved.health_rules(plain)
        self._keeps_all = compose.leaf(plain, "study.keep_adapters") in (None, "all")
        self._results: dict[int, Row | None] = {}
        self._damages: dict[int, list[Finding]] = {}
        self._peers: dict[float, health.Peers] = {}
        """Loss of the base -> the trials that have a result on it: trials with one are on one base and one data set."""
        self._running: dict[int, Row] = {}
        """Number of a cell that is trained here -> what its last evaluation says."""
        self._duplicates: dict[int, list[Cell]] = {}
        for status in view.statuses():
            self._read(status)

    def evaluated(self, number: int, evaluation: Evaluation) -> None:
        """A cell that is trained here was evaluated."""
        before = self._running.get(number, {}).get("eval_loss", math.inf)
        self._running[number] = {
            "eval_loss": min(before, evaluation.eval_loss),
            "train_loss": _finite(evaluation.train_loss),
            "gap": _finite(evaluation.gap),
            "steps": evaluation.step,
        }

    def ended(self, number: int) -> list[Row]:
        """The rows of a cell that has just ended and of its duplicates, with its own findings alone.

        At the cost of this cell, however many the study has. What compares it with the study is left to `rows`.
        """
        status, runs = self._view.status(number)
        if runs is not None:
            return [self._row(self._view.status(runs)[0], compares=False) | _as_duplicate(status.cell, runs)]
        self._running.pop(number, None)
        self._read(status)
        return self._with_duplicates(self._row(status, compares=False))

    def rows(self) -> list[Row]:
        """All rows as the study is now, by number."""
        statuses = self._view.statuses()
        self._duplicates = {}
        for cell, runs in self._view.duplicates().values():
            self._duplicates.setdefault(runs, []).append(cell)
        for status in statuses:
            if status.state in ENDED and status.cell.number not in self._damages:
                self._read(status)
        table = [row for status in statuses for row in self._with_duplicates(self._row(status, compares=True))]
        return sorted(table, key=itemgetter("number"))

    def _read(self, status: CellStatus) -> None:
        number = status.cell.number
        result, damages = _ended(self._view, status, self._keeps_all)
        self._results[number] = result
        if status.state in ENDED:
            self._damages[number] = damages
        if result is not None:
            base_loss = result["base_loss"]
            trials = self._peers.setdefault(base_loss, health.Peers(base_loss))
            trials.add(peer(self._view.trial_folder(number), result))

    def _row(self, status: CellStatus, compares: bool) -> Row:
        number = status.cell.number
        result = self._results.get(number)
        row = _row(self._view.trial_folder(number), status, result, self._running.get(number))
        if result is not None and status.state in ENDED:
            row |= _findings(result, self._peers[result["base_loss"]] if compares else None, self._rules)
        for damage in self._damages.get(number, ()):
            _add(row, damage)
        return row

    def _with_duplicates(self, row: Row) -> list[Row]:
        copies = self._duplicates.get(row["number"], ())
        return [row, *(row | _as_duplicate(cell, row["number"]) for cell in copies)]


def _as_duplicate(cell: Cell, runs: int) -> Row:
    return {"number": cell.number, "params": dict(cell.params), "same_run_as": runs}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def launched(view: StudyView) -> dict[str, Any]:
    """What the study was launched with, by its ledger; of an older one by its config.yaml. Raises ConfigError."""
    return view.launched or saved.load_launched(view.folder) or {}


def _ended(view: StudyView, status: CellStatus, keeps_all: bool) -> tuple[Row | None, list[Finding]]:
    """(result.json of a trial that has ended, what became of its files since).

    Args:
        keeps_all: whether the study keeps the adapter of each trial.
    """
    folder = view.trial_folder(status.cell.number)
    if status.state not in ENDED:
        with suppress(Unsafe):  # of a cell that is trained again; the next launch says so
            return read_ended(folder), []
        return None, []
    try:
        result = read_ended(folder)
        why = "is gone" if result is None else _disagrees(result, status)
    except Unsafe as error:
        result, why = None, str(error)
    if why:
        # A trial that does not fit into memory has none.
        return None, [] if status.reason == "memory" else [_lost_record(folder, why)]
    assert result is not None
    names = seal.broken(folder, result.get("files", {}))
    is_kept = keeps_all or (folder / seal.ADAPTER).exists()
    shipped = [name for name in names if name == "config.yaml" or name.startswith(f"{seal.ADAPTER}/")]
    damages = [_damaged(folder, "adapter_damaged", shipped, is_fault=True)] if shipped and is_kept else []
    others = [name for name in names if name not in shipped]
    return result, [*damages, _damaged(folder, "record_damaged", others, is_fault=False)] if others else damages


def _disagrees(result: Row, status: CellStatus) -> str:
    """Why the result is not that of the cell, one clause; empty where it is."""
    if result["cell"] != status.cell.number or result["params"] != dict(status.cell.params):
        return "is of another cell"
    is_same = status.state == "FAIL" or result["eval_loss"] in (None, status.value)
    if result["state"] != status.state or not is_same:
        return f"says {result['state']} with {result['eval_loss']}, the ledger {status.state} with {status.value}"
    return ""


def _lost_record(folder: Path, why: str) -> Finding:
    remedy = "bring result.json back from a copy, or train the cell in another study"
    return Finding("record_lost", {}, f"{folder / RESULT} {why}; the ledger's loss stands", remedy=remedy)


def _damaged(folder: Path, flag: str, names: Sequence[str], is_fault: bool) -> Finding:
    sentence = f"{folder}: gone or changed since the trial ended: {', '.join(names)}"
    remedy = "bring its files back from a copy, or train the cell in another study" if is_fault else ""
    return Finding(flag, {}, sentence, is_fault=is_fault, remedy=remedy)


def _add(row: Row, damage: Finding) -> None:
    row["flags"] = [*row["flags"], damage.flag]
    row["faults"] = [*row["faults"], *([damage.flag] if damage.is_fault else [])]
    if damage.remedy:
        row["remedies"] = row["remedies"] | {damage.flag: damage.remedy}
    row["damage"] = "; ".join(filter(None, (row["damage"], damage.sentence)))


def _findings(result: Mapping[str, Any], peers: health.Peers | None, rules: HealthConfig) -> dict[str, Any]:
    """The verdict, which compares with the study as it is now, before the trial's own findings.

    Args:
        peers: the trials to compare with; None: the trial's own findings alone.
    """
    diagnosis = result.get("diagnosis")
    own = [Finding.of_plain(each) for each in result["findings"]]
    verdict = (
        ()
        if peers is None
        else health.compared(
            None if diagnosis is None else Diagnosis.of_plain(diagnosis),
            own,
            rules,
            peers,
            result["cell"],
            result["steps"],
            was_pruned=result["state"] == "PRUNED",
        )
    )
    findings = [*verdict, *own]
    return {
        "flags": [each.flag for each in findings],
        "faults": [each.flag for each in findings if each.is_fault],
        "cause": next((each.cause for each in findings if each.cause is not None), None),
        "remedies": {each.flag: each.remedy for each in findings if each.remedy},
    }


def _row(trial: Path, status: CellStatus, result: Row | None, running: Row | None) -> Row:
    """`running`: of a cell that is trained by this process; of another process's the record on disk says it."""
    row: Row = {"number": status.cell.number, "state": status.state, "params": dict(status.cell.params)}
    row |= dict.fromkeys(_FROM_RESULT)
    row |= {"flags": [], "faults": [], "cause": None, "remedies": {}, "reason": status.reason}
    row["same_run_as"] = row["damage"] = None
    if status.state in ENDED:
        # The ledger's value stands where the record is lost.
        row |= {"eval_loss": status.value, "steps": status.step}
        row |= {} if result is None else {key: result.get(key) for key in _FROM_RESULT}
    elif status.state == "RUNNING" and running is not None:
        row |= running
    elif status.state == "RUNNING":
        evaluated = [each for each in read_rows(trial) if each.get("eval/loss") is not None]
        if evaluated:
            last = evaluated[-1]
            best = min(each["eval/loss"] for each in evaluated)
            row |= {"eval_loss": best, "train_loss": last.get("train/loss"), "gap": last.get("eval/gap")}
            row |= {"steps": last["step"]}
    return row


def ranked(table: Sequence[Row]) -> list[Row]:
    """Finished cells with a loss, best first; of one run first the cell that was run, then by number."""
    done = [row for row in table if row["state"] == "COMPLETE" and row["eval_loss"] is not None]
    return sorted(done, key=lambda row: (row["eval_loss"], row["same_run_as"] is not None, row["number"]))


def runs(table: Sequence[Row]) -> list[Row]:
    """The cells that are run themselves, in the order given."""
    return [row for row in table if row["same_run_as"] is None]


def same_run(table: Sequence[Row]) -> dict[int, list[int]]:
    """Number of a cell that is run -> those it is run for, ascending; only where there are any."""
    duplicates: dict[int, list[int]] = {}
    for row in sorted(table, key=itemgetter("number")):
        if row["same_run_as"] is not None:
            duplicates.setdefault(row["same_run_as"], []).append(row["number"])
    return duplicates


DAMAGES = frozenset({"record_lost", "adapter_damaged"})
"""Flags of a trial whose files are not what they were when it ended, so that it cannot be shipped."""


def is_intact(row: Row) -> bool:
    """Whether all that would be shipped is there as it was when the trial ended, as far as sizes show."""
    return not DAMAGES & set(row["faults"])


def is_healthy(row: Row) -> bool:
    """Whether it is finished without a fault; warnings are shown, but keep nothing from being shipped."""
    return row["state"] == "COMPLETE" and not row["faults"]


def summary(view: StudyView, table: Sequence[Row], slots: int | None) -> dict[str, Any]:
    """What `status --json` says of the study and its rows: cells, runs, counts of cells by state, best, ETA, slots.
    `is_held`: whether a process works on it.

    Args:
        slots: as asked for; null where they are chosen on the way, and as many as are running count.
    """
    statuses = view.statuses()
    states = [row["state"] for row in table]
    not_drawn = view.size - len(table)
    left = sum(row["state"] in ("WAITING", "RUNNING") for row in runs(table)) + not_drawn
    best = next(iter(ranked(table)), None)
    return {
        "study": view.name,
        "cells": view.size,
        "distinct_runs": view.size - len(view.duplicates()),
        **{state: states.count(state) + (not_drawn if state == "WAITING" else 0) for state in get_args(State)},
        "best": best and {key: best[key] for key in ("number", "params", "eval_loss", "base_loss", "flags", "cause")},
        "eta_seconds": _eta_seconds(statuses, left, slots or max(1, states.count("RUNNING"))),
        "slots": slots,
        "is_held": view.is_held,
    }


def _eta_seconds(statuses: Sequence[CellStatus], left: int, slots: int) -> float | None:
    """Mean wall time of a finished run x runs left / slots; None before the first is finished."""
    walls = [(s.finished - s.started).total_seconds() for s in statuses if s.started and s.finished]
    return sum(walls) / len(walls) * left / slots if walls else None
