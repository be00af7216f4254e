"""What people type who come from PEFT, transformers, W&B, axolotl or Hydra: it works, or one line gives what does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Said

from lora_sweep.sweep import check, sweep_file

Run = Callable[..., Said]
SMALL = {
    "train": {"max_steps": 2, "eval_every": 2, "batch_size": 1, "slots": 1},
    "data": {"eval_size": 2, "probe_size": 2},
    "tracker": {"name": "none"},
}


def read(*overrides: str, path: Path | None = None) -> Any:
    """The sweep, without a fault."""
    sweep, faults = sweep_file.read(str(path) if path else "quickstart", list(overrides))
    _, more = check.check(sweep)
    assert [str(fault) for fault in (*faults, *more)] == []
    return sweep


def faults_of(*overrides: str, path: Path | None = None) -> list[Any]:
    try:
        sweep, faults = sweep_file.read(str(path) if path else "quickstart", list(overrides))
    except Exception as error:  # ConfigError, of a file as a whole
        return list(error.faults)  # type: ignore[attr-defined]
    return [*faults, *check.check(sweep)[1]]


def file_of(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate=1e-3", "optimizer.base_lr", 1e-3),
        ("lr=1e-3", "optimizer.base_lr", 1e-3),
        ("optimizer.lr=1e-3", "optimizer.base_lr", 1e-3),
        ("lora_r=8", "method.rank", 8),
        ("method.r=8", "method.rank", 8),
        ("lora_alpha=16", "method.alpha", 16),
        ("method.lora_alpha=16", "method.alpha", 16),
        ("lora_dropout=0.1", "method.dropout", 0.1),
        ("lora_target_modules=[q_proj,v_proj]", "method.target_modules", ["q_proj", "v_proj"]),
        ("loraplus_lr_ratio=8", "optimizer.ratio", 8),
        ("study.name=2024", "study.name", "2024"),
        ("study.name=007", "study.name", "007"),
    ],
)
def test_a_word_of_another_tool_is_the_key_that_it_means(line: str, key: str, value: Any) -> None:
    group, _, name = key.partition(".")
    base = read(line).base()
    got = getattr(getattr(base, group), name)
    assert (list(got) if isinstance(value, list) else got) == value


def test_an_alias_may_be_an_axis_here_and_in_a_file(tmp_path: Path) -> None:
    assert {str(axis.key): axis.values for axis in read("lora_r=choice(2,8)").axes}["method.rank"] == (2, 8)
    path = file_of(tmp_path, {"space": {"lora_r": "choice(2,8)", "learning_rate": "choice(1e-3, 2e-3)"}} | SMALL)
    assert [axis.key for axis in read(path=path).axes] == ["method.rank", "optimizer.base_lr"]


def test_a_derived_value_needs_no_quotes_of_its_own_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    line = "method.alpha=${times:2,${method.rank}}"
    path = file_of(tmp_path, {"space": {"method.rank": "choice(4,8)", "method.alpha": line.partition("=")[2]}} | SMALL)
    for sweep in (read(line, "method.rank=choice(4,8)"), read(path=path)):
        assert {(c.method.rank, c.method.alpha) for c in map(sweep.config, sweep.cells())} == {(4, 8.0), (8, 16.0)}


def test_the_file_of_the_article_runs_as_it_stands(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    method = {"name": "lora", "rank": 8, "alpha": 16, "use_rslora": True}
    optimizer = {"name": "loraplus", "ratio": 16, "base_lr": 2e-4}
    path = file_of(
        tmp_path, {"method": method, "optimizer": optimizer, "space": {"method.rank": "choice(2,4)"}} | SMALL
    )
    assert run("launch", str(path)).code == 0
    config = read(path=path).base()
    assert (config.method.use_rslora, config.optimizer.ratio, config.optimizer.base_lr) == (True, 16, 2e-4)


def test_keys_of_a_file_may_be_peft_s_and_two_names_of_one_key_are_a_fault(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"method": {"r": 8, "lora_alpha": 16}, "learning_rate": 1e-3} | SMALL)
    config = read(path=path).base()
    assert (config.method.rank, config.method.alpha, config.optimizer.base_lr) == (8, 16, 1e-3)
    (fault,) = faults_of(path=file_of(tmp_path, {"method": {"r": 8, "rank": 4}}))
    assert str(fault) == "method.rank: means method.rank, which method.r gives too; leave one of them out"


def test_a_number_for_a_name_in_a_file_wants_quotes(tmp_path: Path) -> None:
    (fault,) = faults_of(path=file_of(tmp_path, {"study": {"name": 2024}}))
    assert (fault.field, fault.remedy) == ("study.name", 'in quotes: "2024"')
    assert read(path=file_of(tmp_path, {"study": {"name": "2024"}})).base().study.name == "2024"


def test_null_may_stand_in_a_choice() -> None:
    sweep = read("optimizer.weight_decay_B=choice(null, 0.01)", "method.rank=4", "method.alpha=8")
    assert {config.optimizer.weight_decay_B for config in map(sweep.config, sweep.cells())} == {None, 0.01}
    assert [fault.field for fault in faults_of("optimizer.base_lr=choice(null, 0.01)")] == ["optimizer.base_lr"]


def test_multirun_is_what_every_launch_is(run: Run) -> None:
    for words in (("-m", "quickstart"), ("--multirun", "quickstart"), ("quickstart", "-m")):
        said = run("plan", *words, "method.rank=4", "method.alpha=8", "method.use_rslora=false", "lr=1e-3")
        assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("line", "field", "remedy"),
    [
        ("r=8", "r", "did you mean method.rank?"),
        ("rank=8", "rank", "did you mean method.rank?"),
        ("max_steps=8", "max_steps", "did you mean train.max_steps?"),
        ("~method.alpha", "~method.alpha", "method.alpha=VALUE gives the key one value, an axis too"),
        ("~tracker", "~tracker", "tracker=OPTION chooses another"),
        ("hydra.sweeper=optuna", "hydra.sweeper", "the sampler is sampler=grid, random or tpe"),
        (
            "optimizer.base_lr={min: 1e-4, max: 1e-3}",
            "optimizer.base_lr",
            "'optimizer.base_lr=interval(0.0001, 0.001)'",
        ),
        ("method.rank={values: [4, 8]}", "method.rank", "'method.rank=choice(4, 8)'"),
        ("tracker.tags=['']", "tracker.tags", ""),
        (f"tracker.tags=[{'a' * 65}]", "tracker.tags", ""),
        ("tracker.entity=''", "tracker.entity", ""),
        ("tracker.entity='my team'", "tracker.entity", ""),
        ("tracker.project='a/b'", "tracker.project", ""),
    ],
)
def test_what_is_not_read_is_one_fault_with_what_to_type(line: str, field: str, remedy: str) -> None:
    (fault,) = faults_of(line)
    assert (fault.field, fault.remedy[: len(remedy)]) == (field, remedy)
    if remedy.startswith("'"):
        read(remedy.strip("'"), "sampler=random" if "interval" in remedy else "sampler=grid")
    elif remedy.startswith("did you mean"):
        read(f"{remedy[13:-1]}=4", "train.eval_every=2", "train.warmup_steps=0")


def test_a_sweep_of_wandb_is_named_with_its_axes_in_our_words(tmp_path: Path) -> None:
    parameters = {"lora_r": {"values": [4, 8]}, "learning_rate": {"min": 1e-4, "max": 1e-3}, "seed": {"value": 1}}
    metric = {"name": "eval_loss", "goal": "minimize"}
    (fault,) = faults_of(path=file_of(tmp_path, {"method": "grid", "metric": metric, "parameters": parameters}))
    assert fault.field == "parameters"
    assert fault.remedy == "method.rank: choice(4, 8); optimizer.base_lr: interval(0.0001, 0.001); seed: 1"
    space = dict(line.split(": ", 1) for line in fault.remedy.split("; ")[:2])
    read("sampler=random", path=file_of(tmp_path, {"space": space} | SMALL))
    (fault,) = faults_of(path=file_of(tmp_path, {"space": {"method.rank": {"values": [4, 8]}}}))
    assert (fault.field, fault.remedy) == ("space.method.rank", "method.rank: choice(4, 8)")


def test_the_configuration_of_another_trainer_is_named_with_its_keys_in_our_words(tmp_path: Path) -> None:
    axolotl = {"base_model": "org/base", "adapter": "lora", "lora_r": 32, "datasets": [{"path": "org/set"}],
               "sequence_len": 64, "learning_rate": 2e-4}  # fmt: skip
    (fault,) = faults_of(path=file_of(tmp_path, axolotl))
    assert fault.field == "base_model"
    begin, _, rest = fault.remedy.partition("quickstart.yaml ")
    assert begin == "lora-sweep launch sweeps/"
    words = rest.split()
    assert words[:3] == ["model=hub", "model.path=org/base", "method.rank=32"]
    base = read(*words[2:]).base()
    assert (base.method.rank, base.data.max_length, base.optimizer.base_lr) == (32, 64, 2e-4)


def test_after_a_study_in_which_all_diverged_nobody_is_told_to_ship(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"space": {"method.rank": "choice(2,4)"}, "optimizer": {"base_lr": 1e12}} | SMALL
    said = run("launch", str(file_of(tmp_path, content)))
    assert "ship it" not in said.out + said.err
    assert "every cell diverged: lower optimizer.base_lr" in said.out + said.err
