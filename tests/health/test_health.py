"""Looks against the product by hand and torch's own AdamW; rules where the trouble is known; verdicts and courses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_of
from torch import Tensor

from lora_sweep import health
from lora_sweep.health import (
    BIN_EDGES,
    AdaptedModule,
    Cooler,
    HealthHistory,
    Logged,
    LossHistory,
    Peer,
    Side,
    Stepped,
    TrainerSettings,
)
from lora_sweep.health.history import window
from lora_sweep.health.measure import METRICS
from lora_sweep.health.rules import CAUSES
from lora_sweep.records import (
    BaselineLosses,
    Cause,
    Diagnosis,
    Estimate,
    Evaluation,
    Finding,
    HealthSnapshot,
    Measurement,
    UpdateSums,
)

RULES = config_of().health
AT_REST = Stepped(1.0, 1e-8, (0.9, 0.999), 1)


def drawn(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def still(A: Tensor, B: Tensor) -> AdaptedModule:
    """Nothing known but the values."""
    return AdaptedModule(*(Side(value, None, None, None, AT_REST) for value in (A, B)))


def measured_by_name(modules: Sequence[AdaptedModule]) -> dict[str, Tensor]:
    rows = health.measure(modules, health.sample_weights([(each.A.value, each.B.value) for each in modules]))
    return dict(zip(METRICS, rows.T, strict=True))


NAMES = ("layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj")
FACTORS = [(drawn(2 * place, 3, 8), drawn(2 * place + 1, 3, d_out)) for place, d_out in enumerate((6, 12, 6, 12))]
NORMS = dict(zip(NAMES, (2.0, 3.0, 5.0, 7.0), strict=True))


# -- a look --------------------------------------------------------------------------------------------------------


def test_the_size_of_the_update_and_its_stable_rank_are_those_of_the_explicit_product() -> None:
    measured = measured_by_name([still(A, B) for A, B in FACTORS])
    for place, (A, B) in enumerate(FACTORS):
        singular = torch.linalg.svdvals(B.double().T @ A.double())
        assert float(measured["product"][place]) == pytest.approx(float(singular.square().sum().sqrt()), rel=1e-5)
        by_hand = float(singular.square().sum() / singular[0] ** 2)
        assert float(measured["stable_rank"][place]) == pytest.approx(by_hand, rel=0.02)


def test_sizes_zeros_and_gradients_are_over_all_elements() -> None:
    A, B, gradient = drawn(0, 2, 5), torch.tensor([[0.0, -0.0, 1e-38, 1.0]] * 2), drawn(1, 2, 4)
    gradient[0, 0] = 0.0
    measured = measured_by_name(
        [AdaptedModule(Side(A, None, None, None, AT_REST), Side(B, gradient, None, None, AT_REST))]
    )
    assert float(measured["rms_A"]) == pytest.approx(float(A.square().mean().sqrt()))
    assert (float(measured["zero_B"]), float(measured["absmax_B"])) == (0.5, 1.0)
    assert float(measured["gradmax_B"]) == pytest.approx(float(gradient.abs().max()))
    assert float(measured["gradrms_B"]) == pytest.approx(float(gradient.square().mean().sqrt()))
    assert float(measured["gradzero_B"]) == 0.125
    assert float(measured["gradmax_A"]) == -1, "no gradient is another thing than one of zeros"


def test_each_module_has_its_own_row_however_shapes_are_mixed() -> None:
    apart = [measured_by_name([still(A, B)]) for A, B in FACTORS]
    together = measured_by_name([still(A, B) for A, B in FACTORS])
    for name in ("rms_A", "rms_B", "product"):
        assert [float(each[name]) for each in apart] == pytest.approx(together[name].tolist())


def test_transposed_views_are_read_like_copies() -> None:
    A, B = drawn(0, 4, 600), drawn(1, 2000, 4)
    view, copy = still(A, B.T), still(A, B.T.contiguous())
    assert measured_by_name([view])["product"].tolist() == pytest.approx(measured_by_name([copy])["product"].tolist())
    assert health.sample_weights([(A, B.T)])[0][1].shape == health.sample_weights([(A, B)])[0][1].shape


REAL = [(16, 2048), (64, 4096), (8, 11008), (128, 14336), (6, 4608)]


@pytest.mark.parametrize(("rank", "width"), REAL)
def test_a_sample_holds_every_rank_and_many_places_of_the_width_however_the_memory_lies(rank: int, width: int) -> None:
    ranks = torch.arange(rank).repeat(width, 1)
    columns = torch.arange(width).repeat(rank, 1)
    # PEFT's B is (width, rank) in memory and comes transposed; A, and both in a pack, are (rank, width).
    peft, packed = ranks.T, ranks.T.contiguous()
    for held in (peft, packed):
        ((_, sample),) = health.sample_weights([(packed, held)])
        assert sample.numel() < 2 * 1024
        counts = torch.bincount(sample, minlength=rank)
        assert counts.min() >= 0.5 * sample.numel() / rank, "each rank has its share"
    ((places, _),) = health.sample_weights([(columns, packed)])
    assert len(places.unique()) >= 0.5 * min(width, len(places)), "and not the same few places of each"


@pytest.mark.parametrize("transposed", [False, True], ids=["pack", "PEFT"])
def test_a_dead_rank_among_living_ones_is_no_dead_module(transposed: bool) -> None:
    A = drawn(0, 16, 2048, size=0.01)
    A[0] = 0
    B = torch.zeros(2048, 16).T if transposed else torch.zeros(16, 2048)
    A.requires_grad_()
    B.requires_grad_()
    x, y = drawn(1, 32, 2048), drawn(2, 32, 2048)
    optimizer = torch.optim.AdamW([A, B], lr=1e-3, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        (x @ A.T @ B - y).square().mean().backward()
        before, was = health.sample_weights([(A, B)]), B.detach().clone()
        optimizer.step()
    sides = []
    for parameter in (A, B):
        state = optimizer.state[parameter]
        stepped = Stepped(1.0, 1e-8, (0.9, 0.999), 3)
        sides.append(Side(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], stepped))
    measured = dict(zip(METRICS, health.measure([AdaptedModule(*sides)], before)[0].tolist(), strict=True))
    assert measured["moved_B"] == pytest.approx(float((was != B).float().mean()), abs=0.03)
    assert measured["moved_B"] == pytest.approx(15 / 16, abs=0.03)
    assert measured["gradmax_B"] > 0.5 * float(B.grad.abs().max())
    assert measured["v_over_eps_B"] > 1
    assert measured["lr_B"] == pytest.approx(1e-3, rel=1e-3)


def trained(lr: tuple[float, float], steps: int, dtype: Any = torch.float32, **knobs: Any) -> list[dict[str, Tensor]]:
    """Looks after each step of torch's own AdamW on a small regression, B from zero."""
    settings = {"weight_decay": 0.0, "eps": 1e-8, "betas": (0.9, 0.999)} | knobs
    A, B = drawn(0, 4, 16, size=0.1).to(dtype).requires_grad_(), torch.zeros(4, 8, dtype=dtype, requires_grad=True)
    groups = [{"params": [A], "lr": lr[0]}, {"params": [B], "lr": lr[1]}]
    optimizer = torch.optim.AdamW(groups, **settings)
    x, y = drawn(1, 32, 16).to(dtype), drawn(2, 32, 8).to(dtype)
    measured = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (x @ A.T @ B - y).square().mean().backward()
        before = health.sample_weights([(A, B)])
        optimizer.step()
        sides = []
        for parameter, rate in zip((A, B), lr, strict=True):
            state = optimizer.state[parameter]
            stepped = Stepped(1 - rate * settings["weight_decay"], settings["eps"], settings["betas"], step)
            sides.append(Side(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], stepped))
        rows = health.measure([AdaptedModule(*sides)], before)
        measured.append(dict(zip(METRICS, rows.T, strict=True)))
    return measured


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_the_rates_that_adamw_has_moved_a_and_b_at_are_measured_from_what_moved(ratio: float, decay: float) -> None:
    for step, each in enumerate(trained((1e-3, ratio * 1e-3), 6, weight_decay=decay), start=1):
        assert float(each["lr_B"]) == pytest.approx(ratio * 1e-3, rel=1e-3)
        if step == 1:
            assert math.isnan(float(each["lr_A"])), "B was zero, so A had no gradient"
        else:
            assert float(each["lr_A"]) == pytest.approx(1e-3, rel=1e-3)


