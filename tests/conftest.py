"""Shared parts: the embedded base, loaded once, and trials on it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# No test reaches a hub, nor the user's cache; read when the hub's client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lora-sweep-tests-")
# As the command line does it (cli.main); read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
import torch

from lora_sweep import data as data_room
from lora_sweep import model as model_room
from lora_sweep import space
from lora_sweep.data import Data
from lora_sweep.model import LoadedBase
from lora_sweep.pack import Trial
from lora_sweep.records import Cell

LONG_TIMEOUT_SECONDS = 1200
"""Of a long test that says nothing else: on a machine with other work they take several times as long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_SECONDS))


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


def config_of(*overrides: str) -> Any:
    sweep, faults = space.read(None, overrides)
    assert not faults
    return sweep.base()


@pytest.fixture(scope="session")
def base() -> LoadedBase:
    return model_room.load(config_of().model, torch.device("cpu"))


@pytest.fixture(scope="session")
def base64() -> LoadedBase:
    return model_room.load(config_of("model.dtype=fp64").model, torch.device("cpu"))


@pytest.fixture(scope="session")
def style(base: LoadedBase) -> Data:
    return data_room.load(config_of("data.subjects=64", "data.eval_size=16", "data.probe_size=8").data, base.tokenizer)


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
