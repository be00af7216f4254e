"""The ledger, on synthetic curves: no torch, no model, real files, real processes."""

import itertools
import json
import logging
import math
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import HyperbandPruner, MedianPruner, PatientPruner, SuccessiveHalvingPruner, ThresholdPruner
from optuna.samplers import GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

import lora_sweep.study.journal as journal_module
import lora_sweep.study.study as study_module
from lora_sweep.errors import ConfigError, StorageUnavailable, StudyError
from lora_sweep.records import Cell
from lora_sweep.study.asha import Asha
from lora_sweep.study.lease import Lease, StaleLease
from lora_sweep.study.search import Search
from lora_sweep.study.study import Study
from lora_sweep.study.view import StudyView, status_of

SPACE = {
    "log2_rank": IntDistribution(1, 6),
    "optimizer.base_lr": FloatDistribution(1e-5, 1e-3, log=True),
    "dropout": FloatDistribution(0.0, 0.2, step=0.05),
    "method.use_rslora": CategoricalDistribution([True, False]),
}


def grid(n: int) -> list[Cell]:
    return [Cell(number, {"method.rank": 2**number, "method.use_rslora": number % 2 == 0}) for number in range(n)]


def anything(cell: Cell) -> bool:
    return True


def ask(study: Study, fits: Callable[[Cell], bool] = anything) -> Lease:
    lease = study.ask(fits)
    assert lease is not None
    return lease


def random_search(n_trials: int, seed: int = 0, **more: Any) -> Search:
    return Search(RandomSampler(seed=seed), SPACE, n_trials, **more)


def attempts_on_disk(folder: Path) -> list[FrozenTrial]:
    """What Optuna's own classes read, without any code under test."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=None, storage=storage).trials


def assert_each_finished_once(folder: Path, numbers: set[int]) -> None:
    finished = [
        trial.user_attrs["cell"]["number"]
        for trial in attempts_on_disk(folder)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and trial.user_attrs["reason"] != "lost")
    ]
    assert sorted(finished) == sorted(numbers)


def run_pack(
    study: Study,
    loss: Callable[[int, int], float],
    *,
    slots: int,
    evals: range,
    shuffle: random.Random,
) -> dict[int, dict[int, float]]:
    """The worker's loop without the training; returns {step: {cell: value}} of what was reported."""
    reported: dict[int, dict[int, float]] = {}
    steps: dict[Lease, int] = {}
    while True:
        while len(steps) < slots and (lease := study.ask(anything)):
            steps[lease] = 0
        if not steps:
            return reported
        by_step: dict[int, dict[Lease, float]] = {}
        for lease in shuffle.sample(sorted(steps, key=lambda each: each.trial), len(steps)):
            steps[lease] += evals.step
            by_step.setdefault(steps[lease], {})[lease] = loss(lease.cell.number, steps[lease])
        for step, values in by_step.items():
            reported.setdefault(step, {}).update({lease.cell.number: value for lease, value in values.items()})
            for lease, keep in study.report_rung(values, step).items():
                if step == evals.stop:
                    study.tell(lease, "COMPLETE", values[lease])
                elif not keep:
                    study.tell(lease, "PRUNED")
                if step == evals.stop or not keep:
                    del steps[lease]


# ---------------------------------------------------------------------------------------------------------------------
# Rungs


def test_rungs_are_the_evaluations_at_or_first_after_each_power_of_eta() -> None:
    assert Asha(eta=3, min_steps=20, max_steps=200, eval_every=20).rungs == (20, 60, 180)
    assert Asha(eta=3, min_steps=20, max_steps=180, eval_every=20).rungs == (20, 60)
    assert Asha(eta=2, min_steps=10, max_steps=200, eval_every=50).rungs == (50, 100)
    assert Asha(eta=4, min_steps=1, max_steps=1000, eval_every=25).rungs == (25, 75, 275)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((1, 20, 200, 20), "pruner.eta"),
        ((2.5, 20, 200, 20), "pruner.eta"),
        ((3, 0, 200, 20), "pruner.min_steps"),
        ((3, 20, 200, 0), "train.eval_every"),
        ((3, 200, 200, 20), "pruner.min_steps"),
        ((3, 20, 200, 200), "pruner.min_steps"),
    ],
)
def test_an_asha_that_cannot_prune_or_makes_no_sense_is_refused_with_its_field(arguments: Any, field: str) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        Asha(*arguments)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("n", range(1, 14))
@pytest.mark.parametrize("eta", [2, 3, 4])
def test_a_rung_keeps_the_best_floor_of_n_over_eta_and_at_least_one(n: int, eta: int) -> None:
    values = dict(zip(range(n), random.Random(n).sample(range(100), n), strict=True))
    kept = Asha(eta, 1, 10, 1).survivors(values)
    assert len(kept) == max(1, math.floor(n / eta))
    assert max(values[number] for number in kept) < min(
        (values[number] for number in values if number not in kept), default=math.inf
    )


def test_values_that_are_not_finite_count_but_never_go_on_and_ties_go_to_the_lower_number() -> None:
    asha = Asha(2, 1, 10, 1)
    assert asha.survivors({5: 1.0, 3: 1.0, 8: 1.0, 1: 1.0}) == {1, 3}
    assert asha.survivors({0: math.nan, 1: math.inf, 2: 7.0, 3: math.nan}) == {2}
    assert asha.survivors({0: math.nan}) == set()


