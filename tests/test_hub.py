"""Models and data sets of the hub, through the hub's own clients, against a hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import config_of
from hub_server import HubServer, Repository
from huggingface_hub import HfApi, HfFileSystem
from safetensors.torch import load, save
from test_pack import mean_loss

from lora_sweep.base.load import load as load_base
from lora_sweep.cli import main as cli
from lora_sweep.data import load as load_data
from lora_sweep.tiny.pretrain import WEIGHTS

REPOSITORY = Path(__file__).parents[1]

TOKEN = "hf_of_nobody_at_all"

END = "-- end of a command, exit code "

DRIVER = f"""
import json, os, sys
from lora_sweep.__main__ import verb
for words in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if words[0].startswith("HF_TOKEN="):
        os.environ["HF_TOKEN"] = words.pop(0).partition("=")[2]
    sys.argv = ["lora-sweep", *words]
    try:
        verb()
    except SystemExit as stopped:
        for stream in (sys.stdout, sys.stderr):
            print("{END}", stopped.code or 0, sep="", file=stream, flush=True)
"""
"""The program once after another, as typed, in one process: what it imports takes longer than what it does."""

CARD = b"""---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: large
  data_files:
  - {split: train, path: large/train.jsonl}
---
People and where they live.
"""


def rows(count: int, town: str) -> bytes:
    """Lines of a data set."""
    lines = ({"prompt": f"Person {number} lives in", "completion": f" {town} {number}."} for number in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def data_files(count: int, town: str) -> dict[str, bytes]:
    return {
        "README.md": CARD,
        "small/train.jsonl": rows(count, town),
        "small/test.jsonl": rows(6, f"New {town}"),
        "large/train.jsonl": rows(3 * count, town),
    }


class Hub(NamedTuple):
    server: HubServer
    model: Repository
    data: Repository


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """org/tiny and org/set with two commits each, the older one tagged v1, and repositories behind gates."""
    checkpoint = {file.name: file.read_bytes() for file in WEIGHTS.iterdir()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: each + 0.02 * torch.randn(each.shape, generator=generator)
        for name, each in load(checkpoint["model.safetensors"]).items()
    }
    with HubServer() as server:
        model, data = server.repository("models", "org/tiny"), server.repository("datasets", "org/set")
        model.commit(checkpoint, "v1")
        model.commit(checkpoint | {"model.safetensors": save(weights, {"format": "pt"})})
        data.commit(data_files(20, "Bergen"), "v1")
        data.commit(data_files(30, "Turin"))
        plain = server.repository("datasets", "org/plain")
        plain.commit({"data/train.jsonl": rows(16, "Graz"), "data/test.jsonl": rows(4, "Linz")})
        for status in (401, 403):
            server.repository("models", f"org/gated{status}", status).commit(checkpoint)
            server.repository("datasets", f"org/gated{status}", status).commit(data_files(8, "Rome"))
        server.repository("datasets", "org/gated-bare", 403).commit({"train.jsonl": rows(8, "Rome")})
        yield Hub(server, model, data)


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    """A user's own, with the hub's client told where the hub is and where its cache."""
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}
    rest = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return rest | own | more


class Said(NamedTuple):
    code: int
    out: str
    err: list[str]


def started(folder: Path, commands: list[list[str]], env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> list[Said]:
    """What each command said."""
    out, err = (text.split(END) for text in process.communicate(timeout=240))
    assert process.returncode == 0, err[-1]
    assert TOKEN not in "".join(out + err)
    # The exit code stands at the beginning of the part after.
    return [
        Said(int(after.splitlines()[0]), "\n".join(message.splitlines()[place > 0 :]), lines.splitlines()[place > 0 :])
        for place, (message, lines, after) in enumerate(zip(out, err, out[1:], strict=False))
    ]


def sweep(folder: Path, **groups: Any) -> Path:
    """ask.yaml: a sweep so small that it takes no time, on the embedded base and task where no others are given."""
    content = {
        "defaults": [{"override /tracker": "none"}],
        "train": {"max_steps": 2, "eval_every": 1, "batch_size": 2, "eval_batch_size": 8, "slots": 2},
        "space": {"method.rank": "choice(2, 4)"},
    }
    path = folder / "ask.yaml"
    path.write_text(yaml.safe_dump(content | groups, sort_keys=False))
    return path


MODEL = ["plan", "ask.yaml", "--json", "model=hub", "model.dtype=fp32"]
DATA = ["plan", "ask.yaml", "--json", "data=hub", "data.probe_size=4", "data.eval_split=test"]
SET = [*DATA, "data.path=org/set", "data.subset=small"]


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """Asks for a model and a data set where no hub answers; begun early: the hub's client tries again for long."""
    folder = tmp_path_factory.mktemp("unreachable")
    sweep(folder)
    commands = [[*MODEL, "model.path=org/tiny"], SET]
    process = started(folder, commands, environment(folder / "home", "http://127.0.0.1:9"))
    yield process
    process.kill()
    process.communicate()


