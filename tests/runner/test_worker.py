"""Whole studies on the embedded base, as `lora-sweep launch` runs them: interrupted, refilled, exported, picked."""

import gc
import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import config_of
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from test_pack import IGNORED, mean_loss

from lora_sweep.adapters.peft_template import PeftTemplate
from lora_sweep.base.load import LoadedBase
from lora_sweep.cli.live import Show
from lora_sweep.data import load as load_data
from lora_sweep.errors import NoEligibleTrial, StorageUnavailable, StudyError
from lora_sweep.pack import Capacity, Pack
from lora_sweep.pack.passes import Passes
from lora_sweep.production.pick import pick
from lora_sweep.records import BaselineLosses, Cell, Evaluation
from lora_sweep.report import results
from lora_sweep.report.tables import flag_lines
from lora_sweep.runner import device as workbench
from lora_sweep.runner import launch, worker
from lora_sweep.study.view import StudyView
from lora_sweep.sweep import check, sweep_file
from lora_sweep.tracking import Record, Tracker

SMALL = {
    "data": {"subjects": 32, "eval_size": 16, "probe_size": 8},
    "train": {"max_steps": 6, "eval_every": 2, "batch_size": 2, "eval_batch_size": 8, "slots": 3},
}


class Silent:
    """A Watcher that remembers."""

    def __init__(self) -> None:
        self.admissions: list[tuple[int, int, int]] = []
        self.ends: list[tuple[int, str]] = []
        self.reasons: list[str] = []
        self.steps = 0

    def admitted(self, cell: Cell, slot: int, step: int) -> None:
        self.admissions.append((cell.number, slot, step))

    def stepped(self) -> None:
        self.steps += 1

    def chosen(self, reason: str) -> None:
        self.reasons.append(reason)

    def evaluated(self, cell: Cell, evaluation: Evaluation, base: BaselineLosses) -> None: ...

    def ended(self, cell: Cell, state: str, value: float | None, flags: Sequence[str]) -> None:
        self.ends.append((cell.number, state))


def write_sweep(folder: Path, axes: dict[str, str], **more: Any) -> Path:
    content = {"defaults": [{"override /tracker": "none"}], **SMALL, "space": axes}
    for key, value in more.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "ask.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(path: Path, *overrides: str, stop_after: int | None = None) -> tuple[Silent, bool, list[results.Row]]:
    sweep, faults = sweep_file.read(str(path), overrides)
    assert faults == []
    assert check.check(sweep)[1] == []
    watcher = Silent()
    finished = launch.launch(sweep, watcher, lambda: stop_after is not None and watcher.steps > stop_after)
    return watcher, finished, results.rows(StudyView.read(Path("outputs/ask")))


GRID = {"method.rank": "choice(2, 4)", "optimizer.base_lr": "choice(1e-3, 3e-3)", "optimizer.ratio": "choice(1, 4)"}


@pytest.mark.filterwarnings(IGNORED)
def test_a_grid_runs_every_cell_once_and_leaves_what_the_readme_promises(in_folder: Path, base: LoadedBase) -> None:
    watcher, finished, table = run(write_sweep(in_folder, GRID))
    assert finished
    assert sorted(number for number, _ in watcher.ends) == list(range(8))
    assert [row["state"] for row in table] == ["COMPLETE"] * 8
    assert table == [json.loads(line) for line in (in_folder / "outputs/ask/trials.jsonl").read_text().splitlines()]
    evaluation = load_data(sweep_file.read("ask.yaml", [])[0].base().data, base.tokenizer).evaluation
    for row in table:
        assert set(row["params"]) == set(GRID)
        assert row["gap"] is not None
        assert row["steps"] == 6
        trial = in_folder / "outputs/ask/trials" / f"{row['number']:04d}"
        assert sorted(file.name for file in trial.iterdir()) == [
            "adapter", "config.yaml", "evaluations", "heat_map.png", "metrics.jsonl", "result.json",
        ]  # fmt: skip
        steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5, 6]
        # Whoever has the folder needs nothing else.
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(trial / "adapter"))
        loaded.eval()
        assert mean_loss(loaded, evaluation) == pytest.approx(row["eval_loss"], rel=1e-4)
    picked = pick(Path("outputs/ask"))
    winner, production = picked.winner, picked.production
    assert winner["eval_loss"] == min(row["eval_loss"] for row in table)
    shipped = yaml.safe_load((production / "production.yaml").read_text())
    assert shipped["method"]["rank"] == winner["params"]["method.rank"]
    assert shipped["optimizer"]["base_lr"] == winner["params"]["optimizer.base_lr"]
    assert (production / "adapter/adapter_model.safetensors").is_file()
    assert f"cell {winner['number']}" in (production / "evidence.md").read_text()


