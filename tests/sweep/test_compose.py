"""What a configuration may say: every file composes, every knob has its bounds, nothing runs or reads secrets."""

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from lora_sweep import config as schema
from lora_sweep.errors import ConfigError
from lora_sweep.sweep import check, compose, sweep_file

REPOSITORY = Path(__file__).parents[2]
OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted((REPOSITORY / "conf").glob("*/*.yaml"))]
SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"))
USER_DATA = {
    "model=local": ["model.path=my/checkpoint"],
    "model=hub": ["model.path=someone/model"],
    "data=files": ["data.path=mine.jsonl"],
    "data=hub": ["data.path=someone/set"],
}
"""What only the user can say."""


# -- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes_and_checks(option: str) -> None:
    sweep, faults = sweep_file.read(None, [option, *USER_DATA.get(option, [])])
    variants, faults = check.check(sweep)
    assert [*faults, *faults] == []
    assert variants[0].keys() == schema.GROUPS.keys()
    sweep.base()


@pytest.mark.parametrize("option", sorted(USER_DATA))
def test_what_only_the_user_can_say_is_asked_for(option: str) -> None:
    sweep, _ = sweep_file.read(None, [option])
    (fault,) = check.check(sweep)[1]
    assert str(fault) == f"{option.split('=')[0]}.path: is needed ({option.split('=')[0]}.path=...)"


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: str(file.stem))
def test_every_sweep_composes_and_checks_in_all_its_cells(file: Path) -> None:
    sweep, faults = sweep_file.read(str(file), [])
    assert [*faults, *check.check(sweep)[1]] == []
    assert sweep.base().study.name == file.stem
    if sweep.base().sampler.name == "grid":
        assert len({str(sweep.config(cell)) for cell in sweep.cells()}) == len(sweep.cells())


def test_there_are_options_in_every_group_and_sweeps_to_start_from() -> None:
    assert {option.split("=")[0] for option in OPTIONS} == schema.GROUPS.keys()
    assert "quickstart" in [file.stem for file in SWEEPS]


def test_the_defaults_list_is_all_that_config_yaml_holds() -> None:
    content = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "conf" / "config.yaml"))
    assert isinstance(content, dict)
    assert content.keys() == {"defaults"}


# -- the knobs ----------------------------------------------------------------------------------------------------

NAME = (["a", "A1._-", "x" * 100], ["", "../x", "a/b", "a b", ".hidden", "-x", "x" * 101, "a\n", None])
TEXT_OR_NULL = (["x", None], [5, ["x"], ""])
COUNT = ([1, 10**9], [0, -1, 1.5, "many", True, None, [1]])
COUNT_OR_NULL = ([1, None], [0, -1, 1.5, "many", True])
WHOLE = ([0, 7], [-1, 0.5, "x", False, None])
SEED = ([0, 2**32 - 1], [-1, 2**32, 0.5, "x", False, None])
POSITIVE = ([1e-12, 1e12], [0, -1e-12, float("inf"), float("nan"), "x", True, None])
NOT_NEGATIVE = ([0, 1e12], [-1e-12, float("inf"), float("nan"), "x", True, None])
SHARE = ([0, 0.999999], [1, -1e-9, float("nan"), "x", True, None])
TRUTH = ([True, False], [2, "maybe", None])
RULE = (["torch", "scaled"], ["hf", True, None])
INSTANCE = ([None, {"_target_": "optuna.samplers.RandomSampler"}], ["x", 5, ["x"]])