def test_the_size_of_the_second_moment_is_told_in_units_of_eps_bias_corrected() -> None:
    (first,) = trained((1e-3, 1e-3), 1, eps=1e-4)
    # After one step sqrt(v') is |g|.
    A, x, y = drawn(0, 4, 16, size=0.1), drawn(1, 32, 16), drawn(2, 32, 8)
    gradient = (2 / y.numel()) * (x @ A.T).T @ (-y)
    assert float(first["v_over_eps_B"]) == pytest.approx(float(gradient.abs().median()) / 1e-4, rel=0.02)


def test_elements_that_low_precision_does_not_move_are_counted() -> None:
    full, low = (trained((1e-5, 1e-5), 3, dtype)[-1] for dtype in (torch.float32, torch.bfloat16))
    assert float(full["moved_A"]) == 1
    assert float(low["moved_A"]) < 0.25


# -- groups --------------------------------------------------------------------------------------------------------


def snapshot_of(factors: Sequence[tuple[Tensor, Tensor]] = FACTORS, lr_B_squared: float = 1.0) -> HealthSnapshot:
    measured = {
        name: column.numpy()[None] for name, column in measured_by_name([still(A, B) for A, B in factors]).items()
    }
    sums = UpdateSums(stepped=1, lr_B=1.0, lr_A=1.0, lr_B_squared=lr_B_squared)
    return HealthSnapshot(NAMES[: len(factors)], 20, (1,), (sums,), measured, sums)


def one(B: Tensor, lr_B_squared: float = 1.0) -> Measurement:
    factors = [(torch.ones(B.shape[0], 2, dtype=B.dtype), B)]
    (only,) = health.measurements(snapshot_of(factors, lr_B_squared), {NAMES[0]: factors[0]}, 1.0, {NAMES[0]: 1.0})
    return only


GROUPED = {name: [place for place, full in enumerate(NAMES) if full.endswith(name)] for name in ("q_proj", "up_proj")}


@pytest.mark.parametrize("scaling", [1.0, 4.0, 0.5])
def test_modules_of_one_name_are_one_group_with_the_size_of_the_explicit_product(scaling: float) -> None:
    result = health.measurements(snapshot_of(), dict(zip(NAMES, FACTORS, strict=True)), scaling, NORMS)
    assert [each.group for each in result] == ["q_proj", "up_proj"]
    for each in result:
        updates = [scaling * FACTORS[place][1].double().T @ FACTORS[place][0].double() for place in GROUPED[each.group]]
        by_hand = math.sqrt(sum(float(update.square().sum()) for update in updates))
        weights = math.sqrt(sum(NORMS[NAMES[place]] ** 2 for place in GROUPED[each.group]))
        assert each.delta_rel == pytest.approx(by_hand / weights, rel=1e-5)
        A, B = (np.concatenate([FACTORS[p][side].numpy().ravel() for p in GROUPED[each.group]]) for side in (0, 1))
        assert each.rms_A == pytest.approx(np.sqrt(np.mean(np.square(A, dtype=np.float64))), rel=1e-5)
        assert each.rms_B == pytest.approx(np.sqrt(np.mean(np.square(B, dtype=np.float64))), rel=1e-5)
        assert each.absmax_B == np.abs(B).max()
        assert each.exact_zero_B == 0


def test_rho_is_in_units_of_the_summed_learning_rates() -> None:
    B = torch.tensor([[0.3, -0.4]])
    steps, lr = 25, 0.01
    assert one(B, steps * lr**2).rho == pytest.approx(math.sqrt((0.09 + 0.16) / 2) / (lr * math.sqrt(steps)))
    assert one(B, 0.0).rho == 0, "before the first step"


def test_a_base_of_zeros_makes_no_division_fault() -> None:
    factors = dict(zip(NAMES, FACTORS, strict=True))
    assert health.measurements(snapshot_of(), factors, 1.0, dict.fromkeys(NAMES, 0.0))[0].delta_rel == math.inf
    assert np.isinf(health.delta_rel(snapshot_of(), 1.0, dict.fromkeys(NAMES, 0.0))).all()


# -- histograms ----------------------------------------------------------------------------------------------------


