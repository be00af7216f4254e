"""Files from strangers: none, wherever a person may put it, runs code, writes outside or commands a terminal.

Each attempt plants something in an empty working directory and runs verbs on it. Code that would run touches PWNED;
what must not be written to is PRECIOUS; what must not be told is the value of LORA_SWEEP_SECRET.
"""

import json
import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Run
from test_damage import studies  # noqa: F401

from lora_sweep.tiny.pretrain import WEIGHTS

PWNED, PRECIOUS, SECRET = "pwned", "precious", "hunter2-of-nobody"

Attempt = Callable[[Path], list[list[str]]]
"""Given the folder of test_damage's studies: plants, and returns the commands."""

SWEEP: dict[str, Any] = {
    "data": {"subjects": 8, "eval_size": 4, "probe_size": 4},
    "train": {"max_steps": 2, "eval_every": 1, "batch_size": 2, "eval_batch_size": 4, "slots": 2},
    "tracker": {"name": "none"},
    "space": {"method.rank": "choice(2,4)"},
}
CODE = f"open({PWNED!r}, 'w').close()\n"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


class Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {PWNED}",)


def sweep(**more: Any) -> str:
    Path("mine.yaml").write_text(json.dumps({**SWEEP, **more}))
    return "mine.yaml"


def of_text(text: str) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        Path("mine.yaml").write_text(text)
        return [["plan", "mine.yaml"], ["launch", "mine.yaml"]]

    return planted


def of_sweep(**more: Any) -> Attempt:
    return lambda _: [["plan", sweep(**more)], ["launch", "mine.yaml"]]


def of_words(*words: str) -> Attempt:
    return lambda _: [["plan", sweep(), *words], ["launch", "mine.yaml", *words]]


def of_option(group: str, text: str) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        Path("conf", group).mkdir(parents=True)
        Path("conf", group, "mine.yaml").write_text(text)
        return [["plan", sweep(), f"{group}=mine"], ["launch", "mine.yaml", f"{group}=mine"]]

    return planted