KNOBS: dict[str, tuple[list[Any], list[Any]]] = {
    "model.name": NAME,
    "model.path": TEXT_OR_NULL,
    "model.revision": TEXT_OR_NULL,
    "model.dtype": (["auto", "fp32", "bf16", "fp64"], ["fp16", "float32", 32, None]),
    "model.quantization": (["nf4", "int8", None], ["int4", 4, True]),
    "model.trust_remote_code": TRUTH,
    "model.attn_implementation": (["sdpa", "eager"], ["flash", None]),
    "data.name": (["facts", "style", "real_facts", "files", "hub"], ["csv", None]),
    "data.path": TEXT_OR_NULL,
    "data.subset": TEXT_OR_NULL,
    "data.split": TEXT_OR_NULL,
    "data.revision": TEXT_OR_NULL,
    "data.eval_path": TEXT_OR_NULL,
    "data.eval_split": TEXT_OR_NULL,
    "data.columns": ([{}, {"prompt": "question"}], ["prompt", 5, None]),
    "data.format": (["auto", "alpaca", "text"], ["csv", None]),
    "data.undesirable": (["refuse", "skip", "train"], [False, None]),
    "data.chat_template": TEXT_OR_NULL,
    "data.pack_examples": TRUTH,
    "data.retention": TEXT_OR_NULL,
    "data.retention_size": COUNT,
    "data.eval_share": ([1e-9, 0.999999], [0, 1, -0.1, float("nan"), True]),
    "data.subjects": COUNT_OR_NULL,
    "data.max_length": ([2, 4096], [1, 0, 2.5, True, None]),
    "data.eval_size": COUNT_OR_NULL,
    "data.probe_size": COUNT,
    "data.seed": SEED,
    "method.name": (["lora"], ["dora", None]),
    "method.rank": COUNT,
    "method.alpha": POSITIVE,
    "method.use_rslora": TRUTH,
    "method.dropout": SHARE,
    # Held against the base by model.check.
    "method.target_modules": (["all-linear", ["q_proj"]], []),
    "optimizer.name": (["loraplus"], ["adamw", None]),
    "optimizer.ratio": POSITIVE,
    "optimizer.base_lr": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.weight_decay_B": ([0, 1.5, None], [-1e-12, float("inf"), "x", True]),
    "optimizer.beta1": SHARE,
    "optimizer.beta2": SHARE,
    "optimizer.eps": POSITIVE,
    "optimizer.optim": (["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd"], ["adam", None]),
    "optimizer.momentum": SHARE,
    "optimizer.eps_rule": RULE,
    "optimizer.decay_rule": RULE,
    "optimizer.clip_rule": RULE,
    "train.max_steps": COUNT,
    "train.batch_size": COUNT,
    "train.gradient_accumulation_steps": COUNT,
    "train.eval_every": COUNT,
    "train.eval_batch_size": COUNT,
    "train.warmup_steps": WHOLE,
    "train.schedule": (["constant", "linear", "cosine"], ["onecycle", None]),
    "train.max_grad_norm": ([1e-12, None], [0, -1, float("inf"), "x", True]),
    "train.gradient_checkpointing": TRUTH,
    "train.seed": SEED,
    "train.slots": COUNT_OR_NULL,
    "train.fixed_shapes": TRUTH,
    "train.compile": TRUTH,
    "sampler.name": (["grid", "optuna"], ["tpe", None]),
    "sampler.n_trials": COUNT_OR_NULL,
    "sampler.instance": INSTANCE,
    "pruner.name": (["none", "asha", "optuna"], ["median", None]),
    "pruner.eta": ([2, None], [1, 2.5, "x", True]),
    "pruner.min_steps": COUNT_OR_NULL,
    "pruner.instance": INSTANCE,
    "tracker.name": (["wandb", "none"], ["mlflow", None]),
    "tracker.mode": (["offline", "online"], ["disabled", None]),
    "tracker.project": NAME,
    "tracker.entity": TEXT_OR_NULL,
    "tracker.tags": ([[], ["a", "b"]], ["a", [5], None]),
    "launcher.name": (["local"], ["slurm", None]),
    "launcher.device": (["auto", "cpu", "cuda", "cuda:1"], ["gpu", "cuda:", "cuda:x", "cpu\n", None]),
    "launcher.threads": COUNT_OR_NULL,
    "health.min_gain_of_base": SHARE,
    "health.min_gain_standard_errors": NOT_NEGATIVE,
    "health.min_gain_of_best": SHARE,
    "health.min_delta_rel": NOT_NEGATIVE,
    "health.max_trapped_delta_rel": NOT_NEGATIVE,
    "health.max_delta_rel": NOT_NEGATIVE,
    "health.max_forgetting": NOT_NEGATIVE,
    "health.check_every": COUNT,
    "health.action": (["flag", "stop"], ["prune", None]),
    "study.name": NAME,
    "study.root": (["outputs", "~/x", "../x"], [5, None]),
    # YAML's `off` is false.
    "study.fold": (["exact", "near", "off", False], ["on", True, None]),
    "study.verify_fold": WHOLE,
    "pick.form": (["lora", "rslora", "loraplus", None], ["rsLoRA", 5]),
    "study.keep_adapters": (["all", 0, 3], [-1, 1.5, "some", True, None]),
}