def test_cells_of_one_class_have_bitwise_equal_losses(in_folder: Path) -> None:
    # alpha and ratio are one knob when eps and decay scale with them; here eps is too small to matter.
    axes = {"method.alpha": "choice(8, 16)", "optimizer.ratio": "choice(2, 4)"}
    more = {"optimizer": {"eps": 1e-30}}
    _, _, table = run(write_sweep(in_folder, axes, **more))
    by_params = {(row["params"]["method.alpha"], row["params"]["optimizer.ratio"]): row["eval_loss"] for row in table}
    assert by_params[8, 4] == by_params[16, 2]
    assert len(set(by_params.values())) == 3


def test_a_stopped_study_goes_on_from_its_checkpoints_to_the_same_bits(in_folder: Path) -> None:
    path = write_sweep(in_folder, GRID)
    stopped, finished, table = run(path, stop_after=8)
    assert not finished
    assert {row["state"] for row in table} == {"COMPLETE", "WAITING"}
    resumed, finished, table = run(path)
    assert finished
    assert [step for _, _, step in resumed.admissions].count(2) == 3, "three cells were at their first evaluation"
    assert sorted(stopped.ends + resumed.ends) == [(number, "COMPLETE") for number in range(8)]
    whole = in_folder / "whole"
    whole.mkdir()
    os.chdir(whole)
    _, _, uninterrupted = run(write_sweep(whole, GRID))
    for one, other in zip(table, uninterrupted, strict=True):
        assert one["eval_loss"] == other["eval_loss"]
        assert one["train_loss"] == other["train_loss"]


def test_a_relaunch_with_another_meaning_is_refused_and_shows_the_difference(in_folder: Path) -> None:
    path = write_sweep(in_folder, {"method.rank": "choice(2, 4)"})
    run(path)
    before = (in_folder / "outputs/ask/config.yaml").read_text()
    with pytest.raises(StudyError, match=r"train\.batch_size: 2 -> 3"):
        run(path, "train.batch_size=3")
    with pytest.raises(StudyError, match=r"space\.method\.rank: choice\(2, 4\) -> choice\(2, 8\)"):
        run(path, "method.rank=choice(2, 8)")
    assert (in_folder / "outputs/ask/config.yaml").read_text() == before
    watcher, finished, _ = run(path, "train.slots=1", "study.keep_adapters=1")
    assert finished
    assert watcher.ends == [], "how a study runs may change; finished work is not redone"


def test_a_diverged_cell_is_a_failure_with_its_last_finite_step_and_no_made_up_loss(in_folder: Path) -> None:
    axes = {"optimizer.base_lr": "choice(1e-3, 1e30)"}
    _, _, (good, bad) = run(write_sweep(in_folder, axes))
    assert (good["state"], good["flags"]) == ("COMPLETE", [])
    assert (bad["state"], bad["reason"], bad["flags"], bad["eval_loss"]) == ("FAIL", "diverged", ["diverged"], None)
    result = json.loads((in_folder / "outputs/ask/trials/0001/result.json").read_text())
    assert 0 <= result["last_finite_step"] < 6
    assert not (in_folder / "outputs/ask/trials/0001/adapter").exists()


