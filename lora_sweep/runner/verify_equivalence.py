"""Which cells of a grid are run, and whether cells that should be the same run are."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_sweep.errors import StudyError
from lora_sweep.records import Cell
from lora_sweep.study.study import Study
from lora_sweep.sweep import equivalence, saved
from lora_sweep.sweep.equivalence import Check, Grade, SameRun
from lora_sweep.sweep.sweep import Sweep
from lora_sweep.tracking import read_rows


@dataclass(frozen=True)
class GridRuns:
    """The runs of a grid.

    >>> GridRuns.of(sweep).count
    24
    """

    classes: tuple[SameRun, ...]
    """Cells that are the same run."""
    cells: tuple[tuple[int, ...], ...]
    """Of each run the numbers of the cells that it is for; a cell that is compared has a run of its own."""
    checks: tuple[Check, ...]
    """Pairs to compare: study.verify_fold of them, or as many as there are classes of several cells."""

    @classmethod
    def of(cls, sweep: Sweep) -> "GridRuns":
        """Of a sweep whose sampler is the grid. Raises ConfigError."""
        study = sweep.base().study
        classes = sweep.classes(study.fold)
        checks = equivalence.checks(classes, study.verify_fold)
        alone = {check.other for check in checks}
        kept = [tuple(number for number in each.cells if number not in alone) for each in classes]
        return cls(classes, (*kept, *((number,) for number in sorted(alone))), checks)

    @property
    def count(self) -> int:
        """How many cells a new study runs."""
        return len(self.cells)


def verify(study: Study, checks: Sequence[Check]) -> None:
    """Compares the losses of each pair on record.

    Raises StudyError with each pair of cells that differs by more than its grade allows.
    """
    duplicates = study.duplicates()
    cells = {status.cell.number: status.cell for status in study.statuses()}
    broken = []
    for check in checks:
        one, other = (
            cells[duplicates[number][1] if number in duplicates else number] for number in (check.one, check.other)
        )
        allowed, difference = _difference(study, one, other, check.grade)
        if difference > allowed:
            differ = [key for key, value in one.params.items() if other.params[key] != value]
            axes = ", ".join(f"{key} {one.params[key]} -> {other.params[key]}" for key in differ)
            broken.append(
                f"cells {one.name} and {other.name} ({axes}) should be the same run ({check.grade}), but their "
                f"losses differ by {difference:.1e}"
            )
    if broken:
        remedy = "run each by itself with study.fold=off"
        raise StudyError(
            "\n  ".join([f"{study.folder}: all is recorded, but cells of one class differ ({remedy})", *broken])
        )


def _difference(study: Study, one: Cell, other: Cell, grade: Grade) -> tuple[float, float]:
    """(largest relative difference of losses that the grade allows, the one on record)."""
    folders = [study.trial_folder(cell.number) for cell in (one, other)]
    trained = [(saved.load_launched(folder) or {}).get("train", {}) for folder in folders]
    # Passes of other shapes round differently.
    same_shapes = all(each.get("fixed_shapes") for each in trained) and trained[0]["slots"] == trained[1]["slots"]
    whole = grade.name == "bitwise" and same_shapes
    keys = ("train/loss", "eval/loss") if whole else ("train/loss",)
    curves = [[row.get(key) for row in read_rows(folder) for key in keys] for folder in folders]
    if not whole:
        curves = [curve[: equivalence.HELD_STEPS] for curve in curves]
    allowed = 0.0 if whole else max(grade.size, equivalence.EXACT_SIZE)
    return allowed, equivalence.largest_difference(*curves)
