"""Studies whose files were cut, emptied, deleted, replaced by a link or by garbage: no traceback, no silent loss."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Run
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from test_pack import IGNORED
from test_worker import Silent

from lora_sweep.runner import launch
from lora_sweep.study.journal import hold
from lora_sweep.sweep import sweep_file
from lora_sweep.tracking import seal

SWEEP = {
    "defaults": [{"override /tracker": "none"}],
    "data": {"subjects": 8, "eval_size": 4, "probe_size": 4},
    "train": {"max_steps": 4, "eval_every": 2, "batch_size": 2, "eval_batch_size": 4, "slots": 1},
    "space": {"method.rank": "choice(2, 4)"},
}
CUTS = 10
"""Places at which a file is cut."""

Table = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """outputs/ with a finished study, and one whose second cell was stopped after its first evaluation."""
    folder, before = tmp_path_factory.mktemp("studies"), Path.cwd()
    os.chdir(folder)
    Path("finished.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    Path("unfinished.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    for name, most in (("finished", None), ("unfinished", 6)):
        sweep, faults = sweep_file.read(f"{name}.yaml", [])
        assert not faults
        watcher = Silent()
        launch.launch(sweep, watcher, lambda most=most, watcher=watcher: most is not None and watcher.steps > most)
    assert (folder / "outputs/unfinished/trials/0001/checkpoint").is_dir()
    yield folder
    os.chdir(before)


def files(study: Path) -> list[str]:
    return sorted(str(path.relative_to(study)) for path in study.rglob("*") if path.is_file())


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def to_garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size or 100))


def to_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"cut at {place}/{CUTS}": cut(place / CUTS) for place in range(1, CUTS)},
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "a link": to_link,
    "garbage": to_garbage,
}


def every_damage() -> list[tuple[str, str, str]]:
    """(study, file, damage): the files of a study are known by their names alone."""
    trial = [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.yaml", "evaluations/000002.npz",
        "evaluations/base.npz", "metrics.jsonl",
    ]  # fmt: skip
    ended = [*trial, "evaluations/000004.npz", "heat_map.png", "result.json"]
    begun = [*trial, "best.json", "checkpoint/checkpoint.safetensors"]
    shared = [
        "base/config.json", "base/generation_config.json", "base/model.safetensors", "base/origin.json",
        "base/tokenizer.json", "base/tokenizer_config.json", "config.yaml", "study.journal", "study.lock",
        "trials.jsonl",
    ]  # fmt: skip
    damages = []
    for study, trials in (("finished", (ended, ended)), ("unfinished", (ended, begun))):
        names = [*shared, *(f"trials/{number:04d}/{name}" for number, each in enumerate(trials) for name in each)]
        damages += [(study, name, damage) for name in names for damage in DAMAGES]
    return damages


def test_the_names_of_all_files_of_a_study_are_known(studies: Path) -> None:
    for study in ("finished", "unfinished"):
        assert {name for of, name, _ in every_damage() if of == study} == set(files(studies / "outputs" / study))


def survives(run: Run, studies: Path, case: tuple[str, str, str]) -> None:
    """After the damage launch, status and pick end in one line or go on; nothing is lost without a word."""
    name, file, damage = case
    shutil.rmtree("outputs", ignore_errors=True)
    shutil.copytree(studies / "outputs" / name, f"outputs/{name}")
    shutil.copy(studies / f"{name}.yaml", f"{name}.yaml")
    whole = {number: row["eval_loss"] for number, row in read(studies / "outputs/finished").items()}
    DAMAGES[damage](Path("outputs", name, file))
    words = (f"outputs/{name}",)
    outcomes = [run("status", *words), run("launch", f"{name}.yaml"), run("status", *words), run("pick", *words)]
    for said in outcomes:
        assert said.code in (0, 2, 3), f"{case}: {said}"
        assert "Traceback" not in said.err
        assert len(said.err.splitlines()) <= 4, said.err
    _, launched, status, picked = outcomes
    if launched.code:
        # Refused: the file that is named, brought back as the message says, makes the study whole again.
        assert Path(file).parts[0] in launched.err, f"{case}: {launched}"
        Path("outputs", name, file).unlink(missing_ok=True)
        shutil.copy(studies / "outputs" / name / file, Path("outputs", name, file))
        launched, status, picked = run("launch", f"{name}.yaml"), run("status", *words), run("pick", *words)
        assert (launched.code, status.code, picked.code) == (0, 0, 0)
    rows = read(Path("outputs", name))
    assert {number: row["eval_loss"] for number, row in rows.items()} == whole, case
    damaged = {
        number for number, row in rows.items() if {"record_lost", "record_damaged", "adapter_damaged"} & {*row["flags"]}
    }
    for number in damaged:
        assert f"({number:04d}" in launched.out and f"({number:04d}" in status.out
    is_lost = any(rows[number]["faults"] for number in damaged)
    best = min(rows, key=lambda number: whole[number])
    if is_lost and damaged == {best}:
        assert f"passed over: cell {best:04d}" in picked.out
    elif picked.code == 0:
        assert f"winner: cell {best:04d}" in picked.out
    # What was hurt in a finished trial is named, unless nothing is read of it any more.
    if file.startswith("trials/") and (name, file.split("/")[1]) != ("unfinished", "0001"):
        assert damaged or content(Path("outputs", name, file)) == content(studies / "outputs" / name / file), case


def content(file: Path) -> Any:
    """What a file says; an adapter's base follows its study."""
    if not file.is_file() or file.is_symlink():
        return None
    try:
        plain = json.loads(file.read_bytes())
    except ValueError:
        return file.read_bytes()
    return {**plain, "base_model_name_or_path": None}


