"""What the READMEs and sweep files tell people to type, typed: through a real shell, with what its words stand for."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_sweep.sweep import axis, spellings

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "tests/README.md")),
    *sorted((REPOSITORY / "lora_sweep").rglob("README.md")),
    *sorted((REPOSITORY / "sweeps").glob("*.yaml")),
]
WEIGHTS = REPOSITORY / "lora_sweep/tiny/weights"
VERBS = ("lora-sweep ", "pip ", "pytest", "wandb ", "python -m ")


def typed(page: Path) -> Iterator[str]:
    """Commands in code: lines of a block, spans between backticks, comments of a sweep file that hold nothing else."""
    text = page.read_text()
    text = text.replace("\\\n", " ")
    if page.suffix == ".yaml":
        yield from (line[4:] for line in text.splitlines() if line.startswith("#   "))
        return
    yield from re.findall(r"`([^`\n]+)`", text)
    yield from (line.strip() for line in text.splitlines() if line.startswith("    "))
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        yield from block.splitlines()


COMMANDS = sorted({(page, line.strip()) for page in PAGES for line in typed(page) if line.strip().startswith(VERBS)})
OVERRIDES = sorted(
    {
        line.strip()
        for page in PAGES
        for line in typed(page)
        if re.fullmatch(r"'?[a-z]+(\.[A-Za-z_]+)?=\S.*", line.strip())
    }
)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a person's shell runs it, with `lora-sweep` of this checkout before any other."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    program = tools / "lora-sweep"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_sweep "$@"\n')
    program.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def runnable(line: str) -> str:
    """The command with things that are here for what its words stand for, and nothing that trains for long."""
    for word, thing in (
        ("sweeps/smollm2_facts_gpu.yaml", "quickstart"), ("sweeps/smollm2_facts.yaml", "quickstart"),
        ("SWEEP", "quickstart"), ("/path/to/checkpoint", "checkpoint"),
    ):  # fmt: skip
        line = line.replace(word, thing)
    return re.sub(r"^lora-sweep launch", "lora-sweep plan", line)


def test_there_is_much_to_type() -> None:
    assert len(COMMANDS) > 30
    assert len(OVERRIDES) > 10
    assert any("times:2" in line for line in OVERRIDES)


PLANS = sorted({runnable(line) for _, line in COMMANDS if re.match(r"lora-sweep (plan|launch) \S", line)})


@pytest.mark.parametrize("line", PLANS)
def test_a_sweep_that_a_page_names_is_planned(line: str, tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "checkpoint")
    rows = (f'{{"prompt": "{n} squared?", "completion": " {n * n}"}}\n' for n in range(60))
    (tmp_path / "facts.jsonl").write_text("".join(rows))
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert " cells" in done.stdout


def test_every_other_verb_takes_the_words_that_the_pages_give_it(tmp_path: Path) -> None:
    """Verbs that need a study, an adapter or minutes: their options are read, and nothing is done."""
    others = {line for _, line in COMMANDS if line.startswith("lora-sweep ") and runnable(line) not in PLANS}
    assert others
    for line in sorted(others):
        done = shell(f"{line} --help", tmp_path)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert "Usage: " in done.stdout


def test_lines_for_other_programs_are_whole_for_a_shell(tmp_path: Path) -> None:
    others = {line for _, line in COMMANDS if not line.startswith("lora-sweep ")}
    assert others
    for line in sorted(others):
        done = subprocess.run(["bash", "-nc", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert shutil.which(line.split()[0]) or line.split()[0] == "wandb", line


@pytest.mark.parametrize("line", OVERRIDES)
def test_an_override_that_a_page_gives_survives_the_shell_and_is_in_the_grammar(line: str, tmp_path: Path) -> None:
    words = shell(f"printf '%s\\0' {line}", tmp_path).stdout.split("\0")[:-1]
    assert words
    for word in words:
        parsed, faults = axis.parse(spellings.alias(word))
        assert parsed is not None, [str(fault) for fault in faults]
