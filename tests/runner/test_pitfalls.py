"""Warnings before a sweep starts: each fires where it should, names its cells, and goes away by its own remedy."""

import re
from pathlib import Path

import pytest

from lora_sweep.health import window
from lora_sweep.runner import pitfalls
from lora_sweep.runner.pitfalls import EvaluationSize
from lora_sweep.sweep import check, sweep_file
from lora_sweep.sweep.sweep import Sweep

ENOUGH = EvaluationSize(pitfalls.NEEDED_EXAMPLES, pitfalls.NEEDED_EXAMPLES)


def sweep_of(*overrides: str) -> Sweep:
    sweep, faults = sweep_file.read(None, overrides)
    assert faults == []
    assert check.check(sweep)[1] == []
    return sweep


def pitfalls_of(*overrides: str, size: EvaluationSize = ENOUGH) -> dict[str, str]:
    """Field -> sentence; every data set is taken to have this size."""
    sweep = sweep_of(*overrides)
    sizes = {pitfalls.data_key(sweep.config(cell)): size for cell in sweep.cells()} if is_grid(sweep) else {}
    sizes |= {pitfalls.data_key(sweep.base()): size}
    return {each.field: each.sentence for each in pitfalls.pitfalls(sweep, sizes)}


def is_grid(sweep: Sweep) -> bool:
    return sweep.base().sampler.name == "grid"


# -- rsLoRA -------------------------------------------------------------------------------------------------------

RSLORA = ("method.rank=choice(4,16)", "method.alpha=choice(8,16)", "method.use_rslora=choice(true,false)")


@pytest.mark.parametrize("low", ["model.dtype=bf16", "model.quantization=nf4"])
def test_a_large_s_of_rslora_below_fp32_is_a_warning_that_names_its_cells(low: str) -> None:
    sentence = pitfalls_of(*RSLORA, low)["method.alpha"]
    # (4, 8), (4, 16) under rsLoRA; alpha 16 is the rank of (16, 16).
    assert "2 cells (0000, 0002) have at least 2 x method.rank" in sentence
    assert "up to 8 (alpha 16, rank 4)" in sentence
    assert pitfalls_of(*RSLORA) == {}, "in fp32"
    assert pitfalls_of(*RSLORA, low, "method.use_rslora=false") == {}
    assert pitfalls_of(*RSLORA, low, "method.alpha=7", "method.rank=4") == {}


def test_both_remedies_of_a_large_s_work() -> None:
    (derived,) = re.findall(r"set '(.*?)'", pitfalls_of(*RSLORA, "model.dtype=bf16")["method.alpha"])
    assert pitfalls_of(*RSLORA[::2], "model.dtype=bf16", derived) == {}
    (fp32,) = re.findall(r"in fp32 \((.*?)\)", pitfalls_of(*RSLORA, "model.quantization=nf4")["method.alpha"])
    assert pitfalls_of(*RSLORA, "model.quantization=nf4", *fp32.split()) == {}


def test_the_ends_of_an_interval_are_tried() -> None:
    drawn = ("sampler=tpe", "sampler.n_trials=4", "method.use_rslora=true", "model.dtype=bf16", "method.rank=8")
    sentence = pitfalls_of(*drawn, "method.alpha=interval(1,64)")["method.alpha"]
    assert "cells drawn near method.alpha=64" in sentence
    assert pitfalls_of(*drawn, "method.alpha=interval(1,15)") == {}


# -- warm-up ------------------------------------------------------------------------------------------------------


def test_a_warmup_as_long_as_a_drawn_run_is_a_warning_and_in_a_grid_an_error() -> None:
    axes = ("train.eval_every=10", "train.max_steps=choice(100,20)", "train.warmup_steps=choice(0,50)")
    sentence = pitfalls_of(*axes, "sampler=random", "sampler.n_trials=4")["train.warmup_steps"]
    assert "50 steps of warm-up are no fewer than train.max_steps=20" in sentence
    assert "cells drawn near train.max_steps=20 train.warmup_steps=50" in sentence
    assert sentence.endswith("keep train.warmup_steps below 20")
    assert pitfalls_of(*axes[:2], "train.warmup_steps=choice(0,19)", "sampler=random", "sampler.n_trials=4") == {}
    faults = check.check(sweep_file.read(None, axes)[0])[1]
    assert [fault.field for fault in faults] == ["train.warmup_steps"]


# -- rungs --------------------------------------------------------------------------------------------------------