@pytest.fixture(scope="module")
def plain() -> DictConfig:
    return compose.compose([])


def with_knob(plain: DictConfig, key: str, value: Any) -> list[str]:
    config = plain.copy()
    OmegaConf.update(config, key, value, merge=False)
    return [str(fault) for fault in compose.sections(config)[1]]


def test_no_knob_is_left_out_of_the_table_below() -> None:
    assert KNOBS.keys() == {f"{group}.{field.name}" for group, kind in schema.GROUPS.items() for field in fields(kind)}


@pytest.mark.parametrize("key", KNOBS)
def test_a_knob_takes_its_range_and_refuses_what_lies_beyond(plain: DictConfig, key: str) -> None:
    good, bad = KNOBS[key]
    for value in good:
        assert with_knob(plain, key, value) == [], value
    for value in bad:
        (message,) = with_knob(plain, key, value)
        assert message.startswith(f"{key}: "), (value, message)
        assert value is None or repr(value).strip("[]")[:60] in message, (value, message)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("method.rnk=8", "method.rnk: unknown key (did you mean rank?)"),
        ("optimizer.baselr=1", "optimizer.baselr: unknown key (did you mean base_lr?)"),
        ("methd.rank=8", "methd: unknown group (did you mean method?)"),
        ("rank=8", "rank: unknown key (did you mean method.rank?)"),
        ("pruner=ahsa", "pruner: must be one of asha, median, none, got 'ahsa' (did you mean asha?)"),
        ("sampler=tep", "sampler: must be one of grid, random, tpe, got 'tep' (did you mean tpe?)"),
        ("method.alpha.x=8", "method.alpha: must be a valid number, got {'x': 8}"),
    ],
)
def test_an_unknown_word_names_the_nearest_known_one(typed: str, told: str) -> None:
    sweep, faults = sweep_file.read(None, [typed])
    assert [str(fault) for fault in [*faults, *check.check(sweep)[1]]] == [told]


