"""The process of a verb: signals at any moment, and streams that are full or closed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_main import small

from lora_sweep.system import process

SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP}

PROGRAM = [sys.executable, "-m", "lora_sweep"]


def begun(*words: str, **more: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    return subprocess.Popen([*PROGRAM, *words], env=environment, text=True, **streams)


def ended(*words: str, **more: Any) -> tuple[int, str, str]:
    with begun(*words, **more) as program:
        out, err = program.communicate(timeout=100)
    return program.returncode, out or "", err or ""


def losses(study: str) -> dict[int, float]:
    lines = Path("outputs", study, "trials.jsonl").read_text().splitlines()
    return {row["number"]: row["eval_loss"] for row in map(json.loads, lines)}


def stopped_at(words: list[str], number: signal.Signals, moment: float) -> tuple[int, str, str, float]:
    """The program with a signal after so many seconds; how long it went on after it."""
    with begun(*words, start_new_session=True) as program:
        try:
            program.wait(moment)
        except subprocess.TimeoutExpired:
            # As a terminal does it: to all processes of the group.
            os.killpg(program.pid, number)
        sent = time.monotonic()
        out, err = program.communicate(timeout=100)
    return program.returncode, out, err, time.monotonic() - sent


def survives(moments: int, seed: int) -> None:
    """A study stopped at so many moments from import to exit, each time by another signal, ends as if never stopped."""
    content = {"train": {"max_steps": 60, "eval_every": 6, "batch_size": 2, "eval_batch_size": 4, "slots": 2}}
    sweep = small(**content, data={"subjects": 32, "eval_size": 16, "probe_size": 4})
    began = time.monotonic()
    assert ended("launch", sweep, "study.name=whole")[0] == 0
    span, draw = time.monotonic() - began, random.Random(seed)
    chosen = [span * (place + draw.random()) / moments for place in range(moments)]
    draw.shuffle(chosen)
    unfinished = 0
    for place, moment in enumerate(chosen):
        name = list(SIGNALS)[place % len(SIGNALS)]
        code, out, err, _ = stopped_at(["launch", sweep, "study.name=part"], SIGNALS[name], moment)
        assert code in (0, 128 + SIGNALS[name]), f"SIG{name} after {moment:.2f} s: {code}, {err}"
        assert "Traceback" not in err and "stopped with 0 runs left" not in out
        unfinished += code != 0
        if code == 0 and "winner" in out:
            # Finished early: the moments left are of a study of their own.
            assert losses("part") == losses("whole")
            Path("outputs/part").rename(f"outputs/part{place}")
    assert unfinished > moments / 2
    assert ended("launch", sweep, "study.name=part")[0] == 0
    assert losses("part") == losses("whole")


@pytest.mark.slow
def test_a_signal_at_any_moment_is_a_clean_stop_and_the_study_goes_on_to_the_same_losses(in_folder: Path) -> None:
    survives(12, seed=0)


@pytest.mark.full
def test_a_signal_at_many_moments_is_a_clean_stop(in_folder: Path) -> None:
    survives(40, seed=1)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_the_program_is_imported_ends_it_at_once(in_folder: Path, name: str) -> None:
    code, out, err, seconds = stopped_at(["plan", small()], SIGNALS[name], 0.8)
    assert (code, out, err) == (128 + SIGNALS[name], "", "stopped\n")
    assert seconds < 2


def test_what_is_ignored_when_it_begins_stays_ignored(in_folder: Path) -> None:
    """As under nohup."""
    command = ["nohup", *PROGRAM, "launch", small()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        time.sleep(1)
        program.send_signal(signal.SIGHUP)
        _, err = program.communicate(timeout=100)
    assert program.returncode == 0, err
    assert len(losses("mine")) == 2


def test_while_trials_train_the_first_signal_asks_and_a_second_one_no_longer_waits() -> None:
    before = [signal.getsignal(number) for number in process.SIGNALS]
    with process.stoppable() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.code == 143
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.code == 130
    assert [signal.getsignal(number) for number in process.SIGNALS] == before


def full() -> dict[str, Any]:
    return {"stdout": os.open("/dev/full", os.O_WRONLY)}


def closed() -> dict[str, Any]:
    return {"preexec_fn": lambda: [os.close(number) for number in (0, 1, 2)], "stdout": None, "stderr": None}


def unread() -> dict[str, Any]:
    reader, writer = os.pipe()
    os.close(reader)
    return {"stdout": writer}


STREAMS: dict[str, Callable[[], dict[str, Any]]] = {"full": full, "closed": closed, "unread": unread}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_study_goes_on_whatever_becomes_of_its_output(in_folder: Path, stream: str) -> None:
    code, _, err = ended("launch", small(), **STREAMS[stream]())
    assert (code, err) == (0, "")
    assert len(losses("mine")) == 2
    assert b"cell" not in Path("outputs/mine/study.lock").read_bytes(), "what is printed went into a file of the study"


@pytest.mark.parametrize(
    ("stream", "code", "told"), [("full", 1, "stdout: No space left on device\n"), ("unread", 141, "")]
)
def test_a_verb_that_only_prints_fails_where_it_cannot(in_folder: Path, stream: str, code: int, told: str) -> None:
    code, _, err = ended("plan", small(), **STREAMS[stream]())
    assert (code, err) == (code, told)


def test_in_an_ascii_locale_names_that_are_not_ascii_are_written_as_escapes(in_folder: Path) -> None:
    folder = in_folder / "größe"
    folder.mkdir()
    sweep = folder / "frage.yaml"
    Path(small()).rename(sweep)
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    code, out, err = ended("launch", str(sweep), f'study.root="{folder}"', env=env)
    assert (code, err) == (0, "")
    assert out.isascii() and "gr\\xf6\\xdfe" in out
    assert (folder / "frage/trials.jsonl").is_file()


def test_without_its_working_directory_it_ends_in_one_line(in_folder: Path) -> None:
    gone = in_folder / "gone"
    gone.mkdir()
    with subprocess.Popen(
        ["sh", "-c", f"cd {gone} && rmdir {gone} && exec {sys.executable} -m lora_sweep launch quickstart"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[1:])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1 and "working directory" in err