def test_an_adapter_that_learned_nothing_is_flagged_and_never_picked(in_folder: Path) -> None:
    _, _, table = run(write_sweep(in_folder, {"optimizer.base_lr": "choice(1e-9, 1e-8)"}))
    assert [row["flags"] for row in table] == [["zero_trapped"]] * 2
    assert [row["cause"] for row in table] == ["lr_too_small"] * 2
    result = json.loads((in_folder / "outputs/ask/trials/0000/result.json").read_text())
    assert result["flags"] == [], "what compares with the study is no finding of the trial's own"
    (cause,) = result["diagnosis"]["causes_without_gain"]
    assert cause["evidence"]["delta_rel"] < cause["evidence"]["delta_rel_needed"]
    with pytest.raises(NoEligibleTrial, match="zero_trapped"):
        pick(Path("outputs/ask"))


def test_one_evaluation_example_has_no_error_and_hides_no_gain(in_folder: Path) -> None:
    axes = {"optimizer.base_lr": "choice(1e-6, 3e-3)"}
    _, finished, table = run(write_sweep(in_folder, axes, data={"eval_size": 1}, train={"max_steps": 20}))
    assert finished
    for row in table:
        result = json.loads((in_folder / f"outputs/ask/trials/{row['number']:04d}/result.json").read_text())
        allowed = sweep_file.read("ask.yaml", [])[0].base().health.min_gain_of_base
        assert result["diagnosis"]["noise"] == pytest.approx(allowed * row["base_loss"])
    assert [(row["flags"], row["cause"]) for row in table] == [(["zero_trapped"], "lr_too_small"), ([], None)]


