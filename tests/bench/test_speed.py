"""The benchmark: its ways do the same work, and its table is arithmetic that can be done by hand."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_of
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from lora_sweep.base.load import LoadedBase
from lora_sweep.bench import gauge, overhead, random_base, sequential, speed
from lora_sweep.bench.hf_trainer_process import TrainerProcess
from lora_sweep.bench.question import Question, trials_of
from lora_sweep.bench.random_base import Dimensions
from lora_sweep.bench.reduction import Run, TrainerRun, Work, bounds, difference, reduce
from lora_sweep.cli import main as cli
from lora_sweep.data import Data, order
from lora_sweep.errors import ConfigError, UserError
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.pack.passes import Passes

MakeTrial = Callable[..., Trial]
CPU = torch.device("cpu")
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated"
SMALL = "width=32,layers=1,heads=2,vocab=64"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operations, whose threads would wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def packed_steps(base: LoadedBase, data: Data, trial: Trial) -> tuple[float, torch.Tensor]:
    pack = Pack(base, data, Settings.of(replace(trial, train=replace(trial.train, slots=1))), trial.method.rank)
    try:
        pack.admit(replace(trial, train=replace(trial.train, slots=1)))
        (evaluation,) = pack.advance()
    finally:
        pack.close()
    return evaluation.eval_loss, torch.tensor([step.train_loss for step in evaluation.steps], dtype=torch.float64)


# -- the ways do the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"ratio": 16.0, "use_rslora": True, "weight_decay": 0.1, "weight_decay_B": 0.01},
        {"gradient_accumulation_steps": 3, "batch_size": 2, "schedule": "cosine", "warmup_steps": 2},
        {"max_grad_norm": 0.01, "gradient_checkpointing": True},
    ],
    ids=["plain", "loraplus", "accumulation", "clipping"],
)
def test_the_sequential_loop_gives_the_losses_of_the_pack(
    base: LoadedBase, style: Data, trial: MakeTrial, knobs: dict[str, Any]
) -> None:
    one = trial(**({"max_steps": 6, "eval_every": 6, "base_lr": 1e-3, "seed": 3} | knobs))
    eval_loss, losses = sequential.train(base, style, one)
    packed_eval, packed = packed_steps(base, style, one)
    assert losses.tolist() == pytest.approx(packed.tolist(), rel=1e-5)
    assert eval_loss == pytest.approx(packed_eval, rel=1e-5)
    assert losses[-1] < losses[0]


def test_the_sequential_loop_is_lora_by_hand(base64: LoadedBase, style: Data, trial: MakeTrial) -> None:
    """No PEFT: W + s B A in the weights. B begins at 0, so after one step A is as drawn, and B Adam's first step."""
    one = trial(max_steps=1, eval_every=1, rank=4, alpha=8.0, base_lr=1e-3, target_modules=["o_proj"])
    drawn = Pack(base64, style, Settings.of(one), 4)
    try:
        slot = drawn.admit(one)
        A = {name: view.clone() for name, view in drawn._at(slot).A.items()}
    finally:
        drawn.close()
    batch = style.train.batch(order(len(style.train), one.train.seed)(0, one.train.batch_size))
    weights = {name: base64.model.get_submodule(name).weight for name in A}
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    def loss(part_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        logits = base64.model(input_ids=part_ids).logits[:, :-1]
        nll = functional.cross_entropy(logits.flatten(0, 1), part_ids[:, 1:].flatten(), reduction="none")
        return nll[loss_mask[:, 1:].flatten()].mean()

    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        first = loss(batch.input_ids, batch.loss_mask)
        first.backward()
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = 2.0 * weight.grad @ A[name].T  # of B: s dW A'
                # Adam's first step: g / (|g| + eps).
                weight += 2.0 * (-1e-3 * gradient / (gradient.abs() + one.optimizer.eps)) @ A[name]
            whole = style.evaluation.batch(torch.arange(len(style.evaluation)))
            expected = float(loss(whole.input_ids, whole.loss_mask))
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
                weight.grad = None
                weight.requires_grad_(False)
    eval_loss, losses = sequential.train(base64, style, one)
    assert float(losses[0]) == pytest.approx(float(first.detach()), rel=1e-12)
    assert eval_loss == pytest.approx(expected, rel=1e-9)


def test_the_sequential_loop_leaves_the_base_as_it_was(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.model.named_modules()]
    sequential.train(base, style, trial(max_steps=2, eval_every=1))
    assert [(name, type(module)) for name, module in base.model.named_modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_its_batches_are_padded_no_further_than_their_longest_row(style: Data) -> None:
    rows = torch.tensor([int(np.argmin(style.train.lengths))])
    inputs, labels = sequential.Feed(style.train, CPU).batch(rows)
    longest = int(style.train.lengths.min())
    assert longest <= inputs["input_ids"].shape[1] < longest + 8
    assert inputs["input_ids"].shape[1] < style.train.length
    assert int((labels != sequential.IGNORE_INDEX).sum()) == int(style.train.counts[rows.item()])


def test_rows_of_several_examples_give_the_losses_of_the_pack(base: LoadedBase, style: Data, trial: MakeTrial) -> None:
    rows = replace(style, train=style.train.packed(128), evaluation=style.evaluation.packed(128))
    one = trial(max_steps=2, eval_every=2, batch_size=2, base_lr=1e-3)
    eval_loss, losses = sequential.train(base, rows, one)
    packed_eval, packed = packed_steps(base, rows, one)
    assert losses.tolist() == pytest.approx(packed.tolist(), rel=1e-5)
    assert eval_loss == pytest.approx(packed_eval, rel=1e-5)


def test_packs_are_refilled_until_no_trial_is_left(base: LoadedBase, style: Data) -> None:
    config = config_of("train.max_steps=2", "train.eval_every=2", "train.batch_size=2")
    trials = trials_of(config, 4)
    alone = speed.run_sequential(base, style, trials)
    assert speed.run_packed(base, style, trials, 2) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("most", [0, 2])
def test_slots_that_do_not_fit_into_memory_are_refused_and_never_measured_narrower(
    base: LoadedBase, style: Data, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Passes.train

    def train(self: Passes, slots: Any) -> Any:
        if len(slots) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, slots)

    monkeypatch.setattr(Passes, "train", train)
    trials = trials_of(config_of("train.max_steps=1", "train.eval_every=1", "train.batch_size=1"), 3)
    with pytest.raises(UserError, match="--slots: 3 trials do not fit into the device's memory"):
        speed.run_packed(base, style, trials, 3)
    if not most:
        with pytest.raises(UserError, match="--slots: 1 trials do not fit"):
            speed.choice(base, style, trials)


def test_a_trainer_process_gives_the_losses_of_the_sequential_loop(
    base: LoadedBase, style: Data, trial: MakeTrial, tmp_path: Path
) -> None:
    """Evaluated inside training and once more after it, accumulated, clipped, decayed, with a schedule."""
    one = trial(
        max_steps=3, eval_every=2, batch_size=2, gradient_accumulation_steps=2, eval_batch_size=5, max_grad_norm=0.5,
        schedule="linear", warmup_steps=1, ratio=4.0, base_lr=1e-3, weight_decay=0.1, seed=5,
    )  # fmt: skip
    run = TrainerProcess(config_of(), base, style, tmp_path).run(one)
    eval_loss, _ = sequential.train(base, style, one)
    assert run.eval_loss == pytest.approx(eval_loss, rel=1e-5)
    assert json.loads((tmp_path / "result.json").read_text())["evaluations"] == 2
    assert run.startup_seconds > 0
    assert run.training_seconds > 0
    assert run.startup_seconds + run.training_seconds <= run.seconds


@pytest.mark.slow
def test_a_trainer_process_that_fails_says_why(base: LoadedBase, style: Data, trial: MakeTrial, tmp_path: Path) -> None:
    process = TrainerProcess(config_of(), replace(base, name_or_path=str(tmp_path / "none")), style, tmp_path)
    with pytest.raises(RuntimeError, match="HF Trainer process of trial 7 failed"):
        process.run(trial(7))


# -- the trials and the random base -------------------------------------------------------------------------------


def test_trials_differ_around_the_configuration() -> None:
    config = config_of("method.rank=8", "method.alpha=16", "optimizer.base_lr=1e-3", "train.seed=10")
    trials = trials_of(config, 16)
    assert [trial.method.rank for trial in trials[:5]] == [8, 4, 16, 2, 8]
    assert {trial.method.alpha for trial in trials} == {16.0, 32.0}
    assert {trial.optimizer.base_lr for trial in trials} == {1e-3, 5e-4, 2.5e-4}
    assert {trial.optimizer.ratio for trial in trials} == {1.0, 4.0}
    assert [trial.train.seed for trial in trials] == list(range(10, 26))
    assert len({Settings.of(trial) for trial in trials}) == 1


def test_a_random_base_has_the_dimensions_asked_for() -> None:
    config = config_of("data.max_length=16", "data.subjects=6", "data.eval_size=5", "data.probe_size=3")
    dimensions = Dimensions.parse("width=32, layers=2, heads=4, vocab=64, kv_heads=2, ffn=48")
    base, data = (
        random_base.load(dimensions, config.model, config.data, CPU),
        random_base.tokens(dimensions, config.data),
    )
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert base.parameters == 2 * 64 * 32 + 2 * per_layer + 32
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert [part.lengths.tolist() for part in (data.train, data.evaluation, data.probe)] == [
        [16] * n for n in (6, 5, 3)
    ]
    assert set(data.train.counts) == {15}
    again = random_base.load(dimensions, config.model, config.data, CPU)
    assert torch.equal(base.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("width=32,layers=1,heads=2", "needs vocab"),
        ("wdth=32,layers=1,heads=2,vocab=64", "unknown dimension, got 'wdth' (did you mean width?)"),
        ("width=0,layers=1,heads=2,vocab=64", "width must be a whole number of at least 1, got '0'"),
        ("width=32,layers=1,heads=3,vocab=64", "width must be an even multiple of heads=3, got 32"),
        ("width=32,layers=1,heads=4,kv_heads=3,vocab=64", "kv_heads must divide heads=4, got 3"),
    ],
)
def test_wrong_dimensions_are_told(text: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Dimensions.parse(text)
    assert f"--random: {told}" in str(raised.value)


# -- the arithmetic -----------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_repetition_and_factors_multiply() -> None:
    b = [Run(seconds, (1.0, 2.0), 2**20) for seconds in (4.0, 8.0, 6.0)]
    c = [Run(seconds, (1.0, 2.0 * (1 + 1e-4)), None) for seconds in (2.0, 2.0, 3.0)]
    trainer_runs = [[TrainerRun(1.0, 5.0, 6.0, 12.0, 3 * 2**20), TrainerRun(4.0, 4.0, 6.0, 12.0, 2**20)]]
    work = Work(trained_tokens=600, evaluated_tokens=300, multiplied_parameters=10)
    measured = reduce({"sequential": b, "packed 4": c}, trainer_runs, work, peak=10_000.0, tolerance=1e-3)
    first, alone, packed = measured["rows"]
    assert [row["way"] for row in measured["rows"]] == ["HF Trainer", "sequential", "packed"]
    assert packed["ratios"] == [2.0, 4.0, 2.0]
    assert (packed["ratio"], packed["ratio_low"], packed["ratio_high"]) == (2.0, 2.0, 4.0)
    assert packed["median_seconds"] == 2.0
    assert packed["slots"] == 4
    assert alone["ratio"] == 1.0
    assert alone["tokens_per_second"] == 100.0
    # 10 (4 x 600 + 2 x 300) flop in 6 s of 10,000 a second
    assert alone["mfu"] == pytest.approx(0.5)
    assert packed["mfu"] == pytest.approx(1.5)
    assert (first["peak_mib"], alone["peak_mib"], packed["peak_mib"]) == (3.0, 1.0, None)
    assert (first["median_seconds"], first["ratio"]) == (24.0, 0.25)
    assert packed["largest_difference"] == pytest.approx(1e-4)
    assert first["largest_difference"] == 1.0
    assert not measured["losses_agree"]
    # trainer_runs: 24 s in all, 12 s of training; (b): 6 s
    assert measured["factors"] == {"4": {"start_up": 2.0, "trainer": 2.0, "packing": 2.0, "total": 8.0}}


def test_losses_that_agree_are_said_to_and_hf_trainer_may_be_left_out() -> None:
    runs = {"sequential": [Run(2.0, (1.0,), None)], "packed 1": [Run(1.0, (1.0 + 1e-6,), None)]}
    measured = reduce(runs, [], Work(1, 1, 1), peak=1.0, tolerance=1e-3)
    assert measured["losses_agree"]
    assert measured["factors"] == {}
    json.dumps(measured, allow_nan=False)


def test_bounds_are_the_quantiles_of_resampled_medians() -> None:
    """Of three values the median is the lowest with chance 7/27, and the same for the highest."""
    assert bounds([1.0, 2.0, 3.0]) == (1.0, 3.0)
    assert bounds([2.0]) == (2.0, 2.0)
    # Of nine: the median is at most the k-th lowest with the chance that 5 or more of 9 draws are among the k lowest.
    at_most = [sum(math.comb(9, n) * (k / 9) ** n * (1 - k / 9) ** (9 - n) for n in range(5, 10)) for k in range(1, 10)]
    k = next(k for k, chance in enumerate(at_most, start=1) if chance > 0.025)
    assert bounds([float(n) for n in range(1, 10)]) == (float(k), float(10 - k))


def test_a_loss_on_one_side_only_is_a_difference() -> None:
    assert difference((1.0, 2.2), (1.0, 2.0)) == pytest.approx(0.1)
    assert difference((math.nan,), (math.nan,)) == 0.0
    assert difference((math.nan,), (1.0,)) == math.inf


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_token_is_multiplied_with_leaves_out_what_is_looked_up(tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=50,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    by_hand = 4 * 8 * 8 + 3 * 8 * 12 + 50 * 8 + 3 * 8  # attention, MLP, output layer, norms
    assert gauge.multiplied_parameters(model) == by_hand
    assert gauge.flop(by_hand, trained_tokens=7, evaluated_tokens=5) == by_hand * (28 + 10)


def test_tokens_are_counted_without_padding(base: LoadedBase, style: Data) -> None:
    trials = trials_of(config_of("train.max_steps=3", "train.eval_every=2", "train.batch_size=2"), 2)
    work = speed._work(base, style, trials)
    each = [order(len(style.train), seed)(0, 6).numpy() for seed in (0, 1)]
    assert work.trained_tokens == sum(int(style.train.lengths[rows].sum()) for rows in each)
    # two trials, each evaluated after steps 2 and 3
    assert work.evaluated_tokens == 2 * 2 * int(style.evaluation.lengths.sum() + style.probe.lengths.sum())


def test_the_peak_is_above_what_was_held() -> None:
    peak = gauge.fresh_peak(CPU)
    if peak.bytes is None:
        assert not Path("/proc/self/clear_refs").exists()  # only where there is no such file
        return
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert peak.bytes > 60 * 2**20
    assert peak.most_bytes == peak.bytes + (peak.held_bytes or 0.0)
    after = gauge.fresh_peak(CPU)
    assert after.bytes is not None and after.bytes < 32 * 2**20


# -- overhead --------------------------------------------------------------------------------------------------------


def test_overhead_is_what_lies_between_the_passes() -> None:
    """Two slots, four trials of one stretch of 10 s each; 2 s between, in which measuring the memory takes 0.5 s."""
    clock = overhead.Clock(4, CPU)
    for began in (0.0, 12.0):
        clock.stretches.append(overhead.Stretch(began, began + 10.0, slots=2, live=2, steps=5))
    clock.admissions, clock.ends = [-2.0, -1.0, 11.0, 11.5], [10.5, 10.6, 22.5, 24.0]
    clock.checking = [(10.1, 10.6)]
    measured = overhead.reduce(clock, [4.0, 6.0, 5.0])
    assert measured["overhead_seconds_a_trial"] == pytest.approx((24.0 - 0.5 - 20.0) / 4)
    assert measured["share_of_startup"] == pytest.approx(3.5 / 4 / 5.0)
    assert (measured["pauses"], measured["pause_seconds_a_refill"]["median"]) == (1, pytest.approx(1.5 / 2))
    assert measured["occupancy"] == 1.0
    assert measured["busy"] == pytest.approx(20.0 / 23.5)
    clock.stretches[0] = overhead.Stretch(0.0, 10.0, slots=2, live=1, steps=5)
    assert overhead.reduce(clock, [])["occupancy"] == 0.5, "until the last trial is in"
    facts = {"model": "m", "trials": 4, "steps": 5, "tracker": "none", "device": "d", "reason": None}
    assert "overhead   875 ms a trial beyond its passes, 17.5% of the 5.00 s" in "\n".join(
        overhead.lines(measured | facts)
    )


def test_growth_is_between_the_first_trials_that_are_warm_and_the_last() -> None:
    clock, now = overhead.Clock(40, CPU), 0.0
    for number in range(40):
        clock.stretches.append(overhead.Stretch(now, now + 1.0, slots=1, live=1, steps=1))
        now += 1.0 + (0.5 if number < 20 else 1.0)
        clock.admissions.append(now - 0.1)
        clock.ends.append(now - 0.2)
    measured = overhead.reduce(clock, [])
    assert measured["windows"]["first"]["overhead"] == pytest.approx(0.5)
    assert measured["windows"]["last"]["passes"] == pytest.approx(1.0)
    assert measured["growth_of_cost"] == pytest.approx(2.0 / 1.5 - 1)


@pytest.mark.slow
@pytest.mark.filterwarnings(IGNORED)
def test_a_study_is_run_and_its_overhead_reported(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = ("model=tiny", "data.subjects=16", "data.eval_size=4", "data.probe_size=4", "train.slots=2", "tracker=none")
    words = ("--trials", "6", "--trainer-repetitions", "0", "--json", "train.max_steps=4", "train.batch_size=1")
    assert run(monkeypatch, "overhead", *knobs, *words, "launcher.threads=1") == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["trials"], measured["pauses"], measured["occupancy"]) == (6, 2, 1.0)
    assert measured["overhead_seconds_a_trial"] > 0
    assert not list(in_folder.iterdir())


# -- the command line ---------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lora-sweep", "bench", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


QUICK = ("--random", SMALL, "data.max_length=8", "data.subjects=8", "data.eval_size=4", "train.max_steps=3")


def test_the_verb_measures_a_random_base_and_says_json_alone(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--slots", "1,2", "--trials", "4", "--repetitions", "3", "--trainer-repetitions", "0", "--json")
    assert run(monkeypatch, "speed", *QUICK, *words, "launcher.threads=1") == 0
    measured = json.loads(capsys.readouterr().out)
    assert [(row["way"], row["slots"]) for row in measured["rows"]] == [
        ("sequential", None),
        ("packed", 1),
        ("packed", 2),
    ]
    assert all(len(row["seconds"]) == 3 for row in measured["rows"])
    assert measured["losses_agree"]
    assert (measured["steps"], measured["evaluations"], measured["padded_length"], measured["threads"]) == (3, 1, 8, 1)
    assert measured["trained_tokens"] == 4 * 3 * 4 * 8
    assert len(measured["trials"]) == 4
    assert all(0 < row["mfu"] < 1 for row in measured["rows"])
    assert not list(in_folder.iterdir())


@pytest.mark.slow
def test_the_verb_shows_a_table_with_hf_trainer_and_its_factors(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--slots", "1,2", "--repetitions", "1", "launcher.threads=1")
    assert run(monkeypatch, "speed", *QUICK, *words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("HF Trainer", "sequential", "packed 2", "start-up", "agree within"))
    assert not list(in_folder.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("speed", "--slots", "1,zwei"),
            "--slots: must be whole numbers of at least 1, or auto, got '1,zwei' (--slots auto,1,4)",
        ),
        (
            ("speed", "--slots", "0"),
            "--slots: must be whole numbers of at least 1, or auto, got '0' (--slots auto,1,4)",
        ),
        (("speed", "--slots", "2,2"), "--slots: must not repeat a number, got '2,2'"),
        (
            ("speed", "--slots", "2,3", "--trials", "9"),
            "--trials: must be a multiple of 6, to fill every pack, got 9 (--trials 12)",
        ),
        (("speed", "--repetitions", "0"), "--repetitions: must be at least 1, got 0"),
        (
            ("speed", "--trainer-repetitions", "-1"),
            "--trainer-repetitions: must be at least 0, got -1 (0 leaves HF Trainer out)",
        ),
        (("speed", "--random", "width=32"), "--random: needs layers, heads, vocab, got 'width=32' "),
        (("speed", "method.dropout=0.1"), "method.dropout: must be 0 here: PEFT draws other masks than a pack"),
        (("speed", "method.rnk=8"), "method.rnk: unknown key (did you mean rank?)"),
        (("speed", "train.batch_size=0"), "train.batch_size: must be at least 1, got 0"),
        (("speed", "method.rank=choice(4,8)"), "method.rank: bench makes its own trials around one value"),
        (("speed", "--random", SMALL, "method.target_modules=[q]"), "method.target_modules: matches no module"),
    ],
)
def test_one_slip_is_one_clear_line(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    told: str,
) -> None:
    assert run(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(told)


def test_trials_are_as_few_as_fill_every_pack() -> None:
    assert Question.of("1,2,4", None, 9, 1, None).trials == 4
    assert Question.of("2, 3", None, 9, 1, None).slots == (2, 3)
    assert not Question.of("2, 3", None, 9, 1, None).chooses
    auto = Question.of("auto, 4", None, 9, 1, None)
    assert (auto.slots, auto.chooses, auto.trials) == ((4,), True, 16)


def test_the_number_of_slots_that_pays_is_compared_too(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--slots", "auto,1", "--trials", "4", "--repetitions", "1", "--trainer-repetitions", "0", "--json")
    assert run(monkeypatch, "speed", *QUICK, *words, "launcher.threads=1") == 0
    measured = json.loads(capsys.readouterr().out)
    chosen = measured["chosen"]
    assert chosen["slots"] in (1, 2, 4)
    assert "adapters a pass" in chosen["reason"]
    assert [row["slots"] for row in measured["rows"]] == [None, *sorted({1, chosen["slots"]})]
    assert measured["losses_agree"]
