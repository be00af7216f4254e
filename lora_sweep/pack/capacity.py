"""How many slots pay: step time and memory against the width of a pass, measured in the first steps of real training.

A pass is one forward and backward over the rows of some slots. Wider ones spread the fixed cost of a pass, t(k) = a +
b k, over more slots, until the device is saturated or out of memory.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MOST_SLOTS = {"cpu": 16, "cuda": 32}
"""Slots that are tried where `train.slots` is null."""
ROUNDS = 3
"""Steps at each width; the first warms up."""
SLOW_STEP_SECONDS = (10.0, 1.0)
"""Where a step of all slots takes so long, one round is enough, or two."""
LOSING = 1.5
"""A width whose slot-step is so many times slower than the best is not tried again."""
WORTH = 1.03
"""A wider pass must be faster by this factor: it holds more trials up when one is stopped."""
MOST_ROUNDS, MOST_SECONDS = 16, 180.0
"""Widths of which it is not sure whether the wider one is worth it are measured so often, or for so long, at most."""
FEW, UNSURE = 4, 0.2
"""What a ratio of fewer than FEW rounds may be off by; one of more is bounded by its rounds."""
CHANCE = 0.1
"""That such a bound is on the wrong side, by chance."""
FULL = 0.9
"""Share of the device's free memory that may be planned for."""


