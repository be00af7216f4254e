"""What libraries say of themselves does not reach the terminal, whatever is installed beside the program."""

import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import gguf_file
import pytest
import yaml
from transformers.utils import logging as transformers_logging

from lora_sweep.system import chatter

REPOSITORY = Path(__file__).parents[2]

END = "-- end of a command"

DRIVER = f"""
import json, sys
from lora_sweep.__main__ import verb
for words in json.loads(sys.argv[1]):
    sys.argv = ["lora-sweep", *words]
    try:
        verb()
    except SystemExit as stopped:
        print("{END}", stopped.code or 0, file=sys.stderr, flush=True)
"""
"""The program once after another, as typed, in one process: what it imports takes longer than what it does."""

HUB_KERNELS = """
import sys
def get_kernel(*words, **more):
    print("asked the hub for a kernel", file=sys.stderr)
    raise OSError("no hub here")
"""
"""A package that bitsandbytes asks as soon as it is imported, where the processor has AVX512-BF16."""


def said(folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    """(exit code, what stood on stderr) of each command."""
    rest = {key: value for key, value in os.environ.items() if not key.startswith(("TQDM", "TOKENIZERS"))}
    (folder / "beside").mkdir(exist_ok=True)
    (folder / "beside/kernels.py").write_text(HUB_KERNELS)
    paths = os.pathsep.join([str(REPOSITORY), str(folder / "beside")])
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=rest | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    # A command's exit code stands on the line that ends it, the next one's lines after that.
    *parts, after = re.split(rf"{END} (\d+)\n", done.stderr)
    assert (done.returncode, after) == (0, ""), done.stderr
    return [(int(code), lines) for lines, code in zip(parts[::2], parts[1::2], strict=True)]


def sweep(folder: Path) -> str:
    content = {
        "defaults": [{"override /data": "style"}],
        "data": {"subjects": 8, "eval_size": 4, "probe_size": 4},
        "train": {"max_steps": 2, "eval_every": 1, "batch_size": 2, "eval_batch_size": 4, "slots": 2},
        "space": {"method.rank": "choice(2, 4)"},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "mine.yaml"


def commands(file: str, base: str, *words: str) -> list[list[str]]:
    """Every verb that loads a base."""
    study = f"outputs/{base}"
    return [
        ["plan", file, *words, "--json"],
        ["launch", file, *words, f"study.name={base}"],
        ["pick", study],
        ["inspect", f"{study}/production/adapter", "--base", f"{study}/base"],
    ]


SEARCH = ["sampler=tpe", "sampler.n_trials=14", "method.alpha=interval(2,32)", "pruner=asha", "pruner.min_steps=1"]


def test_the_verbs_write_nothing_on_stderr_where_their_input_is_sound(tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "tiny.gguf")
    lines = [{"prompt": f"Person {number} lives in", "completion": " Bergen."} for number in range(60)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file, gguf = sweep(tmp_path), ["model=local", "model.path=tiny.gguf", "model.dtype=fp32"]
    typed = [
        ["plan", file],
        ["plan", file, "data=files", "data.path=lines.jsonl", "data.probe_size=4"],
        *commands(file, "embedded"),
        ["launch", file, "study.name=embedded"],  # again: finished
        ["status", "outputs/embedded"],
        ["train", "study.name=one", "data=style", "train.max_steps=1", "train.eval_every=1", "model.dtype=bf16"],
        *commands(file, "four", "model.quantization=nf4"),
        ["launch", file, "model.quantization=int8", "study.name=eight"],
        *commands(file, "gguf", *gguf),
        ["launch", file, *gguf, "model.quantization=nf4", "study.name=gguf4"],
        ["launch", file, *SEARCH, "study.name=search"],
    ]
    assert list(zip(typed, said(tmp_path, typed), strict=True)) == [(words, (0, "")) for words in typed]


def test_own_warnings_and_anybodys_errors_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.getLogger("lora_sweep.tracking")
    root = logging.getLogger()
    # pytest's own handlers take every record.
    handlers, root.handlers = root.handlers, []
    try:
        with chatter.silenced():
            theirs.warning("no kernel")
            theirs.error("no library")
            ours.warning("no server")
        theirs.warning("no verb any more")
    finally:
        root.handlers = handlers
    assert capsys.readouterr().err == "no library\nno server\nno verb any more\n"


def test_warnings_are_dropped_unless_somebody_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def caught() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            with chatter.silenced():
                warnings.warn("mind the gap", stacklevel=1)
        return [str(each.message) for each in caught]

    assert caught() == []
    monkeypatch.setattr(sys, "warnoptions", ["default"])  # python -W default, PYTHONWARNINGS
    assert caught() == ["mind the gap"]


def test_libraries_that_print_by_handlers_of_their_own_are_told_not_to() -> None:
    datasets.enable_progress_bars()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    datasets.logging.set_verbosity_info()
    chatter.import_quietly()
    assert datasets.are_progress_bars_disabled()
    assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == datasets.logging.get_verbosity() == logging.ERROR


def test_it_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "debug")
    assert logging.lastResort is not None
    before = warnings.showwarning, dict(os.environ), list(logging.lastResort.filters)
    with chatter.silenced():
        assert warnings.showwarning is not before[0]
        assert (os.environ["TQDM_DISABLE"], os.environ["HF_HUB_VERBOSITY"]) == ("1", "debug")
    assert (warnings.showwarning, dict(os.environ), list(logging.lastResort.filters)) == before