def test_the_bins_are_symmetric_logarithmic_and_one_lies_around_zero() -> None:
    assert BIN_EDGES.shape == (52,)
    assert np.array_equal(BIN_EDGES, -BIN_EDGES[::-1])
    positive = BIN_EDGES[26:]
    assert (positive[0], positive[-1]) == pytest.approx((1e-3, 1e2))
    assert np.allclose(positive[1:] / positive[:-1], 10**0.2)


@pytest.mark.parametrize("unit", [1.0, 0.02, 300.0])
def test_counts_are_numpys_in_the_same_edges_whatever_the_unit(unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    magnitudes = 10 ** (torch.rand(4000, generator=generator, dtype=torch.float64) * 4.9 - 2.95)
    signs = torch.randint(0, 2, (4000,), generator=generator) * 2 - 1
    B = torch.cat([magnitudes * signs, torch.zeros(100, dtype=torch.float64)]).view(10, -1)
    expected = np.histogram(B.numpy(), BIN_EDGES)[0]
    counts = one(B * unit, unit**2).histogram.counts
    assert counts.dtype == np.int64
    assert np.array_equal(counts, expected)
    assert np.array_equal(one((B * unit).float(), unit**2).histogram.counts, expected)
    assert counts[25] >= 100


def test_the_same_adapter_at_twice_the_rate_has_the_same_histogram() -> None:
    """The bins are the same for every trial, so trials compare."""
    B = drawn(0, 4, 100)
    assert np.array_equal(one(B, 1e-4).histogram.counts, one(4 * B, 16e-4).histogram.counts)


def test_what_lies_outside_is_in_the_outermost_bins_and_nothing_is_lost() -> None:
    counts = one(torch.tensor([[1e9, math.inf, -1e9, 0.0, 0.5]])).histogram.counts
    assert counts[-1] == 2
    assert counts[0] == 1
    assert counts.sum() == 5


def test_not_a_number_is_in_no_bin_and_breaks_nothing() -> None:
    broken = one(torch.tensor([[math.nan, 0.5, 0.0]]))
    assert broken.histogram.counts.sum() == 2
    assert math.isnan(broken.rms_B)
    assert one(torch.full((2, 2), math.nan)).histogram.counts.sum() == 0


def test_before_the_first_step_all_of_b_is_in_the_middle() -> None:
    counts = one(torch.zeros(2, 8), 0.0).histogram.counts
    assert counts[25] == counts.sum() == 16


# -- the chart -----------------------------------------------------------------------------------------------------


def test_looks_come_after_the_first_steps_at_the_end_of_the_window_at_the_cadence_and_at_evaluations() -> None:
    chart, due = HealthHistory(("a",), max_steps=1000, every=300), []
    assert window(1000) == 50
    for step in range(1, 1001):
        if chart.is_due(step, at_evaluation=step == 444):
            due.append(step)
        chart.stepped(1e-3, 1e-3 * (step > 5), 1.0)
    # Five steps at rate 0 do not count for the window.
    assert due == [2, 10, 55, 300, 444, 600, 900]


def test_the_window_of_a_short_run_ends_with_it_though_a_warm_up_began_at_0() -> None:
    chart = HealthHistory(("a",), max_steps=20, every=100)
    ends = []
    for step in range(1, 21):
        chart.stepped(1e-3 * (step > 1), 1e-3 * (step > 1), 1.0)
        chart.take(step, torch.zeros(1, len(METRICS), dtype=torch.float64))
        ends += [step] * chart.ends_window
    assert (ends, chart.window_is_over, chart.snapshot().window) == ([20], True, 19)
    again = HealthHistory(("a",), max_steps=20, every=100)
    again.restore(*chart.state())
    assert again.snapshot().window == 19


def test_the_sums_are_those_of_the_steps() -> None:
    sums, decay, rates = UpdateSums(), 0.1, [(0.0, 0.0), (0.01, 0.16), (0.02, 0.16), (0.01, 0.16)]
    for lr_A, lr_B in rates:
        sums = sums.after(lr_A, lr_B, 1 - lr_B * decay)
    assert sums.stepped == 3
    assert sums.kappa_B == pytest.approx(decay * 0.48)
    assert sums.lr_B_squared == pytest.approx(3 * 0.16**2)
    assert (sums.least_ratio, sums.largest_ratio) == pytest.approx((8.0, 16.0))
    # What is left of a constant push at these rates under this decay.
    weight = 0.0
    for _, lr_B in rates:
        weight = weight * (1 - lr_B * decay) + lr_B
    assert sums.kept_B == pytest.approx(weight)


def test_a_chart_goes_on_from_its_checkpoint() -> None:
    chart = HealthHistory(("a", "b"), 100, 50)
    for step in (1, 2):
        chart.stepped(1e-3, 1e-2, 0.999)
        chart.take(step, torch.full((2, len(METRICS)), float(step), dtype=torch.float64))
    again = HealthHistory(("a", "b"), 100, 50)
    again.restore(*chart.state())
    one, other = chart.snapshot(), again.snapshot()
    assert (one.steps, one.sums_by_check, one.sums) == (other.steps, other.sums_by_check, other.sums)
    assert all(np.array_equal(one.values[name], other.values[name]) for name in METRICS)


@pytest.mark.gpu
def test_a_chart_that_was_read_or_restored_goes_on_on_the_device() -> None:
    chart, again = HealthHistory(("a",), 100, 50), HealthHistory(("a",), 100, 50)
    for step in (1, 2, 3):
        chart.stepped(1e-3, 1e-2, 0.999)
        chart.take(step, torch.full((1, len(METRICS)), float(step), dtype=torch.float64, device="cuda"))
        assert chart.snapshot().values["rms_A"][:, 0].tolist() == [1.0, 2.0, 3.0][:step]
    again.restore(*chart.state())
    again.take(4, torch.full((1, len(METRICS)), 4.0, dtype=torch.float64, device="cuda"))
    assert again.snapshot().values["rms_A"][:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


# -- the rules -----------------------------------------------------------------------------------------------------

HEALTHY: dict[str, float] = {
    "rms_A": 0.05, "rms_B": 3.5 * 1e-3 * math.sqrt(20), "absmax_B": 0.1, "zero_B": 0.0, "product": 1.0,
    "stable_rank": 2.0, "gradmax_A": 0.01, "gradmax_B": 0.05, "gradrms_B": 0.01, "gradzero_B": 0.0,
    "v_over_eps_B": 1e5, "moved_A": 1.0, "moved_B": 1.0, "lr_A": 1e-3, "lr_B": 1e-3,
}  # fmt: skip


def rule_input_of(
    asked: TrainerSettings | None = None,
    delta_rel: float = 0.1,
    sums: UpdateSums | None = None,
    hit: int = 8,
    **columns: Any,
) -> health.RuleInput:
    """Four looks at eight modules, healthy but for `columns` in the first `hit` of them."""
    steps = (1, 2, 20, 100)
    values = {name: np.full((4, 8), value) for name, value in HEALTHY.items()}
    values["rms_B"] = values["rms_B"] * np.array([[0.1], [0.2], [1.0], [3.0]])
    for name, value in columns.items():
        values[name][:, :hit] = value
    sums_by_check = tuple(UpdateSums(n, n * 1e-3, n * 1e-3, n * 1e-6, 0.0, n * 1e-3, 1.0, 1.0) for n in steps)
    names = tuple(f"layers.{layer}.proj" for layer in range(8))
    result = HealthSnapshot(names, 20, steps, sums_by_check, values, sums or sums_by_check[-1])
    return health.RuleInput(result, asked or TrainerSettings(1.0), np.full(8, delta_rel), 1e-3)


def named(what: health.RuleInput) -> str | None:
    _, measured = health.causes(what)
    return measured[0].name if measured else None


DECAYED = UpdateSums(100, 0.1, 10.0, 1.0, 8.0, 1.2, 100.0, 100.0)


@pytest.mark.parametrize(
    ("cause", "made"),
    [
        (None, lambda: rule_input_of()),
        ("dead_product", lambda: rule_input_of(rms_A=0.0, rms_B=0.0, gradmax_A=0.0, gradmax_B=0.0)),
        ("not_in_graph", lambda: rule_input_of(gradmax_A=-1.0, gradmax_B=-1.0, rms_B=0.0)),
        ("not_in_graph", lambda: rule_input_of(gradmax_A=0.0, gradmax_B=0.0, rms_B=0.0)),
        ("not_stepped", lambda: rule_input_of(rms_B=0.0, zero_B=1.0, moved_B=0.0)),
        ("underflow", lambda: rule_input_of(TrainerSettings(1.0, fp16_gradients=True), zero_B=0.6)),
        (
            "underflow",
            lambda: rule_input_of(TrainerSettings(1.0, fp16_gradients=True), gradmax_A=0.0, gradmax_B=0.0, zero_B=1.0),
        ),
        ("underflow", lambda: rule_input_of(gradzero_B=0.9, zero_B=0.6)),
        ("eps_limited", lambda: rule_input_of(v_over_eps_B=0.05)),
        ("decay_trapped", lambda: rule_input_of(sums=DECAYED)),
        ("decay_trapped", lambda: rule_input_of(TrainerSettings(1.0, coupled_decay=10.0), gradrms_B=0.1)),
        ("ratio_lost", lambda: rule_input_of(TrainerSettings(16.0))),
        ("precision_stalled", lambda: rule_input_of(TrainerSettings(1.0, is_low_precision=True), moved_B=0.5)),
        (None, lambda: rule_input_of(moved_B=0.5)),
        ("lr_too_small", lambda: rule_input_of(delta_rel=1e-4)),
        ("no_signal", lambda: rule_input_of(rms_B=1e-3 * math.sqrt(20))),
        ("A_frozen", lambda: rule_input_of(moved_A=0.1)),
        ("A_frozen", lambda: rule_input_of(rms_A=6.0)),
        (None, lambda: rule_input_of(rms_A=4.0)),
        ("generic", lambda: rule_input_of(rms_B=0.1 * 1e-3 * math.sqrt(20))),
    ],
)
def test_each_trouble_has_its_name(cause: str | None, made: Callable[[], health.RuleInput]) -> None:
    assert named(made()) == cause


def test_every_cause_has_a_remedy_and_evidence_with_its_thresholds() -> None:
    assert all(rule.remedy.endswith(".") for rule in CAUSES.values())
    _, (cause,) = health.causes(rule_input_of(v_over_eps_B=0.05))
    assert cause.evidence == {"v_over_eps_B": 0.05, "needed": 0.1}
    assert (cause.share, len(cause.modules)) == (1.0, 8)


def test_the_first_rule_a_module_meets_names_it_and_shares_are_by_module() -> None:
    _, measured = health.causes(rule_input_of(gradmax_A=0.0, gradmax_B=0.0, hit=3))
    assert [(each.name, each.modules[0], each.share) for each in measured] == [("not_in_graph", "layers.0.proj", 3 / 8)]


def test_ordinary_decay_and_a_ratio_that_was_kept_are_not_blamed() -> None:
    assert named(rule_input_of(sums=UpdateSums(1000, 1.0, 16.0, 1.0, 0.8, 11.0, 16.0, 16.0))) is None
    # 15.999 for 16, as measured from what moved.
    assert named(rule_input_of(TrainerSettings(16.0), lr_B=15.999e-3)) is None
    assert named(rule_input_of(TrainerSettings(16.0), lr_B=14.9e-3)) == "ratio_lost"


def test_where_nothing_can_be_measured_the_ratio_is_what_the_groups_had() -> None:
    groups = replace(rule_input_of().snapshot.sums, least_ratio=1.0, largest_ratio=1.0)
    assert named(rule_input_of(TrainerSettings(16.0), lr_A=math.nan, sums=groups)) == "ratio_lost"
    assert named(rule_input_of(TrainerSettings(1.0), lr_A=math.nan, sums=groups)) is None


def test_nothing_is_said_of_an_adapter_that_was_never_stepped() -> None:
    empty = replace(
        rule_input_of().snapshot, steps=(), sums_by_check=(), values={name: np.empty((0, 8)) for name in METRICS}
    )
    assert health.causes(replace(rule_input_of(), snapshot=empty)) == ((), ())
    assert not health.cannot_learn(empty, TrainerSettings(1.0))


@pytest.mark.parametrize("lr_A", [0.0, 1e-3])
def test_a_rate_of_b_that_was_0_at_every_step_is_named_with_the_rate_as_evidence(lr_A: float) -> None:
    """rho is 0 / 0 then, and no look was after a step."""
    sums = UpdateSums()
    for _ in range(100):
        sums = sums.after(lr_A, 0.0, 1.0)
    inputs = rule_input_of(TrainerSettings(16.0), rms_B=0.0, zero_B=1.0, moved_B=0.0, lr_B=0.0, sums=sums)
    inputs = replace(inputs, snapshot=replace(inputs.snapshot, sums_by_check=(UpdateSums(),) * 4))
    trapping, measured = health.causes(inputs)
    assert trapping == measured
    assert [(each.name, each.share) for each in measured] == [("not_stepped", 1.0)]
    assert measured[0].evidence == {"lr_B": 0.0, "steps": 100.0}
    own = health.own_findings(inputs, None, RULES)
    assert [(each.flag, each.evidence["ratio"]) for each in own] == [("ratio_lost", 0.0)]
    result = Diagnosis(0.0, 0.01, trapping, measured, window_is_over=inputs.window_is_over)
    (verdict,) = health.verdict(result, None, RULES)
    assert (verdict.flag, verdict.cause) == ("zero_trapped", "not_stepped")
    assert "the learning rate of B was 0 at every step" in verdict.sentence
    assert not health.cannot_learn(inputs.snapshot, TrainerSettings(16.0)), "while it trains, the rate may still rise"
    values = inputs.snapshot.values
    held = replace(inputs, snapshot=replace(inputs.snapshot, values=values | {"rms_B": values["rms_B"] + 0.01}))
    assert health.causes(held) == ((), ()), "a B that does not start at 0 may be held as it is on purpose"
    moved = replace(inputs, snapshot=replace(inputs.snapshot, values=values | {"moved_B": values["moved_B"] + 0.5}))
    assert health.causes(moved) == ((), ())
    soon = replace(inputs, snapshot=replace(inputs.snapshot, steps=(1, 2, 2, 2)))
    assert health.causes(soon) == ((), ()), "two steps of a warm-up may have none"


@pytest.mark.parametrize(
    ("ratio", "moved_A", "advice"),
    [
        (1000.0, 1.0, "lower optimizer.ratio or method.alpha by the same factor"),
        (1.0, 1.0, "raise optimizer.base_lr, and lower method.alpha by the same factor"),
        (1000.0, 0.1, "hold the adapter in fp32"),
        (1.0, 0.1, "hold the adapter in fp32"),
    ],
)
def test_the_advice_for_an_a_that_does_not_move_fits_what_was_measured(
    ratio: float, moved_A: float, advice: str
) -> None:
    inputs = rule_input_of(TrainerSettings(ratio), rms_A=6.0, moved_A=moved_A, lr_B=1e-3 * ratio)
    finding = next(each for each in health.own_findings(inputs, None, RULES) if each.flag == "A_frozen")
    assert advice in finding.remedy
    assert finding.remedy in finding.sentence


@pytest.mark.parametrize(("hit", "hopeless"), [(8, True), (4, True), (3, False)])
def test_half_of_the_modules_without_a_gradient_cannot_mend_themselves(hit: int, hopeless: bool) -> None:
    assert (
        health.cannot_learn(rule_input_of(gradmax_A=0.0, gradmax_B=0.0, hit=hit).snapshot, TrainerSettings(1.0))
        is hopeless
    )
    assert not health.cannot_learn(rule_input_of(v_over_eps_B=0.01, hit=hit).snapshot, TrainerSettings(1.0)), (
        "eps may be outgrown"
    )


# -- verdicts ------------------------------------------------------------------------------------------------------


def diagnosis(gain: float | None, trapped: float = 0.0, without: float = 0.0, **more: Any) -> Diagnosis:
    """Of an adapter with a small update, whose gain has a standard error of .005."""

    def cause(name: str, share: float) -> tuple[Cause, ...]:
        return (Cause(name, ("a",) * round(8 * share), share, {"rho": 2.0}),) if share else ()

    result = Diagnosis(gain, 0.01, cause("not_in_graph", trapped), cause("lr_too_small", without), 0.005, 1e-4)
    return replace(result, **more)


def walking(gain: float, delta_rel: float = 0.2, **more: Any) -> Diagnosis:
    """Of an adapter whose B walks at random in every module."""
    return diagnosis(gain, delta_rel=delta_rel, causes_without_gain=(Cause("no_signal", ("a",), 1.0, {}),), **more)


FELL, FLAT = Estimate(0.2, 0.02), Estimate(0.01, 0.02)
COOLER = Cooler(3, 0.2, 0.01, 12.0)


@pytest.mark.parametrize(
    ("made", "best", "flag", "cause"),
    [
        (diagnosis(0.0, without=1.0), None, "zero_trapped", "lr_too_small"),
        (diagnosis(0.02, without=1.0), None, None, None),
        # 5 % of the best gain in the study at equal steps, beyond chance: it moved.
        (diagnosis(0.02, without=1.0), 1.0, "barely_learned", "lr_too_small"),
        (diagnosis(0.06, without=1.0), 1.0, None, None),
        (diagnosis(0.0, without=0.25), None, "partially_trapped", "lr_too_small"),
        (diagnosis(0.02, without=0.25), 1.0, None, None),
        (diagnosis(0.5, trapped=0.25), 0.6, "partially_trapped", "not_in_graph"),
        (diagnosis(0.5, trapped=0.05), 0.6, None, None),
        # No module could learn: the gain is chance.
        (diagnosis(0.5, trapped=1.0, without=1.0), None, "zero_trapped", "not_in_graph"),
        (diagnosis(0.0), None, None, None),
        # An update that is not small, or a training loss that fell: it does something.
        (diagnosis(0.0, without=1.0, delta_rel=0.1), None, "barely_learned", "lr_too_small"),
        (diagnosis(0.0, without=1.0, fall=FELL), None, "barely_learned", "lr_too_small"),
        (diagnosis(0.0, without=1.0, fall=FLAT), None, "zero_trapped", "lr_too_small"),
        (diagnosis(0.0, without=1.0, probe_fall=FELL), None, "barely_learned", "lr_too_small"),
        # Worse than the base under a small update: not trapped either.
        (diagnosis(-0.02, without=1.0), None, "barely_learned", "lr_too_small"),
        (diagnosis(-0.02, delta_rel=0.03), None, "rate_too_high", None),
        (diagnosis(-0.02, delta_rel=0.03, noise=0.03), None, None, None),
        # That the labels have no signal needs a training loss that is known not to fall.
        (walking(0.0), None, None, None),
        (walking(0.0, delta_rel=0.01), None, None, None),
        # Random labels: the loss of the steps stays, whatever is learned by heart.
        (walking(0.0, fall=FLAT), None, "barely_learned", "no_signal"),
        (walking(-0.1, fall=FLAT, probe_fall=FELL), None, "barely_learned", "no_signal"),
        (walking(0.0, delta_rel=0.01, fall=FLAT), None, "zero_trapped", "no_signal"),
        (walking(0.0, fall=FELL), None, None, None),
        # Others have learned from the same labels.
        (walking(0.0, fall=FLAT), 0.5, "rate_too_high", None),
        (walking(0.09, fall=FLAT, noise=0.2, error=0.1), 0.5, None, None),
        (walking(0.0, fall=FLAT, delta_rel=0.01), 0.5, "zero_trapped", "lr_too_small"),
        (walking(-0.1, fall=FLAT), 0.5, "rate_too_high", None),
        # Hot: worse than the base, and B walks since its signs flip.
        (walking(-0.1, fall=FELL), None, "rate_too_high", None),
        (walking(-0.1, fall=FLAT, delta_rel=0.9), None, "rate_too_high", None),
        (walking(0.0, fall=FLAT, delta_rel=0.9), None, "rate_too_high", None),
        (diagnosis(-0.1, delta_rel=0.2, fall=FLAT), None, "rate_too_high", None),
        (diagnosis(None, delta_rel=0.9), None, None, None),
        (walking(-0.1, delta_rel=None), None, "rate_too_high", None),
        (diagnosis(0.5, delta_rel=1.2), None, "rate_too_high", None),
        (diagnosis(0.5, delta_rel=0.9), None, None, None),
    ],
)
def test_a_verdict_tells_what_does_nothing_from_what_does_little_and_from_what_does_too_much(
    made: Diagnosis, best: float | None, flag: str | None, cause: str | None
) -> None:
    measured = health.verdict(made, best, RULES)
    assert [(each.flag, each.cause) for each in measured] == ([(flag, cause)] if flag else [])
    for each in measured:
        assert each.remedy in each.sentence
        assert each.remedy == (CAUSES[cause].remedy if cause else each.remedy)


def test_a_rate_that_is_too_high_is_a_fault_only_where_the_adapter_is_worse_than_its_base() -> None:
    (hurts,) = health.verdict(walking(-0.1, fall=FELL), None, RULES)
    assert (hurts.is_fault, hurts.evidence["loss_over_base"], hurts.evidence["delta_rel"]) == (True, 0.1, 0.2)
    (slower,) = health.verdict(diagnosis(0.5), None, RULES, COOLER)
    assert (slower.flag, slower.is_fault, slower.evidence["cell"]) == ("rate_too_high", False, 3)
    assert "Cell 3 does better by 0.2 nats at a rate that is lower by a factor of 12" in slower.sentence


EARLY = {"window_is_over": False}


@pytest.mark.parametrize(
    ("made", "cooler", "was_pruned", "flag", "cause"),
    [
        (diagnosis(0.0, without=1.0), None, True, "undecided", None),
        (walking(0.0, delta_rel=0.01), None, True, "undecided", None),
        (diagnosis(0.5), None, True, "undecided", None),
        (diagnosis(0.0, without=1.0, **EARLY), None, False, "undecided", None),
        (walking(-0.1, **EARLY), COOLER, False, "undecided", None),
        (walking(-0.1, **EARLY), COOLER, True, "undecided", None),
        (diagnosis(0.5, delta_rel=2.0, **EARLY), None, False, "undecided", None),
        # No more steps are needed to see that.
        (diagnosis(0.0, trapped=1.0), None, True, "zero_trapped", "not_in_graph"),
        (diagnosis(0.0, trapped=1.0, **EARLY), None, False, "zero_trapped", "not_in_graph"),
        (walking(-0.1), None, True, "rate_too_high", None),
        (diagnosis(0.5), COOLER, True, "rate_too_high", None),
    ],
)
def test_a_trial_that_was_stopped_is_undecided_but_for_what_no_more_steps_can_mend(
    made: Diagnosis, cooler: Cooler | None, was_pruned: bool, flag: str, cause: str | None
) -> None:
    (measured,) = health.verdict(made, 1.0, RULES, cooler, was_pruned)
    assert (measured.flag, measured.cause) == (flag, cause)
    assert measured.is_fault == (flag != "undecided" and cooler is None)


def test_causes_of_all_modules_are_all_of_them_whatever_their_shares_add_up_to() -> None:
    """1/24 + 19/24 + 4/24 is not 1 in floating point."""
    parts = zip(("not_in_graph", "dead_product", "not_stepped"), (19, 4, 1), strict=True)
    causes = tuple(Cause(name, ("a",) * count, count / 24, {}) for name, count in parts)
    (measured,) = health.verdict(diagnosis(0.0, causes=causes, causes_without_gain=causes), None, RULES)
    assert measured.flag == "zero_trapped"


def test_a_walk_and_a_slow_way_over_sound_labels_are_one_cause() -> None:
    causes = (
        Cause("no_signal", ("a",) * 5, 5 / 8, {"rho": 1.0}),
        Cause("lr_too_small", ("b",) * 3, 3 / 8, {"rho": 2.0}),
    )
    (measured,) = health.verdict(diagnosis(0.0, causes_without_gain=causes, fall=FLAT), 1.0, RULES)
    assert (measured.flag, measured.cause) == ("zero_trapped", "lr_too_small")
    assert "lr_too_small in 8 of 8 modules" in measured.sentence


def test_with_a_fault_of_its_own_a_trial_that_was_stopped_is_decided() -> None:
    own = (Finding("ratio_lost", {}, "lost"), Finding("spiking", {}, "jumps", is_fault=False))
    flags = [
        [each.flag for each in health.compared(diagnosis(0.0), part, RULES, was_pruned=True)]
        for part in (own[:1], own[1:])
    ]
    assert flags == [[], ["undecided"]]


def test_a_trial_that_diverged_is_not_said_to_have_a_high_rate_as_well() -> None:
    hot = walking(-0.1, fall=FELL)
    assert [each.flag for each in health.compared(hot, (), RULES)] == ["rate_too_high"]
    own = (Finding("diverged", {}, "hot"),)
    assert health.compared(hot, own, RULES) == ()
    assert health.compared(None, own, RULES) == ()


def test_a_diagnosis_survives_json() -> None:
    import json
    from dataclasses import asdict

    result = diagnosis(0.02, 0.25, 1.0, fall=FELL, window_is_over=False)
    plain = json.loads(json.dumps(asdict(result)))
    assert Diagnosis.of_plain(plain) == result
    names = ("gain", "noise", "causes", "causes_without_gain")
    older = Diagnosis.of_plain({name: plain[name] for name in names} | {"noise": None})
    assert older == Diagnosis(result.gain, 0.0, result.causes, result.causes_without_gain), (
        "of one evaluation example, as it was written once"
    )


# -- the others of a study -----------------------------------------------------------------------------------------


def peer(cell: int, X: float, lr_A: float, loss: float, spread: float = 0.0, step: int = 10) -> Peer:
    """A trial evaluated once, on four examples."""
    losses = loss + spread * np.array([1, -1, 1, -1])
    return Peer(cell, math.log(X), -math.log(lr_A), {step: loss}, lambda at: losses if at == step else None)


def test_the_best_gain_is_at_equal_steps() -> None:
    peers = health.Peers(2.0, [peer(0, 1.0, 1e-3, 1.5), peer(1, 1.0, 1e-3, 1.2), peer(2, 1.0, 1e-3, 1.0, step=20)])
    assert [peers.best_gain(step) for step in (10, 20, 30)] == [pytest.approx(0.8), pytest.approx(1.0), None]
    peers.record(0, 20, 0.5)
    assert peers.best_gain(20) == pytest.approx(1.5)


def test_a_cooler_trial_has_a_tenth_of_the_slope_no_larger_rate_of_a_and_is_better_beyond_chance() -> None:
    hot = peer(0, 1.0, 1e-3, 1.5)

    def found(*others: Peer) -> int | None:
        cooler = health.Peers(2.0, [hot, *others]).cooler(0, 10, 2.0)
        return None if cooler is None else cooler.cell

    assert found() is None
    assert found(peer(1, 0.1, 1e-3, 1.4), peer(2, 0.05, 1e-4, 1.3)) == 2, "the best of them"
    assert found(peer(1, 0.12, 1e-3, 1.0)) == 1, "about a tenth"
    assert found(peer(1, 0.2, 1e-3, 1.0)) is None, "half a decade is the same hill"
    assert found(peer(1, 0.1, 2e-3, 1.0)) is None, "A may be what is better"
    assert found(peer(1, 0.1, 1e-3, 1.45, spread=0.1)) is None, "chance: the error of the mean of four is .058"
    assert found(peer(1, 0.1, 1e-3, 1.35, spread=0.1)) == 1
    assert found(peer(1, 0.1, 1e-3, 1.0, step=20)) is None, "at another step"
    assert found(Peer(1, math.nan, math.nan, {10: 1.0}, lambda _: None)) is None


# -- the course ----------------------------------------------------------------------------------------------------

BASE = BaselineLosses(eval_loss=2.0, probe_loss=2.0, eval_losses=np.array([1.9, 2.0, 2.1, 2.0]), retention_loss=3.0)


def evaluation(gain: float = 0.0, spread: float = 0.0, **more: Any) -> Evaluation:
    """An evaluation that gained this much over BASE, its per-example differences spread by +-spread."""
    result = Evaluation(
        cell=0,
        step=10,
        tokens=100,
        train_loss=2.0,
        eval_loss=BASE.eval_loss - gain,
        probe_loss=2.0,
        eval_losses=BASE.eval_losses - gain + spread * np.array([1, -1, 1, -1]),
        grad_norm_A=1.0,
        grad_norm_B_over_s=1.0,
        measurements=(),
        snapshot=snapshot_of(),
        delta_rel=np.ones(4),
        steps=(),
        seconds=1.0,
        tokens_per_second=1.0,
    )
    return replace(result, **more)


def flags_of(losses: Sequence[float], best: Evaluation | None = None, last: Evaluation | None = None) -> list[Finding]:
    end = last or evaluation(gain=1.0, step=100)
    losses_so_far = LossHistory(BASE, losses, 0, best or end, end)
    inputs = health.rule_input(end, TrainerSettings(None), RULES)
    return [
        each
        for each in health.own_findings(inputs, losses_so_far, RULES)
        if each.flag not in ("A_frozen", "edge_of_precision")
    ]


FALLING = [2.0 * math.exp(-step / 30) + 0.05 * math.sin(step) for step in range(100)]


def test_the_gain_is_of_the_losses_and_its_error_is_paired_by_example() -> None:
    gain, error = health.paired_gain(BASE, evaluation(gain=0.3, spread=0.1))
    assert gain == pytest.approx(0.3)
    # Differences .2, .4, .2, .4: sample deviation .2 / sqrt(3), of a mean of four half of it.
    assert error == pytest.approx(0.2 / math.sqrt(3) / 2)
    alone = BaselineLosses(2.0, 2.0, np.array([2.0]))
    assert health.paired_gain(alone, evaluation(eval_losses=np.array([1.0])))[1] == math.inf


def test_a_loss_that_falls_is_no_finding() -> None:
    assert flags_of(FALLING) == []


@pytest.mark.parametrize("step", [0, 7])
def test_a_loss_that_is_not_finite_is_diverged_and_nothing_else(step: int) -> None:
    (finding,) = flags_of(FALLING, last=evaluation(gain=math.nan, last_finite_step=step))
    assert finding.flag == "diverged"
    assert finding.evidence == {"last_finite_step": step}
    assert f"last finite at step {step}: lower optimizer.base_lr" in finding.sentence


def test_a_loss_above_the_bases_for_a_while_is_diverged() -> None:
    hot = [*FALLING[:40], *([3.0] * 20), *FALLING[60:]]
    assert [each.flag for each in flags_of(hot)][:1] == ["diverged"]
    assert flags_of([2.0 + 0.05 * math.sin(step) for step in range(100)]) == [], "at the start is not above it"


def test_training_data_that_is_harder_than_the_train_probe_is_no_divergence() -> None:
    """A small probe of texts that differ much says little of what the steps see."""
    steps = [2.3 + 0.05 * math.sin(step) for step in range(100)]
    end = evaluation(gain=0.1, step=100)
    for spread, flags in ((0.0, ["diverged"]), (0.3, [])):
        base = replace(BASE, probe_losses=2.0 + spread * np.array([1.0, -1.0, 1.0, -1.0]))
        own = health.own_findings(
            health.rule_input(end, TrainerSettings(None), RULES), LossHistory(base, steps, 0, end, end), RULES
        )
        assert [each.flag for each in own if each.flag == "diverged"] == flags


def test_a_hot_trial_that_ends_above_its_base_is_not_said_to_lack_a_signal() -> None:
    """The walk of B at a rate that is far too high looks like that under random labels."""
    hot = replace(rule_input_of(rms_B=1e-3 * math.sqrt(20)), delta_rel=np.full(8, 0.9))
    assert named(hot) == "no_signal"
    last = evaluation(gain=-1.0)
    for losses, own, flags in (
        (FALLING, (), ["rate_too_high"]),
        ([2.0, 2.1] * 50, (), ["rate_too_high"]),
        (FALLING, (Finding("diverged", {}, "hot"),), ["diverged"]),
    ):
        result = health.diagnose(LossHistory(BASE, losses, 0, last, last), hot, own, RULES)
        assert [each.flag for each in (*health.compared(result, own, RULES), *own)] == flags


def test_a_fall_of_the_training_loss_is_told_with_its_error() -> None:
    falling = health.loss_history.trend(range(100), [2.0 - 0.01 * step + 0.1 * (-1) ** step for step in range(100)])
    assert falling is not None
    assert falling.value == pytest.approx(0.99, abs=0.01)
    # The slope's error, sigma / sqrt(sum of (x - mean)^2), times the steps between.
    assert falling.error == pytest.approx(0.1 / math.sqrt(100 * (100**2 - 1) / 12) * 99, rel=0.02)
    assert health.loss_history.trend([1, 2, 3], [3.0, 2.0, 1.0]) is None
    base = replace(BASE, probe_losses=BASE.eval_losses)
    flat = health.loss_history.training_fall(base, [1.5, 1.6] * 10)
    assert flat is not None
    assert flat.value == pytest.approx(0.45, abs=0.01), (
        "a loss that fell at once has no trend, but lies below the base's"
    )
    paired = health.loss_history.paired_fall(base, evaluation(probe_loss=1.7, probe_losses=BASE.eval_losses - 0.3))
    assert paired == (pytest.approx(0.3), pytest.approx(0.0, abs=1e-9))


def test_giving_back_more_than_half_of_the_best_gain_is_diverged() -> None:
    best = evaluation(gain=1.0, step=50)
    (finding,) = flags_of(FALLING, best, evaluation(gain=0.4, step=100, probe_loss=1.0))
    assert (finding.flag, finding.evidence["best_gain"]) == ("diverged", 1.0)


def test_jumps_of_the_loss_are_told_as_a_warning() -> None:
    jumping = [loss + 1.5 * (step in (40, 60, 80)) for step, loss in enumerate(FALLING)]
    (finding,) = flags_of(jumping)
    assert (finding.flag, finding.is_fault, finding.evidence["spikes"]) == ("spiking", False, 3.0)


def test_overfit_is_a_rise_beyond_chance_while_the_training_data_still_gets_better() -> None:
    best = evaluation(gain=1.0, step=50, probe_loss=0.5)
    assert [each.flag for each in flags_of(FALLING, best, evaluation(0.8, 0.01, step=100, probe_loss=0.2))] == [
        "overfit"
    ]
    assert flags_of(FALLING, best, evaluation(0.8, 0.01, step=100, probe_loss=0.6)) == [], (
        "the training data got worse too"
    )
    assert flags_of(FALLING, best, evaluation(0.8, 0.5, step=100, probe_loss=0.2)) == [], "chance"
    by_heart = evaluation(-0.1, 0.01, step=100, probe_loss=1.5)
    (finding,) = flags_of(FALLING, by_heart, by_heart)
    assert (finding.flag, finding.evidence["best_step"]) == ("overfit", 0.0), "the base itself was the best"
    hot = evaluation(-0.6, 0.01, step=100, probe_loss=1.9)
    assert flags_of(FALLING, hot, hot) == [], "it learned less than it lost: that is its rate"


def logged(losses: Sequence[float], every: int = 1, **knobs: Any) -> list[str]:
    result = Logged(**knobs)
    for place, loss in enumerate(losses, start=1):
        result.take({"loss": loss}, place * every)
    return [each.flag for each in result.findings(RULES)]


def test_what_another_trainer_logs_is_judged_by_the_step_as_far_as_it_tells() -> None:
    hot = [*FALLING[:40], *([5.0] * 20), *FALLING[60:]]
    jumping = [loss + 1.5 * (step in (40, 60, 80)) for step, loss in enumerate(FALLING)]
    assert logged(FALLING) == []
    assert "diverged" in logged(hot)
    assert "diverged" in logged([2.0, 1.9, 5.0, 5.0, 1.7, 1.7], every=10)
    assert logged(hot, knows_start=False) == [], "what the first loss was is not known"
    assert logged([9.0] * 30 + FALLING[30:], warmup_steps=30) == []
    assert logged(jumping) == ["spiking"]
    assert logged(jumping, every=2) == [], "a mean over several steps hides a jump"


def test_an_evaluation_that_was_not_finite_for_once_is_no_gain_that_was_given_back() -> None:
    result = Logged()
    for row, step in (({"eval_loss": 2.0}, 0), ({"eval_loss": math.nan}, 10), ({"eval_loss": 1.0}, 20)):
        result.take(row, step)
    assert [*result.findings(RULES)] == []


def test_what_is_not_finite_in_the_end_is_diverged_since_it_last_was() -> None:
    result = Logged()
    for step, loss in ((10, 2.0), (20, math.inf), (30, 1.5), (40, 0.0)):
        result.take({"loss": loss}, step)
    assert result.not_finite([(2, True), (32, True)]) is None, "a step that was left out is none"
    broken = result.not_finite([(2, True), (32, True), (40, False)])
    assert broken is not None
    assert broken.evidence == {"last_finite_step": 32.0}, "0 is what is logged for a loss that is not finite"
    result.take({"eval_loss": math.nan}, 31)
    broken = result.not_finite([(2, True)])
    assert broken is not None
    assert broken.evidence == {"last_finite_step": 30.0}


def test_forgetting_beyond_what_is_allowed_is_told_as_a_warning() -> None:
    (finding,) = flags_of(FALLING, last=evaluation(gain=1.0, retention_loss=3.2))
    assert (finding.flag, finding.is_fault) == ("forgetting", False)
    assert flags_of(FALLING, last=evaluation(gain=1.0, retention_loss=3.05)) == []