def test_several_faults_are_told_at_once() -> None:
    wrong = ["method.rank=-1", "method.alfa=2", "optimizer.base_lr=fast", "train.slots=0", "study.name=a/b"]
    sweep, _ = sweep_file.read(None, wrong)
    with pytest.raises(ConfigError) as caught:
        sweep.base()
    assert {fault.field for fault in caught.value.faults} == {line.split("=")[0] for line in wrong}


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (["train.max_steps=10", "train.eval_every=11"], "train.eval_every"),
        (["train.max_steps=50", "train.warmup_steps=50"], "train.warmup_steps"),
        (["sampler=grid", "sampler.n_trials=5"], "sampler.n_trials"),
        (["sampler=tpe", "sampler.n_trials=null"], "sampler.n_trials"),
        (["sampler=tpe", "sampler.instance=null"], "sampler.instance"),
        (["pruner=asha", "pruner.eta=null"], "pruner.eta"),
        (["pruner=asha", "pruner.min_steps=null"], "pruner.min_steps"),
        (["pruner=median", "pruner.instance=null"], "pruner.instance"),
        (["model.path=null"], "model.path"),
    ],
)
def test_fields_are_held_against_each_other(overrides: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose.build(compose.compose([f"++{line}" if "." in line else line for line in overrides]))
    assert [fault.field for fault in caught.value.faults] == [field]


# -- what a configuration from a stranger may not do --------------------------------------------------------------

FOREIGN = [
    "${oc.env:CANARY}",
    "${ oc.env:CANARY}",
    "${oc.env :CANARY}",
    "${\toc.env:CANARY}",
    '${oc.env:"CANARY"}',
    "${oc.env:CANARY,default}",
    "\\${oc.env:CANARY}",
    "a ${oc.env:CANARY} b",
    "${times:2,${oc.env:CANARY}}",
    "${method.rank} ${oc.env:CANARY}",
    "${oc.decode:5}",
    "${oc.create:{}}",
    "${oc.select:model.path}",
    "${now:%Y}",
    "${hydra:runtime.cwd}",
    "${ hydra:runtime.cwd}",
    "${hydra.runtime.cwd}",
    "${ hydra.runtime.cwd}",
    "${.hydra.runtime.cwd}",
    # A resolver's name can be put together of references, too.
    "${oc.${study.name}:CANARY}",
    "${${study.name}:CANARY}",
    "${${study.name}.cwd}",
]


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CANARY", "the-secret")
    return "the-secret"


@pytest.mark.parametrize("text", FOREIGN)
def test_only_arithmetic_and_references_are_resolved(in_folder: Path, canary: str, text: str) -> None:
    """In a sweep file's own content, in its space and on the command line."""
    content = {"data": {"path": text}, "study": {"name": "env"}, "space": {"method.alpha": f"choice('{text}',2)"}}
    OmegaConf.save(OmegaConf.create({"study": content["study"], "space": content["space"]}), "space.yaml")
    Path("content.yaml").write_text(json.dumps({key: content[key] for key in ("data", "study")}))
    for file, overrides in (("content.yaml", []), ("space.yaml", []), (None, [f"data.path='{text}'"])):
        try:
            sweep, faults = sweep_file.read(file, overrides)
            faults = faults or check.check(sweep)[1]
        except ConfigError as error:
            faults = list(error.faults)
        message = "\n".join(map(str, faults))
        assert "refused: only the resolvers times, divide, power" in message
        assert canary not in message


def test_two_halves_of_a_reference_that_meet_are_refused(in_folder: Path, canary: str) -> None:
    halves = {"tracker": {"entity": "$"}, "data": {"path": "${tracker.entity}{oc.env:CANARY}"}}
    Path("halves.yaml").write_text(json.dumps(halves))
    sweep, faults = sweep_file.read("halves.yaml", [])
    assert faults == []
    (fault,) = check.check(sweep)[1]
    assert fault.field == "data.path"
    assert "refused" in fault.rule


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${times:2,${method.rank}}", 16),
        ("${ times : 2 , ${method.rank} }", 16),
        ("${divide:${method.rank},4}", 2.0),
        ("${power:2,${times:1,3}}", 8),
        ("${power:${method.rank},0.5}", 8**0.5),
        ("${method.rank}", 8),
        ("${.rank}", 8),
    ],
)
def test_derived_values_are_resolved(plain: DictConfig, text: str, value: float) -> None:
    config = plain.copy()
    OmegaConf.update(config, "method.alpha", text)
    assert compose.build(config).method.alpha == value


