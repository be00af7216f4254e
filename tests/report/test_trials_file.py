"""trials.jsonl while a study runs: whole lines, one a cell, whatever is written when."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_sweep.config import HealthConfig
from lora_sweep.records import Cell
from lora_sweep.report.results import StudyTable, rows
from lora_sweep.report.trials_file import TrialsFile
from lora_sweep.study.study import Study
from lora_sweep.sweep import compose

RULES: HealthConfig = compose.section("health", {})


def result(cell: Cell, loss: float) -> dict[str, Any]:
    verdict = {"gain": 1.0, "noise": 0.01, "causes": [], "causes_without_gain": []}
    return {
        "cell": cell.number, "params": dict(cell.params), "state": "COMPLETE", "reason": None, "flags": [],
        "findings": [], "eval_loss": loss, "base_loss": 5.0, "train_loss": loss, "gap": 0.1, "forgetting": None,
        "steps": 4, "seconds": 1.0, "wandb_id": None, "effective": None, "curve": {"2": loss + 1, "4": loss},
        "diagnosis": verdict,
    }  # fmt: skip


def finish(study: Study, loss: Callable[[int], float], cells: int) -> list[int]:
    numbers = []
    for _ in range(cells):
        lease = study.ask(lambda _: True)
        assert lease is not None
        folder = study.trial_folder(lease.cell.number)
        folder.mkdir(parents=True)
        value = loss(lease.cell.number)
        (folder / "result.json").write_text(json.dumps(result(lease.cell, value)))
        study.report_rung({lease: value}, 4)
        study.tell(lease, "COMPLETE", value)
        numbers.append(lease.cell.number)
    return numbers


def study_of(folder: Path, cells: int) -> Study:
    grid = [Cell(number, {"method.rank": number + 1, "method.alpha": 8}) for number in range(cells)]
    return Study.open(folder, name="many", cells=grid)


def lines(study: Study) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study.folder / "trials.jsonl").read_text().splitlines()]


def test_a_cell_that_ends_has_its_line_at_once_and_the_others_keep_theirs(tmp_path: Path) -> None:
    with study_of(tmp_path / "many", 6) as study:
        table, file = StudyTable(study, RULES), TrialsFile(study.folder)
        file.write(table.rows())
        assert [row["state"] for row in lines(study)] == ["WAITING"] * 6
        for number in finish(study, lambda number: 2.0 + number, 3):
            assert all(file.update(row) for row in table.ended(number))
            assert lines(study)[number]["eval_loss"] == 2.0 + number
        assert [row["number"] for row in lines(study)] == list(range(6))
        assert [row["state"] for row in lines(study)] == ["COMPLETE"] * 3 + ["WAITING"] * 3
        file.write(table.rows())
        assert lines(study) == rows(study, RULES), "compared with the study again, it is what is read anew"


def test_a_file_that_somebody_has_changed_is_written_anew_and_not_into(tmp_path: Path) -> None:
    with study_of(tmp_path / "many", 2) as study:
        table, file = StudyTable(study, RULES), TrialsFile(study.folder)
        file.write(table.rows())
        path = study.folder / "trials.jsonl"
        path.write_text("mine\n")
        (number,) = finish(study, lambda _: 2.0, 1)
        assert [file.update(row) for row in table.ended(number)] == [False]
        assert path.read_text() == "mine\n"
        path.unlink()
        assert [file.update(row) for row in table.ended(number)] == [False]


def test_a_line_that_does_not_fit_is_left_to_the_next_writing(tmp_path: Path) -> None:
    with study_of(tmp_path / "many", 2) as study:
        table, file = StudyTable(study, RULES), TrialsFile(study.folder)
        file.write(table.rows())
        (number,) = finish(study, lambda _: 2.0, 1)
        (row,) = table.ended(number)
        assert not file.update(row | {"damage": "x" * 2000})
        assert lines(study)[number]["state"] == "WAITING"
        assert file.update(row)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_line_costs_the_same_at_2000_cells_as_at_100(tmp_path: Path) -> None:
    """From a cell's end to its line: medians of 40 cells, taken in turn, the fastest of three rounds."""
    studies = {done: study_of(tmp_path / str(done), done + 200) for done in (100, 2000)}
    parts = {}
    for done, study in studies.items():
        finish(study, lambda number: 2.0 + number % 7, done)
        parts[done] = StudyTable(study, RULES), TrialsFile(study.folder)
        parts[done][1].write(parts[done][0].rows())
    ratios = []
    for _ in range(3):
        spent: dict[int, list[float]] = {100: [], 2000: []}
        for _ in range(40):
            for done, (table, file) in parts.items():
                (number,) = finish(studies[done], lambda number: 2.0 + number % 7, 1)
                began = time.perf_counter()
                assert all(file.update(row) for row in table.ended(number))
                spent[done].append(time.perf_counter() - began)
        few, many = (statistics.median(spent[done]) for done in (100, 2000))
        print(f"{1e6 * few:.0f} us at 100 cells, {1e6 * many:.0f} us at 2,000")
        ratios.append(many / few)
    for study in studies.values():
        study.close()
    assert min(ratios) < 1.2
