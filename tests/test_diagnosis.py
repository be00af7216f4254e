"""Every fault of the table and as many healthy trainings at least: recall, causes, false alarms."""

import os

import pytest
import torch

from lora_sweep.bench import diagnosis


@pytest.mark.parametrize(
    "seeds", [pytest.param(1, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.full)], ids=str
)
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_faults_are_named_with_the_right_cause_and_healthy_trainings_left_alone(
    seeds: int, capsys: pytest.CaptureFixture
) -> None:
    """Of each fault one training, and of the ordinary sweeps one seed; README.md's table has five and two."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    made = diagnosis.diagnosis(lambda _: None, range(seeds))
    with capsys.disabled():
        print("", *diagnosis.lines(made), sep="\n")
    assert made["injected"] == seeds * len(made["faults"])
    assert {row["cause"] for row in made["faults"]} >= {
        "not_in_graph", "dead_product", "not_stepped", "underflow", "eps_limited", "decay_trapped", "ratio_lost",
        "precision_stalled", "lr_too_small", "no_signal", "lost_on_save", "A_frozen",
    }  # fmt: skip
    assert made["recall"] >= 0.95
    assert made["cause_right"] >= 0.9
    assert made["healthy_packed"] >= 50 * min(seeds, 2)
    assert made["false_alarms"] <= 0.02, made["alarms"]
    assert made["decay_blamed"] == 0