def test_a_slot_is_refilled_while_the_result_of_the_last_trial_is_being_written(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_trains = threading.Event()
    finish, train = Record.finish, Passes.train
    told_too_early = []

    def slow(self: Record, *given: Any, **named: Any) -> None:
        assert second_trains.wait(60), "nobody trains while the disk is busy"
        finish(self, *given, **named)

    def noted(self: Passes, slots: Any) -> Any:
        if any(slot is not None and slot.trial.cell.number == 1 for slot in slots):
            if not second_trains.is_set():
                told_too_early.extend(
                    s for s in StudyView.read(Path("outputs/ask")).statuses() if s.state == "COMPLETE"
                )
            second_trains.set()
        return train(self, slots)

    monkeypatch.setattr(Record, "finish", slow)
    monkeypatch.setattr(Passes, "train", noted)
    path = write_sweep(in_folder, {"optimizer.base_lr": "choice(1e-3, 3e-3)"}, train={"slots": 1})
    watcher, finished, table = run(path)
    assert finished
    assert not told_too_early, "told before the result was written"
    assert watcher.ends == [(0, "COMPLETE"), (1, "COMPLETE")]
    assert [row["state"] for row in table] == ["COMPLETE", "COMPLETE"]


def test_a_disk_slower_than_the_training_holds_it_up_and_fills_no_memory(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, untold = Record.finish, []

    def slow(self: Record, *given: Any, **named: Any) -> None:
        time.sleep(0.3)
        finish(self, *given, **named)

    def loss_mask(self: Passes, slots: Any) -> Any:
        folders = Path("outputs/ask/trials").glob("*/result.json")
        cache = max(slot.trial.cell.number for slot in slots if slot is not None)
        untold.append(cache - len(list(folders)))
        return train(self, slots)

    train = Passes.train
    monkeypatch.setattr(Record, "finish", slow)
    monkeypatch.setattr(Passes, "train", loss_mask)
    path = write_sweep(in_folder, {"train.seed": "range(0, 12)"}, train={"slots": 2, "max_steps": 2, "eval_every": 1})
    watcher, finished, _ = run(path)
    assert finished
    assert len(watcher.ends) == 12
    assert max(untold) <= 4, "two train, two wait, none more"


@pytest.mark.parametrize("slots", [1, 2])
def test_a_trial_that_finds_no_memory_waits_for_room_and_fails_where_it_is_alone(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    admit, calls = Pack.admit, []

    def short(self: Pack, trial: Any) -> int:
        calls.append((trial.cell.number, len(self.live)))
        if len(self.live) == slots - 1 and (slots > 1 or trial.cell.number == 0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return admit(self, trial)

    monkeypatch.setattr(Pack, "admit", short)
    _, finished, table = run(write_sweep(in_folder, {"train.seed": "range(0, 3)"}, train={"slots": slots}))
    assert finished
    assert [row["state"] for row in table] == ["FAIL" if slots == 1 else "COMPLETE", "COMPLETE", "COMPLETE"]
    assert table[0]["reason"] == ("memory" if slots == 1 else None)
    assert [live for _, live in calls].count(slots - 1) == (3 if slots == 1 else 1), "it is asked for once"


FILLS_UP = """
    import resource, sys
    from pathlib import Path
    from lora_sweep.runner import launch
    from lora_sweep.sweep import sweep_file
    from lora_sweep.errors import StorageUnavailable
    class Watcher:
        def __getattr__(self, name):
            return lambda *_: None
        def admitted(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    sweep, _ = sweep_file.read("ask.yaml", [])
    try:
        launch.launch(sweep, Watcher(), lambda: False)
    except StorageUnavailable as error:
        print(error)
"""


def test_an_adapter_that_finds_no_room_on_the_disk_is_told_like_any_file(in_folder: Path) -> None:
    write_sweep(in_folder, GRID)
    command = [sys.executable, "-c", textwrap.dedent(FILLS_UP)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "make room, then launch again to resume" in done.stdout
    counts = StudyView.read(Path("outputs/ask")).counts()
    assert (counts["WAITING"], counts["RUNNING"]) == (8, 0)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_person_looks_on_while_slots_are_refilled(in_folder: Path, is_terminal: bool) -> None:
    sweep, faults = sweep_file.read(str(write_sweep(in_folder, GRID)), [])
    assert faults == []
    out = io.StringIO()
    with Show(Console(file=out, width=200, force_terminal=is_terminal), 8, 0, 6) as show:
        assert launch.launch(sweep, show, lambda: False)
    printed = out.getvalue()
    assert "8/8" in printed if is_terminal else all(f"cell {number:04d} COMPLETE" in printed for number in range(8))


@pytest.mark.parametrize("verb", ["log", "finish"])
def test_a_disk_that_fills_up_ends_the_study_and_costs_no_cell(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    whole, calls = getattr(Record, verb), []

    def full(self: Record, *given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise StorageUnavailable("no space left")
        if len(calls) < 3:
            whole(self, *given, **named)

    path = write_sweep(in_folder, GRID)
    monkeypatch.setattr(Record, verb, full)
    with pytest.raises(StorageUnavailable, match="no space left"):
        run(path)
    monkeypatch.setattr(Record, verb, whole)
    counts = StudyView.read(Path("outputs/ask")).counts()
    assert counts["RUNNING"] == 0
    assert counts["COMPLETE"] == (2 if verb == "finish" else 0)
    _, finished, table = run(path)
    assert finished
    assert [row["state"] for row in table] == ["COMPLETE"] * 8
    for row in table:
        rows = (in_folder / "outputs/ask/trials" / f"{row['number']:04d}" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in rows] == [1, 2, 3, 4, 5, 6]


def test_an_adapter_that_cannot_learn_is_stopped_and_its_slot_refilled_when_asked(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = PeftTemplate.initial

    def without_A(self: PeftTemplate, config: Any, seed: int) -> dict[str, torch.Tensor]:
        return {name: A * (config.r != 2) for name, A in whole(self, config, seed).items()}

    monkeypatch.setattr(PeftTemplate, "initial", without_A)
    train = {"max_steps": 40, "eval_every": 40, "slots": 1}
    path = write_sweep(in_folder, {"method.rank": "choice(2, 4)", "optimizer.base_lr": "choice(1e-3)"}, train=train)
    _, finished, (dead, alive) = run(path, "health.action=stop")
    assert finished
    assert (dead["state"], dead["reason"], dead["steps"]) == ("FAIL", "trapped", 20), "the window is over"
    assert (dead["flags"], dead["cause"], dead["faults"]) == (["zero_trapped"], "dead_product", ["zero_trapped"])
    assert (alive["state"], alive["steps"], alive["flags"]) == ("COMPLETE", 40, [])


HOT = {
    "data": {"subjects": 128, "eval_size": 48, "probe_size": 24},
    "method": {"rank": 8, "alpha": 16},
    "optimizer": {"ratio": 16},
    "train": {"max_steps": 25, "eval_every": 25, "batch_size": 8, "slots": 2},
}


def test_what_is_said_of_a_rate_that_is_too_high_is_the_same_everywhere(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its B walks as under random labels: on disk, in W&B's summary and tags, in trials.jsonl and on the terminal."""
    sent: dict[int, dict[str, Any]] = {}

    class Run:
        def log(self, *_: Any) -> None: ...

        def finish(self, result: dict[str, Any], _: Any) -> None:
            sent[result["cell"]] = result

        def end(self, **_: Any) -> None: ...

    monkeypatch.setattr(Tracker, "start", lambda *_: Run())
    path = write_sweep(in_folder, {"optimizer.base_lr": "choice(4e-4, 3e-3, 1e-9)"}, **HOT)
    path.write_text(path.read_text().replace("defaults:", "defaults:\n- override /data: facts"))
    _, finished, (sound, hot, slow) = run(path)
    assert finished
    assert sound["base_loss"] - sound["eval_loss"] > 0.3
    assert hot["eval_loss"] > hot["base_loss"]
    assert (sound["flags"], sound["faults"], sound["cause"]) == ([], [], None)
    # How a hot trial ends differs between processors: on some its gap grows as well.
    assert hot["flags"] in (["rate_too_high"], ["rate_too_high", "overfit"])
    assert (hot["faults"][0], hot["cause"]) == ("rate_too_high", None)
    assert (slow["flags"], slow["faults"], slow["cause"]) == (["zero_trapped"], ["zero_trapped"], "lr_too_small")
    for row in (sound, hot, slow):
        printed = sent[row["number"]]
        assert (printed["flags"], printed["cause"]) == (row["flags"], row["cause"])
    assert "lower optimizer.base_lr" in sent[1]["findings"][0]["sentence"]
    assert "raise optimizer.base_lr" in sent[2]["findings"][0]["sentence"]
    assert [line for line in flag_lines([sound, hot, slow]) if not line.startswith("overfit")] == [
        f"rate_too_high: 1 cell (0001): {hot['remedies']['rate_too_high']}",
        f"zero_trapped (lr_too_small): 1 cell (0002): {slow['remedies']['zero_trapped']}",
    ]
    lines = [json.loads(line) for line in (in_folder / "outputs/ask/trials.jsonl").read_text().splitlines()]
    assert lines == [sound, hot, slow]
    result = json.loads((in_folder / "outputs/ask/trials/0001/result.json").read_text())
    assert result["diagnosis"]["delta_rel"] > 0.05
    assert result["diagnosis"]["gain"] < -2 * result["diagnosis"]["error"]


def test_asha_prunes_at_its_rungs_and_the_slots_are_refilled(in_folder: Path) -> None:
    # The good ones come first: a rung looks at the values it has, so late comers are compared with them.
    axes = {"optimizer.base_lr": "choice(3e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)", "method.rank": "choice(2, 4)"}
    asha = {"name": "asha", "eta": 2, "min_steps": 2}
    watcher, finished, table = run(write_sweep(in_folder, axes, pruner=asha))
    assert finished
    pruned = [row for row in table if row["state"] == "PRUNED"]
    assert len(pruned) >= 4
    assert {row["steps"] for row in pruned} <= {2, 4}
    assert {(*row["flags"], *row["faults"], row["cause"]) for row in pruned} == {("undecided", None)}
    assert any(line.startswith("undecided: ") for line in flag_lines(table))
    best = results.ranked(table)[0]
    assert best["params"]["optimizer.base_lr"] >= 1e-3
    refilled = [number for number, _, _ in watcher.admissions]
    assert sorted(refilled) == list(range(12))
    # A full run of all cells in three slots takes 24 steps; what was pruned was not trained on.
    assert watcher.steps < 24 + 12


def test_a_sampled_study_draws_its_cells_and_only_the_best_adapters_are_kept(in_folder: Path) -> None:
    sampler = {"name": "optuna", "n_trials": 5, "instance": {"_target_": "optuna.samplers.TPESampler", "seed": 1}}
    axes = {"method.rank": "choice(1, 2, 4)", "optimizer.base_lr": "tag(log, interval(1e-4, 3e-3))"}
    path = write_sweep(in_folder, axes, sampler=sampler)
    _, finished, table = run(path, "study.keep_adapters=2")
    assert finished
    assert len(table) == 5
    assert all(1e-4 <= row["params"]["optimizer.base_lr"] <= 3e-3 for row in table)
    kept = [row["number"] for row in table if (in_folder / f"outputs/ask/trials/{row['number']:04d}/adapter").exists()]
    assert sorted(kept) == sorted(row["number"] for row in results.ranked(table)[:2])


def test_drawn_cells_that_are_the_same_run_are_run_once_and_each_has_its_line(in_folder: Path) -> None:
    sampler = {"name": "optuna", "n_trials": 8, "instance": {"_target_": "optuna.samplers.RandomSampler", "seed": 0}}
    axes = {"method.alpha": "choice(8, 16)", "optimizer.ratio": "choice(1, 2)"}
    more = {"sampler": sampler, "optimizer": {"eps_rule": "scaled", "base_lr": 1e-3}}
    watcher, finished, table = run(write_sweep(in_folder, axes, **more))
    assert finished
    products = [row["params"]["method.alpha"] * row["params"]["optimizer.ratio"] for row in table]
    assert len({cell for cell, _, _ in watcher.admissions}) == len(set(products)) == 3
    assert sorted(watcher.ends) == [(number, "COMPLETE") for number in range(8)], "those that were told are done too"
    assert [row["same_run_as"] for row in table] == [
        None if products.index(product) == number else products.index(product)
        for number, product in enumerate(products)
    ]
    for row in table:
        assert row["state"] == "COMPLETE"
        assert row["eval_loss"] == table[products.index(products[row["number"]])]["eval_loss"]
    assert results.summary(StudyView.read(Path("outputs/ask")), table, 3)["distinct_runs"] == 3
    watcher, _, _ = run(write_sweep(in_folder, axes, **more), "study.fold=off", "study.name=each")
    assert len(watcher.ends) == 8


def test_cells_that_cannot_share_a_pack_wait_for_their_own(in_folder: Path) -> None:
    axes = {"train.batch_size": "choice(1, 2)", "data": "choice(style, facts)", "method.rank": "choice(2, 4)"}
    watcher, finished, table = run(write_sweep(in_folder, axes))
    assert finished
    assert {row["state"] for row in table} == {"COMPLETE"}
    assert sorted(number for number, _ in watcher.ends) == list(range(8))
    assert len({row["base_loss"] for row in table}) == 2


ASK = [sys.executable, "-m", "lora_sweep", "launch", "ask.yaml"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[2])}


def wait_for(path: Path, text: str, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if path.is_file() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} never said {text!r}; exit code {process.poll()}")


def test_kill_9_in_the_middle_and_the_same_command_again_finishes_every_cell_once(in_folder: Path) -> None:
    axes = {**GRID, "optimizer.base_lr": "choice(1e-3, 1e30)"}
    # Long enough that a fast machine is not through before it is seen to be in the middle.
    write_sweep(in_folder, axes, defaults=[], tracker={"mode": "offline"}, train={"max_steps": 40, "eval_every": 4})
    journal = in_folder / "outputs/ask/study.journal"
    for kill in range(2):
        process = subprocess.Popen(ASK, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # Once in the middle of the first pack, once after some cells are finished.
        wait_for(in_folder / "outputs/ask/trials/0000/metrics.jsonl", "eval/loss", process)
        if kill:
            wait_for(in_folder / "outputs/ask/trials.jsonl", "COMPLETE", process)
        time.sleep(random.Random(kill).uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert journal.is_file()
    done = subprocess.run(ASK, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    table = [json.loads(line) for line in (in_folder / "outputs/ask/trials.jsonl").read_text().splitlines()]
    assert [row["number"] for row in table] == list(range(8))
    hot = [row for row in table if row["params"]["optimizer.base_lr"] > 1]
    assert [(row["state"], row["reason"]) for row in hot] == [("FAIL", "diverged")] * 4
    assert [row["state"] for row in table if row not in hot] == ["COMPLETE"] * 4
    for row in table:
        trial = in_folder / f"outputs/ask/trials/{row['number']:04d}"
        steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, row["steps"] + 1))
    runs = [path.name.rpartition("-")[2] for path in (in_folder / "outputs/ask/wandb").glob("offline-run-*")]
    assert sorted(runs) == [f"{number:04d}" for number in range(8)], "one W&B run a cell"
    again = subprocess.run(ASK, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0
    assert "8 of them finished" in again.stdout


def test_ctrl_c_stops_cleanly_says_how_to_go_on_and_a_second_process_is_refused(in_folder: Path) -> None:
    write_sweep(in_folder, GRID, train={"max_steps": 4000, "eval_every": 4})
    process = subprocess.Popen(ASK, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(in_folder / "outputs/ask/trials/0000/metrics.jsonl", "eval/loss", process)  # type: ignore[arg-type]
    second = subprocess.run(ASK, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2
    assert f"process {process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "the same command goes on" in out
    assert "Traceback" not in err
    status = StudyView.read(in_folder / "outputs/ask").counts()
    assert status["RUNNING"] == 0
    assert status["WAITING"] == 8


def test_one_trial_without_a_study(in_folder: Path) -> None:
    overrides = [f"{group}.{key}={value}" for group, knobs in SMALL.items() for key, value in knobs.items()]
    command = [sys.executable, "-m", "lora_sweep", "train", "tracker=none", "optimizer.base_lr=1e-3", *overrides]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "COMPLETE: eval loss" in done.stdout
    assert (in_folder / "outputs/train/adapter/adapter_model.safetensors").is_file()
    assert not (in_folder / "outputs/train/checkpoint").exists()
    result = (in_folder / "outputs/train/result.json").read_bytes()
    assert torch.isfinite(torch.tensor(json.loads(result)["eval_loss"]))
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2
    assert again.stderr.endswith("holds a finished trial; choose another study.name\n")
    assert (in_folder / "outputs/train/result.json").read_bytes() == result, "what is recorded is not written over"


def test_an_interrupted_trial_goes_on_and_another_one_in_its_place_is_refused(in_folder: Path) -> None:
    overrides = [f"{group}.{key}={value}" for group, knobs in SMALL.items() for key, value in knobs.items()]
    sweep, _ = sweep_file.read(None, ["tracker=none", *overrides])
    watcher = Silent()
    assert not launch.train(sweep.base(), watcher, lambda: watcher.steps > 3)
    other, _ = sweep_file.read(None, ["tracker=none", "method.rank=2", *overrides])
    with pytest.raises(StudyError, match=r"method\.rank: 8 -> 2"):
        launch.train(other.base(), Silent(), lambda: False)
    resumed = Silent()
    assert launch.train(sweep.base(), resumed, lambda: False)
    assert resumed.admissions == [(0, 0, 2)]
    steps = [json.loads(line)["step"] for line in Path("outputs/train/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def own_data(folder: Path, count: int) -> dict[str, Any]:
    lines = [json.dumps({"prompt": f"Person {n} lives in", "completion": f" house {n}."}) for n in range(count)]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return {"defaults": [{"override /tracker": "none"}, {"override /data": "files"}], "data": {"path": "mine.jsonl"}}


@pytest.mark.filterwarnings(IGNORED)
def test_a_study_whose_data_file_has_changed_is_not_resumed(in_folder: Path) -> None:
    more = {**own_data(in_folder, 200), "data": {"path": "mine.jsonl", "subjects": None}}
    path = write_sweep(in_folder, {"method.rank": "choice(2, 4)"}, **more)
    assert not run(path, stop_after=4)[1]
    (kept,) = Path("outputs/ask/data").iterdir()
    assert json.loads(kept.read_text())["report"]["train"]["examples"] > 100
    own_data(in_folder, 201)
    with pytest.raises(StudyError, match=r"mine\.jsonl has changed since the study began \(sha256 "):
        run(path)
    own_data(in_folder, 200)
    assert run(path)[1]


@pytest.mark.filterwarnings(IGNORED)
def test_forgetting_is_measured_on_the_retention_text(in_folder: Path) -> None:
    axes = {"optimizer.base_lr": "choice(1e-6, 1e-2)"}
    _, finished, table = run(write_sweep(in_folder, axes, data={"retention": "embedded:tiny"}))
    assert finished
    assert abs(table[0]["forgetting"]) < 1e-3
    assert table[1]["forgetting"] > 0.05, "a hot adapter on pirates forgets plain biographies"
    last = json.loads(Path("outputs/ask/trials/0001/metrics.jsonl").read_text().splitlines()[-1])
    base_loss = last["eval/retention"] - table[1]["forgetting"]
    assert 0 < base_loss < 3


@pytest.mark.filterwarnings(IGNORED)
def test_without_a_retention_text_nothing_is_said_of_forgetting(in_folder: Path) -> None:
    table = run(write_sweep(in_folder, {"method.rank": "choice(2)"}))[2]
    assert table[0]["forgetting"] is None
    assert "eval/retention" not in Path("outputs/ask/trials/0000/metrics.jsonl").read_text()


def test_a_trial_too_large_for_the_memory_fails_alone_and_the_others_go_on(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Passes.train

    def train(self: Passes, slots: Any) -> Any:
        if any(slot.trial.method.rank > 4 for slot in slots):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, slots)

    monkeypatch.setattr(Passes, "train", train)
    _, finished, table = run(write_sweep(in_folder, {"method.rank": "choice(2, 4, 8)"}))
    assert finished
    assert [(row["state"], row["reason"]) for row in table] == [
        ("COMPLETE", None),
        ("COMPLETE", None),
        ("FAIL", "memory"),
    ]
    assert table[2]["eval_loss"] is None, "never a made-up loss"
    cache = json.loads((in_folder / "outputs/ask/capacity.json").read_text())
    assert [each["too_wide"] for each in cache.values()] == [3], "remembered for the next launch"


def test_what_did_not_fit_is_remembered_for_the_same_kind_of_device(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("data.subjects=8", "data.eval_size=2", "data.probe_size=2", "train.slots=8")
    bench = workbench.LoadedDevice(torch.device("cpu"), in_folder)

    def begun(kind: str) -> tuple[int | None, int]:
        """What a pack on such a device knows when it begins; then passes of 4 fit and those of 6 do not."""
        monkeypatch.setattr(workbench, "device_kind", lambda _: kind)
        with bench.pack(config, 2) as (pack, _):
            cache = pack.capacity.too_many, pack.capacity.fits
            pack.capacity.fitted(4)
            pack.capacity.failed(6)
        return cache

    assert [begun(kind) for kind in ("small", "large", "small")] == [(None, 0), (None, 0), (6, 4)]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "1", '{"x": 1}', "[" * 10**5, '{"KEY": {"too_wide": "x", "fits": -1}}', '{"KEY": []}']
)
def test_a_damaged_record_of_the_devices_memory_is_made_anew(tmp_path: Path, content: str) -> None:
    cache = workbench.CapacityCache(tmp_path / "capacity.json", "kind")
    cache.file.write_text(content.replace("KEY", cache._key))
    assert (cache.too_many, cache.fits) == (None, 0)
    cache.keep(Capacity(slots=2, too_many=8, fits=4, slots_per_pass=2))
    assert (cache.too_many, cache.fits) == (8, 4)


def test_the_interpreter_collects_as_before_once_the_training_is_over() -> None:
    turn, kept = sys.getswitchinterval(), gc.get_freeze_count()
    with worker._steady():
        assert gc.get_freeze_count() > 100_000, "what the packages hold"
        assert sys.getswitchinterval() == pytest.approx(worker.TURN_SECONDS)
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (turn, kept)
