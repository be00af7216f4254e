"""The record of a trial on disk, and what the real W&B client makes of it, uploaded to a stand-in of its server."""

import errno
import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb_server import API_KEY, ServerRun, WandbServer

from lora_sweep.errors import StorageUnavailable
from lora_sweep.records import (
    BaselineLosses,
    Cell,
    Evaluation,
    Finding,
    HealthSnapshot,
    Histogram,
    Measurement,
    Step,
    UpdateSums,
)
from lora_sweep.tracking import (
    RESULT,
    Record,
    Tracker,
    read_base_losses,
    read_evaluation,
    read_losses,
    read_result,
    read_rows,
    seal,
)

HERE = Path(__file__).parent
GROUPS = ("q_proj", "down_proj")
EDGES = np.concatenate([[-np.inf], np.linspace(-4, 4, 9), [np.inf]])
FINITE_EDGES = np.linspace(-5, 5, 11)
BASE = BaselineLosses(eval_loss=2.5, probe_loss=2.4, eval_losses=np.linspace(2, 3, 7))
EVERY = 10
NAN_STEP = 13
CONFIG = {
    "method": {"rank": 16, "use_rslora": True, "target_modules": "all-linear"},
    "optimizer": {"ratio": 4.0, "base_lr": 5e-5, "weight_decay_B": None},
    "data": {"name": "facts"},
}
TRAPPED = Finding("zero_trapped", {"rho": 0.1, "rho_min": 0.3}, "B hardly moved; raise the rate.", "lr_too_small")
WITHHELD = Finding("undecided", {}, "The trial was pruned.", is_fault=False)
OVERFIT = Finding("overfit", {"rise": 0.1, "allowed": 0.05}, "The evaluation loss rose; train for fewer steps.")


def a_cell(number: int) -> Cell:
    params = {"method.rank": 16, "method.use_rslora": True, "optimizer.base_lr": 5e-5 * (number + 1), "data": "facts"}
    return Cell(number, params)


def an_evaluation(cell: int, step: int) -> Evaluation:
    """The evaluation of `cell` at `step`: the same numbers whoever asks, so that a resumed trial must equal a whole."""
    random = np.random.default_rng((cell, step))

    def number() -> float:
        return float(random.uniform(0.1, 2))

    measurements = tuple(
        Measurement(
            group,
            number(),
            number(),
            number(),
            number(),
            number(),
            number(),
            number(),
            number(),
            number(),
            number(),
            Histogram(random.integers(0, 99, 10)),
        )
        for group in GROUPS
    )
    modules = tuple(f"layers.{layer}.{group}" for layer in range(2) for group in GROUPS)
    looked = {name: random.uniform(0, 1, (1, len(modules))) for name in ("rms_A", "rms_B", "moved_B")}
    reading = HealthSnapshot(modules, 20, (step,), (UpdateSums(),), looked, UpdateSums())
    steps = tuple(
        Step(s, math.nan if s == NAN_STEP else 3 / (s + cell + 1), 1e-4 / s, 1e-3 / s)
        for s in range(max(step - EVERY, 0) + 1, step + 1)
    )
    losses = random.uniform(1, 2, 7)
    return Evaluation(
        cell, step, step * 64, number(), 2.5 - 0.01 * step, number(), losses, number(), number(), measurements,
        reading, random.uniform(0, 1, len(modules)), steps, float(step), number(),
    )  # fmt: skip


def a_tracker(root: Path, mode: Any = "none", **more: Any) -> Tracker:
    more = {"patience_seconds": 20.0, "tags": ("nightly",), **more}
    return Tracker(study="ladder", study_id="ladder-x7", folder=root, bin_edges=EDGES, mode=mode, **more)


def a_record(root: Path, cell: int, tracker: Tracker | None = None, resume_step: int | None = None) -> Record:
    return Record.open(
        root / "trials" / f"{cell:04d}",
        cell=a_cell(cell),
        config=CONFIG,
        base=BASE,
        tracker=tracker or a_tracker(root),
        resume_step=resume_step,
    )


