"""What `bench speed` compares: numbers of slots, repetitions, and trials that differ as those of a sweep do."""

import math
from dataclasses import dataclass, replace

from lora_sweep.bench.random_base import Dimensions
from lora_sweep.config import Config
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.pack import Trial
from lora_sweep.pack.capacity import MOST_SLOTS
from lora_sweep.records import Cell

STEPS = {"train": {"max_steps": 24, "eval_every": "${train.max_steps}"}}
"""What a trial is, unless the command line says otherwise: as a sweep file's content."""

AUTO = "auto"
"""Among the numbers of slots: the one that a launch with train.slots=null would choose for these trials."""

RANKS, ALPHAS, RATES, RATIOS = (1, 1 / 2, 2, 1 / 4), (1, 1, 1, 1, 2, 2, 2, 2), (1, 1 / 2, 1 / 4), (1, 4)
"""Factors on the configuration's rank, alpha, base_lr and ratio, taken in turn: trial n has the n-th of each, and the
n-th seed from train.seed on. Rates only go down: a hot trial is chaotic, and its losses compare nothing."""


@dataclass(frozen=True)
class Question:
    """What is compared."""

    slots: tuple[int, ...]
    chooses: bool
    """Whether the number of slots that the capacity rule chooses is compared too."""
    trials: int
    """A multiple of every number of slots: no pack runs half empty."""
    repetitions: int
    trainer_repetitions: int
    """Each runs every trial in a process of its own; 0: none."""
    dimensions: Dimensions | None
    """Of a random-weight base; None: the configuration's."""

    @classmethod
    def of(
        cls, slots: str, trials: int | None, repetitions: int, trainer_repetitions: int, drawn: str | None
    ) -> "Question":
        """From the command line; without `trials` as few as will do. Raises ConfigError with all faults."""
        faults = []
        words = [word.strip() for word in slots.split(",")]
        chooses = AUTO in words
        if chooses:
            words.remove(AUTO)
        if not all(word.isdecimal() and int(word) >= 1 for word in words):
            faults.append(Fault("--slots", "must be whole numbers of at least 1, or auto", slots, "--slots auto,1,4"))
        elif len(set(map(int, words))) < len(words):
            faults.append(Fault("--slots", "must not repeat a number", slots))
        numbers = () if faults else tuple(int(word) for word in words)
        multiple = math.lcm(*numbers)
        if trials is not None and (trials < 1 or trials % multiple):
            remedy = f"--trials {multiple * max(1, round(trials / multiple))}"
            faults.append(Fault("--trials", f"must be a multiple of {multiple}, to fill every pack", trials, remedy))
        if repetitions < 1:
            faults.append(Fault("--repetitions", "must be at least 1", repetitions))
        if trainer_repetitions < 0:
            faults.append(
                Fault("--trainer-repetitions", "must be at least 0", trainer_repetitions, "0 leaves HF Trainer out")
            )
        dimensions = None
        try:
            dimensions = None if drawn is None else Dimensions.parse(drawn)
        except ConfigError as error:
            faults += error.faults
        if faults:
            raise ConfigError(faults)
        if trials is None:
            trials = math.lcm(multiple, MOST_SLOTS["cpu"]) if chooses else multiple
        return cls(numbers, chooses, trials, repetitions, trainer_repetitions, dimensions)


def check(config: Config, question: Question) -> list[Fault]:
    """What a configuration may not say here."""
    faults = []
    if config.method.dropout:
        rule = "must be 0 here: PEFT draws other masks than a pack, and the losses could not be compared"
        faults.append(Fault("method.dropout", rule, config.method.dropout))
    if question.dimensions is not None and config.model.quantization:
        faults.append(Fault("model.quantization", "must be null with --random", config.model.quantization))
    return faults


def trials_of(config: Config, count: int) -> list[Trial]:
    """`count` trials around the configuration: see RANKS."""
    trials = []
    for n in range(count):
        trial = Trial.of(Cell(n), config)
        rank = max(1, round(trial.method.rank * RANKS[n % len(RANKS)]))
        method = replace(trial.method, rank=rank, alpha=trial.method.alpha * ALPHAS[n % len(ALPHAS)])
        rate, ratio = RATES[n % len(RATES)], RATIOS[n // 2 % len(RATIOS)]
        optimizer = trial.optimizer
        optimizer = replace(optimizer, base_lr=optimizer.base_lr * rate, ratio=optimizer.ratio * ratio)
        trials.append(
            replace(trial, method=method, optimizer=optimizer, train=replace(trial.train, seed=trial.train.seed + n))
        )
    return trials
