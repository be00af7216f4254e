"""What was seen of one adapter over its training: a look now and then, and sums over every step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_sweep.health.measure import METRICS
from lora_sweep.records import HealthSnapshot, UpdateSums

FIRST_CHECKS = (2, 10)
"""Steps after which the health of an adapter is checked, beside the end of the window, every `every` steps and each
evaluation. The
second step is the first that moves A, which has no gradient while B is zero."""

WINDOW_STEPS, WINDOW_SHARE = 20, 0.05
"""The window is the first max(20, 5 %) steps whose learning rate was above 0."""


def window(max_steps: int) -> int:
    """Steps with a learning rate above 0 that the early rules are about."""
    return min(max_steps, max(WINDOW_STEPS, math.ceil(WINDOW_SHARE * max_steps)))


@dataclass
class HealthHistory:
    """The checks and the sums of one adapter. Waits for the device only in `snapshot` and `state`."""

    modules: tuple[str, ...]
    max_steps: int
    every: int
    _sums: UpdateSums = field(default_factory=UpdateSums)
    _idle: int = 0
    """Steps at which B's learning rate was 0: those at the start of a warm-up, say."""
    _checks: list[tuple[int, UpdateSums]] = field(default_factory=list)
    """(step, sums up to it) of each check."""
    _unread: list[Tensor] = field(default_factory=list)
    """The latest checks (modules, METRICS), where they lie."""

    def __post_init__(self) -> None:
        self._read: NDArray[np.float64] = np.empty((0, len(self.modules), len(METRICS)))
        """The checks before those, on the host."""

    def is_due(self, step: int, at_evaluation: bool) -> bool:
        """Whether to look after this step, the next one."""
        first = step in FIRST_CHECKS or step % self.every == 0
        return at_evaluation or first or self._sums.stepped + 1 == self._window

    def stepped(self, lr_A: float, lr_B: float, shrink_B: float) -> None:
        """Adds a step to the sums; `shrink_B` = 1 - lr_B x weight decay of B where decay is decoupled."""
        self._sums = self._sums.after(lr_A, lr_B, shrink_B)
        self._idle += lr_B == 0

    def take(self, step: int, rows: Tensor) -> None:
        """A check (modules, METRICS), after `stepped`. Kept where it lies until somebody reads."""
        self._checks.append((step, self._sums))
        self._unread.append(rows)

    @property
    def sums(self) -> UpdateSums:
        return self._sums

    @property
    def _window(self) -> int:
        """No more than there can be steps with a learning rate above 0."""
        return min(window(self.max_steps), self.max_steps - self._idle)

    @property
    def window_is_over(self) -> bool:
        return self._sums.stepped >= self._window

    @property
    def ends_window(self) -> bool:
        """Whether the last step was the window's last."""
        return self._sums.stepped == self._window

    def snapshot(self) -> HealthSnapshot:
        """All of it in plain numbers."""
        values = self._on_host()
        return HealthSnapshot(
            modules=self.modules,
            window=self._window,
            steps=tuple(step for step, _ in self._checks),
            sums_by_check=tuple(sums for _, sums in self._checks),
            values={name: values[:, :, column] for column, name in enumerate(METRICS)},
            sums=self._sums,
        )

    def _on_host(self) -> NDArray[np.float64]:
        """(checks, modules, METRICS); only what came since the last time is brought from the device, at once."""
        if self._unread:
            self._read = np.concatenate([self._read, torch.stack(self._unread).cpu().numpy()])
            self._unread = []
        return self._read

    # -- a checkpoint --------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], Tensor]:
        """(plain values, (checks, modules, METRICS)) that `restore` takes."""
        plain = {
            "tally": self._sums.plain(),
            "idle": self._idle,
            "seen": [[step, sums.plain()] for step, sums in self._checks],
        }
        return plain, torch.from_numpy(self._on_host()).clone()

    def restore(self, plain: Mapping[str, Any], rows: Tensor) -> None:
        self._sums = UpdateSums(*plain["tally"])
        # Checkpoints of older versions know none.
        self._idle = plain.get("idle", 0)
        self._checks = [(step, UpdateSums(*sums)) for step, sums in plain["seen"]]
        self._read, self._unread = rows.numpy(), []
