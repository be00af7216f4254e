"""Shared parts: the embedded base, loaded once, and trials on it."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

# No test reaches a hub, nor the user's cache; read when the hub's client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lora-sweep-tests-")
# As the command line does it (cli.main); read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import processor  # before torch
import pytest
import torch

from lora_sweep import __main__
from lora_sweep.base import cpu_bf16
from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.data import Data
from lora_sweep.data import load as load_data
from lora_sweep.pack import Trial
from lora_sweep.records import Cell
from lora_sweep.sweep import sweep_file

LONG_TIMEOUT_SECONDS = 1200
"""Of a long test that says nothing else: on a machine with other work they take several times as long."""


def pytest_configure() -> None:
    # Begun in the background, or under nohup, the tests would pass on to their children that signals are ignored.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_long = item.get_closest_marker("slow") or item.get_closest_marker("full")
        if is_long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_SECONDS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    processor.note_paths(item)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which paths of the processor were taken: not every machine has them all."""
    reports = [
        (outcome, report.user_properties)
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    for line in processor.summary(reports):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _masked() -> None:
    if processor.IS_MASKED:
        processor.mask_bitsandbytes()


BEGUN_BY = "LORA_SWEEP_TESTS"
"""Environment variable: which process of pytest's has begun this one."""


def orphans(begun_by: str) -> dict[int, str]:
    """Process -> command line, of what was begun here and has outlived whoever began it."""
    commands, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if f"{BEGUN_BY}={begun_by}".encode() in environment:
                commands[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                parents[int(folder.name)] = parent
        except OSError:  # ended meanwhile, or somebody else's
            continue
    return {each: line for each, line in commands.items() if parents[each] not in (*commands, int(begun_by))}


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    os.environ[BEGUN_BY] = str(os.getpid())
    yield
    left = orphans(str(os.getpid()))
    for each in left:
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    assert not left, f"tests left processes behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    # Two workers of pytest-xdist share the two cores.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, threads))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """With `processor.either(BF16_PRODUCTS, BF16_ATTENTION)` as its parameter: whether both sides of a comparison use
    the processor's bf16 instructions, this package's bases and torch's own kernels."""
    if not request.param:
        monkeypatch.setattr(cpu_bf16, "_has_bf16", lambda: False)
    before, *_ = torch.backends.mkldnn.set_flags(request.param)
    yield request.param
    torch.backends.mkldnn.set_flags(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """With `processor.either(THREADS)` as its parameter: 1 or 2 threads of torch's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 + request.param)
    yield 1 + request.param
    torch.set_num_threads(before)


def config_of(*overrides: str) -> Any:
    sweep, faults = sweep_file.read(None, overrides)
    assert not faults
    return sweep.base()


@pytest.fixture(scope="session")
def base() -> LoadedBase:
    return load_base(config_of().model, torch.device("cpu"))


@pytest.fixture(scope="session")
def base64() -> LoadedBase:
    return load_base(config_of("model.dtype=fp64").model, torch.device("cpu"))


@pytest.fixture(scope="session")
def style(base: LoadedBase) -> Data:
    return load_data(config_of("data.subjects=64", "data.eval_size=16", "data.probe_size=8").data, base.tokenizer)


@pytest.fixture
def trial() -> Callable[..., Trial]:
    """trial(number, rank=..., max_steps=..., ...): any knob of method, optimizer and train by its own name."""

    def make(number: int = 0, **knobs: Any) -> Trial:
        config = config_of("train.max_steps=50", "train.eval_every=50", "train.slots=8")
        parts = []
        for section in (config.method, config.optimizer, config.train):
            names = set(section.__dataclass_fields__)
            parts.append(replace(section, **{key: knobs.pop(key) for key in names & knobs.keys()}))
        assert not knobs, f"no such knobs: {knobs}"
        return Trial(Cell(number), *parts, config.health)

    return make


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("plan", "x.yaml", ...): the program in an empty working directory."""

    def ran(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["lora-sweep", *words])
        with pytest.raises(SystemExit) as stopped:
            __main__.verb()
        out, err = capsys.readouterr()
        return Said(int(stopped.value.code or 0), out, err)

    return ran