@pytest.mark.parametrize("seed", range(5))
def test_one_pack_of_all_cells_keeps_what_the_rule_gives_in_any_order_of_reporting(tmp_path: Path, seed: int) -> None:
    """27 curves that never cross, eta 3: 9 of 27 pass step 20, 3 of those 9 pass step 60, the best of them wins."""
    shuffle = random.Random(seed)
    rank = shuffle.sample(range(27), 27)
    with Study.open(tmp_path, name="s", cells=grid(27), pruner=Asha(3, 20, 100, 20)) as study:
        run_pack(
            study,
            lambda number, step: 1 + 0.01 * rank[number] + math.exp(-step / 50),
            slots=27,
            evals=range(20, 100, 20),
            shuffle=shuffle,
        )
        ended = {status.cell.number: (status.state, status.step) for status in study.statuses()}
    for number, place in enumerate(rank):
        expected = ("COMPLETE", 100) if place < 3 else ("PRUNED", 60) if place < 9 else ("PRUNED", 20)
        assert ended[number] == expected


@pytest.mark.parametrize("slots", [1, 4, 5])
def test_with_refills_the_best_survives_and_each_decision_is_the_rule_over_all_values_so_far(
    tmp_path: Path, slots: int
) -> None:
    shuffle = random.Random(slots)
    rank = shuffle.sample(range(20), 20)
    asha = Asha(3, 10, 40, 10)

    def loss(number: int, step: int) -> float:
        return 1 + 0.01 * rank[number] + math.exp(-step / 50)

    with Study.open(tmp_path, name="s", cells=grid(20), pruner=asha) as study:
        values_by_step: dict[int, dict[int, float]] = {}
        decide = study.report_rung

        def report(values: Mapping[Lease, float], step: int) -> dict[Lease, bool]:
            keep = decide(values, step)
            at_step = values_by_step.setdefault(step, {})
            at_step.update({lease.cell.number: value for lease, value in values.items()})
            best = sorted(at_step, key=lambda number: at_step[number])[: max(1, len(at_step) // 3)]
            for lease, kept in keep.items():
                assert kept == (step not in asha.rungs or lease.cell.number in best)
            return keep

        study.report_rung = report  # type: ignore[method-assign]
        run_pack(study, loss, slots=slots, evals=range(10, 40, 10), shuffle=shuffle)
        statuses = study.statuses()
    assert set(asha.rungs) <= set(values_by_step)
    assert len(values_by_step[10]) == 20
    complete = [status for status in statuses if status.state == "COMPLETE"]
    assert min(complete, key=lambda status: status.value or math.inf).cell.number == rank.index(0)
    assert {status.state for status in statuses} == {"COMPLETE", "PRUNED"}


def test_an_attempt_that_failed_is_no_competitor_at_its_rung(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(4), pruner=Asha(2, 10, 40, 10)) as study:
        leases = [ask(study) for _ in range(4)]
        study.report_rung({leases[0]: 0.1, leases[1]: 0.2}, 10)
        study.tell(leases[0], "FAIL", why="diverged")
        study.release(leases[1])
        # 0.3 is the better of the two values left: with the failed ones it would be third of four.
        assert study.report_rung({leases[2]: 0.3, leases[3]: 0.4}, 10) == {leases[2]: True, leases[3]: False}


def test_without_a_pruner_and_between_rungs_all_go_on(tmp_path: Path) -> None:
    for name, pruner in (("none", None), ("asha", Asha(2, 30, 90, 10))):
        with Study.open(tmp_path / name, name=name, cells=grid(3), pruner=pruner) as study:
            values = {ask(study): float(number) for number in range(3)}
            assert set(study.report_rung(values, 10).values()) == {True}
            assert [status.step for status in study.statuses()] == [10, 10, 10]


def test_optunas_order_free_pruners_decide_as_they_do(tmp_path: Path) -> None:
    with Study.open(tmp_path / "t", name="t", cells=grid(2), pruner=ThresholdPruner(upper=2.0)) as study:
        low, high = ask(study), ask(study)
        assert study.report_rung({low: 1.9, high: 2.1}, 10) == {low: True, high: False}
    median = MedianPruner(n_startup_trials=3, n_warmup_steps=0)
    with Study.open(tmp_path / "m", name="m", cells=grid(6), pruner=median) as study:
        for value in (1.0, 2.0, 3.0):
            lease = ask(study)
            assert study.report_rung({lease: value}, 10) == {lease: True}
            study.tell(lease, "COMPLETE", value)
        better, worse = ask(study), ask(study)
        assert study.report_rung({worse: 2.1, better: 1.9}, 10) == {worse: False, better: True}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_optunas_own_halving_is_refused_wrapped_or_not(tmp_path: Path) -> None:
    for pruner in (SuccessiveHalvingPruner(), HyperbandPruner(), PatientPruner(HyperbandPruner(), patience=1)):
        with pytest.raises(ValueError, match="use Asha"):
            Study.open(tmp_path / "s", name="s", cells=grid(2), pruner=pruner)
    assert not (tmp_path / "s").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Cells and attempts


def test_each_grid_cell_is_offered_exactly_once_lowest_number_first(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=reversed(grid(7))) as study:
        leases = [ask(study) for _ in range(7)]
        assert [lease.cell for lease in leases] == grid(7)
        assert study.ask(anything) is None
        for lease in leases:
            study.tell(lease, "COMPLETE", 1.0)
        assert study.ask(anything) is None
        assert study.counts() == {"COMPLETE": 7, "PRUNED": 0, "FAIL": 0, "RUNNING": 0, "WAITING": 0}
    assert_each_finished_once(tmp_path, set(range(7)))


def test_a_grid_is_stored_without_distributions_so_that_an_axis_may_be_of_any_kind(tmp_path: Path) -> None:
    odd = [Cell(0, {"data": "facts", "method.target_modules": ["q_proj"], "x": None}), Cell(1, {"data": 1e-5, "x": 2})]
    with Study.open(tmp_path, name="s", cells=odd) as study:
        assert [ask(study).cell for _ in odd] == odd
    assert all(not trial.distributions and not trial.params for trial in attempts_on_disk(tmp_path))


def test_ask_gives_the_lowest_cell_that_fits_and_the_others_later(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(4)) as study:
        assert ask(study, lambda cell: cell.params["method.rank"] >= 4).cell.number == 2
        assert study.ask(lambda cell: False) is None
        assert [ask(study).cell.number for _ in range(3)] == [0, 1, 3]


def test_what_comes_next_is_told_without_being_leased(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(5)) as study:
        assert [cell.number for cell in study.next(anything, 2)] == [0, 1]
        ask(study)
        assert [cell.number for cell in study.next(lambda cell: cell.number % 2 == 0, 9)] == [2, 4]
        assert ask(study).cell.number == 1
    with Study.open(tmp_path / "drawn", name="s", search=random_search(3)) as study:
        assert study.next(anything, 2) == [], "not drawn before its turn"
        assert study.counts()["WAITING"] == 0


def test_a_cell_claimed_by_somebody_else_between_look_and_claim_is_not_given_twice(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        other = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))

        def overtaken(cell: Cell) -> bool:
            if cell.number == 0:
                assert other.set_trial_state_values(0, TrialState.RUNNING)
            return True

        assert ask(study, overtaken).cell.number == 1


def test_a_lease_is_a_value(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        lease, other = ask(study), ask(study)
        copy = pickle.loads(pickle.dumps(lease))
        assert copy == lease and hash(copy) == hash(lease) and lease != other
        study.tell(copy, "COMPLETE", 1.0)


def test_a_released_cell_waits_again_before_later_ones_and_final_failures_do_not(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(5)) as study:
        leases = [ask(study) for _ in range(4)]
        study.release(leases[0])
        for lease, why in zip(leases[1:], ("diverged", "memory", "error"), strict=True):
            study.tell(lease, "FAIL", why=why)  # type: ignore[arg-type]
        again = ask(study)
        assert (again.cell, again.attempt) == (grid(5)[0], 2)
        assert ask(study).cell.number == 4
        assert study.ask(anything) is None
        assert [status.reason for status in study.statuses()] == [None, "diverged", "memory", "error", None]


def test_a_late_report_tell_or_renewal_of_a_reaped_attempt_raises_and_overwrites_nothing(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        late = ask(study)
        study.report_rung({late: 3.0}, 10)
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        again = ask(study)
        assert again.cell == late.cell and again.attempt == 2
        fresh = ask(study)
        before = (tmp_path / "study.journal").read_bytes()
        for act in (
            lambda: study.report_rung({fresh: 1.0, late: 1.0}, 20),
            lambda: study.tell(late, "COMPLETE", 1.0),
            lambda: study.release(late),
            lambda: study.renew(late),
        ):
            with pytest.raises(StaleLease, match=r"cell 0: attempt 1 .* FAIL") as caught:
                act()
            assert isinstance(caught.value, StudyError) and caught.value.lease == late
        assert (tmp_path / "study.journal").read_bytes() == before
        study.renew(again)


def test_reaping_spares_what_this_process_leases(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        lease = ask(study)
        assert study.reap() == ()
        study.renew(lease)
        stolen = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
        assert stolen.set_trial_state_values(1, TrialState.RUNNING)
        assert study.reap() == (grid(2)[1],)
        study.renew(lease)
        assert ask(study).attempt == 2


@pytest.mark.parametrize(
    ("state", "value", "why"),
    [
        ("COMPLETE", None, None),
        ("COMPLETE", math.nan, None),
        ("COMPLETE", math.inf, None),
        ("COMPLETE", 1.0, "error"),
        ("PRUNED", None, "diverged"),
        ("FAIL", None, None),
        ("FAIL", None, "tired"),
        ("FAIL", 1.0, "error"),
    ],
)
def test_a_tell_that_makes_no_sense_is_refused_and_leaves_the_lease(
    tmp_path: Path, state: Any, value: float | None, why: Any
) -> None:
    with Study.open(tmp_path, name="s", cells=grid(1)) as study:
        lease = ask(study)
        with pytest.raises(ValueError, match=r"value|reason"):
            study.tell(lease, state, value, why)
        study.renew(lease)


def test_a_pruned_cell_is_worth_what_was_told_or_its_last_finite_report(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(3)) as study:
        for value_at_end, reports in ((2.5, [3.0]), (None, [3.0, 2.0, math.nan]), (None, [])):
            lease = ask(study)
            for step, value in enumerate(reports):
                study.report_rung({lease: value}, step)
            study.tell(lease, "PRUNED", value_at_end)
        assert [status.value for status in study.statuses()] == [2.5, 2.0, None]


def test_relaunching_enqueues_only_what_has_no_live_or_finished_attempt(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(4)) as study:
        study.tell(ask(study), "COMPLETE", 1.0)
        study.tell(ask(study), "FAIL", why="diverged")
        identity = study.id
    size = (tmp_path / "study.journal").stat().st_size
    for _ in range(2):
        with Study.open(tmp_path, name="s", cells=grid(4)) as study:
            assert study.counts() == {"COMPLETE": 1, "PRUNED": 0, "FAIL": 1, "RUNNING": 0, "WAITING": 2}
            assert study.id == identity and len(identity) == 8 and study.size == 4
    assert (tmp_path / "study.journal").stat().st_size == size
    with Study.open(tmp_path, name="s", cells=grid(6)) as study:
        assert [ask(study).cell.number for _ in range(4)] == [2, 3, 4, 5]
        assert study.size == 6


def test_what_did_not_fit_into_memory_is_tried_again_by_the_next_launch_alone(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        study.tell(ask(study), "FAIL", why="memory")
        study.tell(ask(study), "COMPLETE", 1.0)
        assert study.ask(lambda _: True) is None
    for _ in range(2):
        with Study.open(tmp_path, name="s", cells=grid(2)) as study:
            assert study.counts() == {"COMPLETE": 1, "PRUNED": 0, "FAIL": 0, "RUNNING": 0, "WAITING": 1}
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        lease = ask(study)
        assert (lease.cell.number, lease.attempt) == (0, 2)
        study.tell(lease, "COMPLETE", 2.0)
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        assert study.counts()["COMPLETE"] == 2 and study.ask(lambda _: True) is None


def test_another_study_in_the_same_folder_is_refused_in_one_line_and_untouched(tmp_path: Path) -> None:
    Study.open(tmp_path, name="s", cells=grid(3)).close()
    before = (tmp_path / "study.journal").read_bytes()
    changed = [*grid(2), Cell(2, {"method.rank": 5, "method.use_rslora": True})]
    truth_is_not_one = [Cell(0, {"method.rank": 1, "method.use_rslora": 1}), *grid(3)[1:]]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"name": "other", "cells": grid(3)}, "holds the study 's'"),
        ({"name": "s", "cells": grid(2)}, "other cells .cell 2"),
        ({"name": "s", "cells": changed}, "other cells .cell 2"),
        ({"name": "s", "cells": truth_is_not_one}, "other cells .cell 0"),
        ({"name": "s", "search": random_search(3)}, "as a grid"),
    )
    for arguments, message in cases:
        with pytest.raises(StudyError, match=message) as caught:
            Study.open(tmp_path, **arguments)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "study.journal").read_bytes() == before


def test_arguments_that_make_no_sense_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"cells": grid(1), "search": random_search(1)},
        {"cells": []},
        {"cells": [Cell(0, {}), Cell(0, {})]},
    )
    for arguments in cases:
        with pytest.raises(ValueError, match="cells"):
            Study.open(folder, name="s", **arguments)
    assert not folder.exists()


