"""Trials through a pack that stays full until they run out, as a worker keeps it."""

from collections.abc import Iterator, Sequence

from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.records import BaselineLosses, Evaluation


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


def recorded(base: LoadedBase, data: Data, trials: Sequence[Trial]) -> tuple[BaselineLosses, list[list[Evaluation]]]:
    """(the losses of the base alone, each trial's evaluations); cells are numbered from 0 in the order of `trials`."""
    records: list[list[Evaluation]] = [[] for _ in trials]
    pack = Pack(base, data, Settings.of(trials[0]), max(trial.method.rank for trial in trials))
    try:
        alone = pack.evaluate_base()
        for evaluation in run(pack, trials):
            records[evaluation.cell].append(evaluation)
    finally:
        pack.close()
    return alone, records