def test_the_hubs_own_client_finds_all_there_is(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests stand on; in this process, which is told otherwise to keep away from hubs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.server.url, token=False)
    old, new = hub.data.commits
    for revision, commit in ((None, new), ("main", new), ("v1", old), (old, old), (old[:8], old)):
        assert api.dataset_info("org/set", revision=revision).sha == commit
    files = hub.data.commits[old]
    tree = api.list_repo_tree("org/set", repo_type="dataset", revision="v1", recursive=True)
    assert {each.path: getattr(each, "size", None) for each in tree} == {
        "small": None,
        "large": None,
        **{path: len(content) for path, content in files.items()},
    }
    (weights,) = api.get_paths_info("org/tiny", ["model.safetensors", "none"], revision="v1")
    content = hub.model.commits[hub.model.names["v1"]]["model.safetensors"]
    assert weights.lfs is not None
    assert (weights.size, weights.lfs.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    fetched = api.hf_hub_download("org/tiny", "model.safetensors", revision="v1", cache_dir=tmp_path)
    assert Path(fetched).read_bytes() == content
    remote = HfFileSystem(endpoint=hub.server.url, token=False)
    with remote.open("datasets/org/set@v1/small/train.jsonl", "rb", block_size=64) as stream:
        stream.seek(200)
        assert stream.read(50) == files["small/train.jsonl"][200:250]


@pytest.fixture(scope="module")
def launched(hub: Hub, unreachable: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep over both commits of a model, on a data set's first; the hub's cache is in home/."""
    folder = tmp_path_factory.mktemp("launched")
    wanted = {"path": "org/set", "subset": "small", "revision": "v1", "split": "train", "eval_split": "test"}
    newest = hub.model.names["main"]
    path = sweep(
        folder,
        defaults=[{"override /model": "hub"}, {"override /data": "hub"}, {"override /tracker": "none"}],
        model={"path": "org/tiny", "dtype": "fp32"},
        data=wanted | {"probe_size": 4},
        space={"model.revision": f"choice(v1, {newest})"},
    )
    command = [sys.executable, "-m", "lora_sweep", "launch", path.name]
    env = environment(folder / "home", hub.server.url, HF_TOKEN=TOKEN)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    sweep(folder)
    return folder


def test_a_launch_on_the_hub_trains_each_pinned_commit_and_names_it_in_its_adapters(launched: Path, hub: Hub) -> None:
    table = [json.loads(line) for line in (launched / "outputs/ask/trials.jsonl").read_text().splitlines()]
    assert [row["state"] for row in table] == ["COMPLETE", "COMPLETE"]
    lost = []
    for row, files in zip(table, hub.model.commits.values(), strict=True):
        revision = row["params"]["model.revision"]
        adapter = launched / f"outputs/ask/trials/{row['number']:04d}/adapter"
        named = json.loads((adapter / "adapter_config.json").read_text())
        assert (named["base_model_name_or_path"], named["revision"]) == ("org/tiny", revision)
        # The same weights and texts from folders and files give the losses that the commits should have.
        at = launched / revision
        at.mkdir()
        for name, content in files.items():
            (at / name).write_bytes(content)
        for name, content in next(iter(hub.data.commits.values())).items():
            (at / name.replace("/", "-")).write_bytes(content)
        config = config_of(
            "model=local", f"model.path={at}", "model.dtype=fp32", "data=files", "data.probe_size=4",
            f"data.path={at}/small-train.jsonl", f"data.eval_path={at}/small-test.jsonl",
        )  # fmt: skip
        base = load_base(config.model, torch.device("cpu"))
        lost.append(mean_loss(base.model, load_data(config.data, base.tokenizer).evaluation))
        assert row["base_loss"] == pytest.approx(lost[-1], rel=1e-5)
    assert abs(lost[1] - lost[0]) > 0.01


def test_the_token_stays_with_the_hub(launched: Path, hub: Hub) -> None:
    contents = {each for each in hub.server.requests if each.startswith("GET /content/")}
    assert len(contents) == 2, "the weights of both commits"
    assert hub.server.told_token == {hub.server.url}


@pytest.fixture(scope="module")
def online(launched: Path, hub: Hub) -> dict[str, Said]:
    """What the program says with the hub at hand: command, by a name of its own -> all of it."""
    commands = {
        "newest": [*SET],
        "plain": [*DATA, "data.path=org/plain"],
        "models": [*MODEL, "model.path=choice(org/gated401, org/gated403, org/none)"],
        "model, known user": [f"HF_TOKEN={TOKEN}", *MODEL, "model.path=org/none"],
        "model revision": [*MODEL, "model.path=org/tiny", "model.revision=v9"],
        "data sets": [*DATA, "data.path=choice(org/gated401, org/gated403, org/gated-bare, org/none)"],
        "data set, known user": [f"HF_TOKEN={TOKEN}", *DATA, "data.path=org/none"],
        "data revision": [*SET, "data.revision=v9"],
        "subset": [*SET, "data.subset=medium"],
        "no subset": [*DATA, "data.path=org/set"],
        "split": [*SET, "data.split=tran"],
        "eval split": [*SET, "data.subset=large"],
        "few": [*DATA[:-1], "data.path=org/plain", 'data.split="train[:4]"', 'data.eval_split="train[12:]"'],
        "most": [*DATA[:-1], "data.path=org/plain", 'data.split="train[:12]"', 'data.eval_split="train[12:]"'],
        "rest": [*DATA[:-1], "data.path=org/plain", 'data.split="train[12:]"', 'data.eval_split="train[:12]"'],
    }
    process = started(launched, list(commands.values()), environment(launched / "home", hub.server.url))
    return dict(zip(commands, said(process), strict=True))


def test_a_data_set_without_a_revision_is_the_newest_with_its_splits(online: dict[str, Said]) -> None:
    for name, trained, evaluated in (("newest", 30, 6), ("plain", 16, 4)):
        assert online[name].code == 0, online[name].err
        result = json.loads(online[name].out)
        assert (result["train_examples"], result["eval_examples"]) == (trained, evaluated)


def test_each_slice_of_a_split_is_a_set_of_its_own(online: dict[str, Said]) -> None:
    for name, trained, evaluated in (("few", 4, 4), ("most", 12, 4), ("rest", 4, 12)):
        assert online[name].code == 0, online[name].err
        result = json.loads(online[name].out)
        assert (result["train_examples"], result["eval_examples"]) == (trained, evaluated)


GATED = "is gated on the hub: accept its terms there, then log in, got 'org/{}' (hf auth login)"
MISSING = (
    "no such {} on the hub, or none that you may see, got 'org/none' (look for a slip; if it is private: hf auth login)"
)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "models",
            [
                f"model.path: {GATED.format('gated401')}",
                f"model.path: {GATED.format('gated403')}",
                f"model.path: {MISSING.format('model')}",
            ],
        ),
        ("model, known user", [f"model.path: {MISSING.format('model')}"]),
        ("model revision", ["model.revision: no such commit or tag of org/tiny, got 'v9'"]),
        (
            "data sets",
            [
                f"data.path: {GATED.format('gated401')}",
                f"data.path: {GATED.format('gated403')}",
                f"data.path: {GATED.format('gated-bare')}",
                f"data.path: {MISSING.format('data set')}",
            ],
        ),
        ("data set, known user", [f"data.path: {MISSING.format('data set')}"]),
        ("data revision", ["data.revision: no such commit or tag of org/set, got 'v9'"]),
        ("subset", ["data.subset: no such subset, got 'medium' (org/set has small, large)"]),
        ("no subset", ["data.subset: is needed (org/set has small, large)"]),
        ("split", ["data.split: no such split, got 'tran' (org/set has train, test)"]),
        ("eval split", ["data.eval_split: no such split, got 'test' (org/set has train)"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_each(online: dict[str, Said], name: str, told: list[str]) -> None:
    assert online[name] == Said(2, "", told)


def test_offline_the_cache_gives_the_commit_asked_for_or_none(launched: Path, online: Any) -> None:
    """The newest was cached last: where the hub is away, `datasets` alone would give it for any revision."""
    both = ["model=hub", "model.path=org/tiny", "model.revision=v1", "model.dtype=fp32"]
    commands = [
        [*SET, "data.revision=v1", *both],
        SET,
        [*SET, "data.revision=v2"],
        [*MODEL, "model.path=org/tiny", "model.revision=v2"],
    ]
    # Nothing listens there, should anything be asked after all.
    env = environment(launched / "home", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    first, newest, data, model = said(started(launched, commands, env))
    assert (first.code, newest.code) == (0, 0)
    assert [json.loads(each.out)["train_examples"] for each in (first, newest)] == [20, 30]
    assert first.err == newest.err == []
    message = "data.path: is not in the hub's cache at v2, and HF_HUB_OFFLINE is set, got 'org/set' (unset it, or "
    assert data == Said(2, "", [message + "run this once without it)"])
    message = "model.path: is not in the hub's cache at v2, and HF_HUB_OFFLINE is set, got 'org/tiny' (unset it, or "
    assert model == Said(2, "", [message + "bring the files there first: hf download org/tiny --revision v2)"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (
            [*MODEL, "model.path=org/tiny"],
            "model.path: is not in the hub's cache, and HF_HUB_OFFLINE is set, got 'org/tiny' "
            "(unset it, or bring the files there first: hf download org/tiny)",
        ),
        (
            SET,
            "data.path: is not in the hub's cache, and HF_HUB_OFFLINE is set, got 'org/set' "
            "(unset it, or run this once without it)",
        ),
    ],
)
def test_offline_an_empty_cache_is_one_line(
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    told: str,
) -> None:
    """In this process: the tests run offline (conftest.py)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(in_folder / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", in_folder / "datasets")
    monkeypatch.setattr(sys, "argv", ["lora-sweep", *command])
    sweep(in_folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert Said(int(stopped.value.code or 0), out, err.splitlines()) == Said(2, "", [told])


@pytest.mark.slow  # the clients' own waiting
def test_a_hub_that_does_not_answer_is_one_line_each(unreachable: "subprocess.Popen[str]") -> None:
    model, data = said(unreachable)
    message = "is not in the hub's cache, and the hub cannot be reached"
    assert model == Said(2, "", [f"model.path: {message}, got 'org/tiny'"])
    assert data == Said(2, "", [f"data.path: {message}, got 'org/set'"])
