"""How many slots are fastest: step time and memory by slots a pass, measured in the first steps of real training.

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
    is_chosen: bool = False
    """Whether the width is no longer searched for: given by the user, or chosen."""
    free_bytes: float = math.inf
    """Of the device, with the base, the data and the adapters in it."""
    slots_per_pass: int = 0
    """Slots a pass once chosen; 0: all."""
    too_many: int | None = None
    """The smallest width that ran out of memory, in this pack or in an earlier one of its kind."""
    fits: int = 0
    """The largest width below that whose passes went through."""
    _seconds: dict[int, list[float]] = field(default_factory=dict)
    """Width -> seconds of a step by slot, each step."""
    _spent_seconds: float = 0.0
    """On all of them."""
    _peaks: dict[int, float] = field(default_factory=dict)
    """Width -> most bytes of a pass."""

    def next_slots_per_pass(self, live: int) -> int:
        """How many slots the passes of the next step hold, with so many in the pack."""
        # One that failed costs a step's time, so what lies between the two is not looked for.
        most = live if self.too_many is None else min(live, max(1, self.fits, self.too_many // 2))
        if self.is_chosen:
            return max(1, min(self.slots_per_pass or live, most))
        tried = [slots_per_pass for slots_per_pass in _doubling(most) if self._fits(slots_per_pass)]
        if open_ := self._open(tried, live):
            return min(open_, key=lambda slots_per_pass: (self._steps(slots_per_pass), slots_per_pass))
        self._choose_slots(tried)
        return self.slots_per_pass

    def _open(self, tried: Sequence[int], live: int) -> list[int]:
        """The widths that are to be measured again."""
        rounds, best = self._rounds(live), self._best()
        ratios = [
            slots_per_pass
            for slots_per_pass in tried
            if self._steps(slots_per_pass) < rounds
            and (self._steps(slots_per_pass) < 2 or best is None or self._slot_seconds(slots_per_pass) <= LOSING * best)
        ]
        if not ratios and self._spent_seconds < MOST_SECONDS:
            ratios = [
                slots_per_pass for slots_per_pass in self._unsure(tried) if self._steps(slots_per_pass) < MOST_ROUNDS
            ]
        return ratios

    def _unsure(self, tried: Sequence[int]) -> list[int]:
        """The widths between which the choice lies, where it may be another by chance."""
        ratios: set[int] = set()
        for slots_per_pass in tried:
            bounds = {larger: _bounds(gains) for larger, gains in self._gains(slots_per_pass, tried).items()}
            if any(low > WORTH for low, _ in bounds.values()):
                continue
            maybe = [larger for larger, (_, high) in bounds.items() if high > WORTH]
            if not maybe:
                break
            ratios |= {slots_per_pass, *maybe}
        return sorted(ratios)

    def _gains(self, slots_per_pass: int, tried: Sequence[int]) -> dict[int, list[float]]:
        """Each wider one -> how many times faster it was, round by round: other work falls on both of a round alike."""
        ratios = {}
        for larger in tried:
            if larger > slots_per_pass:
                pairs = list(zip(self._seconds[slots_per_pass], self._seconds[larger], strict=False))
                ratios[larger] = [few / many for few, many in pairs[1:] or pairs]
        return ratios

    def _steps(self, slots_per_pass: int) -> int:
        return len(self._seconds.get(slots_per_pass, ()))

    def known_slots_per_pass(self, live: int) -> int:
        """The widest pass that is known to fit, of so many slots: for evaluations."""
        return self.next_slots_per_pass(live) if self.is_chosen else min(live, max(self._seconds, default=1))

    def took(self, slots_per_pass: int, live: int, seconds: float, peak_bytes: float | None) -> None:
        """Records what a step of `live` slots, `slots_per_pass` a pass, has cost, unless it had to shrink."""
        if self.too_many is not None and slots_per_pass >= self.too_many:
            return
        self._seconds.setdefault(slots_per_pass, []).append(seconds / live)
        self._spent_seconds += seconds
        if peak_bytes is not None:
            self._peaks[slots_per_pass] = max(peak_bytes, self._peaks.get(slots_per_pass, 0.0))

    def fitted(self, slots_per_pass: int) -> None:
        """A training pass of so many slots went through."""
        if self.too_many is None or slots_per_pass < self.too_many:
            self.fits = max(self.fits, slots_per_pass)

    def failed(self, slots_per_pass: int) -> None:
        """A pass of so many slots ran out of memory. The next ones are half as wide."""
        self.too_many = min(slots_per_pass, self.too_many or slots_per_pass)
        if self.fits >= self.too_many:
            self.fits = self.too_many // 2
        self._seconds = {each: ratios for each, ratios in self._seconds.items() if each < self.too_many}
        if self.is_chosen:
            self.slots_per_pass = max(1, min(self.slots_per_pass or slots_per_pass, slots_per_pass // 2))
            self.slots = min(self.slots, self.slots_per_pass)

    def _rounds(self, live: int) -> int:
        longest = live * max((ratios[-1] for ratios in self._seconds.values()), default=0.0)
        return ROUNDS - sum(longest > seconds for seconds in SLOW_STEP_SECONDS)

    @property
    def slot_seconds(self) -> float:
        """Of a step by slot, at the width that was chosen, or given."""
        return self._slot_seconds(self.slots_per_pass or max(self._seconds))

    @property
    def measured(self) -> dict[int, float]:
        """Width -> seconds of a slot's step."""
        return {slots_per_pass: self._slot_seconds(slots_per_pass) for slots_per_pass in sorted(self._seconds)}

    @property
    def peak_bytes(self) -> float | None:
        """Of a pass at the width that was chosen, beyond what lies there anyway."""
        return self._peaks.get(self.slots_per_pass or max(self._peaks, default=0))

    @property
    def fit(self) -> tuple[float, float] | None:
        """(a, b) of the seconds t(k) = a + b k of a pass, least squares over the widths; None of fewer than two."""
        ratios = self.measured
        return (
            _line(list(ratios), [slots_per_pass * each for slots_per_pass, each in ratios.items()])
            if len(ratios) > 1
            else None
        )

    @property
    def reason(self) -> str:
        """One sentence: the choice, and what it was chosen by."""
        times = ", ".join(f"{slots_per_pass}: {1e3 * each:.3g}" for slots_per_pass, each in self.measured.items())
        limit = "" if self.too_many is None else f"; {self.too_many} at once do not fit into memory"
        line = "" if self.fit is None else f"; a pass takes {1e3 * self.fit[0]:.3g} + {1e3 * self.fit[1]:.3g} k ms"
        slots_per_pass = self.slots_per_pass or max(self._seconds, default=self.slots)
        return f"{slots_per_pass} adapters a pass (ms of a step by adapter at each width: {times}{line}{limit})"

    def _choose_slots(self, tried: Sequence[int]) -> None:
        # Never slower than one by one: a wider pass that may be so by chance does not stand for election.
        sure = [
            tried[0],
            *(larger for larger, gains in self._gains(tried[0], tried).items() if _bounds(gains)[0] > 1.0),
        ]
        self.slots_per_pass = next(
            slots_per_pass
            for slots_per_pass in sure
            if all(_gain(gains) <= WORTH for gains in self._gains(slots_per_pass, sure).values())
        )
        self.slots = min(self.slots, self.slots_per_pass)
        self.is_chosen = True

    def _best(self) -> float | None:
        medians = [
            self._slot_seconds(slots_per_pass) for slots_per_pass, ratios in self._seconds.items() if len(ratios) > 1
        ]
        return min(medians, default=None)

    def _slot_seconds(self, slots_per_pass: int) -> float:
        """Median of the steps after the first."""
        ratios = self._seconds[slots_per_pass]
        return statistics.median(ratios[1:] or ratios)

    def _fits(self, slots_per_pass: int) -> bool:
        """Whether a pass of this width is within memory, by a line through the narrower ones."""
        peaks = {each: peak for each, peak in self._peaks.items() if each < slots_per_pass}
        if not peaks or slots_per_pass in self._peaks:
            return True
        if len(peaks) == 1:
            ((few, peak),) = peaks.items()
            needed = peak * slots_per_pass / few
        else:
            a, b = _line(list(peaks), list(peaks.values()))
            needed = a + b * slots_per_pass
        return needed <= FULL * self.free_bytes


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and `most`."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def _gain(ratios: Sequence[float]) -> float:
    """The middle of them: the median of the means of any two (Hodges and Lehmann 1963), surer than their own."""
    return statistics.median(_means(ratios))


def _bounds(ratios: Sequence[float]) -> tuple[float, float]:
    """Of their middle, each with at most CHANCE on the wrong side: the signed-rank test's interval (Wilcoxon 1945)."""
    ratios, n = _means(ratios), len(ratios)
    if n < FEW:
        return ratios[0] - UNSURE, ratios[-1] + UNSURE
    ways = np.ones(1)
    for rank in range(1, n + 1):
        # How many of the 2 ** n choices of signs have each sum of positive ranks.
        ways = np.convolve(ways, [1.0, *[0.0] * (rank - 1), 1.0])
    place = int(np.searchsorted(np.cumsum(ways) / 2.0**n, CHANCE, side="right")) - 1
    return ratios[place], ratios[-1 - place]


def _means(ratios: Sequence[float]) -> list[float]:
    """Geometric, of any two, and each of them alone; sorted."""
    return sorted(math.sqrt(one * other) for i, one in enumerate(ratios) for other in ratios[i:])


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    slope, start = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), 1)
    return float(start), float(slope)
