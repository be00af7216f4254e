"""Studies that run out of memory: never a hang, never a success with nothing trained, and all is trained later."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run
from test_main import small

from lora_sweep.pack import Pack, PackOutOfMemory
from lora_sweep.system.out_of_memory import is_out_of_memory

LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from lora_sweep.__main__ import main
try:
    main()
finally:
    with open("/proc/self/status") as file:
        peak = next(line.split()[1] for line in file if line.startswith("VmPeak"))
    open("peak", "w").write(peak)
"""


def launched(limit: int, *words: str) -> tuple[int, str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", LIMITED, str(limit), "launch", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def losses(study: str) -> dict[int, float]:
    lines = Path("outputs", study, "trials.jsonl").read_text().splitlines()
    return {row["number"]: row["eval_loss"] for row in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_under_any_limit_of_address_space_a_study_ends_and_goes_on_with_more(in_folder: Path, tracker: str) -> None:
    """Enough to begin its imports, to end them but not to load, and to train but not all."""
    sweep = small(tracker={"name": tracker})
    code, _, err = launched(0, sweep, "study.name=whole")
    assert code == 0, err
    peak = 1024 * int(Path("peak").read_text())
    for share in (0.5, 0.85, 0.97):
        name = f"study.name=part{share}"
        code, out, err = launched(int(share * peak), sweep, name)
        trained = code == 0 and "winner" in out
        assert code != 0 or trained, f"{share}: {out} {err}"
        assert "Traceback" not in err, f"{share}: {err[-2000:]}"
        assert launched(0, sweep, name)[0] == 0
        assert losses(f"part{share}") == losses("whole")


@pytest.mark.slow
def test_at_any_limit_the_imports_end_in_a_line(in_folder: Path) -> None:
    """Where the interpreter itself gets no memory it raises anything, or C++ ends the process: never a traceback."""
    sweep = small()
    for limit_mib in range(100, 4000, 50):
        code, _, err = launched(limit_mib * 2**20, sweep)
        assert "Traceback" not in err, f"{limit_mib}: {err[-2000:]}"
        if code == 0:
            break
        assert code in (1, 2, -6, -11), limit_mib
    else:
        pytest.fail("no limit was enough")


def test_a_process_at_its_limit_of_address_space_knows_it() -> None:
    at_limit = """
import resource
from lora_sweep.system.out_of_memory import is_at_limit
assert not is_at_limit()
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
assert not is_at_limit()
try:
    held = [bytearray(2**20) for _ in range(1024)]
except MemoryError:
    pass
assert is_at_limit()
"""
    subprocess.run([sys.executable, "-c", at_limit], check=True, timeout=60)


def test_a_study_none_of_whose_cells_fits_is_no_success_and_is_tried_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = small()
    with monkeypatch.context() as patched:

        def exhausted(pack: Pack, *_: object) -> None:
            raise PackOutOfMemory(next(slot.index for slot in pack._live()), 1)

        patched.setattr(Pack, "advance", exhausted)
        said = run("launch", sweep)
    assert said.code == 1
    assert "no cell was trained: there is not enough memory" in said.out
    assert "learning rates" not in said.out
    assert "memory: 2 cells (0000, 0001): launch again with more free memory" in said.out
    again = run("launch", sweep)
    assert again.code == 0 and "0 of them finished" in again.out
    whole = run("launch", sweep, "study.name=whole")
    assert whole.code == 0
    assert losses("mine") == losses("whole")


def test_memory_that_runs_out_anywhere_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Pack, "evaluate_base", exhausted)
    said = run("launch", small())
    assert said.code == 1
    assert len(said.err.splitlines()) == 1 and "not enough memory" in said.err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError(), False),
    ],
)
def test_what_says_that_memory_ran_out_is_told_from_what_does_not(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    wrapped = KeyError("x")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is expected
