"""Every fault of the table, five seeds each, and over a hundred healthy trainings: recall, causes, false alarms."""

import os

import pytest
import torch

from lora_sweep.bench import diagnosis


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
def test_faults_are_named_with_the_right_cause_and_healthy_trainings_left_alone(capsys: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    made = diagnosis.diagnosis(lambda _: None)
    with capsys.disabled():
        print("", *diagnosis.lines(made), sep="\n")
    assert made["injected"] == 5 * len(made["faults"])
    assert {row["cause"] for row in made["faults"]} >= {
        "not_in_graph", "dead_product", "not_stepped", "underflow", "eps_limited", "decay_trapped", "ratio_lost",
        "precision_stalled", "lr_too_small", "no_signal", "lost_on_save", "A_frozen",
    }  # fmt: skip
    assert made["recall"] >= 0.95
    assert made["cause_right"] >= 0.9
    assert made["healthy_packed"] >= 100
    assert made["false_alarms"] <= 0.02, made["alarms"]
    assert made["decay_blamed"] == 0
