"""The right to run one attempt at a cell, and what is raised when it is gone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from optuna.exceptions import UpdateFinishedTrialError

from lora_sweep.errors import StudyError
from lora_sweep.records import Cell


class StaleLease(StudyError):
    """The attempt was reaped or told meanwhile: nothing of it was overwritten. `lease` says which."""

    def __init__(self, lease: "Lease", now: str) -> None:
        super().__init__(
            f"cell {lease.cell.number}: attempt {lease.attempt} is no longer held here, it is {now}; not recorded"
        )
        self.lease = lease


@dataclass(frozen=True)
class Lease:
    """The right to run one attempt at a cell: a plain value, hashable, picklable."""

    cell: Cell = field(hash=False)
    attempt: int
    """1 for the first attempt at the cell, 2 after one loss, ..."""
    trial: int
    """Optuna's trial id: names the attempt in the storage."""


@contextmanager
def held(lease: Lease) -> Iterator[None]:
    """StaleLease where Optuna refuses a write because the attempt has ended."""
    try:
        yield
    except UpdateFinishedTrialError as error:
        raise StaleLease(lease, "finished") from error