def checkpoint(**changes: Any) -> Path:
    folder = Path("checkpoint")
    shutil.copytree(WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    for name in ("modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "mine.py"):
        (folder / name).write_text(CODE)
    return folder


MAP = {
    "AutoConfig": "configuration_mine.Config",
    "AutoModelForCausalLM": "modeling_mine.Model",
    "AutoTokenizer": ["tokenization_mine.Tokens", None],
}
LOCAL = ["model=local", "model.path=checkpoint"]
ON_IT = [["plan", "mine.yaml", *LOCAL], ["launch", "mine.yaml", *LOCAL]]


def of_config(**changes: Any) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        sweep()
        checkpoint(**changes)
        return ON_IT

    return planted


def of_file(name: str, content: bytes | None, *gone: str) -> Attempt:
    """Of a checkpoint: one file more, or another; `content`: a pickle if None."""

    def planted(_: Path) -> list[list[str]]:
        sweep()
        folder = checkpoint()
        for each in gone:
            (folder / each).unlink()
        (folder / name).write_bytes(pickle.dumps(Touch()) if content is None else content)
        return ON_IT

    return planted


def of_tokenizer(**changes: Any) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        sweep()
        file = checkpoint() / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return ON_IT

    return planted


def trusting(where: str) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        checkpoint(auto_map=MAP, model_type="unheard_of")
        model = {"name": "local", "path": "checkpoint", "trust_remote_code": True}
        if where == "sweep":
            return [[verb, sweep(model=model)] for verb in ("plan", "launch")]
        Path("conf/model").mkdir(parents=True)
        given = yaml.safe_load(Path(WEIGHTS).parents[2].joinpath("conf/model/local.yaml").read_text())
        Path("conf/model/mine.yaml").write_text(yaml.safe_dump(given | model))
        if where == "axis":
            return [[verb, sweep(space={"model": "choice(tiny, mine)"})] for verb in ("plan", "launch")]
        return [[verb, sweep(), "model=mine"] for verb in ("plan", "launch")] + [["train", "model=mine"]]

    return planted


def of_adapter(name: str, content: bytes | None, *words: str, **config: Any) -> Attempt:
    def planted(made: Path) -> list[list[str]]:
        folder = Path("adapter")
        shutil.copytree(made / "outputs/finished/trials/0000/adapter", folder)
        plain = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(plain | config))
        if name:
            (folder / "adapter_model.safetensors").unlink()
            (folder / name).write_bytes(pickle.dumps(Touch()) if content is None else content)
        return [["inspect", "adapter", *words], ["inspect", "adapter", "--json", *words]]

    return planted


def on_code(made: Path) -> list[list[str]]:
    checkpoint(auto_map=MAP)
    return of_adapter("", b"", "--base", "checkpoint")(made)


def of_data(name: str, content: bytes | None, *words: str) -> Attempt:
    def planted(_: Path) -> list[list[str]]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(pickle.dumps(Touch()) if content is None else content)
        base = "data" if name.startswith("data/") else name
        given = ["data=files", f"data.path={base}", "data.eval_share=0.5", *words]
        content_ = {key: value for key, value in SWEEP.items() if key != "data"}
        Path("mine.yaml").write_text(json.dumps(content_))
        return [["plan", "mine.yaml", *given], ["launch", "mine.yaml", *given]]

    return planted


def of_template(text: str) -> Attempt:
    rows = [
        {"messages": [{"role": "user", "content": f"a{i}"}, {"role": "assistant", "content": "b"}]} for i in range(40)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def planted(made: Path) -> list[list[str]]:
        Path("t.jinja").write_text(text)
        return of_data("chat.jsonl", content, "data.chat_template=t.jinja")(made)

    return planted


def of_study(plant: Callable[[Path], object], name: str = "unfinished") -> Attempt:
    def planted(made: Path) -> list[list[str]]:
        shutil.copytree(made / "outputs" / name, f"outputs/{name}", symlinks=True)
        shutil.copy(made / f"{name}.yaml", f"{name}.yaml")
        plant(Path("outputs", name))
        study = f"outputs/{name}"
        return [["status", study], ["pick", study], ["launch", f"{name}.yaml"], ["pick", study], ["status", study]]

    return planted


def link(inside: str, target: str = f"../{PRECIOUS}") -> Attempt:
    """A link in the place of a file or folder of a study, to a file outside or a folder of files outside."""

    def plant(study: Path) -> None:
        at = study / inside
        shutil.rmtree(at) if at.is_dir() and not at.is_symlink() else at.unlink(missing_ok=True)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(Path(target).absolute() if not target.startswith("../") else Path(PRECIOUS).absolute())

    return of_study(plant, "finished" if inside.startswith((".", "production")) else "unfinished")


def to_folder(inside: str) -> Attempt:
    return link(inside, "treasury")


def edited(inside: str, edit: Callable[[Any], Any], name: str = "finished") -> Attempt:
    def plant(study: Path) -> None:
        file = study / inside
        file.write_text(json.dumps(edit(json.loads(file.read_text()))))

    return of_study(plant, name)


def appended(inside: str, text: str, name: str = "unfinished") -> Attempt:
    def plant(study: Path) -> None:
        with (study / inside).open("a") as file:
            file.write(text)

    return of_study(plant, name)


def numbered(number: Any) -> Attempt:
    """A cell whose number would name a folder elsewhere."""

    def plant(study: Path) -> None:
        lines = (study / "study.journal").read_text().splitlines()
        changed = [re.sub(r'"number":1(?=[,}])', f'"number":{json.dumps(number)}', line) for line in lines]
        (study / "study.journal").write_text("\n".join(changed) + "\n")

    return of_study(plant)


def npz(study: Path) -> None:
    file = study / "trials/0000/evaluations/base.npz"
    np.savez(file, losses=np.array([Touch()], dtype=object))


OPTION = "name: local\npath: checkpoint\n"
ENV = "${oc.env:LORA_SWEEP_SECRET}"

ATTEMPTS: dict[str, Attempt] = {
    # -- sweep files
    "sweep: trusts code": trusting("sweep"),
    "sweep: an axis of options trusts code": trusting("axis"),
    "sweep: a python tag": of_text(f"a: !!python/object/apply:os.system ['touch {PWNED}']"),
    "sweep: a python name": of_text("a: !!python/name:os.system"),
    "sweep: a target as sampler": of_sweep(sampler={"name": "optuna", "instance": {"_target_": "os.system", "command": f"touch {PWNED}"}}),
    "sweep: a target in optuna's namespace": of_sweep(sampler={"name": "optuna", "instance": {"_target_": "optuna.samplers._base.np.load", "file": "x"}}),
    "sweep: a nested target": of_sweep(sampler={"name": "optuna", "instance": {"_target_": "optuna.samplers.TPESampler", "gamma": {"_target_": "builtins.eval", "_args_": [CODE]}}}),
    "sweep: a target as pruner": of_sweep(pruner={"name": "optuna", "instance": {"_target_": "subprocess.call", "args": ["touch", PWNED]}}),
    "sweep: a target elsewhere": of_sweep(method={"_target_": "os.system", "command": f"touch {PWNED}"}),
    "sweep: the environment": of_sweep(tracker={"name": "none", "project": ENV}),
    "sweep: the environment in a choice": of_sweep(space={"tracker.project": f'choice("{ENV}", x)'}),
    "sweep: the environment as a path": of_sweep(space={"data.path": f"choice('{ENV}', x)"}),
    "sweep: the environment put together": of_sweep(study={"root": "${oc.${a}:LORA_SWEEP_SECRET}"}),
    "sweep: the environment decoded": of_sweep(study={"root": "${oc.decode:${oc.env:LORA_SWEEP_SECRET}}"}),
    "sweep: the environment in defaults": of_sweep(defaults=[{"override /data": ENV}]),
    "sweep: hydra's own settings": of_sweep(hydra={"searchpath": ["file:///etc"]}),
    "sweep: a search path": of_sweep(**{"hydra.searchpath": ["file:///etc"]}),
    "sweep: hydra's environment": of_sweep(study={"root": "${hydra:runtime.cwd}"}),
    "sweep: escapes in a key": of_sweep(**{f"x{ESCAPE}": 1}),
    "sweep: escapes in a value": of_sweep(method={"rank": f"x{ESCAPE}"}),
    "sweep: escapes in an axis": of_sweep(space={f"method.rank{ESCAPE}": "choice(1,2)"}),
    "sweep: escapes in an option": of_sweep(defaults=[{"override /data": f"x{ESCAPE}"}]),
    "sweep: a study outside": of_sweep(study={"name": "../../x"}),
    "sweep: a study with escapes": of_sweep(study={"name": f"x{ESCAPE}"}),
    # -- overrides
    "word: the environment": of_words(f"tracker.project={ENV}"),
    "word: the environment in a choice": of_words(f"data.path=choice({ENV},x)"),
    "word: the environment in a list": of_words(f"tracker.tags=[{ENV}]"),
    "word: the environment quoted": of_words(f"tracker.project='{ENV}'"),
    "word: hydra's search path": of_words("hydra.searchpath=[file:///etc]"),
    "word: a package": of_words("data@model=facts"),
    # -- conf/
    "conf: trusts code": trusting("option"),
    "conf: a python tag": of_option("model", f"path: !!python/object/apply:os.system ['touch {PWNED}']"),
    "conf: a target": of_option("sampler", f"name: optuna\ninstance: {{_target_: os.system, command: touch {PWNED}}}"),
    "conf: the environment": of_option("tracker", f"name: none\nproject: {ENV}"),
    "conf: hydra's search path": of_option("model", "defaults:\n  - /hydra/launcher: basic\n" + OPTION),
    "conf: a default elsewhere": of_option("model", "defaults:\n  - ../../../../etc/passwd\n" + OPTION),
    "conf: escapes": of_option("model", f"{OPTION}x\\e: 1"),
    # -- checkpoints
    "checkpoint: code for a known type": of_config(auto_map=MAP),
    "checkpoint: code for an unknown type": of_config(auto_map=MAP, model_type="unheard_of"),
    "checkpoint: a kernel for attention": of_config(_attn_implementation="org/kernel"),
    "checkpoint: a kernel inside": of_config(_attn_implementation_internal="org/kernel"),
    "checkpoint: a kernel in public": of_config(attn_implementation="org/kernel", use_kernels=True),
    "checkpoint: kernels for experts": of_config(_experts_implementation="org/kernel"),
    "checkpoint: code elsewhere": of_config(auto_map={"AutoModelForCausalLM": "org/repo--modeling_mine.Model"}),
    "checkpoint: a pipeline": of_config(custom_pipelines={"x": {"impl": "mine.X", "pt": ["AutoModel"]}}),
    "checkpoint: a quantizer of its own": of_config(quantization_config={"quant_method": "mine", "modules": "mine.py"}),
    "checkpoint: escapes as its type": of_config(model_type=f"x{ESCAPE}"),
    "checkpoint: pickled weights": of_file("pytorch_model.bin", None, "model.safetensors"),
    "checkpoint: pickled weights beside": of_file("pytorch_model.bin", None),
    "checkpoint: a pickle as safetensors": of_file("model.safetensors", None),
    "checkpoint: an index of pickles": of_file("model.safetensors.index.json", b'{"weight_map": {"a": "pytorch_model.bin"}}'),
    "checkpoint: an index outside": of_file("model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}'),
    "checkpoint: an adapter beside": of_file("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "org/x"}'),
    "checkpoint: a generation of its own": of_file("generation_config.json", b'{"custom_generate": "mine.py", "trust_remote_code": true}'),
    "checkpoint: code of a tokenizer": of_tokenizer(auto_map={"AutoTokenizer": ["tokenization_mine.Tokens", None]}, tokenizer_class="Tokens"),
    "checkpoint: a vocabulary elsewhere": of_tokenizer(vocab_file=f"../{PRECIOUS}", tokenizer_file="/etc/passwd"),
    "checkpoint: inputs of a tokenizer": of_tokenizer(init_inputs=["/etc/passwd"]),
    # -- adapters
    "adapter: a pickle": of_adapter("adapter_model.bin", None),
    "adapter: a pickle that is allowed": of_adapter("adapter_model.bin", None, "--allow-pickle"),
    "adapter: a pickle as safetensors": of_adapter("adapter_model.safetensors", None),
    "adapter: a class of its own": of_adapter("", b"", auto_mapping={"base_model_class": "X", "parent_library": "mine"}),
    "adapter: another kind": of_adapter("", b"", peft_type=f"x{ESCAPE}"),
    "adapter: escapes as its base": of_adapter("", b"", base_model_name_or_path=f"x{ESCAPE}", target_modules=[f"q{ESCAPE}"]),
    "adapter: a base with code": on_code,
    # -- data
    "data: a pickle": of_data("a.jsonl", None),
    "data: a pickle as Parquet": of_data("a.parquet", None),
    "data: a script beside": of_data("data/data.py", CODE.encode()),
    "data: escapes in a column": of_data("a.csv", f"x{ESCAPE},y\n1,2\n".encode()),
    "data: escapes in a row": of_data("a.jsonl", b'{"text": "a"}\n' * 40 + f'{{"te\\u001b[31mxt": {ESCAPE}'.encode()),
    "data: escapes in its name": of_data("a\x1b[31m.jsonl", b"{}", ),
    "data: a folder of datasets": of_data("data/state.json", b'{"_data_files": [{"filename": "../../x.arrow"}], "_split": "train"}'),
    # -- templates
    "template: a class": of_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: globals": of_template(f"{{{{ cycler.__init__.__globals__.os.system('touch {PWNED}') }}}}"),
    "template: a file": of_template("{% include '/etc/passwd' %}"),
    "template: the environment": of_template("{{ lipsum.__globals__['os'].environ['LORA_SWEEP_SECRET'] }}"),
    "template: escapes": of_template("{{ raise_exception('\x1b[31mx') }}"),
    "template: escapes in an error": of_template("{% \x1b[31m %}"),
    # -- study folders
    **{f"study: a link for {name}": link(name) for name in (
        "study.lock", "study.journal", "config.yaml", "trials.jsonl", "trials.jsonl.tmp", "capacity.json", "base/config.json",
        "base/origin.json", "trials/0001/metrics.jsonl", "trials/0001/config.yaml", "trials/0001/result.json",
        "trials/0001/result.json.tmp", "trials/0001/best.json", "trials/0001/heat_map.png", "trials/0001/evaluations/000004.npz",
        "trials/0001/evaluations/000004.tmp", "trials/0001/checkpoint/checkpoint.safetensors",
        "trials/0001/checkpoint/.checkpoint.safetensors", "trials/0001/adapter/adapter_config.json",
        "trials/0001/adapter/adapter_model.safetensors",
    )},
    **{f"study: a linked folder for {name}": to_folder(name) for name in (
        "trials", "trials/0001", "trials/0001/adapter", "trials/0001/.adapter", "trials/0001/checkpoint",
        "trials/0001/evaluations", "base", "data", "wandb", "production", ".production",
    )},
    "study: a pickle in an evaluation": of_study(npz, "finished"),
    "study: escapes in a result": edited("trials/0000/result.json", lambda plain: plain | {"findings": [{"flag": f"x{ESCAPE}", "sentence": ESCAPE, "remedy": ESCAPE, "evidence": {}}]}),
    "study: a seal outside": edited("trials/0000/result.json", lambda plain: plain | {"files": {"../../../precious": {"bytes": 4, "sha256": "0"}}}),
    "study: a trial that trusts code": appended("trials/0000/config.yaml", "\n# x\nextra: {trust_remote_code: true}\n", "finished"),
    "study: a python tag": appended("trials/0000/config.yaml", f"\nx: !!python/object/apply:os.system ['touch {PWNED}']\n", "finished"),
    "study: the environment": appended("config.yaml", f"\nx: {ENV}\n"),
    "study: a cell that names a folder outside": numbered("../../../x"),
    "study: a cell below zero": numbered(-1),
    "study: a cell beyond counting": numbered(10**18),
    "study: an unknown entry in the ledger": appended("study.journal", '{"op_code":999,"worker_id":"x"}\n'),
    "study: escapes in the ledger": appended("study.journal", f'{{"op_code": "{ESCAPE}"}}\n'),
}  # fmt: skip


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch, in_folder: Path) -> Iterator[list[Any]]:
    """The connections that were tried: none leaves this machine, and none is to be."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        if not isinstance(address, str | bytes) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("LORA_SWEEP_SECRET", SECRET)
    Path(PRECIOUS).write_text("mine")
    Path("treasury").mkdir()
    Path("treasury/gold").write_text("mine")
    yield tried


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.mark.parametrize("name", ATTEMPTS)
def test_no_file_of_a_stranger_runs_code_writes_outside_or_tells_a_secret(
    run: Run,
    guarded: list[Any],
    studies: Path,  # noqa: F811
    name: str,
) -> None:
    planted = ATTEMPTS[name](studies)
    outside = {path: path.read_bytes() for path in studies.rglob("*") if path.is_file()}
    for words in planted:
        said = run(*words)
        assert said.code in (0, 1, 2, 3), f"{words}: {said}"
        assert "Traceback" not in said.err
        for text in (said.out, said.err):
            assert SECRET not in text
            assert not CONTROL.search(text), f"{words}: {text!r}"
    assert not list(Path.cwd().rglob(PWNED))
    assert guarded == []
    assert Path(PRECIOUS).read_text() == "mine"
    assert [each.name for each in Path("treasury").iterdir()] == ["gold"]
    assert Path("treasury/gold").read_text() == "mine"
    assert {path: path.read_bytes() for path in studies.rglob("*") if path.is_file()} == outside
    assert not [path for path in Path.cwd().parent.iterdir() if path.name in ("x", "x.safetensors")]
    for path in Path("outputs").rglob("*") if Path("outputs").is_dir() else ():
        assert path.is_symlink() or not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_there_are_attempts_enough_in_every_place() -> None:
    places = [name.partition(":")[0] for name in ATTEMPTS]
    assert len(places) >= 60
    least = {place: places.count(place) for place in set(places)}
    assert set(least) == {"sweep", "word", "conf", "checkpoint", "adapter", "data", "template", "study"}
    assert min(least.values()) >= 5