ASHA = ("pruner=asha", "train.max_steps=200", "train.eval_every=5", "method.rank=choice(4,8)")


def remedy(sentence: str) -> str:
    (pitfalls_of,) = re.findall(r"set (\S*=[^,\s]+)", sentence)
    return str(pitfalls_of)


@pytest.mark.parametrize(
    ("words", "step", "over"),
    [
        (("pruner.min_steps=10",), 10, 20),
        (("pruner.min_steps=12",), 15, 20),
        # The first step of a warm-up has a rate of 0.
        (("pruner.min_steps=20", "train.warmup_steps=10"), 20, 21),
        (("pruner.min_steps=20", "train.max_steps=1000"), 20, 50),
        (("pruner.min_steps=5", "train.max_steps=20"), 5, 20),
    ],
)
def test_a_rung_within_the_window_of_health_is_a_warning(words: tuple[str, ...], step: int, over: int) -> None:
    sentence = pitfalls_of(*ASHA, *words)["pruner.min_steps"]
    assert f"end trials at step {step}, before the first {over} steps" in sentence
    assert "2 cells (0000, 0001)" in sentence
    assert pitfalls_of(*ASHA, *words, remedy(sentence)) == {}


def test_a_rung_after_the_window_is_none() -> None:
    assert window(200) == 20
    assert pitfalls_of(*ASHA, "pruner.min_steps=20") == {}
    assert pitfalls_of(*ASHA, "pruner.min_steps=16") == {}, "the evaluation after it is at 20"
    assert pitfalls_of(*ASHA, "pruner.min_steps=25", "train.warmup_steps=10") == {}


def test_optunas_pruners_are_asked_for_their_own_first_step() -> None:
    median = ("pruner=median", *ASHA[1:])
    sentence = pitfalls_of(*median)["pruner.instance.n_warmup_steps"]
    assert "0 lets the pruner end trials at step 5, before the first 20 steps" in sentence
    assert pitfalls_of(*median, remedy(sentence)) == {}
    assert pitfalls_of(*median, "train.eval_every=50") == {}
    instance = "pruner.instance={_target_:optuna.pruners.SuccessiveHalvingPruner}"
    halving = ("pruner=none", "pruner.name=optuna", instance, *ASHA[1:])
    sentence = pitfalls_of(*halving)["pruner.instance.min_resource"]
    assert pitfalls_of(*halving, remedy(sentence)) == {}


# -- evaluation set -----------------------------------------------------------------------------------------------


def test_too_few_examples_are_told_with_how_many_are_needed() -> None:
    needed = pitfalls.NEEDED_EXAMPLES
    few = EvaluationSize(needed - 1, 10 * needed)
    axis = "method.rank=choice(4,8)"
    assert pitfalls_of(axis, "data=facts") == {}
    sentence = pitfalls_of(axis, "data=facts", size=few)["data.eval_size"]
    assert sentence.startswith(f"{needed - 1} evaluation examples distinguish runs")
    assert f"about {needed} are needed; set data.eval_size={needed}" in sentence


@pytest.mark.parametrize("data", ["style", "facts"])
def test_the_remedy_for_few_examples_makes_them_enough(data: str) -> None:
    words = ("method.rank=choice(4,8)", f"data={data}")
    (pitfall,) = pitfalls.pitfalls(sweep_of(*words))
    more = re.findall(r"data\.\w+=\d+", pitfall.sentence)
    assert pitfalls.pitfalls(sweep_of(*words, *more)) == ()


def test_the_remedy_for_data_of_ones_own_makes_them_enough(in_folder: Path) -> None:
    rows = "".join(f'{{"text": "the {n}th line of many"}}\n' for n in range(3000))
    Path("mine.jsonl").write_text(rows)
    words = ("method.rank=choice(4,8)", "data=files", "data.path=mine.jsonl")
    (pitfall,) = pitfalls.pitfalls(sweep_of(*words, "data.eval_share=0.02"))
    more = re.findall(r"data\.\w+=[\d.]+\d", pitfall.sentence)
    assert len(more) == 2
    assert pitfalls.pitfalls(sweep_of(*words, *more)) == ()


def test_only_the_cells_with_few_examples_are_named() -> None:
    sweep = sweep_of("data.eval_size=choice(8,240)", "data=style", "method.rank=choice(4,8)")
    (pitfall,) = pitfalls.pitfalls(sweep)
    assert "8 evaluation examples (2 cells (0000, 0001))" in pitfall.sentence
