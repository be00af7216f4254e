"""Trials through a pack that stays full until they run out, as a worker keeps it."""

from collections.abc import Iterator, Sequence

from lora_sweep.pack import Pack, Trial
from lora_sweep.records import Evaluation


def run(pack: Pack, trials: Sequence[Trial]) -> Iterator[Evaluation]:
    """All evaluations, as they come."""
    waiting = list(trials)
    while waiting or pack.live:
        while waiting and pack.has_room:
            pack.admit(waiting.pop(0))
        pack.prepare(waiting[: pack.capacity.slots])
        yield from pack.advance()
        for slot in [slot for slot in pack.live if pack.step(slot) >= pack.settings.max_steps]:
            pack.evict(slot)
