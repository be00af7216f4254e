"""Measurements of an adapter against the product by hand; findings need all that they say."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config_of

from lora_sweep import health
from lora_sweep.health import BIN_EDGES, AdaptedModule
from lora_sweep.records import Base, Evaluation, Measurement

RULES = config_of().health


def module(seed: int, rank: int, d_in: int, d_out: int, base_norm: float, size: float = 1.0) -> AdaptedModule:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator)
    return AdaptedModule(A, size * torch.randn(rank, d_out, generator=generator), base_norm)


MODULES = {
    "layers.0.self_attn.q_proj": module(0, 3, 8, 6, 2.0),
    "layers.0.mlp.up_proj": module(1, 3, 8, 12, 3.0),
    "layers.1.self_attn.q_proj": module(2, 3, 8, 6, 5.0),
    "layers.1.mlp.up_proj": module(3, 3, 8, 12, 7.0),
}
GROUPS = {name: [module for key, module in MODULES.items() if key.endswith(name)] for name in ("q_proj", "up_proj")}


def one(B: torch.Tensor, lr_B_squared: float = 1.0) -> Measurement:
    (only,) = health.measure({"x.proj": AdaptedModule(torch.ones(B.shape[0], 2), B, 1.0)}, 1.0, lr_B_squared)
    return only


def test_modules_of_one_name_are_one_group_in_order_of_appearance() -> None:
    assert [each.group for each in health.measure(MODULES, 1.0, 1.0)] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("scaling", [1.0, 4.0, 0.5])
def test_the_relative_size_of_the_update_is_that_of_the_explicit_product(scaling: float) -> None:
    for each in health.measure(MODULES, scaling, 1.0):
        updates = [scaling * m.B.double().T @ m.A.double() for m in GROUPS[each.group]]
        by_hand = math.sqrt(sum(float(update.square().sum()) for update in updates))
        weights = math.sqrt(sum(m.base_norm**2 for m in GROUPS[each.group]))
        assert each.delta_rel == pytest.approx(by_hand / weights, rel=1e-5)


def test_sizes_and_zeros_are_over_all_elements_of_the_group() -> None:
    for each in health.measure(MODULES, 1.0, 1.0):
        A, B = (np.concatenate([getattr(m, bank).numpy().ravel() for m in GROUPS[each.group]]) for bank in "AB")
        assert each.rms_A == pytest.approx(np.sqrt(np.mean(np.square(A, dtype=np.float64))), rel=1e-5)
        assert each.rms_B == pytest.approx(np.sqrt(np.mean(np.square(B, dtype=np.float64))), rel=1e-5)
        assert each.absmax_B == np.abs(B).max()
        assert each.exact_zero_B == 0


def test_the_fraction_of_exact_zeros_counts_zeros_of_both_signs_and_nothing_small() -> None:
    assert one(torch.tensor([[0.0, -0.0, 1e-38, 1.0]])).exact_zero_B == 0.5
    assert one(torch.zeros(2, 3)).exact_zero_B == 1


def test_rho_is_in_units_of_the_summed_learning_rates() -> None:
    B = torch.tensor([[0.3, -0.4]])
    steps, lr = 25, 0.01
    assert one(B, steps * lr**2).rho == pytest.approx(math.sqrt((0.09 + 0.16) / 2) / (lr * math.sqrt(steps)))
    assert one(B, 0.0).rho == 0, "before the first step"


def test_a_base_of_zeros_makes_no_division_fault() -> None:
    (each,) = health.measure({"x": module(0, 2, 3, 3, 0.0)}, 1.0, 1.0)
    assert each.delta_rel == math.inf


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
    B = module(0, 4, 4, 100, 1.0).B
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


# -- findings ------------------------------------------------------------------------------------------------------

BASE = Base(eval_loss=2.0, probe_loss=2.0, eval_losses=np.array([1.9, 2.0, 2.1, 2.0]))


def evaluation(gain: float = 0.0, spread: float = 0.0, delta_rel: Any = 0.0, **more: Any) -> Evaluation:
    """An evaluation that gained this much over BASE, its per-example differences spread by +-spread."""
    moved = delta_rel if isinstance(delta_rel, list) else [delta_rel]
    losses = BASE.eval_losses - gain + spread * np.array([1, -1, 1, -1])
    made = Evaluation(
        cell=0,
        step=10,
        tokens=100,
        train_loss=2.0,
        eval_loss=BASE.eval_loss - gain,
        probe_loss=2.0,
        eval_losses=losses,
        grad_norm_A=1.0,
        grad_norm_B_over_s=1.0,
        measurements=tuple(
            replace(one(torch.zeros(1, 1)), group=str(n), delta_rel=each) for n, each in enumerate(moved)
        ),
        steps=(),
        seconds=1.0,
        tokens_per_second=1.0,
    )
    return replace(made, **more)


def flags(last: Evaluation) -> list[str]:
    return [finding.flag for finding in health.findings(BASE, last, RULES)]


def test_the_gain_is_of_the_losses_and_its_error_is_paired_by_example() -> None:
    gain, error = health.paired_gain(BASE, evaluation(gain=0.3, spread=0.1))
    assert gain == pytest.approx(0.3)
    # Differences .2, .4, .2, .4: sample deviation .2 / sqrt(3), of a mean of four half of it.
    assert error == pytest.approx(0.2 / math.sqrt(3) / 2)
    alone = Base(2.0, 2.0, np.array([2.0]))
    assert health.paired_gain(alone, evaluation(eval_losses=np.array([1.0])))[1] == math.inf


def test_no_gain_and_no_movement_is_zero_trapped_with_its_evidence() -> None:
    (finding,) = health.findings(BASE, evaluation(gain=0.001, delta_rel=1e-5), RULES)
    assert finding.flag == "zero_trapped"
    assert finding.evidence == pytest.approx(
        {"gain": 0.001, "gain_needed": RULES.min_gain_of_base * 2.0, "delta_rel": 1e-5, "delta_rel_needed": 1e-3}
    )
    assert "raise optimizer.base_lr" in finding.sentence


@pytest.mark.parametrize(
    ("gain", "spread", "delta_rel", "trapped"),
    [
        (0.0, 0.0, 0.0, True),
        (-0.5, 0.0, 1e-5, True),
        # Half a percent of the base's 2 nats is .01.
        (0.0099, 0.0, 1e-5, True),
        (0.0101, 0.0, 1e-5, False),
        # A paired standard error of spread / sqrt(3): two of them at .1 are .115.
        (0.11, 0.1, 1e-5, True),
        (0.12, 0.1, 1e-5, False),
        # It moved: no gain is another trouble.
        (0.0, 0.0, 0.00099, True),
        (0.0, 0.0, 0.00101, False),
        (0.5, 0.0, 0.1, False),
        # The median group decides.
        (0.0, 0.0, [1e-5, 1e-5, 0.5], True),
        (0.0, 0.0, [1e-5, 0.5, 0.5], False),
    ],
)
def test_zero_trapped_needs_no_gain_and_no_movement(gain: float, spread: float, delta_rel: Any, trapped: bool) -> None:
    assert flags(evaluation(gain, spread, delta_rel)) == (["zero_trapped"] if trapped else [])


@pytest.mark.parametrize("step", [0, 7])
def test_a_loss_that_is_not_finite_is_diverged_and_nothing_else(step: int) -> None:
    last = evaluation(gain=math.nan, delta_rel=math.nan, last_finite_step=step)
    (finding,) = health.findings(BASE, last, RULES)
    assert finding.flag == "diverged"
    assert finding.evidence == {"last_finite_step": step}
    assert f"last finite at step {step}: lower optimizer.base_lr" in finding.sentence
