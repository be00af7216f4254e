"""What can go wrong, and whose mistake it is.

LoraSweepError              never raised itself
├── UserError               exit code 2, one line each, no traceback
│   ├── ConfigError         faults of a configuration, all at once (also a ValueError)
│   └── StudyError          the study on disk does not allow what was asked
├── NoEligibleTrial            exit code 3: nothing that could be shipped with a clear conscience
└── StorageUnavailable               the disk or the storage went away; what was recorded is safe, resume later

Anything else that escapes is a bug and keeps its traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One mistake in what the user asked for."""

    field: str
    """The field as the user types it, e.g. `method.rank`."""
    rule: str
    """What must hold, e.g. `must be at least 1`."""
    got: Any = None
    """The value found; None where there is none to show."""
    remedy: str = ""
    """What to do, one clause; may be empty when the rule says it."""

    def __str__(self) -> str:
        got = "" if self.got is None else f", got {self.got!r}"
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{self.field}: {self.rule}{got}{remedy}"


class LoraSweepError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(LoraSweepError):
    """The user can mend this; the message says how."""


class ConfigError(UserError, ValueError):
    """One or more faults of a configuration, reported together."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class StudyError(UserError, RuntimeError):
    """The study on disk does not allow what was asked."""


class NoEligibleTrial(LoraSweepError):
    """No trial can be shipped; the message says why and what to try."""


class StorageUnavailable(LoraSweepError, OSError):
    """The disk is full or the storage is away."""
