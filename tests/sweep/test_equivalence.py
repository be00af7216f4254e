"""Folding: algebra says which cells are the same run, and trainings say whether it is true."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from processor import BF16_ATTENTION, BF16_PRODUCTS, either
from test_pack import losses, packed, short_examples
from test_worker import run, write_sweep
from transformers import AutoModelForCausalLM, LlamaConfig, get_scheduler

from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.config import Config, OptimizerConfig
from lora_sweep.data import Data, TokenSet
from lora_sweep.errors import ConfigError, StudyError
from lora_sweep.pack import Trial
from lora_sweep.production.pick import pick
from lora_sweep.records import Cell, Evaluation
from lora_sweep.study.study import Study
from lora_sweep.study.view import StudyView
from lora_sweep.sweep import equivalence, sweep_file
from lora_sweep.sweep.sweep import Sweep

MakeTrial = Callable[..., Trial]
RULES: dict[str, Any] = {"eps_rule": "scaled", "decay_rule": "scaled", "clip_rule": "scaled"}
SCALED = tuple(f"optimizer.{rule}={value}" for rule, value in RULES.items())


def sweep_of(*overrides: str) -> Sweep:
    sweep, faults = sweep_file.read(None, overrides)
    assert faults == []
    return sweep


def pair(first: Iterable[str], second: Iterable[str], shared: Iterable[str] = SCALED) -> dict[int, Config]:
    """Two configurations, by their overrides."""
    return {number: sweep_of(*shared, *words).base() for number, words in enumerate((first, second))}


def grades(*configs: dict[int, Config], fold: equivalence.Fold = "exact") -> list[str | None]:
    """The grade of each pair; None where it is two classes."""
    classes = [equivalence.classes(each, fold) for each in configs]
    return [str(classes[0].grade) if len(classes) == 1 else None for classes in classes]


# ---------------------------------------------------------------------------------------------------------------------
# Algebra


def runs_by_hand(ranks: dict[int, tuple[int, int]], alphas: range, ratios: range) -> int:
    """Distinct (rank, log2(s lr_B / lr_A)) over alpha = 2^k, ratio = 2^m; `ranks`: rank -> (log2 r, log2 sqrt r)."""
    return len(
        {(rank, a - root + m) for rank, roots in ranks.items() for root in roots for a in alphas for m in ratios}
    )


ISSUE = (
    "method.rank=choice(4,16,64)",
    "method.alpha=choice(4,8,16,32,64)",
    "method.use_rslora=choice(false,true)",
    "optimizer.ratio=choice(1,2,4,8,16)",
)
ISSUE_RUNS = runs_by_hand({4: (2, 1), 16: (4, 2), 64: (6, 3)}, range(2, 7), range(5))


def test_the_four_axes_fold_to_what_algebra_says() -> None:
    sweep = sweep_of(*ISSUE, "optimizer.eps_rule=scaled")
    assert len(sweep.cells()) == 150
    assert ISSUE_RUNS == 33
    classes = sweep.classes("exact")
    assert len(classes) == ISSUE_RUNS
    assert {each.grade.name for each in classes} == {"bitwise"}
    assert sorted(number for each in classes for number in each.cells) == list(range(150))
    assert len(sweep.classes("off")) == 150
    for each in classes:
        configs = [sweep.config(sweep.cells()[number]) for number in each.cells]
        slopes = {
            round(math.log2(c.method.alpha * c.optimizer.ratio / c.method.rank ** (0.5 if c.method.use_rslora else 1)))
            for c in configs
        }
        assert len(slopes) == len({c.method.rank for c in configs}) == 1


@pytest.mark.parametrize(
    ("decay", "runs"),
    [
        ((), 10),
        (("optimizer.weight_decay=0.1",), 30),
        (("optimizer.weight_decay=0.1", "optimizer.decay_rule=scaled"), 10),
        (("optimizer.weight_decay=0.1", "optimizer.weight_decay_B=0.0"), 10),
    ],
)
def test_a_fixed_decay_of_b_keeps_cells_apart_and_a_scaled_one_does_not(decay: tuple[str, ...], runs: int) -> None:
    grid = ("method.rank=16", "method.alpha=choice(8,16,32,64)", *ISSUE[2:])
    assert len(sweep_of(*grid, *decay, "optimizer.eps_rule=scaled").classes("exact")) == runs


def test_the_grade_says_whether_bits_rounding_or_more_tells_members_apart() -> None:
    rates = (("method.alpha=48", "optimizer.ratio=1"), ("method.alpha=16", "optimizer.ratio=3"))
    powers = (("method.alpha=32", "optimizer.ratio=1"), ("method.alpha=8", "optimizer.ratio=4"))
    clipped = ("optimizer.eps_rule=scaled", "train.max_grad_norm=1.0")
    assert grades(pair(*powers), pair(*rates)) == ["bitwise", "exact"]
    near = [pair(*powers, shared=()), pair(*powers, shared=clipped), pair(*powers, shared=clipped[1:])]
    assert grades(*near) == [None, None, None]
    assert grades(*near, fold="near") == ["near: eps, up to 2e-03", None, None], "a clip moves losses by more than 1e-2"
    half = (*SCALED, "model.dtype=bf16")
    for fold in ("exact", "near"):
        assert grades(pair(*powers, shared=half), pair(*rates, shared=half), fold=fold) == ["bitwise", None]
    assert grades(pair(*powers, shared=half[3:]), fold="near") == [None], "another eps rounds otherwise in bf16, too"
    quarter = (*SCALED, "model.quantization=nf4", "model.dtype=fp32")
    assert grades(pair(*rates, shared=quarter)) == [None]
    assert grades(pair(*rates, shared=quarter), fold="near") == ["near: rounding, up to 1e-04"]


@pytest.mark.parametrize(("eps", "grade"), [("1e-9", "2e-04"), ("1e-8", "2e-03"), ("5e-8", "1e-02"), ("6e-8", None)])
def test_what_eps_may_move_decides_whether_it_is_near(eps: str, grade: str | None) -> None:
    """s is 1 and 4: the smaller s has the larger eps_B / s."""
    powers = ("method.alpha=32", "optimizer.ratio=1"), ("method.alpha=8", "optimizer.ratio=4")
    classes = grades(pair(*powers, shared=(f"optimizer.eps={eps}",)), fold="near")
    assert classes == [grade and f"near: eps, up to {grade}"]
    # A tenth of s is ten times the eps.
    tenth = ("method.alpha=3.2", "optimizer.ratio=1"), ("method.alpha=0.8", "optimizer.ratio=4")
    classes = grades(pair(*tenth, shared=(f"optimizer.eps={eps}",)), fold="near")
    assert classes == ["near: eps, up to 2e-03" if eps == "1e-9" else None]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fold", ["exact", "near"])
def test_no_class_holds_cells_whose_losses_may_differ_by_a_hundredth(fold: equivalence.TrueFold, seed: int) -> None:
    """Of random grids; and two cells share a class where their keys are equal, and nowhere else."""
    draw = random.Random(seed)
    choices = {
        "method.rank": (4, 9), "method.alpha": (1e-20, 0.01, 8, 12, 16, 32, 1e20),
        "method.use_rslora": ("true", "false"), "optimizer.ratio": (1e-19, 1, 1.5, 2, 4, 1e19),
        "optimizer.eps": (1e-3, 3e-8, 1e-8, 1e-18), "optimizer.weight_decay": (0.0,),
        "optimizer.optim": ("adamw",) * 6 + ("adamw_8bit", "sgd"), "model.dtype": ("fp32",) * 6 + ("bf16", "fp64"),
        "model.quantization": (None, None, "nf4"),
        "train.max_grad_norm": ("null", "null", 1.0), "optimizer.eps_rule": ("torch", "scaled"),
        "optimizer.clip_rule": ("torch", "scaled"), "optimizer.decay_rule": ("torch", "scaled"),
    }  # fmt: skip
    base = sweep_of().base()
    configs = {}
    for number in range(300):
        rank, alpha, rslora, ratio, eps, decay, *rest = (draw.choice(values) for values in choices.values())
        optim, dtype, quantization, norm, eps_rule, clip_rule, decay_rule = rest
        configs[number] = replace(
            base,
            model=replace(base.model, dtype=dtype, quantization=quantization),
            method=replace(base.method, rank=rank, alpha=float(alpha), use_rslora=rslora == "true"),
            optimizer=replace(
                base.optimizer, ratio=float(ratio), eps=eps, weight_decay=decay, optim=optim, eps_rule=eps_rule,
                clip_rule=clip_rule, decay_rule=decay_rule,
            ),
            train=replace(base.train, max_grad_norm=None if norm == "null" else norm),
        )  # fmt: skip
    classes = equivalence.classes(configs, fold)
    assert sorted(number for each in classes for number in each.cells) == list(configs)
    keys = [{equivalence.run_key(configs[number], fold) for number in each.cells} for each in classes]
    assert all(len(each) == 1 for each in keys)
    assert len(set().union(*keys)) == len(classes)
    for each in classes:
        assert each.grade.size <= equivalence.LARGEST_SIZE
        assert (
            set(each.grade.reasons) <= {"eps", "rounding"}
            if fold == "near"
            else each.grade.name in ("bitwise", "exact")
        )
    assert any(len(each.cells) > 1 for each in classes)


def scaled_by(s: str, ratio: str, *shared: str) -> dict[int, Config]:
    """LoRA with s = 1 and ratio 1, and the same run by algebra."""
    one, other = (
        ("method.rank=1", f"method.alpha={alpha}", f"optimizer.ratio={q}", "optimizer.base_lr=3e-3")
        for alpha, q in (("1", "1"), (s, ratio))
    )
    return pair(one, other, (*SCALED, *shared))


def test_what_leaves_the_range_of_floats_shares_no_class() -> None:
    far = (("1e-20", "1e20"), ("1.6e-6", "625000"), ("2e12", "5e-13"), ("1e20", "1e-20"))
    within = (("2e-6", "5e5"), ("1e-3", "1e3"), ("1e3", "1e-3"), ("1e12", "1e-12"))
    folds: tuple[equivalence.TrueFold, ...] = ("exact", "near")
    for fold in folds:
        assert grades(*(scaled_by(*each) for each in far), fold=fold) == [None] * 4
        assert grades(*(scaled_by(*each) for each in within), fold=fold) == ["exact"] * 4
    # A smaller eps is lost sooner, and fp64 has the larger range.
    smaller = [scaled_by(*each, "optimizer.eps=1e-12") for each in (("0.016", "62.5"), ("0.02", "50"))]
    assert grades(*smaller) == [None, "exact"]
    assert grades(*(scaled_by(*each, "model.dtype=fp64") for each in far)) == ["exact"] * 4
    # Two cells with one s are the same run wherever it lies.
    same = ("method.rank=4", "method.alpha=4e20"), ("method.rank=4", "method.alpha=2e20", "method.use_rslora=true")
    assert grades(pair(*same)) == ["bitwise"]
    assert str(equivalence.in_form(scaled_by(*far[-1])[1], "lora")[1]) == "near: range, up to inf"


def test_rslora_is_a_choice_of_alpha_where_the_root_of_the_rank_is_whole() -> None:
    plain = ("method.rank=9", "method.alpha=24", "method.use_rslora=false")
    stabilised = ("method.rank=9", "method.alpha=8", "method.use_rslora=true")
    of_four = ("method.rank=4", "method.alpha=6"), ("method.rank=4", "method.alpha=3", "method.use_rslora=true")
    # The root of 9 rounds in no float here, but nobody promises it for every alpha.
    assert grades(pair(plain, stabilised), pair(*of_four)) == ["exact", "bitwise"]
    eight = [("method.rank=8", f"method.alpha={a}", "method.use_rslora=true", f"optimizer.ratio={r}") for a, r in
             ((8, 2), (16, 1), (22.627416997969522, 1))]  # fmt: skip
    assert grades(pair(eight[0], eight[1])) == ["bitwise"]
    by_float = ("method.rank=8", "method.alpha=45.254833995939045", "optimizer.ratio=1")
    assert grades(pair(by_float, eight[1])) == [None], "16 x the root of 8 as a float is not it"


def test_numbers_count_as_they_are_typed() -> None:
    thirds = pair(("method.alpha=16", "optimizer.ratio=0.3"), ("method.alpha=48", "optimizer.ratio=0.1"))
    assert 16 * 0.3 != 48 * 0.1
    assert grades(thirds) == ["exact"]


@pytest.mark.parametrize(
    "word",
    [
        "method.rank=16", "method.dropout=0.1", "method.target_modules=[q_proj]", "optimizer.base_lr=1e-3",
        "optimizer.weight_decay=0.1", "optimizer.weight_decay_B=0.1", "optimizer.beta1=0.8", "optimizer.beta2=0.99",
        "optimizer.eps=1e-7", "train.max_steps=100", "train.batch_size=2", "train.seed=1", "train.schedule=cosine",
        "train.warmup_steps=5", "train.max_grad_norm=1.0", "train.gradient_accumulation_steps=2", "train.eval_every=25",
        "data=facts", "data.seed=1", "model.dtype=bf16", "train.gradient_checkpointing=true",
    ],
)  # fmt: skip
def test_cells_that_differ_in_anything_else_are_other_runs(word: str) -> None:
    """Here everything is equal in algebra but for that word; s is that of rank 8 under rank 16, too."""
    alpha = 64 if "rank" in word else 32
    other = (f"method.alpha={alpha}", "optimizer.ratio=1", word)
    assert grades(pair(("method.alpha=8", "optimizer.ratio=4"), other), fold="near") == [None]


def test_each_optimizer_folds_only_what_is_proved_for_it() -> None:
    powers = ("method.alpha=32", "optimizer.ratio=1"), ("method.alpha=8", "optimizer.ratio=4")
    thirds = ("method.alpha=48", "optimizer.ratio=1"), ("method.alpha=16", "optimizer.ratio=3")
    one_s = ("method.rank=4", "method.alpha=8"), ("method.rank=4", "method.alpha=4", "method.use_rslora=true")

    def under(optim: str, fold: equivalence.Fold = "exact") -> list[str | None]:
        shared = (*SCALED, f"optimizer.optim={optim}")
        return grades(*(pair(*each, shared=shared) for each in (powers, thirds, one_s)), fold=fold)

    classes = {optim: under(optim) for optim in get_args(get_type_hints(OptimizerConfig)["optim"])}
    assert classes == {
        "adamw": ["bitwise", "exact", "bitwise"],
        "paged_adamw": ["bitwise", "exact", "bitwise"],
        # What is not a power of two rounds 8-bit moments otherwise.
        "adamw_8bit": ["bitwise", None, "bitwise"],
        "paged_adamw_8bit": ["bitwise", None, "bitwise"],
        "sgd": [None, None, "bitwise"],
    }
    assert under("adamw_8bit", "near") == ["bitwise", None, "bitwise"]
    assert under("sgd", "near") == [None, None, "bitwise"]
    eight = sweep_of(*SCALED, "optimizer.optim=adamw_8bit", "method.alpha=16", "optimizer.ratio=3").base()
    assert str(equivalence.in_form(eight, "lora")[1]) == f"near: rounding, up to {equivalence.ROUNDING_SIZE:.0e}"


@pytest.mark.parametrize("form", ["lora", "rslora", "loraplus"])
def test_under_sgd_there_are_no_effective_coordinates_and_no_other_form(form: equivalence.Form) -> None:
    config = sweep_of(*SCALED, "optimizer.optim=sgd", "optimizer.ratio=4").base()
    assert equivalence.coordinates(config) is None
    with pytest.raises(ConfigError, match=r"pick\.form: under optimizer\.optim=sgd no other form .*\(leave it out"):
        equivalence.in_form(config, form)


def test_the_key_of_a_run_is_that_of_its_class() -> None:
    sweep = sweep_of("method.alpha=choice(8,12,16)", "optimizer.ratio=choice(1,1.5,2)", "model.dtype=choice(fp32,bf16)")
    folds: tuple[equivalence.TrueFold, ...] = ("exact", "near")
    for fold in folds:
        keys: dict[Any, list[int]] = {}
        for cell in sweep.cells():
            keys.setdefault(equivalence.run_key(sweep.config(cell), fold), []).append(cell.number)
        assert [each.cells for each in sweep.classes(fold)] == [tuple(numbers) for numbers in keys.values()]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_effective_coordinates_are_those_of_the_class(schedule: str, warmup: int) -> None:
    shared = (*SCALED, f"train.schedule={schedule}", f"train.warmup_steps={warmup}", "train.max_steps=40",
              "train.eval_every=40", "optimizer.weight_decay=0.3", "method.dropout=0.1")  # fmt: skip
    one, other = pair(
        ("method.rank=16", "method.alpha=8", "method.use_rslora=true", "optimizer.ratio=4"),
        ("method.rank=16", "method.alpha=128"),
        shared,
    ).values()
    mine, twin = equivalence.coordinates(one), equivalence.coordinates(other)
    assert mine is not None
    assert mine.log_X == pytest.approx(math.log(8 / 4 * 16 * 4 * 2e-4))
    assert mine.log_Y == pytest.approx(-math.log(2e-4))
    assert (mine.log2_rank, mine.dropout) == (4, 0.1)
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    steps = get_scheduler(name, adam, num_warmup_steps=warmup, num_training_steps=40)
    factors = 0.0
    for _ in range(40):
        factors += adam.param_groups[0]["lr"]
        adam.step()
        steps.step()
    assert mine.kappa_B == pytest.approx(2e-4 * 0.3 * factors)
    assert [getattr(twin, name) for name in vars(mine)] == pytest.approx([getattr(mine, name) for name in vars(mine)])


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


@pytest.fixture(scope="module")
def stranger() -> tuple[LoadedBase, Data]:
    """A small Llama of random weights, and random texts."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, initializer_range=0.15, **shape)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (24, 12), generator=generator).tolist()
    part = TokenSet.of([(row, [place > 2 for place in range(12)]) for row in ids])
    return LoadedBase(model, None, "stranger", None, torch.float32), Data(
        part, part.take(range(4)), part.take(range(4))
    )


