"""Every fault of the table, as many healthy trainings at least, and sweeps over their whole ranges."""

import os
from collections.abc import Sequence

import pytest
import torch

from lora_sweep.evidence import diagnosis, ranges


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
    measured = diagnosis.diagnosis(lambda _: None, range(seeds), sweeps={})
    with capsys.disabled():
        print("", *diagnosis.lines(measured), sep="\n")
    assert measured["injected"] == seeds * len(measured["faults"])
    assert {row["cause"] for row in measured["faults"]} >= {
        "not_in_graph", "dead_product", "not_stepped", "underflow", "eps_limited", "decay_trapped", "ratio_lost",
        "precision_stalled", "lr_too_small", "no_signal", "lost_on_save", "A_frozen",
    }  # fmt: skip
    assert measured["recall"] >= 0.95
    assert measured["cause_right"] >= 0.9
    assert measured["healthy_packed"] >= 50 * min(seeds, 2)
    assert measured["false_alarms"] <= 0.02, measured["alarms"]
    assert measured["decay_blamed"] == 0


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("quickstart", "a hot grid on facts"), marks=pytest.mark.slow, id="two of them"),
        pytest.param((*ranges.RANGES,), marks=pytest.mark.full, id="all"),
    ],
)
@pytest.mark.timeout(30000)
@pytest.mark.filterwarnings("ignore")
def test_over_whole_ranges_what_moved_is_never_called_trapped_and_what_is_hot_is_named(
    names: Sequence[str], capsys: pytest.CaptureFixture
) -> None:
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    measured = {name: ranges.counts(ranges.measured(ranges.RANGES[name], 0)) for name in names}
    with capsys.disabled():
        print("", *ranges.lines(measured), sep="\n")
    moved, trapped, hot, named, sound, alarmed = (
        sum(each[key] for each in measured.values())
        for key in ("moved", "moved_called_trapped", "hot", "hot_named", "sound", "sound_named")
    )
    assert min(moved, hot, sound) > 0
    assert trapped <= 0.01 * moved
    assert named >= 0.9 * hot
    # Of few cells one is more than a fiftieth.
    assert alarmed <= max(1, 0.02 * sound)
