"""The storage of a study, and whether what it holds is that study."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, SuccessiveHalvingPruner
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from lora_sweep.errors import StudyError
from lora_sweep.records import Cell
from lora_sweep.study.asha import Asha
from lora_sweep.study.journal import Journal
from lora_sweep.study.search import Search
from lora_sweep.study.view import JOURNAL, Attempt, refuse_lost


def open_storage(folder: Path, name: str) -> tuple[JournalStorage, Journal]:
    """The storage of the study `name` in `folder`, made where there is none. Raises StudyError."""
    path = folder / JOURNAL
    if not path.exists():
        refuse_lost(folder)
    journal = Journal(path, writable=True)
    storage = JournalStorage(journal)
    studies = storage.get_all_studies()
    names = [each.study_name for each in studies]
    if not any("about" in each.user_attrs for each in studies):
        refuse_lost(folder)
    if not studies:
        optuna.create_study(study_name=name, storage=storage, direction="minimize")
    elif names != [name]:
        raise StudyError(f"{folder}: holds the study {names[0]!r}, not {name!r}; choose another study.name")
    return storage, journal


def as_json(params: Mapping[str, Any]) -> str:
    """To compare with what is on disk: JSON distinguishes true from 1 and makes lists of tuples."""
    return json.dumps(dict(params), sort_keys=True)


def check_arguments(
    cells: Iterable[Cell] | None, search: Search | None, pruner: Asha | BasePruner | None
) -> tuple[Cell, ...] | None:
    """The cells of a grid; None without one. Raises ValueError for arguments of `Study.open` that make no sense."""
    if (cells is None) == (search is None):
        raise ValueError("give either cells or search")
    grid = None if cells is None else tuple(cells)
    if grid is not None and not 0 < len(grid) == len({cell.number for cell in grid}):
        raise ValueError("cells must not be empty and every number must be there once")
    for cell in grid or ():
        as_json(cell.params)
    inner = pruner
    while inner is not None:
        if isinstance(inner, SuccessiveHalvingPruner | HyperbandPruner):
            raise ValueError(f"{type(inner).__name__} keeps too few or all, by the order of calls: use Asha")
        inner = getattr(inner, "_wrapped_pruner", None)
    return grid


def refuse_other_cells(folder: Path, begun: Iterable[Cell], grid: Iterable[Cell]) -> None:
    """Raises StudyError where a cell that the study was begun with is not one of the grid."""
    params = {cell.number: as_json(cell.params) for cell in grid}
    for cell in begun:
        if params.get(cell.number) != as_json(cell.params):
            raise StudyError(
                f"{folder}: begun with other cells (cell {cell.number} was {dict(cell.params)}); choose another "
                "study.name"
            )


def grid_duplicates(
    grid: Sequence[Cell], classes: Iterable[Collection[int]], attempts: Iterable[tuple[Attempt, FrozenTrial]]
) -> list[tuple[int, dict[str, Any], int]]:
    """(number, parameters, number of the cell that runs) of each cell of a grid that is not to run.

    Of each class (numbers of cells that are the same run) the cell that is furthest runs, else the lowest; a cell that
    has begun is no duplicate.
    """
    order = {TrialState.COMPLETE: 0, TrialState.PRUNED: 0, TrialState.RUNNING: 1, TrialState.FAIL: 2}
    begun: dict[int, int] = {}
    for attempt, trial in attempts:
        if trial.state in order:
            number = attempt.cell.number
            begun[number] = min(begun.get(number, 2), order[trial.state])
    runs: dict[int, int] = {}
    for numbers in classes:
        best = min(numbers, key=lambda number: (begun.get(number, 3), number))
        runs |= {number: best for number in numbers if number != best and number not in begun}
    return [(cell.number, dict(cell.params), runs[cell.number]) for cell in grid if cell.number in runs]