BITING = 0.02


def train_all(on: tuple[LoadedBase, Data], sweep: Sweep, slots: int) -> dict[int, Evaluation]:
    """Every cell, `slots` in a pack; the last pack is filled up."""
    cells = sweep.cells()
    classes = {}
    for first in range(0, len(cells), slots):
        chosen = [*cells[first : first + slots]]
        chosen += cells[: slots - len(chosen)]
        trials = [Trial.of(cell, sweep.config(cell)) for cell in chosen]
        for trial, evaluation in zip(trials, packed(*on, trials, rank=sweep.largest_rank()), strict=True):
            classes[trial.cell.number] = evaluation
    return classes


def assert_folding_is_true(on: tuple[LoadedBase, Data], sweep: Sweep, slots: int, pairs: int, seed: int) -> None:
    """`pairs` random pairs of one class have the same bits, and as many of different classes have not."""
    classes = sweep.classes("exact")
    assert {each.grade.name for each in classes} == {"bitwise"}
    trained = train_all(on, sweep, slots)
    for evaluation in trained.values():
        assert not evaluation.diverged
        assert math.hypot(evaluation.grad_norm_A, evaluation.grad_norm_B_over_s) > BITING, "the clip bites"
    of = {number: place for place, each in enumerate(classes) for number in each.cells}
    draw = random.Random(seed)
    every = list(itertools.combinations(sorted(of), 2))
    same = draw.sample([pair for pair in every if of[pair[0]] == of[pair[1]]], pairs)
    other = draw.sample([pair for pair in every if of[pair[0]] != of[pair[1]]], pairs)
    for one, two in same:
        assert torch.equal(losses(trained[one]), losses(trained[two]))
        assert trained[one].eval_loss == trained[two].eval_loss
        assert (trained[one].eval_losses == trained[two].eval_losses).all()
    for one, two in other:
        assert not torch.equal(losses(trained[one]), losses(trained[two]))
        assert trained[one].eval_loss != trained[two].eval_loss