@pytest.mark.parametrize(
    "text", ["${divide:1,0}", "${times:ab,1000000000000}", "${power:10,${power:10,10}}", "${nope}"]
)
def test_a_derived_value_that_cannot_be_had_is_a_fault_and_soon(plain: DictConfig, text: str) -> None:
    config = plain.copy()
    OmegaConf.update(config, "method.alpha", text)
    began = time.monotonic()
    (fault,) = compose.sections(config)[1]
    assert fault.field == "method.alpha"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("defaults", "told"),
    [
        ("5", "must be a list"),
        ("{data: facts}", "must be a list"),
        ("[5]", "must choose an option of a group"),
        ("[/data/facts]", "must choose an option of a group"),
        ("[/../../secrets]", "must choose an option of a group"),
        ("[{override /nope: facts}]", "no such group"),
        ("[{override hydra/launcher: basic}]", "no such group"),
        (
            "[{override /data: fact}]",
            "files, hub, real_facts, style, got 'fact' (did you mean facts?)",
        ),
        ("[{override /data: [facts, style]}]", "must be one of facts, files, hub, real_facts, style"),
    ],
)
def test_a_sweep_files_defaults_choose_options_of_groups_and_nothing_else(
    in_folder: Path, defaults: str, told: str
) -> None:
    Path("x.yaml").write_text(f"defaults: {defaults}\n")
    sweep, _ = sweep_file.read("x.yaml", [])
    (fault,) = check.check(sweep)[1]
    assert told in str(fault)


# -- where the groups lie ------------------------------------------------------------------------------------------


def own_group(group: str, option: str, **values: Any) -> None:
    """conf/<group>/<option>.yaml in the working directory: the shipped default with other values."""
    shipped = OmegaConf.load(next((REPOSITORY / "conf" / group).glob("*.yaml")))
    file = Path("conf") / group / f"{option}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.merge(shipped, values), file)


def test_ones_own_groups_in_the_working_directory_are_usable(in_folder: Path) -> None:
    own_group("data", "mine", name="style", subjects=32)
    sweep, faults = sweep_file.read(None, ["data=mine"])
    assert [*faults, *check.check(sweep)[1]] == []
    assert sweep.base().data.subjects == 32


def test_ones_own_option_may_be_a_value_of_an_axis(in_folder: Path) -> None:
    own_group("data", "mine", name="style", subjects=32)
    sweep, faults = sweep_file.read(None, ["data=mine,style"])
    assert [*faults, *check.check(sweep)[1]] == []
    assert [sweep.config(cell).data.subjects for cell in sweep.cells()] == [32, 256]


def test_ones_own_option_comes_before_the_shipped_one_of_its_name(in_folder: Path) -> None:
    own_group("train", "default", max_steps=77)
    assert compose.build(compose.compose([])).train.max_steps == 77


def test_another_programs_config_yaml_in_the_working_directory_is_not_ours(in_folder: Path) -> None:
    own_group("data", "mine", name="style", subjects=32)
    Path("conf/config.yaml").write_text("defaults: [{database: mysql}]\nport: 3306\n")
    assert compose.build(compose.compose(["data=mine"])).data.subjects == 32


def test_faults_in_ones_own_groups_are_told_like_any_other(in_folder: Path, canary: str) -> None:
    own_group("data", "mine", subjcts=3)
    own_group("data", "spy", path="${oc.env:CANARY}")
    message = {}
    for option in ("mine", "spy"):
        sweep, _ = sweep_file.read(None, [f"data={option}"])
        (fault,) = check.check(sweep)[1]
        message[option] = str(fault)
    assert message["mine"] == "data.subjcts: unknown key (did you mean subjects?)"
    assert "data.path: refused" in message["spy"]
    assert canary not in message["spy"]


def test_groups_and_sweeps_inside_the_package_come_before_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "lora_sweep"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr(compose, "__file__", str(package / "sweep" / "compose.py"))
    assert compose.shipped("conf") == package / "conf"
    assert compose.shipped("sweeps") == package.parent / "sweeps"


@pytest.mark.slow
def test_an_installed_wheel_finds_its_groups_and_sweeps(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(REPOSITORY),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "lora_sweep", "plan", "--json", "sweeps/quickstart.yaml"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["cells"] >= 48
    assert list(empty.iterdir()) == []


def test_yaml_and_back_changes_no_value() -> None:
    awkward = {
        "a": 1e-8,
        "b": "1e-8",
        "c": "null",
        "d": None,
        "e": "true",
        "f": True,
        "g": [],
        "h": ["x", 2],
        "i": "a: b",
    }
    assert OmegaConf.to_container(OmegaConf.create(compose.to_yaml(awkward))) == awkward
