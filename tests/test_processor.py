"""Losses do not depend on the processor beyond rounding, and every test that depends on it is listed."""

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import processor
import pytest
import torch
from processor import BF16_PRODUCTS, THREADS, VECTORS, as_found, on
from test_pack import MakeTrial, largest_difference, losses, packed

from lora_sweep.base.load import LoadedBase
from lora_sweep.data import Data

TESTS = Path(__file__).parent

TRAINED = """
import json, sys
import torch
from lora_sweep import data
from lora_sweep.base import load
from lora_sweep.sweep.sweep_file import read
from lora_sweep.pack import Pack, Settings, Trial
from lora_sweep.records import Cell

torch.set_num_threads(1)
small = ["data=style", "data.subjects=16", "data.eval_size=4", "data.probe_size=4", "train.slots=2",
         "train.max_steps=5", "train.eval_every=5", "train.batch_size=2", "optimizer.base_lr=2e-4"]
found = {"vectors": torch.backends.cpu.get_cpu_capability()}
for dtype in ("fp32", "bf16"):
    configs = [read(None, [*small, f"model.dtype={dtype}", f"method.rank={rank}"])[0].base() for rank in (4, 8)]
    base = load.load(configs[0].model, torch.device("cpu"))
    trials = [Trial.of(Cell(number), config) for number, config in enumerate(configs)]
    pack = Pack(base, data.load(configs[0].data, base.tokenizer), Settings.of(trials[0]), 8)
    for trial in trials:
        pack.admit(trial)
    found[dtype] = [[step.train_loss for step in each.steps] + [each.eval_loss] for each in pack.advance()]
print(json.dumps(found))
"""


def trained(**masks: str) -> dict[str, list[list[float]]]:
    """Losses of two trials on an fp32 and on a bf16 base, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in processor.MASKS}
    environment |= {"PYTHONPATH": str(TESTS.parent), **masks}
    command = [sys.executable, "-c", TRAINED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    products: dict[str, list[list[float]]] = json.loads(done.stdout)
    return products


@on(VECTORS)
@on(BF16_PRODUCTS)
def test_masked_or_not_a_trial_has_the_same_losses_but_for_rounding() -> None:
    native, masked = trained(), trained(**processor.MASKS)
    assert (native["vectors"], masked["vectors"]) == ("AVX512", "AVX2")
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        one, other = (torch.tensor(each[dtype], dtype=torch.float64) for each in (native, masked))
        assert not torch.equal(one, other), "the masks do something"
        assert largest_difference(one, other) < tolerance


@on(THREADS)
def test_one_thread_and_two_give_the_same_losses_but_for_rounding(
    base: LoadedBase, style: Data, trial: MakeTrial
) -> None:
    trials = [trial(number, rank=4 + 4 * number, max_steps=10, eval_every=10, base_lr=2e-4) for number in range(3)]
    before, products = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        products.append(packed(base, style, trials))
    torch.set_num_threads(before)
    for one, two in zip(*products, strict=True):
        assert largest_difference(losses(one), losses(two)) < 1e-5
        assert one.eval_loss == pytest.approx(two.eval_loss, rel=1e-5)


@as_found(VECTORS)
def test_a_masked_run_is_masked_and_no_other_is() -> None:
    if not processor.IS_MASKED:
        assert not processor.MASKS.items() <= os.environ.items()
        return
    import bitsandbytes

    if platform.machine() == "x86_64":
        assert torch.backends.cpu.get_cpu_capability() == "AVX2"
        assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not bitsandbytes.nn.Linear4bit(32, 32).support_avx512bf16_for_cpu
    assert not any(path.is_there() for path in processor.PATHS if path is not THREADS)


def test_the_end_of_a_run_counts_the_paths_that_were_taken() -> None:
    taken = [("processor", (BF16_PRODUCTS.name, "off"))]
    other = [("processor", (BF16_PRODUCTS.name, "on")), ("somebody's", 1)]
    lines = processor.summary([("passed", taken), ("passed", taken), ("skipped", other), ("failed", [])])
    assert lines[0].startswith("processor: ")
    assert "  bf16 products: off: 2 passed; on: 1 skipped" in lines
    assert "  two threads: off: none run; on: none run" in lines
    assert processor.summary([("passed", [])]) == []


MARKS = {"off": "off", "on": "on", "either": "off and on", "as_found": "as found"}
"""processor.py's function -> its word in README.md."""


def marked(file: Path) -> set[tuple[str, str, str]]:
    """(path, test, word) of each test that processor.py's marks stand at."""
    constants = {name: each.name for name, each in vars(processor).items() if isinstance(each, processor.Path)}
    return {
        (constants[name.id], f"{file.name}::{function.name}", MARKS[call.func.id])
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
        for decorator in function.decorator_list
        for call in ast.walk(decorator)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in MARKS
        for name in call.args
        if isinstance(name, ast.Name) and name.id in constants
    }


def test_the_readme_lists_each_path_with_its_tests() -> None:
    text = (TESTS / "README.md").read_text()
    listed, path = set(), ""
    for line in text.splitlines():
        if line.startswith("### "):
            path = line.removeprefix("### ")
        elif line.startswith("- `test_"):
            _, test, word = line.split("`")
            listed.add((path, test, word.removeprefix(": ").partition(",")[0]))
        elif line.startswith("## "):
            path = ""
    there = {each for file in TESTS.rglob("test_*.py") for each in marked(file)}
    assert listed == there
    assert {path for path, *_ in listed} == {each.name for each in processor.PATHS}