def finish(record: Record) -> None:
    record.finish(
        "COMPLETE",
        {"eval_loss": 2.1, "gain": 0.4, "gap": math.inf, "params": {"method.rank": 16}},
        [OVERFIT],
        [TRAPPED, WITHHELD],
    )


def diverge(record: Record) -> None:
    record.finish("FAIL", {"last_finite_step": 39}, reason="diverged")


def diverge_or_finish(record: Record) -> None:
    (diverge if record.folder.name == "0002" else finish)(record)


def whole(root: Path, cell: int = 0, last: int = 40) -> Path:
    """The folder of a trial that nothing interrupted."""
    record = a_record(root, cell)
    for step in range(0, last + 1, EVERY):
        record.log(an_evaluation(cell, step))
    finish(record)
    return record.folder


# --- processes of their own: W&B fixes its environment when a process first uses it --------------------------------


def trials(
    root: Path,
    mode: str,
    cells: Sequence[int],
    resume_step: int | None = None,
    last: int = 40,
    end: Callable[[Record], None] = finish,
    **more: Any,
) -> None:
    """Body of a child process: trains `cells` live together, says each evaluation and goes on when it is answered."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="WARNING %(message)s")
    tracker = a_tracker(root, mode, **more)
    records = {cell: a_record(root, cell, tracker, resume_step) for cell in cells}
    for step in range(0 if resume_step is None else resume_step + EVERY, last + 1, EVERY):
        for cell, record in records.items():
            record.log(an_evaluation(cell, step))
        if not sys.stdin.isatty():
            print("logged", step, flush=True)
            sys.stdin.readline()
    for record in records.values():
        end(record)
    tracker.close()


class Child:
    """A process that runs `trials`; `advance(step)` returns when it has logged that step."""

    def __init__(self, root: Path, mode: str, cells: Sequence[int], url: str, key: str | None = API_KEY, **more: Any):
        self.root = root
        options = "".join(f", {name}={value}" for name, value in more.items())
        call = f"trials(Path({str(root)!r}), {mode!r}, {list(cells)!r}{options})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from test_record import *; {call}"],
            env=environment(root, url, key),
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def advance(self, step: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        while (line := self.process.stdout.readline()) != f"logged {step}\n":
            assert line.startswith("logged"), (line, self.process.communicate()[1])
            self.go_on()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> str:
        """Lets it run to its end; what it said beside the steps, on stdout and stderr."""
        out, err = self.process.communicate("\n" * 20, timeout=120)
        assert self.process.returncode == 0, err
        return re.sub(r"logged \d+\n", "", out) + err

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=30)


def environment(root: Path, url: str, key: str | None) -> dict[str, str]:
    """The environment of a user with an empty home: W&B knows one server, and whatever goes astray ends there too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = root / "home"
    home.mkdir(exist_ok=True)
    kept |= {"HOME": str(home), "WANDB_BASE_URL": url, "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}"}
    kept |= {"http_proxy": "", "https_proxy": url, "no_proxy": "127.0.0.1"}
    kept |= {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1"}  # seconds, whole ones; of itself 15
    return kept | ({} if key is None else {"WANDB_API_KEY": key})


def sync(root: Path, url: str) -> str:
    """wandb's own `wandb sync` of every offline run under `root`."""
    runs = [str(path) for path in sorted((root / "wandb").glob("offline-run-*"))]
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", *runs],
        env=environment(root, url, API_KEY),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


def assert_arrived(run: ServerRun, folder: Path) -> None:
    """Every number of the files of a finished trial is on the server, once, and nothing besides."""
    rows = read_rows(folder)
    assert [row["_step"] for row in run.history] == [row["step"] for row in rows]
    for row, arrived in zip(rows, run.history, strict=True):
        values = {key: value for key, value in arrived.items() if not key.startswith(("_", "lora_B_histogram/"))}
        expected = {key: value for key, value in row.items() if key != "step" and value is not None}
        assert values == pytest.approx(expected, rel=1e-12)
        drawn = {key: value for key, value in arrived.items() if key.startswith("lora_B_histogram/")}
        assert len(drawn) == (len(GROUPS) if "eval/loss" in row else 0)
        for key, histogram in drawn.items():
            counts = read_evaluation(folder, row["step"])[1][key.removeprefix("lora_B_histogram/")]
            assert histogram["values"] == counts.tolist()
            assert histogram["bins"] == pytest.approx(FINITE_EDGES.tolist())
    cell = a_cell(int(folder.name))
    labels = {key.rsplit(".")[-1]: value for key, value in cell.params.items()}
    assert run.config == {**CONFIG, "cell": cell.number, "swept": labels}
    assert (run.project, run.group, run.job_type) == ("lora-sweep", "ladder", "trial")
    assert run.name == f"{cell.name} rank=16 use_rslora=true base_lr={labels['base_lr']:.4g} data=facts"
    assert run.tags == ["nightly", "zero_trapped", "overfit", "lr_too_small"]
    assert run.exit_code == 0
    summary = {key: value for key, value in run.summary.items() if not key.startswith("_")}
    best = {key: min(row[key] for row in rows if row.get(key) is not None) for key in ("eval/loss", "probe/loss")}
    assert {key: summary[key]["min"] for key in best} == pytest.approx(best)
    assert summary["train/loss"]["min"] == min(row["train/loss"] for row in rows if row.get("train/loss") is not None)
    assert summary["eval/gap"] == pytest.approx(rows[-1]["eval/gap"])
    assert summary["lora_B/q_proj/rms"] == pytest.approx(rows[-1]["lora_B/q_proj/rms"])
    assert not [key for key in summary if key.startswith("lora_B_histogram/")]
    expected = {"eval_loss": 2.1, "gain": 0.4, "base_loss": 2.5, "state": "COMPLETE", "cause": "lr_too_small"}
    assert summary["flags"] == ["zero_trapped", "undecided", "overfit"], "which is no tag"
    assert {key: summary.get(key) for key in (*expected, "gap", "reason")} == {**expected, "gap": None, "reason": None}
    assert summary["evidence/zero_trapped/rho"] == 0.1


# --- on disk ------------------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_losses_that_are_missing_or_damaged_are_none(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    assert np.array_equal(read_losses(folder, 40), read_evaluation(folder, 40)[0])
    file = folder / "evaluations" / "000040.npz"
    file.write_bytes(file.read_bytes()[:100])
    assert (read_losses(folder, 40), read_losses(folder, 41)) == (None, None)


def test_every_step_is_one_row_and_an_evaluation_is_merged_into_the_row_of_its_step(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(41))
    for row in rows[1:]:
        expected = next(s for s in an_evaluation(0, -(-row["step"] // EVERY) * EVERY).steps if s.step == row["step"])
        assert row["optimizer/lr_A"], row["optimizer/lr_B"] == (expected.lr_A, expected.lr_B)
        assert row["train/loss"] == (None if row["step"] == NAN_STEP else expected.train_loss)
        assert ("eval/loss" in row) == (row["step"] % EVERY == 0)
    given, row = an_evaluation(0, 20), rows[20]
    assert row["eval/loss"] == given.eval_loss
    assert row["eval/gap"] == given.eval_loss - given.probe_loss
    assert row["probe/loss"] == given.probe_loss
    assert (row["grad_norm/A"], row["grad_norm/B_over_s"]) == (given.grad_norm_A, given.grad_norm_B_over_s)
    assert (row["perf/tokens"], row["perf/tokens_per_second"]) == (given.tokens, given.tokens_per_second)
    for m in given.measurements:
        of_B = [row[f"lora_B/{m.group}/{name}"] for name in ("rms", "absmax", "exact_zero", "delta_rel", "rho")]
        assert of_B == [m.rms_B, m.absmax_B, m.exact_zero_B, m.delta_rel, m.rho]
        assert row[f"lora_A/{m.group}/rms"] == m.rms_A


def test_losses_by_example_and_histograms_of_each_evaluation_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = whole(tmp_path)
    for step in range(0, 41, EVERY):
        losses, histograms = read_evaluation(folder, step)
        given = an_evaluation(0, step)
        np.testing.assert_array_equal(losses, given.eval_losses)
        assert list(histograms) == list(GROUPS)
        for m in given.measurements:
            np.testing.assert_array_equal(histograms[m.group], m.histogram.counts)
    np.testing.assert_array_equal(read_base_losses(folder), BASE.eval_losses)


def test_a_diverged_trial_leaves_valid_json_without_made_up_numbers(tmp_path: Path) -> None:
    record = a_record(tmp_path, 0)
    hot = replace(an_evaluation(0, 10), eval_loss=math.nan, grad_norm_A=math.inf, last_finite_step=7)
    record.log(hot)
    record.finish("FAIL", {"eval_loss": np.float64("nan"), "steps": np.int64(10)}, reason="diverged")
    row = strict((record.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["eval/loss"] is row["eval/gap"] is row["grad_norm/A"] is None
    assert row["probe/loss"] == hot.probe_loss
    result = strict((record.folder / RESULT).read_text())
    assert result == {
        "cell": 0, "eval_loss": None, "steps": 10, "state": "FAIL", "reason": "diverged", "flags": [], "findings": [],
        "wandb_id": None, "files": seal.sealed(record.folder, ("metrics.jsonl", "evaluations", "heat_map.png")),
    }  # fmt: skip


def test_the_result_appears_whole_at_the_end_and_never_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = a_record(tmp_path, 3)
    record.log(an_evaluation(3, 0))
    assert read_result(record.folder) is None

    def no_room(_: int) -> None:
        assert read_result(record.folder) is None, "the name must not appear before the content is safe"
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(StorageUnavailable, match="No space left on device"):
            finish(record)
    assert read_result(record.folder) is None

    again = a_record(tmp_path, 3, resume_step=0)
    finish(again)
    result = read_result(again.folder)
    assert result is not None
    assert (result["cell"], result["state"], result["eval_loss"]) == (3, "COMPLETE", 2.1)
    assert result["findings"] == [
        {
            "flag": "overfit",
            "evidence": {"rise": 0.1, "allowed": 0.05},
            "sentence": OVERFIT.sentence,
            "cause": None,
            "remedy": "",
            "is_fault": True,
        }
    ], "the verdict compares with the study, so it is no part of a trial's result"
    assert not list(again.folder.rglob("*.tmp"))


def test_a_full_disk_is_told_as_such_and_what_was_recorded_before_is_resumed(tmp_path: Path) -> None:
    import resource

    record = a_record(tmp_path, 0)
    for step in (0, 10, 20):
        record.log(an_evaluation(0, step))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((record.folder / "metrics.jsonl").stat().st_size + 100, hard))
    try:
        with pytest.raises(StorageUnavailable, match=r"trials/0000: cannot be written .*make room"):
            record.log(an_evaluation(0, 30))
        record.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["step"] for row in read_rows(record.folder)] == list(range(21))
    record = a_record(tmp_path, 0, resume_step=20)
    for step in (30, 40):
        record.log(an_evaluation(0, step))
    finish(record)
    assert contents(record.folder) == contents(whole(tmp_path / "whole"))


def contents(folder: Path) -> dict[str, Any]:
    """The files of a trial, arrays as numbers: a zip file holds the time of its writing."""
    written: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                written[path.name] = {name: arrays[name].tolist() for name in arrays.files}
        else:
            written[path.name] = path.read_bytes()
    return written


def test_wherever_a_kill_tears_the_record_the_resumed_trial_equals_one_never_interrupted(tmp_path: Path) -> None:
    expected = contents(whole(tmp_path / "whole"))
    text = expected["metrics.jsonl"]
    kept = len(b"".join(text.splitlines(keepends=True)[:21]))
    ends = [kept, kept + 1, kept + 40, len(text) - 1, len(text), *range(kept, len(text), 997)]
    for end in ends:
        root = tmp_path / str(end)
        folder = whole(root)
        (folder / "metrics.jsonl").write_bytes(text[:end])
        (folder / "evaluations" / "000030.tmp").write_bytes(b"PK half of")
        record = a_record(root, 0, resume_step=20)
        assert read_result(folder) is None
        assert (folder / "metrics.jsonl").read_bytes() == text[:kept]
        assert {path.name for path in (folder / "evaluations").iterdir()} == {
            "base.npz", "000000.npz", "000010.npz", "000020.npz",
        }  # fmt: skip
        for step in (30, 40):
            record.log(an_evaluation(0, step))
        finish(record)
        assert contents(folder) == expected


def test_a_trial_that_starts_again_without_a_checkpoint_keeps_nothing_of_the_attempt_before(tmp_path: Path) -> None:
    whole(tmp_path)
    record = a_record(tmp_path, 0)
    assert read_rows(record.folder) == []
    assert read_result(record.folder) is None
    assert [path.name for path in (record.folder / "evaluations").iterdir()] == ["base.npz"]
    record.abandon()


def test_steps_that_are_recorded_already_are_not_recorded_twice(tmp_path: Path) -> None:
    record = a_record(tmp_path, 0)
    for step in (0, 10, 20, 10, 20, 30):
        record.log(an_evaluation(0, step))
    record.abandon()
    assert [row["step"] for row in read_rows(record.folder)] == list(range(31))


def test_without_a_tracker_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from test_record import whole, Path
sys.modules.pop("pytest")
whole(Path({str(tmp_path)!r}))
print([name for name in ("wandb", "torch", "optuna", "hydra", "omegaconf") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path, "", None), capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not (tmp_path / "wandb").exists()


# --- W&B ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uploaded:
    """Three offline runs that lived together, the last one a failure, and the server they were synced to."""

    root: Path
    server: WandbServer
    said: str
    requests_while_training: int


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uploaded]:
    root = tmp_path_factory.mktemp("offline")
    with WandbServer() as server:
        said = Child(root, "offline", [0, 1, 2], server.url, end="diverge_or_finish").end()
        requests = len(server.requests)
        sync(root, server.url)
        yield Uploaded(root, server, said, requests)


def test_offline_runs_that_live_together_arrive_whole_by_wandb_sync(uploaded: Uploaded) -> None:
    assert set(uploaded.server.runs) == {"ladder-x7-0000", "ladder-x7-0001", "ladder-x7-0002"}
    for cell in range(2):
        assert_arrived(uploaded.server.runs[f"ladder-x7-{cell:04d}"], uploaded.root / "trials" / f"{cell:04d}")


def test_a_failed_trial_is_a_failed_run_with_its_reason(uploaded: Uploaded) -> None:
    run = uploaded.server.runs["ladder-x7-0002"]
    assert [row["_step"] for row in run.history] == list(range(41))
    assert run.exit_code == 1
    assert (run.summary["state"], run.summary["reason"], run.summary["last_finite_step"]) == ("FAIL", "diverged", 39)
    assert run.tags == ["nightly"]


def test_an_offline_run_is_silent_and_never_asks_the_network(uploaded: Uploaded) -> None:
    assert uploaded.said == ""
    assert uploaded.requests_while_training == 0


def test_wandb_leet_shows_an_offline_run(uploaded: Uploaded) -> None:
    (path,) = (uploaded.root / "wandb").glob("offline-run-*-ladder-x7-0001/*.wandb")
    shown = ("Finished", "ladder-x7-0001", "0001 rank=16", "zero_trapped", "eval/loss", "eval/loss.min", "2.1")
    command = [sys.executable, "-m", "wandb", "leet", "run", str(path)]
    screen = terminal(command, uploaded.root, uploaded.server.url, until=shown)
    assert not [text for text in shown if text not in screen]


def test_online_runs_live_together_arrive_whole_in_silence(tmp_path: Path, server: WandbServer) -> None:
    said = Child(tmp_path, "online", [0, 1], server.url).end()
    assert said == ""
    for cell in range(2):
        assert_arrived(server.runs[f"ladder-x7-{cell:04d}"], tmp_path / "trials" / f"{cell:04d}")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if API_KEY.encode() in path.read_bytes()]


def test_an_offline_run_killed_and_resumed_is_uploaded_as_if_never_interrupted(
    tmp_path: Path, server: WandbServer
) -> None:
    first = Child(tmp_path, "offline", [0, 1], server.url)
    first.advance(30)
    first.kill()
    torn = [path for path in (tmp_path / "wandb").glob("offline-run-*") if path.is_dir()]
    assert len(torn) == 2
    foreign = tmp_path / "wandb" / "offline-run-20260101_000000-another-ladder-x7-0000"
    foreign.mkdir()
    with (tmp_path / "trials" / "0000" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 31, "train/lo')

    assert Child(tmp_path, "offline", [0, 1], server.url, resume_step=20).end() == ""
    assert foreign.is_dir()
    foreign.rmdir()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    sync(tmp_path, server.url)
    for cell in range(2):
        folder = tmp_path / "trials" / f"{cell:04d}"
        run = server.runs[f"ladder-x7-{cell:04d}"]
        assert_arrived(run, folder)
        assert read_rows(folder) == read_rows(whole(tmp_path / "whole", cell))


def test_an_online_run_killed_and_resumed_has_each_step_once(tmp_path: Path, server: WandbServer) -> None:
    first = Child(tmp_path, "online", [0], server.url)
    first.advance(30)
    for _ in range(200):  # the client sends in the background; wait until the server knows more than is resumed
        if "ladder-x7-0000" in server.runs and len(server.runs["ladder-x7-0000"].history) > 25:
            break
        time.sleep(0.1)
    first.kill()
    assert len(server.runs["ladder-x7-0000"].history) > 25
    assert Child(tmp_path, "online", [0], server.url, resume_step=20).end() == ""
    assert_arrived(server.runs["ladder-x7-0000"], tmp_path / "trials" / "0000")


def test_a_resumed_online_run_brings_the_server_the_rows_that_it_missed(tmp_path: Path, server: WandbServer) -> None:
    first = Child(tmp_path, "none", [0], server.url)
    first.advance(30)
    first.kill()
    assert Child(tmp_path, "online", [0], server.url, resume_step=20).end() == ""
    assert_arrived(server.runs["ladder-x7-0000"], tmp_path / "trials" / "0000")


@pytest.mark.slow
def test_an_abandoned_run_is_closed_and_goes_on_when_its_trial_does(tmp_path: Path, server: WandbServer) -> None:
    assert Child(tmp_path, "online", [0], server.url, last=20, end="Record.abandon").end() == ""
    assert server.runs["ladder-x7-0000"].exit_code == 1
    assert read_result(tmp_path / "trials" / "0000") is None
    assert Child(tmp_path, "online", [0], server.url, resume_step=20).end() == ""
    assert_arrived(server.runs["ladder-x7-0000"], tmp_path / "trials" / "0000")


def test_a_study_raises_one_alert_and_each_trial_uploads_its_heat_map(tmp_path: Path) -> None:
    with WandbServer() as server:
        said = Child(tmp_path, "online", [0, 1], server.url).end()
        assert said == ""
        (alert,) = server.alerts
        assert alert["title"] == "ladder: zero_trapped (lr_too_small)"
        assert TRAPPED.sentence in alert["text"]
        for run in server.runs.values():
            picture = run.summary["heat_map"]
            assert (picture["_type"], picture["format"]) == ("image-file", "png")
            assert any(name == picture["path"] for name in run.files)


def test_a_server_that_dies_costs_one_warning_and_no_record(tmp_path: Path) -> None:
    with WandbServer() as server:
        child = Child(tmp_path, "online", [0, 1], server.url, patience_seconds=3.0)
        child.advance(20)
        server.stop()
        begin = time.monotonic()
        said = child.end()
    assert time.monotonic() - begin < 40
    assert re.fullmatch(r"WARNING W&B: .+ failed \(.+\); training goes on, the record on disk is complete\n", said)
    for cell in range(2):
        expected = contents(whole(tmp_path / "whole", cell))
        written = contents(tmp_path / "trials" / f"{cell:04d}")
        for result in (expected, written):
            result[RESULT] = {**json.loads(result[RESULT]), "wandb_id": None}
        assert written == expected


def test_a_server_that_is_not_there_costs_one_wait_and_one_warning(tmp_path: Path) -> None:
    with WandbServer() as server:
        server.stop()
    begin = time.monotonic()
    said = Child(tmp_path, "online", [0, 1, 2, 3], server.url, patience_seconds=3.0).end()
    assert time.monotonic() - begin < 40
    assert re.fullmatch(r"WARNING W&B: starting a run failed \(.+\); training goes on, .+\n", said)
    for cell in range(4):
        assert len(read_rows(tmp_path / "trials" / f"{cell:04d}")) == 41


def test_a_missing_api_key_is_told_and_never_asked_for(tmp_path: Path, server: WandbServer) -> None:
    call = f"trials(Path({str(tmp_path)!r}), 'online', [0])"
    screen = terminal([sys.executable, "-c", f"from test_record import *; {call}"], tmp_path, server.url, key=None)
    assert screen.count("WARNING") == 1
    assert "no API key; run `wandb login` or set tracker.mode=offline" in screen
    assert read_result(tmp_path / "trials" / "0000") is not None


def services(parent: int) -> list[int]:
    """W&B's processes that a process has begun."""
    written = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"wandb-core" in (folder / "cmdline").read_bytes():
                written.append(int(folder.name))
    return written


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_service_that_hangs_costs_one_wait_and_one_warning(tmp_path: Path, server: WandbServer, mode: str) -> None:
    """Stopped as by a debugger: it takes what is sent and answers nothing, neither to a call nor at the end."""
    child = Child(tmp_path, mode, [0, 1], server.url, patience_seconds=2.0)
    child.advance(20)
    (service,) = services(child.process.pid)
    os.kill(service, signal.SIGSTOP)
    begin = time.monotonic()
    said = child.end()
    assert time.monotonic() - begin < 12
    assert re.fullmatch(r"WARNING W&B: .+ failed \(.+\); training goes on, the record on disk is complete\n", said)
    left = Path(f"/proc/{service}/stat")
    assert not left.exists() or left.read_text().rpartition(")")[2].split()[0] == "Z"
    for cell in range(2):
        assert len(read_rows(tmp_path / "trials" / f"{cell:04d}")) == 41


def test_a_server_that_never_answers_costs_one_wait_and_one_warning(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        begin = time.monotonic()
        child = Child(tmp_path, "online", [0, 1, 2], url, patience_seconds=2.0)
        said = child.end()
    assert time.monotonic() - begin < 20
    assert re.fullmatch(r"WARNING W&B: starting a run failed \(.+\); training goes on, .+\n", said)


CONTROL = re.compile(rb"\x1b(\[[0-9;?<>=]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|.)")
"""A terminal's control sequences: CSI, OSC, two characters."""


def terminal(
    command: list[str], root: Path, url: str, *, key: str | None = None, until: Sequence[str] = ()
) -> str:  # fmt: skip
    """What a command writes to a terminal of 60 x 200 without its control sequences: to its end or all of `until`."""
    from conftest import BEGUN_BY, orphans  # not in the processes that import this file

    mine = str(time.monotonic_ns())
    process, screen = pty.fork()
    if process == 0:
        os.execve(command[0], command, {**environment(root, url, key), "TERM": "xterm-256color", BEGUN_BY: mine})
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
    raw, text, end = b"", "", time.monotonic() + 60
    try:
        while time.monotonic() < end and not (until and all(word in text for word in until)):
            if select.select([screen], [], [], 0.2)[0]:
                try:
                    raw += os.read(screen, 65536)
                except OSError:  # EIO: the command ended
                    break
                text = re.sub(rb"\x1b(\[[0-9;?<>=]*[ -/]*[@-~]|\].*?(\x07|\x1b\\)|.)", b"", raw).decode(
                    errors="replace"
                )
    finally:
        # Its whole session: `wandb leet` has a process of its own draw.
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        # What began a session of its own.
        for left in orphans(mine):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        os.close(screen)
    return text