def test_a_folder_that_cannot_be_a_study_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="file"):
        Study.open(tmp_path / "file", name="s", cells=grid(1))
    with pytest.raises(StudyError, match="file"):
        Study.open(tmp_path / "file" / "s", name="s", cells=grid(1))
    with pytest.raises(StudyError, match="no study here"):
        StudyView.read(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Study.open("outputs/s", name="s", cells=grid(1)) as study:
        monkeypatch.chdir("elsewhere")
        study.tell(ask(study), "COMPLETE", 1.0)
    assert StudyView.read("../outputs/s").counts()["COMPLETE"] == 1


def test_a_closed_study_and_a_view_write_nothing(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        lease = ask(study)
    with pytest.raises(StudyError, match="closed"):
        study.tell(lease, "COMPLETE", 1.0)
    with pytest.raises(StudyError, match="closed"):
        study.ask(anything)
    assert study.counts()["RUNNING"] == 1
    assert not hasattr(StudyView.read(tmp_path), "ask")


# ---------------------------------------------------------------------------------------------------------------------
# Sampled cells


def finish(study: Study, lease: Lease) -> float:
    params = lease.cell.params
    value = float(abs(math.log10(params["optimizer.base_lr"]) + 4) + 0.01 * params["log2_rank"])
    study.tell(lease, "COMPLETE", value)
    return value


@pytest.mark.parametrize("make", [lambda: RandomSampler(seed=7), lambda: TPESampler(seed=7, n_startup_trials=5)])
def test_cells_are_what_optunas_own_ask_and_tell_would_draw(tmp_path: Path, make: Callable[[], Any]) -> None:
    with Study.open(tmp_path, name="s", search=Search(make(), SPACE, 15)) as study:
        drawn = []
        while lease := study.ask(anything):
            drawn.append((dict(lease.cell.params), finish(study, lease)))
    oracle = optuna.create_study(sampler=make())
    for params, value in drawn:
        trial = oracle.ask(SPACE)
        assert trial.params == params
        oracle.tell(trial, value)
    assert len(drawn) == 15


@pytest.mark.parametrize("make", [lambda: RandomSampler(seed=3), lambda: TPESampler(seed=3, n_startup_trials=4)])
def test_a_sampled_study_reaches_n_trials_cells_and_tries_lost_ones_with_the_same_parameters(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    unlucky = random.Random(1)
    with Study.open(tmp_path, name="s", search=Search(make(), SPACE, 14)) as study:
        while lease := study.ask(anything):
            if unlucky.random() < 0.4:
                study.release(lease)
                again = ask(study)
                assert (again.cell, again.attempt) == (lease.cell, lease.attempt + 1)
                lease = again
            if unlucky.random() < 0.2:
                study.tell(lease, "FAIL", why="diverged")
            else:
                finish(study, lease)
        assert len(study.statuses()) == study.size == 14
        assert study.counts()["WAITING"] == 0
    trials = attempts_on_disk(tmp_path)
    assert len(trials) > 14
    for trial in trials:
        first = trials[trial.user_attrs["cell"]["number"]]
        assert first.user_attrs["cell"]["number"] == first.number and first.user_attrs["cell"]["attempt"] == 1
        assert trial.params == first.params == trial.user_attrs["cell"]["params"]
        assert trial.distributions == SPACE
    assert_each_finished_once(tmp_path, {trial.user_attrs["cell"]["number"] for trial in trials})


def test_a_drawn_cell_that_does_not_fit_waits_unchanged_and_others_are_drawn_meanwhile(tmp_path: Path) -> None:
    refused: list[Cell] = []

    def only_small(cell: Cell) -> bool:
        small = bool(cell.params["log2_rank"] <= 3)
        if not small:
            refused.append(cell)
        return small

    with Study.open(tmp_path, name="s", search=random_search(12)) as study:
        small = [lease for lease in (study.ask(only_small) for _ in range(6)) if lease]
        assert refused and all(lease.cell.params["log2_rank"] <= 3 for lease in small)
        waiting = [status.cell for status in study.statuses() if status.state == "WAITING"]
        assert waiting == sorted({cell.number: cell for cell in refused}.values(), key=lambda cell: cell.number)
        offered = [ask(study) for _ in waiting]
        assert [lease.cell for lease in offered] == waiting
        assert {lease.attempt for lease in offered} == {1}
        assert len({lease.cell.number for lease in small + offered}) == len(study.statuses())


def test_what_does_not_fit_is_not_drawn_without_bound(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", search=random_search(100, hold=3)) as study:
        for _ in range(4):
            assert study.ask(lambda cell: False) is None
        assert study.counts()["WAITING"] == 3


def test_decode_turns_optunas_parameters_into_config_values(tmp_path: Path) -> None:
    search = random_search(5, decode=lambda drawn: {"method.rank": 2 ** drawn["log2_rank"]})
    with Study.open(tmp_path, name="s", search=search) as study:
        for _ in range(5):
            lease = ask(study)
            assert lease.cell.params["method.rank"] in {2, 4, 8, 16, 32, 64}
            study.release(lease)
            again = ask(study)
            assert again.cell == lease.cell
            study.tell(again, "COMPLETE", 1.0)
    assert {tuple(trial.params) for trial in attempts_on_disk(tmp_path)} == {tuple(SPACE)}


def test_a_resumed_seeded_sampler_does_not_draw_the_same_cells_again(tmp_path: Path) -> None:
    drawn = []
    for n_trials in (3, 6):
        with Study.open(tmp_path, name="s", search=random_search(n_trials)) as study:
            while lease := study.ask(anything):
                drawn.append(lease.cell.params["optimizer.base_lr"])
                finish(study, lease)
    assert len(drawn) == len(set(drawn)) == 6


def test_another_space_in_the_same_study_is_refused(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", search=random_search(3)) as study:
        finish(study, ask(study))
    wider = {**SPACE, "method.use_rslora": CategoricalDistribution([True, False, None])}
    with pytest.raises(StudyError, match="another space"):
        Study.open(tmp_path, name="s", search=Search(RandomSampler(), wider, 3))


def letters(n_trials: int, *values: str, **more: Any) -> Search:
    """Cells that are the same run where the letter is the same, in either case."""
    space = {"letter": CategoricalDistribution(values)}
    same = {"same_run": lambda cell: cell.params["letter"].lower()} | more
    return Search(RandomSampler(seed=0), space, n_trials, **same)


ENDS = [("COMPLETE", 1.5, None), ("PRUNED", 2.5, None), ("PRUNED", None, None), ("FAIL", None, "diverged")]


@pytest.mark.parametrize(("state", "value", "why"), ENDS)
def test_a_drawn_cell_that_is_the_same_run_waits_for_the_end_of_the_first_and_is_told_it(
    tmp_path: Path, state: Any, value: float | None, why: Any
) -> None:
    with Study.open(tmp_path, name="s", search=letters(6, "a", "A", hold=2)) as study:
        lease = ask(study)
        assert study.ask(anything) is None, "all that is drawn is the same run"
        assert study.next(anything, 9) == []
        assert study.counts() == {"RUNNING": 1, "WAITING": 2, "COMPLETE": 0, "PRUNED": 0, "FAIL": 0}
        study.release(lease)
        again = ask(study)
        assert (again.cell, again.attempt) == (lease.cell, 2), "what was lost has not ended"
        assert study.ask(anything) is None
        study.report_rung({again: 2.0}, 10)
        study.tell(again, state, value, why)
        assert study.ask(anything) is None
        assert [runs for _, runs in study.duplicates().values()] == [0] * 5
        assert [(each.cell, each.state) for each in study.statuses()] == [(lease.cell, state)]
    ended = [trial for trial in attempts_on_disk(tmp_path) if trial.user_attrs.get("reason") != "lost"]
    assert len(ended) == 6
    value_at_end = 2.0 if state == "PRUNED" and value is None else value
    assert {(trial.state.name, trial.value, trial.user_attrs.get("reason")) for trial in ended} == {
        (state, value_at_end, why)
    }
    assert [trial.intermediate_values for trial in ended if trial.intermediate_values] == [{10: 2.0}]


def test_each_run_is_leased_once_whoever_shares_the_pack(tmp_path: Path) -> None:
    slots: list[Lease] = []
    leased: list[str] = []
    with Study.open(tmp_path, name="s", search=letters(40, *"aAbBcCdD", hold=3)) as study:
        while True:
            while len(slots) < 3 and (lease := study.ask(anything)):
                slots.append(lease)
                leased.append(lease.cell.params["letter"].lower())
            if not slots:
                break
            study.tell(slots.pop(0), "COMPLETE", float(len(leased)))
        assert sorted(leased) == list("abcd")
        assert (study.size, len(study.statuses()), len(study.duplicates())) == (40, 4, 36)
        values = {status.cell.params["letter"].lower(): status.value for status in study.statuses()}
    for trial in attempts_on_disk(tmp_path):
        assert trial.state is TrialState.COMPLETE and trial.value == values[trial.params["letter"].lower()]


def test_what_a_cell_was_told_stays_when_folding_is_turned_off_and_what_still_waits_is_run(tmp_path: Path) -> None:
    with Study.open(tmp_path, name="s", search=letters(3, "a")) as study:
        lease = ask(study)
        assert study.ask(anything) is None
        assert study.counts()["WAITING"] == 2
        study.tell(lease, "COMPLETE", 1.0)
    with Study.open(tmp_path, name="s", search=letters(4, "a", same_run=None)) as study:
        study.tell(ask(study), "COMPLETE", 1.0)
        assert study.duplicates() == {}
    with Study.open(tmp_path, name="s", search=letters(4, "a")) as study:
        assert study.ask(anything) is None
        assert {number: runs for number, (_, runs) in study.duplicates().items()} == {2: 0, 3: 0}
    with Study.open(tmp_path, name="s", search=letters(4, "a", same_run=None)) as study:
        assert study.ask(anything) is None
        assert study.counts()["COMPLETE"] == 2


def test_a_search_that_cannot_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="n_trials"):
        random_search(0)
    with pytest.raises(ValueError, match="at least one parameter"):
        Search(RandomSampler(), {}, 3)
    with pytest.raises(ValueError, match="GridSampler"):
        Search(GridSampler({"x": [1, 2]}), {"x": IntDistribution(1, 2)}, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Statuses

START = datetime(2026, 1, 1, tzinfo=UTC)


def attempt(kind: str, *, value: float | None = None, reports: Mapping[int, float] | None = None) -> FrozenTrial:
    """`COMPLETE`, `PRUNED`, `RUNNING`, `WAITING`, or `FAIL:reason`."""
    state, _, reason = kind.partition(":")
    trial = create_trial(
        state=TrialState[state],
        value=value,
        intermediate_values=dict(reports or {}),
        user_attrs={"reason": reason} if reason else {},
    )
    local = START.astimezone().replace(tzinfo=None)
    trial.datetime_start = None if state == "WAITING" else local
    trial.datetime_complete = local + timedelta(hours=1) if trial.state.is_finished() else None
    return trial


@pytest.mark.parametrize(
    ("kinds", "state", "reason", "attempts"),
    [
        (["WAITING"], "WAITING", None, 0),
        (["RUNNING"], "RUNNING", None, 1),
        (["COMPLETE"], "COMPLETE", None, 1),
        (["PRUNED"], "PRUNED", None, 1),
        (["FAIL:diverged"], "FAIL", "diverged", 1),
        (["FAIL:memory"], "FAIL", "memory", 1),
        (["FAIL"], "FAIL", "error", 1),
        (["FAIL:lost"], "WAITING", None, 1),
        (["FAIL:lost", "WAITING"], "WAITING", None, 1),
        (["FAIL:lost", "RUNNING"], "RUNNING", None, 2),
        (["FAIL:lost", "FAIL:lost", "COMPLETE"], "COMPLETE", None, 3),
        (["FAIL:lost", "FAIL:diverged"], "FAIL", "diverged", 2),
        (["FAIL:diverged", "FAIL:lost"], "WAITING", None, 2),
        (["FAIL:diverged", "WAITING"], "WAITING", None, 1),
        (["COMPLETE", "FAIL:lost"], "COMPLETE", None, 2),
        (["COMPLETE", "RUNNING"], "COMPLETE", None, 2),
        (["RUNNING", "PRUNED"], "PRUNED", None, 2),
        (["WAITING", "RUNNING"], "RUNNING", None, 1),
    ],
)
def test_a_status_is_derived_from_all_attempts(kinds: list[str], state: str, reason: str | None, attempts: int) -> None:
    cell = Cell(3, {"a": 1})
    trials = [attempt(kind, value=2.0 if kind == "COMPLETE" else None, reports={5: 3.0, 10: 2.5}) for kind in kinds]
    status = status_of(cell, trials)
    assert (status.cell, status.state, status.reason, status.attempts) == (cell, state, reason, attempts)
    assert status.value == (2.0 if state == "COMPLETE" else None)
    assert status.step == (None if state == "WAITING" else 10)
    assert status.started == (None if state == "WAITING" else START)
    assert status.finished == (START + timedelta(hours=1) if state in ("COMPLETE", "PRUNED", "FAIL") else None)


def test_of_two_finished_attempts_the_first_counts_and_of_two_failures_the_last() -> None:
    cell = Cell(0)
    assert status_of(cell, [attempt("COMPLETE", value=1.0), attempt("COMPLETE", value=2.0)]).value == 1.0
    assert status_of(cell, [attempt("FAIL:memory"), attempt("FAIL:diverged")]).reason == "diverged"


def test_statuses_come_by_number_with_times_in_utc(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    with Study.open(tmp_path, name="s", cells=reversed(grid(3))) as study:
        lease = ask(study)
        study.report_rung({lease: 2.0}, 25)
        study.tell(lease, "COMPLETE", 2.0)
        statuses = study.statuses()
    assert [status.cell for status in statuses] == grid(3)
    done = statuses[0]
    assert (done.state, done.value, done.step, done.attempts) == ("COMPLETE", 2.0, 25, 1)
    assert done.started and done.finished
    assert before <= done.started <= done.finished <= datetime.now(UTC)


# ---------------------------------------------------------------------------------------------------------------------
# When things go wrong


class Killed(BaseException):
    """Stands for kill -9 at one write."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None, str], None]]:
    """After `kill_at(n, how)` the n-th write dies: before it, after it, or with half a line on disk."""
    real = journal_module.Journal._append
    countdown: list[Any] = [None, ""]

    def append(self: Any, lines: bytes) -> None:
        if countdown[0] is None:
            return real(self, lines)
        countdown[0] -= 1
        if countdown[0] >= 0:
            return real(self, lines)
        if countdown[1] == "after":
            real(self, lines)
        elif countdown[1] == "torn":
            with self._path.open("ab") as file:
                file.write(lines[: len(lines) // 2])
        countdown[0] = None
        raise Killed

    def arm(n: int | None, how: str) -> None:
        countdown[:] = [n, how]

    monkeypatch.setattr(journal_module.Journal, "_append", append)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # Only speed: the writes are real, the machine doesn't stop.
    yield arm


@pytest.mark.parametrize("how", ["before", "torn", "after"])
@pytest.mark.parametrize("kind", ["grid", "search", "same runs"])
def test_a_kill_at_any_write_loses_no_cell_and_finishes_none_twice(
    tmp_path: Path, kill_at: Callable[[int | None, str], None], kind: str, how: str
) -> None:
    """Every single write of a study's life is the last one once: creation, enqueuing, claims, reports, ends.

    The process that takes over is killed too, in the middle of its repair.
    """
    ends: dict[int, Any] = {0: ("COMPLETE", 1.0, None), 1: ("PRUNED", None, None), 2: ("FAIL", None, "diverged")}

    def work(folder: Path) -> None:
        space: Any = {"cells": grid(3)} if kind == "grid" else {"search": random_search(3)}
        if kind == "same runs":
            space = {"search": letters(3, "a", "A", hold=2)}
        with Study.open(folder, name="s", pruner=Asha(2, 10, 20, 10), **space) as study:
            while lease := study.ask(anything):
                if lease.attempt == 1 and lease.cell.number == 1:
                    study.release(lease)
                    continue
                study.report_rung({lease: 1.0}, 10)
                study.tell(lease, *ends[lease.cell.number % 3])

    for n, again in itertools.product(range(100), (None, 0, 1, 2, 3)):
        folder = tmp_path / f"{n} {again}"
        kill_at(n, how)
        try:
            work(folder)
            break
        except Killed:
            kill_at(again, how)
        with suppress(Killed):
            work(folder)
        kill_at(None, "")
        work(folder)
        trials = [trial for trial in attempts_on_disk(folder) if "cell" in trial.user_attrs]
        numbers = {trial.user_attrs["cell"]["number"] for trial in trials}
        assert len(numbers) == 3
        assert_each_finished_once(folder, numbers)
        for number in numbers:
            own = [trial for trial in trials if trial.user_attrs["cell"]["number"] == number]
            assert all(trial.user_attrs["cell"]["params"] == own[0].user_attrs["cell"]["params"] for trial in own)
            assert [trial.user_attrs["cell"]["attempt"] for trial in own] == list(range(1, len(own) + 1))
        assert not [trial for trial in attempts_on_disk(folder) if not trial.state.is_finished()]
        if kind == "same runs":
            view = StudyView.read(folder)
            (ran,) = view.statuses()
            assert {runs for _, runs in view.duplicates().values()} == {ran.cell.number}
            assert numbers == {ran.cell.number, *view.duplicates()}
    assert 15 < n < 99


WORKER = """
    import sys, time
    from lora_sweep.records import Cell
    from lora_sweep.study.study import Study
    folder, n = sys.argv[1], int(sys.argv[2])
    cells = [Cell(i, {"method.rank": 2**i, "method.use_rslora": i % 2 == 0}) for i in range(n)]
    print("up", flush=True)
    with Study.open(folder, name="s", cells=cells) as study:
        print("open", flush=True)
        pack = []
        while True:
            while len(pack) < 3 and (lease := study.ask(lambda cell: True)):
                pack.append(lease)
            if not pack:
                break
            for step in (10, 20):
                study.report_rung({lease: 1.0 / step for lease in pack}, step)
            print("work", flush=True)
            for lease in pack[:2]:
                study.tell(lease, "COMPLETE", 1.0)
            del pack[:2]
            time.sleep(float(sys.argv[3]))
    print("done", flush=True)
"""


def start_worker(folder: Path, n: int, pause: float = 0.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WORKER), str(folder), str(n), str(pause)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(study_module.__file__).parents[2])},
    )


def wait_for(worker: subprocess.Popen[str], line: str) -> None:
    assert worker.stdout
    for value_at_end in worker.stdout:
        if value_at_end.strip() == line:
            return
    raise AssertionError(f"the worker ended before it said {line!r}")


def kill_worker(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()


def test_a_process_killed_at_random_points_again_and_again_loses_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    killed = 0
    for n_works in (None, None, 2, 3, 5, 2, 4):
        with start_worker(tmp_path, 60) as worker:
            wait_for(worker, "up" if n_works is None else "open")
            for _ in range(n_works or 0):
                wait_for(worker, "work")
            time.sleep(chance.uniform(0, 0.02))
            kill_worker(worker)
            killed += worker.returncode == -signal.SIGKILL
    assert killed == 7
    began = time.monotonic()
    with start_worker(tmp_path, 60) as worker:
        wait_for(worker, "done")
    assert time.monotonic() - began < 25  # Optuna's lock of a killed process would be waited out for 30 s.
    assert worker.returncode == 0
    assert_each_finished_once(tmp_path, set(range(60)))
    assert len(attempts_on_disk(tmp_path)) > 60


def test_a_second_process_is_refused_while_the_first_lives_and_not_after_kill_9(tmp_path: Path) -> None:
    with start_worker(tmp_path, 4, pause=60) as worker:
        wait_for(worker, "work")
        with pytest.raises(StudyError, match=rf"process {worker.pid} on .*one process at a time") as caught:
            Study.open(tmp_path, name="s", cells=grid(4))
        assert "\n" not in str(caught.value)
        assert StudyView.read(tmp_path).counts()["WAITING"] == 1
        kill_worker(worker)
    with Study.open(tmp_path, name="s", cells=grid(4)) as study:
        with pytest.raises(StudyError, match=f"process {os.getpid()} "):
            Study.open(tmp_path, name="s", cells=grid(4))
        assert study.counts()["RUNNING"] == 0


def test_a_view_follows_a_writer_without_disturbing_it(tmp_path: Path) -> None:
    with start_worker(tmp_path, 60) as worker:
        wait_for(worker, "work")
        view, values = StudyView.read(tmp_path), []
        while worker.poll() is None:
            values.append(view.counts())
            assert sum(StudyView.read(tmp_path).counts().values()) == 60
        values.append(view.counts())
    assert worker.returncode == 0
    done = [counts["COMPLETE"] for counts in values]
    assert done == sorted(done) and done[0] < 60 and done[-1] == 60 and len(set(done)) > 2


def test_a_lock_left_behind_by_a_killed_writer_delays_nobody(tmp_path: Path) -> None:
    Study.open(tmp_path, name="s", cells=grid(1)).close()
    journal = tmp_path / "study.journal"
    Path(f"{journal}.lock").symlink_to(journal)
    Path(f"{journal}.lock1234.rename").symlink_to(journal)
    began = time.monotonic()
    with Study.open(tmp_path, name="s", cells=grid(1)) as study:
        study.tell(ask(study), "COMPLETE", 1.0)
    assert time.monotonic() - began < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.journal", "study.lock"]


@pytest.mark.parametrize("tail", [b'{"op_code":6,"worker', b"\x00" * 5000, b'{"op_code":6}'])
def test_a_torn_tail_is_skipped_by_readers_and_cut_by_the_next_writer(tmp_path: Path, tail: bytes) -> None:
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        study.tell(ask(study), "COMPLETE", 1.0)
        view = StudyView.read(tmp_path)
        with (tmp_path / "study.journal").open("ab") as file:
            file.write(tail)
        assert view.counts() == StudyView.read(tmp_path).counts() == study.counts()
        study.tell(ask(study), "COMPLETE", 2.0)
        assert view.counts()["COMPLETE"] == StudyView.read(tmp_path).counts()["COMPLETE"] == 2
    for line in (tmp_path / "study.journal").read_bytes().split(b"\n")[:-1]:
        assert "worker_id" in json.loads(line)
    assert_each_finished_once(tmp_path, {0, 1})


def test_a_journal_that_is_only_a_torn_line_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b'{"op_co')
    with pytest.raises(StudyError, match="never begun"):
        StudyView.read(tmp_path)
    with Study.open(tmp_path, name="s", cells=grid(1)) as study:
        assert study.counts()["WAITING"] == 1


def test_damage_in_the_middle_of_the_journal_is_named_not_guessed_at(tmp_path: Path) -> None:
    Study.open(tmp_path, name="s", cells=grid(2)).close()
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "study.journal").write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    with pytest.raises(StudyError, match=r"study\.journal: damaged"):
        StudyView.read(tmp_path)


def test_a_full_disk_is_out_of_room_leaves_no_half_record_and_work_goes_on_later(tmp_path: Path) -> None:
    """A file-size limit makes the kernel write a part of the line and then refuse, as a full disk does."""
    journal = tmp_path / "study.journal"
    with Study.open(tmp_path, name="s", cells=grid(2)) as study:
        lease = ask(study)
        before = journal.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
        try:
            with pytest.raises(StorageUnavailable, match=r"study\.journal.*to resume"):
                study.report_rung({lease: 1.0}, 10)
            halfway = journal.read_bytes()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert halfway == before
        study.report_rung({lease: 1.0}, 10)
        study.tell(lease, "COMPLETE", 1.0)
    assert StudyView.read(tmp_path).statuses()[0].step == 10


def test_a_storage_that_went_away_is_out_of_room_and_not_begun_anew(tmp_path: Path) -> None:
    with Study.open(tmp_path / "s", name="s", cells=grid(2)) as study:
        lease = ask(study)
        (tmp_path / "s").rename(tmp_path / "away")
        with pytest.raises(StorageUnavailable):
            study.tell(lease, "COMPLETE", 1.0)
        assert not (tmp_path / "s").exists()


def test_optuna_says_nothing_of_its_own_and_a_level_chosen_by_the_user_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(logging.INFO)
        with Study.open(tmp_path / "a", name="a", cells=grid(1)) as study:
            study.tell(ask(study), "COMPLETE", 1.0)
        assert optuna.logging.get_verbosity() == logging.WARNING
        assert capfd.readouterr() == ("", "")
        for level in (logging.DEBUG, logging.ERROR):
            optuna.logging.set_verbosity(level)
            Study.open(tmp_path / str(level), name="b", cells=grid(1)).close()
            assert optuna.logging.get_verbosity() == level
    finally:
        optuna.logging.set_verbosity(chosen)