@dataclass
class Capacity:
    """Decides into what passes the slots of a step are split, and how many slots the pack keeps."""

    slots: int
    """Adapters that may be in the pack."""
    is_settled: bool = False
    """Whether the width is no longer searched for: given by the user, or chosen."""
    free_bytes: float = math.inf
    """Of the device, with the base, the data and the adapters in it."""
    width: int = 0
    """Slots a pass when settled; 0: all."""
    too_wide: int | None = None
    """The smallest width that ran out of memory, in this pack or in an earlier one of its kind."""
    fits: int = 0
    """The largest width below that whose passes went through."""
    _seconds: dict[int, list[float]] = field(default_factory=dict)
    """Width -> seconds of a step by slot, each step."""
    _spent_seconds: float = 0.0
    """On all of them."""
    _peaks: dict[int, float] = field(default_factory=dict)
    """Width -> most bytes of a pass."""

    def next_width(self, live: int) -> int:
        """How many slots the passes of the next step hold, with so many in the pack."""
        # One that failed costs a step's time, so what lies between the two is not looked for.
        widest = live if self.too_wide is None else min(live, max(1, self.fits, self.too_wide // 2))
        if self.is_settled:
            return max(1, min(self.width or live, widest))
        tried = [width for width in _doubling(widest) if self._fits(width)]
        if open_ := self._open(tried, live):
            return min(open_, key=lambda width: (self._steps(width), width))
        self._settle(tried)
        return self.width

    def _open(self, tried: Sequence[int], live: int) -> list[int]:
        """The widths that are to be measured again."""
        rounds, best = self._rounds(live), self._best()
        found = [
            width
            for width in tried
            if self._steps(width) < rounds
            and (self._steps(width) < 2 or best is None or self._slot_seconds(width) <= LOSING * best)
        ]
        if not found and self._spent_seconds < MOST_SECONDS:
            found = [width for width in self._unsure(tried) if self._steps(width) < MOST_ROUNDS]
        return found

    def _unsure(self, tried: Sequence[int]) -> list[int]:
        """The widths between which the choice lies, where it may be another by chance."""
        found: set[int] = set()
        for width in tried:
            bounds = {wider: _bounds(gains) for wider, gains in self._gains(width, tried).items()}
            if any(low > WORTH for low, _ in bounds.values()):
                continue
            maybe = [wider for wider, (_, high) in bounds.items() if high > WORTH]
            if not maybe:
                break
            found |= {width, *maybe}
        return sorted(found)

    def _gains(self, width: int, tried: Sequence[int]) -> dict[int, list[float]]:
        """Each wider one -> how many times faster it was, round by round: other work falls on both of a round alike."""
        found = {}
        for wider in tried:
            if wider > width:
                pairs = list(zip(self._seconds[width], self._seconds[wider], strict=False))
                found[wider] = [narrow / wide for narrow, wide in pairs[1:] or pairs]
        return found

    def _steps(self, width: int) -> int:
        return len(self._seconds.get(width, ()))

    def known_width(self, live: int) -> int:
        """The widest pass that is known to fit, of so many slots: for evaluations."""
        return self.next_width(live) if self.is_settled else min(live, max(self._seconds, default=1))

    def took(self, width: int, live: int, seconds: float, peak_bytes: float | None) -> None:
        """What a step of `live` slots, `width` a pass, has cost; nothing is learned of one that had to shrink."""
        if self.too_wide is not None and width >= self.too_wide:
            return
        self._seconds.setdefault(width, []).append(seconds / live)
        self._spent_seconds += seconds
        if peak_bytes is not None:
            self._peaks[width] = max(peak_bytes, self._peaks.get(width, 0.0))

    def fitted(self, width: int) -> None:
        """A training pass of so many slots went through."""
        if self.too_wide is None or width < self.too_wide:
            self.fits = max(self.fits, width)

    def failed(self, width: int) -> None:
        """A pass of so many slots ran out of memory. The next ones are half as wide."""
        self.too_wide = min(width, self.too_wide or width)
        if self.fits >= self.too_wide:
            self.fits = self.too_wide // 2
        self._seconds = {each: found for each, found in self._seconds.items() if each < self.too_wide}
        if self.is_settled:
            self.width = max(1, min(self.width or width, width // 2))
            self.slots = min(self.slots, self.width)

    def _rounds(self, live: int) -> int:
        longest = live * max((found[-1] for found in self._seconds.values()), default=0.0)
        return ROUNDS - sum(longest > seconds for seconds in SLOW_STEP_SECONDS)

    @property
    def slot_seconds(self) -> float:
        """Of a step by slot, at the width that was chosen, or given."""
        return self._slot_seconds(self.width or max(self._seconds))

    @property
    def measured(self) -> dict[int, float]:
        """Width -> seconds of a slot's step."""
        return {width: self._slot_seconds(width) for width in sorted(self._seconds)}

    @property
    def peak_bytes(self) -> float | None:
        """Of a pass at the width that was chosen, beyond what lies there anyway."""
        return self._peaks.get(self.width or max(self._peaks, default=0))

    @property
    def fit(self) -> tuple[float, float] | None:
        """(a, b) of the seconds t(k) = a + b k of a pass, least squares over the widths; None of fewer than two."""
        found = self.measured
        return _line(list(found), [width * each for width, each in found.items()]) if len(found) > 1 else None

    @property
    def reason(self) -> str:
        """One sentence: the choice, and what it was chosen by."""
        told = ", ".join(f"{width}: {1e3 * each:.3g}" for width, each in self.measured.items())
        limit = "" if self.too_wide is None else f"; {self.too_wide} at once do not fit into memory"
        line = "" if self.fit is None else f"; a pass takes {1e3 * self.fit[0]:.3g} + {1e3 * self.fit[1]:.3g} k ms"
        width = self.width or max(self._seconds, default=self.slots)
        return f"{width} adapters a pass (ms of a step by adapter at each width: {told}{line}{limit})"

    def _settle(self, tried: Sequence[int]) -> None:
        # Never slower than one by one: a wider pass that may be so by chance does not stand for election.
        sure = [tried[0], *(wider for wider, gains in self._gains(tried[0], tried).items() if _bounds(gains)[0] > 1.0)]
        self.width = next(
            width for width in sure if all(_gain(gains) <= WORTH for gains in self._gains(width, sure).values())
        )
        self.slots = min(self.slots, self.width)
        self.is_settled = True

    def _best(self) -> float | None:
        known = [self._slot_seconds(width) for width, found in self._seconds.items() if len(found) > 1]
        return min(known, default=None)

    def _slot_seconds(self, width: int) -> float:
        """Median of the steps after the first."""
        found = self._seconds[width]
        return statistics.median(found[1:] or found)

    def _fits(self, width: int) -> bool:
        """Whether a pass of this width is within memory, by a line through the narrower ones."""
        known = {each: peak for each, peak in self._peaks.items() if each < width}
        if not known or width in self._peaks:
            return True
        if len(known) == 1:
            ((narrow, peak),) = known.items()
            needed = peak * width / narrow
        else:
            a, b = _line(list(known), list(known.values()))
            needed = a + b * width
        return needed <= FULL * self.free_bytes


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def _gain(ratios: Sequence[float]) -> float:
    """The middle of them: the median of the means of any two (Hodges and Lehmann 1963), surer than their own."""
    return statistics.median(_means(ratios))


def _bounds(ratios: Sequence[float]) -> tuple[float, float]:
    """Of their middle, each with at most CHANCE on the wrong side: the signed-rank test's interval (Wilcoxon 1945)."""
    found, n = _means(ratios), len(ratios)
    if n < FEW:
        return found[0] - UNSURE, found[-1] + UNSURE
    ways = np.ones(1)
    for rank in range(1, n + 1):
        # How many of the 2 ** n choices of signs have each sum of positive ranks.
        ways = np.convolve(ways, [1.0, *[0.0] * (rank - 1), 1.0])
    place = int(np.searchsorted(np.cumsum(ways) / 2.0**n, CHANCE, side="right")) - 1
    return found[place], found[-1 - place]


def _means(ratios: Sequence[float]) -> list[float]:
    """Geometric, of any two, and each of them alone; sorted."""
    return sorted(math.sqrt(one * other) for i, one in enumerate(ratios) for other in ratios[i:])


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    slope, start = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)
    return float(start), float(slope)
