"""A study that an older version began: old_study/, of old_study.yaml, interrupted in its third cell of four."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import Run

HERE = Path(__file__).parent


@pytest.fixture
def study(in_folder: Path) -> Path:
    shutil.copy(HERE / "old_study.yaml", "old.yaml")
    shutil.copytree(HERE / "old_study", "outputs/old")
    return Path("outputs/old")


def rows(study: Path) -> dict[int, dict[str, object]]:
    return {row["number"]: row for row in map(json.loads, (study / "trials.jsonl").read_text().splitlines())}


def test_it_is_shown_resumed_and_picked(study: Path, run: Run) -> None:
    before = rows(study)
    shown = run("status", str(study), "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["COMPLETE"] == 2
    launched = run("launch", "old.yaml", "launcher.threads=1")
    assert launched.code == 0, launched.err
    assert "2 of them finished" in launched.out
    assert "health.look_every is now health.check_every" in launched.err
    after = rows(study)
    assert {row["state"] for row in after.values()} <= {"COMPLETE", "FAIL"}
    for number in (0, 1):
        assert {key: before[number][key] for key in ("eval_loss", "base_loss", "gap", "effective")} == {
            key: after[number][key] for key in ("eval_loss", "base_loss", "gap", "effective")
        }
    picked = run("pick", str(study))
    assert picked.code == 0, picked.err
    assert "winner: cell 0002" in picked.out


def test_what_it_goes_on_with_is_what_a_new_study_gives(study: Path, run: Run) -> None:
    """Up to rounding, on whatever processor it was begun."""
    assert run("launch", "old.yaml", "launcher.threads=1").code == 0
    assert run("launch", "old.yaml", "launcher.threads=1", "study.name=new").code == 0
    old, new = rows(study)[2], rows(Path("outputs/new"))[2]
    assert old["eval_loss"] == pytest.approx(new["eval_loss"], rel=1e-4)


def test_the_old_name_of_a_key_means_what_its_new_one_does(study: Path, run: Run) -> None:
    sweep = Path("old.yaml").read_text()
    Path("old.yaml").write_text(sweep.replace("look_every", "check_every"))
    launched = run("launch", "old.yaml", "launcher.threads=1")
    assert launched.code == 0, launched.err
    assert "look_every" not in launched.err
    Path("old.yaml").write_text(sweep.replace("look_every: 5", "check_every: 6"))
    refused = run("launch", "old.yaml", "launcher.threads=1")
    assert refused.code == 2
    assert "health.check_every: 5 -> 6" in refused.err