def whole(seed: int, steps: int, *axes: str) -> Sweep:
    """Decay, a biting clip, dropout, a warm-up and a cosine: all that could tell members apart."""
    return sweep_of(
        *SCALED, *axes, "optimizer.weight_decay=0.5", f"train.max_grad_norm={BITING}", "method.dropout=0.1",
        f"train.seed={seed}", f"train.max_steps={steps}", f"train.eval_every={steps}", "train.schedule=cosine",
        "train.warmup_steps=3", "train.batch_size=2", "train.eval_batch_size=4",
        "train.fixed_shapes=true", "train.slots=1",
    )  # fmt: skip


def test_members_of_a_bitwise_class_train_to_the_same_bits(stranger: tuple[LoadedBase, Data]) -> None:
    axes = ("method.rank=choice(4,8)", "method.alpha=choice(2,4,8)", "method.use_rslora=choice(false,true)",
            "optimizer.ratio=choice(1,2,4)", "optimizer.base_lr=3e-3")  # fmt: skip
    assert_folding_is_true(stranger, whole(0, 8, *axes), 36, 30, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_pairs_of_a_class_train_to_the_same_bits_and_as_many_of_others_do_not(
    stranger: tuple[LoadedBase, Data], seed: int
) -> None:
    axes = ("method.rank=choice(2,4,8)", "method.alpha=choice(2,4,8,16,32)", "method.use_rslora=choice(false,true)",
            "optimizer.ratio=choice(1,2,4,8,16)", "optimizer.base_lr=3e-3",
            "method.target_modules=[q_proj,v_proj,down_proj]")  # fmt: skip
    assert_folding_is_true(stranger, whole(seed, 20, *axes), 50, 200, seed)


def twins(trial: MakeTrial, **knobs: Any) -> list[Trial]:
    """Two members of a class of the scaled rules."""
    knobs = {
        "rank": 4,
        "base_lr": 3e-3,
        "max_steps": 20,
        "eval_every": 20,
        "batch_size": 2,
        "eval_batch_size": 4,
    } | knobs
    return [trial(0, alpha=32.0, ratio=1.0, **knobs), trial(1, alpha=4.0, ratio=8.0, **knobs)]


def difference(on: tuple[LoadedBase, Data], trials: list[Trial]) -> float:
    one, two = (losses(evaluation).tolist() for evaluation in packed(*on, trials))
    return equivalence.largest_difference(one, two)


def test_each_rule_is_needed_and_torchs_own_is_near(stranger: tuple[LoadedBase, Data], trial: MakeTrial) -> None:
    knobs: dict[str, Any] = {"weight_decay": 1.0, "max_grad_norm": BITING}
    assert difference(stranger, twins(trial, **knobs, **RULES)) == 0
    eps = difference(stranger, twins(trial, **knobs, **RULES | {"eps_rule": "torch"}))
    clip = difference(stranger, twins(trial, **knobs, **RULES | {"clip_rule": "torch"}))
    decay = difference(stranger, twins(trial, **knobs, **RULES | {"decay_rule": "torch"}))
    assert 0 < eps < equivalence.EPS_SIZE
    assert equivalence.EXACT_SIZE < clip < equivalence.CLIP_SIZE
    assert decay > equivalence.EXACT_SIZE


def test_where_s_and_ratio_are_one_the_scaled_rules_are_torchs(
    stranger: tuple[LoadedBase, Data], trial: MakeTrial
) -> None:
    knobs: dict[str, Any] = {"alpha": 4.0, "rank": 4, "max_steps": 20, "eval_every": 20, "batch_size": 2}
    knobs |= {"weight_decay": 1.0, "max_grad_norm": BITING, "base_lr": 3e-3}
    assert difference(stranger, [trial(0, **knobs), trial(1, **knobs, **RULES)]) == 0


def test_members_of_an_exact_class_differ_by_rounding_only(stranger: tuple[LoadedBase, Data], trial: MakeTrial) -> None:
    knobs: dict[str, Any] = {"eps_rule": "scaled", "rank": 4, "base_lr": 1e-3, "batch_size": 2}
    classes = difference(stranger, [trial(0, alpha=12.0, ratio=1.0, **knobs), trial(1, alpha=4.0, ratio=3.0, **knobs)])
    assert 0 < classes < equivalence.EXACT_SIZE


def test_eight_bit_moments_keep_the_bits_of_powers_of_two_and_of_nothing_else(
    base: LoadedBase, style: Data, trial: MakeTrial
) -> None:
    # Moments have 8 bits from 4,096 numbers a tensor on: rank 32 of width 128.
    knobs: dict[str, Any] = {"optim": "adamw_8bit", "rank": 32, "base_lr": 1e-3, "weight_decay": 1.0, **RULES}
    assert difference((base, style), twins(trial, **knobs, max_steps=8, eval_every=8, max_grad_norm=0.1)) == 0
    knobs |= {"max_steps": 30, "eval_every": 30, "batch_size": 2}

    def thirds(optim: str) -> list[Trial]:
        settings = knobs | {"optim": optim}
        return [trial(0, alpha=96.0, ratio=1.0, **settings), trial(1, alpha=32.0, ratio=3.0, **settings)]

    exact, rounded = (difference((base, style), thirds(optim)) for optim in ("adamw", "adamw_8bit"))
    assert 0 < exact < equivalence.EXACT_SIZE < rounded < equivalence.ROUNDING_SIZE


def test_under_sgd_members_of_an_adamw_class_are_other_runs(
    stranger: tuple[LoadedBase, Data], trial: MakeTrial
) -> None:
    assert difference(stranger, twins(trial, optim="sgd", base_lr=0.1)) > equivalence.LARGEST_SIZE


@pytest.mark.parametrize("s", [2.0**-18, 2.0**40])
def test_at_the_edge_of_the_range_bits_are_the_same_and_beyond_it_losses_part(
    stranger: tuple[LoadedBase, Data], trial: MakeTrial, s: float
) -> None:
    knobs: dict[str, Any] = {"rank": 4, "max_steps": 20, "eval_every": 20, "batch_size": 2, "eval_batch_size": 4}

    def member(number: int, s: float) -> Trial:
        return trial(number, alpha=4 * s, ratio=1 / s, base_lr=3e-3, weight_decay=1.0, **knobs, **RULES)

    assert difference(stranger, [member(0, 1.0), member(1, s)]) == 0
    far = 2.0**-70 if s < 1 else 2.0**75
    assert difference(stranger, [member(0, 1.0), member(1, far)]) > equivalence.LARGEST_SIZE


@pytest.mark.parametrize("bf16", either(BF16_PRODUCTS, BF16_ATTENTION), indirect=True)
def test_a_base_in_bf16_keeps_the_bits_of_a_class(trial: MakeTrial, bf16: bool) -> None:
    model = replace(sweep_of().base().model, dtype="bf16")
    base = load_base(model, torch.device("cpu"))
    part = short_examples(8, 0)
    knobs: dict[str, Any] = {"max_steps": 8, "eval_every": 8, "weight_decay": 0.5, "max_grad_norm": 0.1}
    assert difference((base, Data(part, part, part)), twins(trial, base_lr=1e-3, **knobs, **RULES)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The ledger


def cells(count: int) -> list[Cell]:
    return [Cell(number, {"method.alpha": 2**number}) for number in range(count)]


def finish_all(study: Study) -> list[int]:
    ran = []
    while (lease := study.ask(lambda _: True)) is not None:
        study.report_rung({lease: 1.0 + lease.cell.number}, 10)
        study.tell(lease, "COMPLETE", 1.0 + lease.cell.number)
        ran.append(lease.cell.number)
    return ran


def who_runs(folder: Path) -> dict[int, int]:
    return {number: runs for number, (_, runs) in StudyView.read(folder).duplicates().items()}


def test_one_cell_of_a_class_runs_and_the_others_point_to_it(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=cells(6), same_run=[(0, 3, 5), (1,), (2, 4)]) as study:
        assert finish_all(study) == [0, 1, 2]
        assert (study.size, study.counts()["COMPLETE"]) == (6, 3)
    assert who_runs(tmp_path) == {3: 0, 5: 0, 4: 2}
    assert StudyView.read(tmp_path).duplicates()[5][0] == cells(6)[5]


def test_a_new_cell_equal_to_an_old_one_points_to_it_and_does_not_run(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=cells(3), same_run=[(0,), (1, 2)]) as study:
        assert finish_all(study) == [0, 1]
    with Study.open(tmp_path, name="s", cells=cells(6), same_run=[(0, 4), (1, 2, 5), (3,)]) as study:
        assert finish_all(study) == [3]
    assert who_runs(tmp_path) == {4: 0, 2: 1, 5: 1}


def test_who_has_begun_stays_the_one_that_runs(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=cells(4)) as study:
        study.ask(lambda cell: cell.number == 2)
    # 2 was begun by a process that died; now folding is on, and 0 and 3 wait for nothing.
    with Study.open(tmp_path, name="s", cells=cells(4), same_run=[(0, 2, 3), (1,)]) as study:
        assert {status.cell.number for status in study.statuses()} == {1, 2}
        assert finish_all(study) == [1, 2]
    assert who_runs(tmp_path) == {0: 2, 3: 2}


def test_folding_may_be_turned_off_and_on_between_launches(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=cells(3), same_run=[(0, 1, 2)]) as study:
        assert finish_all(study) == [0]
    with Study.open(tmp_path, name="s", cells=cells(3)) as study:
        lease = study.ask(lambda _: True)
        assert lease is not None
        assert lease.cell.number == 1
        study.tell(lease, "COMPLETE", 5.0)
    with Study.open(tmp_path, name="s", cells=cells(3), same_run=[(0, 1, 2)]) as study:
        assert finish_all(study) == []
        assert [status.value for status in study.statuses()] == [1.0, 5.0]
    assert who_runs(tmp_path) == {2: 0}


def test_a_folded_cell_that_became_another_is_other_cells(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=cells(2), same_run=[(0, 1)]):
        pass
    changed = [cells(1)[0], Cell(1, {"method.alpha": 3})]
    with pytest.raises(StudyError, match="begun with other cells"):
        Study.open(tmp_path, name="s", cells=changed)


# ---------------------------------------------------------------------------------------------------------------------
# Whole studies

TWO_STEPS = {"max_steps": 2, "eval_every": 2, "slots": 11}


def test_the_whole_table_is_filled_by_the_distinct_runs(in_folder: Path) -> None:
    axes = dict(line.split("=", 1) for line in ISSUE)
    watcher, finished, table = run(write_sweep(in_folder, axes, train=TWO_STEPS, optimizer=RULES))
    assert finished
    assert len(watcher.ends) == ISSUE_RUNS
    assert sorted(int(each.name) for each in Path("outputs/ask/trials").iterdir()) == sorted(n for n, _ in watcher.ends)
    assert [row["number"] for row in table] == list(range(150))
    assert {row["state"] for row in table} == {"COMPLETE"}
    assert sum(row["same_run_as"] is None for row in table) == ISSUE_RUNS
    assert table == [json.loads(line) for line in Path("outputs/ask/trials.jsonl").read_text().splitlines()]
    by_number = {row["number"]: row for row in table}
    assert len({row["params"]["method.alpha"] for row in table}) == 5
    for row in table:
        runs = by_number[row["number"] if row["same_run_as"] is None else row["same_run_as"]]
        assert runs["same_run_as"] is None
        assert row["eval_loss"] == runs["eval_loss"] is not None
        assert row["params"]["method.rank"] == runs["params"]["method.rank"] == 2 ** row["effective"]["log2_rank"]


SMALL_AXES = {"method.alpha": "choice(8, 16, 32)", "optimizer.ratio": "choice(1, 2, 4)"}
THREE_STEPS = {"max_steps": 3, "eval_every": 3, "slots": 5}
DECAYING = RULES | {"weight_decay": 50.0, "base_lr": 3e-3}


def test_what_is_folded_is_what_running_it_gives_and_a_spot_check_says_so(in_folder: Path) -> None:
    path = write_sweep(in_folder, SMALL_AXES, train=THREE_STEPS, optimizer=DECAYING)
    watcher, _, folded = run(path)
    assert len(watcher.ends) == 5
    watcher, _, checked = run(path, "study.verify_fold=2")
    assert len(watcher.ends) == 2, "the other five are finished"
    watcher, _, each = run(path, "study.fold=off")
    assert len(watcher.ends) == 2, "the rest"
    assert [row["same_run_as"] for row in each] == [None] * 9
    for one, other, third in zip(folded, checked, each, strict=True):
        assert one["eval_loss"] == other["eval_loss"] == third["eval_loss"]
        assert one["train_loss"] == other["train_loss"] == third["train_loss"]


def test_a_folding_that_does_not_hold_is_an_error_that_names_the_axis_and_loses_nothing(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(in_folder, SMALL_AXES, train=THREE_STEPS, optimizer=DECAYING)
    # A trainer that forgets the rule of decay.
    monkeypatch.setattr(Trial, "weight_decay_B", property(lambda trial: trial.optimizer.weight_decay))
    with pytest.raises(
        StudyError, match=r"method\.alpha \d+ -> \d+, optimizer\.ratio \d -> \d\) should be the same run"
    ):
        run(path, "study.verify_fold=9")
    rows = [json.loads(line) for line in Path("outputs/ask/trials.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["COMPLETE"] * 9


def test_a_difference_of_two_percent_is_found_in_a_near_class(in_folder: Path) -> None:
    """The largest size that any class has is below it, so a fold that hides it is an error."""
    axes = {"method.alpha": "choice(8, 16)", "optimizer.ratio": "choice(1, 2)", "method.rank": "choice(4)"}
    path = write_sweep(in_folder, axes, train=THREE_STEPS | {"slots": 4}, optimizer={"eps": 1e-8})
    run(path, "study.fold=near", "study.verify_fold=1")
    (pair,) = [each for each in sweep_file.read(str(path), [])[0].classes("near") if len(each.cells) > 1]
    assert pair.grade.name == "near"
    metrics = Path("outputs/ask/trials") / f"{pair.cells[1]:04d}" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for factor, holds in ((1.001, True), (1.02, False)):
        moved = [row | {"train/loss": row["train/loss"] * factor} for row in rows]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in moved))
        if holds:
            run(path, "study.fold=near", "study.verify_fold=1")
        else:
            with pytest.raises(StudyError, match=r"should be the same run \(near: eps.*differ by 2\.\de-02"):
                run(path, "study.fold=near", "study.verify_fold=1")


def test_off_is_off_in_yaml_and_on_the_command_line(in_folder: Path) -> None:
    path = write_sweep(in_folder, {"method.alpha": "choice(8, 16)"})
    path.write_text(path.read_text() + "study:\n  fold: off\n")
    assert sweep_file.read(str(path), [])[0].base().study.fold == "off"
    assert sweep_of("study.fold=off").base().study.fold == "off"


@pytest.mark.parametrize("form", ["lora", "rslora", "loraplus"])
@pytest.mark.parametrize("decay_rule", ["torch", "scaled"])
def test_the_winner_can_be_written_in_any_form_of_the_same_run(form: equivalence.Form, decay_rule: str) -> None:
    shared = (*SCALED, f"optimizer.decay_rule={decay_rule}", "optimizer.weight_decay=0.1", "method.rank=16")
    config = sweep_of(*shared, "method.alpha=8", "method.use_rslora=true", "optimizer.ratio=8").base()
    written, grade = equivalence.in_form(config, form)
    expected = {"lora": (256, False, 1), "rslora": (64, True, 1), "loraplus": (16, False, 16)}[form]
    assert (written.method.alpha, written.method.use_rslora, written.optimizer.ratio) == expected
    assert str(grade) == grades({0: config, 1: written})[0] == "bitwise"
    # Rank 8 has no whole root: the same but for the rounding of alpha.
    odd = replace(config, method=replace(config.method, rank=8))
    written, grade = equivalence.in_form(odd, form)
    one, other = equivalence.coordinates(odd), equivalence.coordinates(written)
    assert one is not None
    assert other is not None
    assert (other.log_X, other.kappa_B) == pytest.approx((one.log_X, one.kappa_B))
    assert grade.name == ("bitwise" if form == "rslora" else "exact")


def test_pick_writes_the_form_asked_for_and_leaves_the_adapter_as_it_was_trained(in_folder: Path) -> None:
    axes = {"optimizer.ratio": "choice(2, 4)", "optimizer.base_lr": "choice(3e-3)"}
    run(write_sweep(in_folder, axes, train=THREE_STEPS, optimizer=RULES))
    picked = pick(Path("outputs/ask"), "lora")
    winner, production = picked.winner, picked.production
    shipped = yaml.safe_load((production / "production.yaml").read_text())
    ratio = winner["params"]["optimizer.ratio"]
    assert (shipped["method"]["alpha"], shipped["optimizer"]["ratio"]) == (16 * ratio, 1)
    assert (shipped["form"], shipped["same_run"]) == ("lora", "bitwise")
    assert shipped["adapter_trained_with"] == {
        "alpha": 16, "use_rslora": False, "ratio": ratio, "weight_decay_B": None,
    }  # fmt: skip
    assert json.loads((production / "adapter/adapter_config.json").read_text())["lora_alpha"] == 16