def read(study: Path) -> Table:
    lines = (study / "trials.jsonl").read_text().splitlines()
    return {row["number"]: row for row in map(json.loads, lines)}


@pytest.mark.parametrize("case", random.Random(7).sample(every_damage(), 16), ids=" ".join)
def test_a_damaged_study_is_finished_or_refused_in_one_line(
    run: Run, studies: Path, case: tuple[str, str, str]
) -> None:
    survives(run, studies, case)


@pytest.mark.full
@pytest.mark.parametrize("case", every_damage(), ids=" ".join)
def test_any_damage_to_a_study_is_survived(run: Run, studies: Path, case: tuple[str, str, str]) -> None:
    survives(run, studies, case)


def bases_named(study: Path) -> set[str]:
    files = study.rglob("adapter_config.json")
    return {json.loads(file.read_text())["base_model_name_or_path"] for file in files}


@pytest.mark.filterwarnings(IGNORED)
def test_the_adapters_of_a_study_that_was_moved_name_the_base_that_moved_with_it(run: Run, studies: Path) -> None:
    """Finished or not, by whichever of the verbs that write comes first; a checkpoint elsewhere stays named."""
    for name in ("finished", "unfinished"):
        shutil.copy(studies / f"{name}.yaml", f"{name}.yaml")
        for verb in ("launch", "pick"):
            shutil.rmtree("outputs", ignore_errors=True)
            shutil.copytree(studies / "outputs" / name, f"outputs/{name}")
            here = str(Path(f"outputs/{name}/base").resolve())
            assert bases_named(Path("outputs", name)) == {str((studies / "outputs" / name / "base").resolve())}
            said = run(verb, f"{name}.yaml" if verb == "launch" else f"outputs/{name}")
            assert said.code == 0
            assert "was moved or copied" in said.out
            assert bases_named(Path("outputs", name)) == {here}
            assert "damaged" not in run("status", f"outputs/{name}").out
            assert "was moved" not in run("pick", f"outputs/{name}").out
    model = AutoPeftModelForCausalLM.from_pretrained("outputs/unfinished/production/adapter")
    assert model.peft_config["default"].base_model_name_or_path == here


def test_what_was_running_when_its_process_died_waits_and_status_says_that_nobody_works_on_it(
    run: Run, studies: Path
) -> None:
    shutil.copytree(studies / "outputs/unfinished", "outputs/dead")
    journal = Path("outputs/dead/study.journal")
    lines = journal.read_text().splitlines()
    # As kill -9 leaves it: without the last entries, by which the stop has given the cell back.
    given_back = next(place for place, line in enumerate(lines) if '"lost"' in line)
    journal.write_text("\n".join(lines[:given_back]) + "\n")
    said = run("status", "outputs/dead")
    assert "1 COMPLETE, 0 PRUNED, 0 FAIL, 0 RUNNING, 1 WAITING" in said.out
    assert "no process works on it; `launch` goes on with what is left (1)" in said.out
    lock = hold(Path("outputs/dead"))
    try:
        held = run("status", "outputs/dead")
    finally:
        os.close(lock)
    assert "1 RUNNING, 0 WAITING" in held.out and "nobody" not in held.out


def test_a_study_whose_ledger_is_gone_is_refused_and_one_without_its_config_goes_on(run: Run, studies: Path) -> None:
    shutil.copytree(studies / "outputs/finished", "outputs/finished")
    shutil.copy(studies / "finished.yaml", "finished.yaml")
    config = Path("outputs/finished/config.yaml")
    before = config.read_text()
    config.unlink()
    other = run("launch", "finished.yaml", "train.max_steps=6")
    assert other.code == 2 and "another meaning" in other.err and "train.max_steps: 4 -> 6" in other.err
    same = run("launch", "finished.yaml")
    assert same.code == 0 and "2 of them finished" in same.out
    assert config.read_text() == before
    Path("outputs/finished/study.journal").unlink()
    for words in (("launch", "finished.yaml"), ("status", "outputs/finished"), ("pick", "outputs/finished")):
        said = run(*words)
        assert said.code == 2
        assert "the ledger is gone or empty, but trials/ holds 2 trials" in said.err


def test_data_that_changed_after_a_study_has_finished_is_refused(run: Run) -> None:
    rows = [{"prompt": f"Who is {number}? ", "completion": f"Person {number}."} for number in range(60)]
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {**SWEEP, "data": {"path": "facts.jsonl", "eval_share": 0.3, "probe_size": 4}}
    content["defaults"] = [{"override /tracker": "none"}, {"override /data": "files"}]
    Path("mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert run("launch", "mine.yaml").code == 0
    assert run("launch", "mine.yaml").code == 0
    with Path("facts.jsonl").open("a") as file:
        file.write(json.dumps(rows[0]) + "\n")
    said = run("launch", "mine.yaml")
    assert said.code == 2 and "facts.jsonl has changed since the study began" in said.err
    assert run("launch", "mine.yaml", "study.name=other").code == 0


def test_an_adapter_that_is_not_what_was_trained_is_never_shipped(run: Run, studies: Path) -> None:
    """Of the same size, too large to be read again and again: its digest is compared when it is to go out."""
    shutil.copytree(studies / "outputs/finished", "outputs/finished")
    best = min(read(Path("outputs/finished")).values(), key=lambda row: row["eval_loss"])["number"]
    file = Path(f"outputs/finished/trials/{best:04d}/adapter/adapter_model.safetensors")
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    before = seal.READ_BYTES
    seal.READ_BYTES = 0
    try:
        said = run("pick", "outputs/finished", "--json")
    finally:
        seal.READ_BYTES = before
    result = json.loads(said.out)
    assert result["passed_over"] == [best] and result["winner"]["number"] != best
