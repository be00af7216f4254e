"""The sweep grammar on one side, cells and distributions on the other."""

import itertools
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lora_sweep.errors import ConfigError
from lora_sweep.records import Cell
from lora_sweep.sweep import check, compose, optuna_classes, saved, sweep_file
from lora_sweep.sweep.axis import Axis
from lora_sweep.sweep.sweep import Sweep


def read(*overrides: str, file: str | None = None) -> Sweep:
    sweep, faults = sweep_file.read(file, overrides)
    assert faults == []
    return sweep


def faults_of(*overrides: str, file: str | None = None) -> list[str]:
    """Everything that `plan` would tell of the sweep's form."""
    try:
        sweep, faults = sweep_file.read(file, overrides)
        return [str(fault) for fault in [*faults, *check.check(sweep)[1]]]
    except ConfigError as error:
        return [str(fault) for fault in error.faults]


Write = Callable[[str], str]


@pytest.fixture
def write(in_folder: Path) -> Write:
    """Writes a sweep file and gives its name."""

    def written(text: str) -> str:
        (in_folder / "mine.yaml").write_text(textwrap.dedent(text))
        return "mine.yaml"

    return written


def axis(line: str) -> Axis:
    (only,) = read(line).axes
    return only


# -- the grammar --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("method.rank=choice(4,16,64)", (4, 16, 64)),
        ("method.rank=choice(64,4)", (64, 4)),
        ("method.rank=choice(8)", (8,)),
        ("method.rank=4,16", (4, 16)),
        ("method.rank=sort(16,4,8)", (4, 8, 16)),
        ("method.rank=sort(choice(4,16,8),reverse=true)", (16, 8, 4)),
        ("method.use_rslora=choice(true,false)", (True, False)),
        ("train.schedule=choice(constant,'cosine',\"linear\")", ("constant", "cosine", "linear")),
        ("method.target_modules=choice('.*q_proj, or so',all-linear)", (".*q_proj, or so", "all-linear")),
        ("method.target_modules=choice([q_proj],[q_proj,v_proj])", (["q_proj"], ["q_proj", "v_proj"])),
        ("method.target_modules=choice(['q_proj'],all-linear)", (["q_proj"], "all-linear")),
        ("optimizer.base_lr=choice(1e-5,0.001)", (1e-5, 1e-3)),
        ("train.seed=range(3)", (0, 1, 2)),
        ("train.seed=range(1,7,2)", (1, 3, 5)),
        ("train.seed=range(5,1,-2)", (5, 3)),
        ("train.seed=sort(range(0,3),reverse=true)", (2, 1, 0)),
        ("method.dropout=range(0,0.3,0.1)", (0.0, 0.1, 0.2)),
        # Sums of binary tenths would stop short of 1.0 and let the exclusive end in.
        ("method.dropout=range(0.7,1.0,0.1)", (0.7, 0.8, 0.9)),
        ("method.dropout=range(0.9,0.7,-0.1)", (0.9, 0.8)),
        ("data=choice(facts,style)", ("facts", "style")),
        ("data=facts,style", ("facts", "style")),
    ],
)
def test_choices_and_ranges_are_read_as_their_values_in_order(line: str, values: tuple[Any, ...]) -> None:
    parsed = axis(line)
    assert parsed.values == values
    assert [type(value) for value in parsed.values] == [type(value) for value in values]
    assert parsed.kind == ("range" if "range" in line else "choice")


@pytest.mark.parametrize(
    ("line", "low", "high", "log", "kind"),
    [
        ("optimizer.base_lr=interval(0.1,0.5)", 0.1, 0.5, False, float),
        ("optimizer.base_lr=tag(log,interval(1e-5,1e-3))", 1e-5, 1e-3, True, float),
        ("method.rank=int(interval(1,64))", 1, 64, False, int),
        ("method.rank=tag(log,int(interval(1,64)))", 1, 64, True, int),
    ],
)
def test_intervals_keep_their_bounds_their_type_and_their_scale(
    line: str, low: float, high: float, log: bool, kind: type
) -> None:
    parsed = axis(line)
    assert (parsed.kind, parsed.low, parsed.high, parsed.log) == ("interval", low, high, log)
    assert {type(parsed.low), type(parsed.high)} == {kind}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("method.rank=interval(5,4)", "low < high must hold, got 'interval(5,4)'"),
        ("method.rank=interval(4,4)", "low < high must hold"),
        ("optimizer.base_lr=tag(log,interval(0,1))", "a logarithmic interval must start above 0"),
        ("train.seed=range(1,5,0)", "the step of a range must not be 0"),
        ("train.seed=range(5,1)", "the range is empty (its end is exclusive)"),
        ("train.seed=range(3,3)", "the range is empty"),
        ("train.seed=range(0,inf)", "a range must be finite"),
        ("train.seed=range(0,10000000000)", "a range of more than 10,000 values"),
        ("method.rank=choice(8,4,8)", "a choice must not repeat a value (8)"),
        ("method.alpha=choice(8,8.0)", "a choice must not repeat a value (8, 8.0)"),
        ("method.target_modules=choice([q_proj],[q_proj])", "a choice must not repeat a value ([q_proj])"),
        ("method.rank=shuffle(1,2)", "shuffle is not read"),
        ("train.seed=shuffle(range(4))", "shuffle is not read"),
        ("method.rank=tag(fast,choice(1,2))", "the only tag read is log, of an interval"),
        ("method.rank=tag(log,choice(1,2))", "the only tag read is log, of an interval"),
        ("optimizer.base_lr=tag(lg,interval(0.1,1))", "the only tag read is log, of an interval"),
        ("data=glob(*)", "must be choice(...), range(...) or interval(...)"),
        ("method.rank=choice()", "is not in Hydra's override grammar"),
        ("method.rank=choice(1", "is not in Hydra's override grammar"),
        ("method.rank", "is not in Hydra's override grammar"),
        (
            "data.path=mine, v=2.jsonl",
            """(in quotes, and those in the shell's: 'data.path="mine, v=2.jsonl"')""",
        ),
        (
            r"method.target_modules=.*layers\.[01]\.(q|v)_proj",
            r"""(in quotes, and those in the shell's: 'method.target_modules=".*layers\.[01]\.(q|v)_proj"')""",
        ),
        ("method.alpha=1 ${times:2,${method.rank}}", "put quotes around a value with ${...}"),
        ("~method.rank", "deletions and packages are not read"),
        ("data@elsewhere=facts", "deletions and packages are not read"),
        ("hydra.run.dir=x", "Hydra's own settings are not read"),
        ("method.rnk=choice(4,8)", "unknown key (did you mean method.rank?)"),
        ("methd=lora,dora", "unknown key (did you mean method?)"),
        ("rank=choice(4,8)", "unknown key (did you mean method.rank?)"),
        ("sampler=grid,tpe", "cannot be swept, only keys of model, data, method, optimizer, train can"),
        ("sampler.n_trials=choice(1,2)", "cannot be swept"),
        ("pruner.eta=choice(2,3)", "cannot be swept"),
        ("tracker=wandb,none", "cannot be swept"),
        ("launcher.device=cpu,cuda", "cannot be swept"),
        ("health.min_delta_rel=choice(0.1,0.2)", "cannot be swept"),
        ("study.name=a,b", "cannot be swept"),
        ("train.slots=1,2", "cannot be swept"),
        ("data=fcts,style", "must be one of facts, files, hub, real_facts, style, got 'fcts' (did you mean facts?)"),
        ("method.rank=choice(4,-1)", "must be at least 1, got -1"),
        ("method.rank=choice(true,4)", "must be a number, got True"),
        ("method.use_rslora=choice(true,sometimes)", "must be a valid boolean"),
    ],
)
def test_a_slip_in_the_grammar_is_one_fault_that_names_it(line: str, told: str) -> None:
    (fault,) = faults_of(line)
    assert told in fault
    assert fault.startswith(line.partition("=")[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.path", "mine, v=2.jsonl"), ("method.target_modules", r".*layers\.[01]\.(q|v)_proj")],
)
def test_a_value_in_quotes_is_taken_as_it_is(key: str, value: str) -> None:
    sweep, faults = sweep_file.read(None, [f'{key}="{value}"', "data=files", "model=tiny"])
    assert faults == []
    group, _, name = key.partition(".")
    assert sweep.composed()[group][name] == value


def test_a_grid_over_an_interval_is_refused_and_a_sampler_takes_it() -> None:
    (fault,) = faults_of("optimizer.base_lr=interval(0.1,0.5)")
    assert fault == (
        "optimizer.base_lr: a grid cannot run over an interval, got 'interval(0.1, 0.5)' (choice(...), or sampler=tpe)"
    )
    assert faults_of("optimizer.base_lr=interval(0.1,0.5)", "sampler=tpe") == []


def test_an_interval_of_floats_over_whole_numbers_says_how_to_ask() -> None:
    """Both ends are whole, so only what lies between shows it."""
    (fault,) = faults_of("method.rank=interval(4,64)", "sampler=tpe")
    assert fault == "method.rank: takes whole numbers, got 'interval(4.0, 64.0)' (int(interval(4, 64)))"
    assert faults_of("method.rank=int(interval(4,64))", "sampler=tpe") == []


def test_a_fault_of_two_axes_together_is_found_before_anything_runs() -> None:
    (fault,) = faults_of("train.max_steps=choice(100,50)", "train.warmup_steps=choice(0,60)")
    assert fault.startswith("train.warmup_steps: must be below train.max_steps=50 (at train.max_steps=50")


def test_faults_of_many_kinds_are_told_at_once() -> None:
    messages = faults_of(
        "method.rank=choice(8,8)", "train.seed=range(5,1)", "optimizer.ratio=-1", "methd.x=1,2", "data=fcts"
    )
    fields = [fault.partition(":")[0] for fault in messages]
    assert sorted(fields) == ["data", "methd.x", "method.rank", "train.seed"]
    messages = faults_of("method.rank=choice(8,8)", "optimizer.ratio=-1", "data=fcts,style")
    assert sorted(fault.partition(":")[0] for fault in messages) == ["data", "method.rank", "optimizer.ratio"]


# -- files --------------------------------------------------------------------------------------------------------


def test_a_sweep_files_space_may_be_dotted_or_nested(write: Write) -> None:
    dotted = read(file=write("space: {method.rank: 'choice(4,8)', optimizer.ratio: 'choice(1,4)'}"))
    nested = read(file=write("space: {method: {rank: 'choice(4,8)'}, optimizer: {ratio: 'choice(1,4)'}}"))
    assert dotted.axes == nested.axes
    assert [axis.key for axis in dotted.axes] == ["method.rank", "optimizer.ratio"]


def test_a_plain_value_in_the_space_is_fixed(write: Write) -> None:
    sweep = read(file=write("space: {method.rank: 4, method.use_rslora: true, train.max_grad_norm: null, data: facts}"))
    assert sweep.axes == ()
    config = sweep.base()
    assert (config.method.rank, config.method.use_rslora, config.data.name) == (4, True, "facts")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("space: {method.rank: [4, 8]}", "method.rank: must be in Hydra's grammar, got [4, 8] (choice(4, 8))"),
        ("space: 5", "space: must map a key"),
        ("method.rank: 8", "method.rank: dotted keys are read under `space` only (nest it: `method: {rank: 8}`)"),
        ("hydra: {searchpath: [pkg://x]}", "hydra: Hydra's own settings and search paths are refused"),
        ("study: 5", "study: must be a mapping, got 5"),
        ("- 1", "mine.yaml: must hold a mapping"),
        ("a: [", "mine.yaml: cannot be read"),
        ("train: 5", "train: must be a mapping, got 5"),
        ("trains: {max_steps: 5}", "trains: unknown group (did you mean train?)"),
    ],
)
def test_a_slip_in_a_sweep_file_is_one_fault(write: Write, text: str, told: str) -> None:
    (fault,) = faults_of(file=write(text))
    assert fault.startswith(told)


def test_a_sweep_file_that_is_no_text_is_a_fault(in_folder: Path) -> None:
    (in_folder / "x.yaml").write_bytes(b"space: \xff\xfe")
    (fault,) = faults_of(file="x.yaml")
    assert fault.startswith("x.yaml: cannot be read")


def test_the_study_is_named_for_its_file_unless_it_says_otherwise(write: Write) -> None:
    assert read(file=write("{}")).base().study.name == "mine"
    assert read(file=write("study: {root: elsewhere}")).base().study.name == "mine"
    assert read(file=write("study: {name: other}")).base().study.name == "other"
    assert read("study.name=third", file=write("study: {name: other}")).base().study.name == "third"


def test_a_shipped_sweep_is_found_from_anywhere_and_ones_own_comes_first(in_folder: Path) -> None:
    shipped = compose.shipped("sweeps") / "quickstart.yaml"
    for name in ("sweeps/quickstart.yaml", "quickstart.yaml", "quickstart"):
        assert sweep_file.find(name) == shipped
    (in_folder / "sweeps").mkdir()
    (in_folder / "sweeps" / "quickstart.yaml").write_text("{}")
    assert sweep_file.find("sweeps/quickstart.yaml") == Path("sweeps/quickstart.yaml")
    with pytest.raises(
        ConfigError, match=r"no such file, got 'sweeps/quikstart.yaml'.*did you mean sweeps/quickstart.yaml"
    ):
        sweep_file.find("sweeps/quikstart.yaml")


# -- the command line ----------------------------------------------------------------------------------------------

THREE = "space: {method.rank: 'choice(4,16)', method.alpha: 'choice(8,32)', optimizer.ratio: 'choice(1,4)'}"


def test_the_command_line_replaces_an_axis_in_its_place(write: Write) -> None:
    sweep = read("method.alpha=choice(1,2,3)", file=write(THREE))
    assert [axis.key for axis in sweep.axes] == ["method.rank", "method.alpha", "optimizer.ratio"]
    assert sweep.axes[1].values == (1, 2, 3)


def test_the_command_line_fixes_an_axis(write: Write) -> None:
    sweep = read("method.alpha=5", file=write(THREE))
    assert [axis.key for axis in sweep.axes] == ["method.rank", "optimizer.ratio"]
    assert {sweep.config(cell).method.alpha for cell in sweep.cells()} == {5.0}


def test_the_command_line_adds_an_axis_at_the_end(write: Write) -> None:
    sweep = read("train.seed=range(2)", file=write(THREE))
    assert [axis.key for axis in sweep.axes][-1] == "train.seed"


def test_the_last_word_on_a_key_holds(write: Write) -> None:
    sweep = read("method.rank=8", "method.rank=choice(2,3)", file=write(THREE))
    assert sweep.axes[-1].values == (2, 3)
    assert [sweep.config(cell).method.rank for cell in sweep.cells()][-2:] == [2, 3]
    assert read("method.rank=choice(2,3)", "method.rank=8", file=write(THREE)).base().method.rank == 8


def test_a_plus_before_a_key_changes_nothing() -> None:
    for sign in ("", "+", "++"):
        assert read(f"{sign}method.rank=5").base().method.rank == 5
        assert read(f"{sign}data=facts").base().data.name == "facts"


# -- cells --------------------------------------------------------------------------------------------------------


def test_cells_are_numbered_in_the_order_of_the_axes_the_last_one_fastest(write: Write) -> None:
    sweep = read(file=write(THREE))
    by_hand = itertools.product((4, 16), (8, 32), (1, 4))
    keys = ("method.rank", "method.alpha", "optimizer.ratio")
    assert sweep.cells() == tuple(Cell(n, dict(zip(keys, values, strict=True))) for n, values in enumerate(by_hand))
    for cell in sweep.cells():
        config = sweep.config(cell)
        assert [config.method.rank, config.method.alpha, config.optimizer.ratio] == list(cell.params.values())


def test_no_axis_is_one_cell() -> None:
    assert read().cells() == (Cell(0, {}),)


def test_derived_values_follow_each_cell(write: Write) -> None:
    sweep = read(
        file=write(
            """
            method: {alpha: '${times:2,${method.rank}}'}
            optimizer: {weight_decay_B: '${divide:${optimizer.weight_decay},${optimizer.ratio}}', weight_decay: 0.1}
            space: {method.rank: 'choice(4,16)', optimizer.ratio: 'choice(1,4)'}
            """
        )
    )
    assert check.check(sweep)[1] == []
    for cell in sweep.cells():
        config = sweep.config(cell)
        assert config.method.alpha == 2 * cell.params["method.rank"]
        assert config.optimizer.weight_decay_B == 0.1 / cell.params["optimizer.ratio"]


def test_a_group_axis_changes_the_whole_group_and_keys_still_apply_on_top() -> None:
    sweep = read("data=choice(facts,style)", "data.subjects=choice(16,32)", "data.max_length=48")
    assert check.check(sweep)[1] == []
    configs = [sweep.config(cell).data for cell in sweep.cells()]
    assert [(data.name, data.subjects) for data in configs] == [
        ("facts", 16),
        ("facts", 32),
        ("style", 16),
        ("style", 32),
    ]
    assert {data.max_length for data in configs} == {48}
    assert [data.eval_size for data in configs] == [256, 256, 64, 64]


def test_a_list_replaces_a_list(write: Write) -> None:
    sweep = read(
        "method.target_modules=choice([q_proj],all-linear)", file=write("method: {target_modules: [k_proj, v_proj]}")
    )
    assert [sweep.config(cell).method.target_modules for cell in sweep.cells()] == [["q_proj"], "all-linear"]


def test_variants_hold_every_value_of_every_axis_by_itself() -> None:
    variants, _ = check.check(read("method.rank=choice(2,4,8)", "data=facts,style"))
    configs = [(groups["method"].rank, groups["data"].name) for groups in variants]
    assert configs == [(2, "facts"), (4, "facts"), (8, "facts"), (2, "style")]


@pytest.mark.parametrize(
    ("lines", "largest"),
    [
        ([], 8),
        (["method.rank=5"], 5),
        (["method.rank=choice(4,64,16)"], 64),
        (["method.rank=range(1,7)"], 6),
        (["method.rank=int(interval(1,9))", "sampler=tpe"], 9),
        (["train.seed=range(4)", "method.rank='${power:2,${train.seed}}'"], 8),
        (
            [
                "train.seed=choice(3,1)",
                "method.alpha=choice(1,5)",
                "method.rank='${times:${train.seed},${method.alpha}}'",
            ],
            15,
        ),
    ],
)
def test_the_largest_rank_is_that_of_any_cell(lines: list[str], largest: int) -> None:
    sweep = read(*lines)
    assert sweep.largest_rank() == largest
    if sweep.base().sampler.name == "grid":
        assert sweep.largest_rank() == max(sweep.config(cell).method.rank for cell in sweep.cells())


# -- distributions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "distribution"),
    [
        ("method.rank=choice(4,16,64)", IntDistribution(0, 2)),
        ("optimizer.base_lr=choice(1e-5,1e-3)", IntDistribution(0, 1)),
        ("train.seed=range(3)", IntDistribution(0, 2)),
        ("method.rank=choice(64,4)", CategoricalDistribution(range(2))),
        ("method.use_rslora=choice(false,true)", CategoricalDistribution(range(2))),
        ("method.target_modules=choice([q_proj],all-linear)", CategoricalDistribution(range(2))),
        ("method.rank=choice(8)", CategoricalDistribution(range(1))),
        ("data=facts,style", CategoricalDistribution(range(2))),
        ("optimizer.base_lr=interval(0.1,0.5)", FloatDistribution(0.1, 0.5)),
        ("optimizer.base_lr=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("method.rank=int(interval(1,64))", IntDistribution(1, 64)),
        ("method.rank=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
    ],
)
def test_what_a_sampler_draws_decodes_to_values_of_the_axis(line: str, distribution: Any) -> None:
    sweep = read(line, "sampler=random")
    ((key, parsed),) = sweep.distributions().items()
    assert parsed == distribution
    drawn = [optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=n)).ask({key: parsed}) for n in range(40)]
    values = [sweep.decode(trial.params)[key] for trial in drawn]
    (overrides,) = sweep.axes
    if overrides.kind == "interval":
        assert all(overrides.low <= value <= overrides.high and type(value) is type(overrides.low) for value in values)
    else:
        # Each value is met, and none but these.
        assert [value for value in overrides.values if value in values] == list(overrides.values)
        assert all(value in overrides.values for value in values)
    for number, value in enumerate(values[:5]):
        assert sweep.config(Cell(number, {key: value})) is not None


# -- relaunching ---------------------------------------------------------------------------------------------------

LAUNCHED = """
    method: {alpha: '${times:2,${method.rank}}', target_modules: [q_proj, v_proj]}
    optimizer: {base_lr: 1e-5, eps: 1e-8}
    tracker: {tags: ['null', 'a: b']}
    space: {method.rank: 'choice(4,16)', optimizer.ratio: 'choice(1,4)', method.use_rslora: 'choice(true,false)'}
"""


def relaunch(folder: Path, first: Sweep, second: Sweep) -> list[str]:
    (folder / "config.yaml").write_text(compose.to_yaml(first.as_launched()))
    before = saved.load_launched(folder)
    assert before is not None
    return saved.differences(before, second.as_launched())


def test_what_was_launched_comes_back_equal_from_yaml(write: Write, tmp_path: Path) -> None:
    sweep = read("sampler=tpe", "pruner=asha", file=write(LAUNCHED))
    (tmp_path / "config.yaml").write_text(compose.to_yaml(sweep.as_launched()))
    assert saved.load_launched(tmp_path) == sweep.as_launched()
    assert relaunch(tmp_path, sweep, read("sampler=tpe", "pruner=asha", file="mine.yaml")) == []


@pytest.mark.parametrize(
    "line",
    [
        "tracker=none",
        "tracker.mode=online",
        "tracker.tags=[x]",
        "launcher.device=cpu",
        "launcher.threads=1",
        "study.root=x",
        "study.keep_adapters=2",
        "train.slots=3",
    ],
)
def test_how_a_study_runs_may_change_on_a_relaunch(write: Write, tmp_path: Path, line: str) -> None:
    file = write(LAUNCHED)
    assert relaunch(tmp_path, read(file=file), read(line, file=file)) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("method.dropout=0.5", "method.dropout: 0.0 -> 0.5"),
        ("method.alpha=5", "method.alpha: ${times:2,${method.rank}} -> 5"),
        ("method.target_modules=[q_proj]", "method.target_modules.1: v_proj -> absent"),
        ("optimizer.ratio=choice(1,8)", "space.optimizer.ratio: choice(1, 4) -> choice(1, 8)"),
        ("train.seed=range(2)", "space.train.seed: absent -> choice(0, 1)"),
        ("train.max_steps=201", "train.max_steps: 200 -> 201"),
        ("health.min_delta_rel=0.5", "health.min_delta_rel: 0.001 -> 0.5"),
        ("study.name=other", "study.name: mine -> other"),
        ("data.seed=1", "data.seed: 0 -> 1"),
    ],
)
def test_what_a_study_means_may_not_change(write: Write, tmp_path: Path, line: str, told: str) -> None:
    file = write(LAUNCHED)
    assert relaunch(tmp_path, read(file=file), read(line, file=file)) == [told]


def test_a_fixed_axis_is_another_meaning(write: Write, tmp_path: Path) -> None:
    file = write(LAUNCHED)
    assert relaunch(tmp_path, read(file=file), read("method.use_rslora=true", file=file)) == [
        "method.use_rslora: False -> True",
        "space.method.use_rslora: choice(true, false) -> absent",
    ]


def test_a_folder_without_a_config_was_never_launched_and_a_broken_one_is_a_fault(tmp_path: Path) -> None:
    assert saved.load_launched(tmp_path) is None
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        saved.load_launched(tmp_path)


# -- samplers and pruners by _target_ --------------------------------------------------------------------------------


@pytest.fixture
def alarm(tmp_path: Path) -> Path:
    """A file that appears when anything of the stranger's was run."""
    return tmp_path / "alarm"


def strangers(alarm: Path) -> dict[str, tuple[Mapping[str, Any], str]]:
    """name -> (instance, the part of it that is refused)."""
    touch = {"_target_": "os.system", "command": f"touch {alarm}"}
    good = "optuna.samplers.RandomSampler"
    return {
        "os.system": (touch, "_target_"),
        "a prefix that fits": ({"_target_": "optuna.samplers._base.np.load", "file": "x"}, "_target_"),
        "a module below": ({"_target_": "optuna.samplers._random.RandomSampler"}, "_target_"),
        "the base class": ({"_target_": "optuna.samplers.nothing"}, "_target_"),
        "no sampler": ({"_target_": "optuna.samplers.intersection_search_space"}, "_target_"),
        "optuna, but no sampler": ({"_target_": "optuna.create_study"}, "_target_"),
        "a pruner": ({"_target_": "optuna.pruners.MedianPruner"}, "_target_"),
        "none": ({"seed": 1}, "_target_"),
        "no text": ({"_target_": 5}, "_target_"),
        "a list": ({"_target_": [good]}, "_target_"),
        "nested": ({"_target_": "optuna.samplers.PartialFixedSampler", "base_sampler": touch}, "base_sampler._target_"),
        "in a list": ({"_target_": good, "seed": [1, touch]}, "seed.1._target_"),
        "in a mapping": ({"_target_": good, "seed": {"a": {"b": touch}}}, "seed.a.b._target_"),
        "positional": ({"_target_": good, "_args_": [touch]}, "_args_.0"),
        "positional, plain": ({"_target_": good, "_args_": [1]}, "_args_.0"),
        "partial": ({"_target_": good, "_partial_": True}, "_partial_"),
        "recursive": ({"_target_": good, "_recursive_": False}, "_recursive_"),
        "convert": ({"_target_": good, "_convert_": "all"}, "_convert_"),
    }


@pytest.mark.parametrize("name", strangers(Path()))
def test_a_target_outside_optunas_own_classes_is_refused_and_never_run(write: Write, alarm: Path, name: str) -> None:
    instance, refused = strangers(alarm)[name]
    file = write("{}")
    content = {"sampler": {"name": "optuna", "n_trials": 3, "instance": dict(instance)}}
    OmegaConf.save(OmegaConf.create(content), file)
    messages = faults_of(file=file)
    assert any(fault.startswith(f"sampler.instance.{refused}") for fault in messages), messages
    with pytest.raises(ConfigError):
        optuna_classes.instance(instance, "samplers")
    assert not alarm.exists()
    assert os.system(f"touch {alarm}") == 0
    assert alarm.exists(), "the canary sings when it is let out"


def test_a_target_on_the_command_line_is_held_to_the_same(alarm: Path) -> None:
    messages = faults_of(
        "sampler=tpe", "sampler.instance._target_=os.system", f"+sampler.instance.command='touch {alarm}'"
    )
    assert messages[0].startswith("sampler.instance._target_: must be a class of optuna.samplers, got 'os.system'")
    messages = faults_of("pruner=median", "pruner.instance._target_=optuna.samplers.TPESampler")
    assert messages[0].startswith("pruner.instance._target_: must be a class of optuna.pruners")
    assert not alarm.exists()


def test_a_target_elsewhere_in_a_configuration_is_an_unknown_key(alarm: Path) -> None:
    assert faults_of("+method._target_=os.system")[0].startswith("method._target_: unknown key")
    assert faults_of("+data.path._target_=os.system")[0].startswith("data.path: ")


@pytest.mark.parametrize(
    ("kind", "node", "made"),
    [
        ("samplers", {"_target_": "optuna.samplers.TPESampler", "seed": 3}, optuna.samplers.TPESampler),
        ("pruners", {"_target_": "optuna.pruners.MedianPruner"}, optuna.pruners.MedianPruner),
        (
            "pruners",
            {
                "_target_": "optuna.pruners.PatientPruner",
                "patience": 2,
                "wrapped_pruner": {"_target_": "optuna.pruners.ThresholdPruner", "upper": 9.0},
            },
            optuna.pruners.PatientPruner,
        ),
    ],
)
def test_optunas_own_classes_are_made_nested_ones_too(kind: Any, node: Mapping[str, Any], made: type) -> None:
    assert type(optuna_classes.instance(node, kind)) is made


def test_arguments_that_a_class_does_not_take_are_a_fault() -> None:
    (fault,) = faults_of("sampler=tpe", "+sampler.instance.sed=3")
    assert fault.startswith("sampler.instance: optuna.samplers.TPESampler refuses these arguments: ")
    assert "sed" in fault


def test_rungs_that_no_evaluation_reaches_are_told_before_anything_starts(in_folder: Path) -> None:
    Path("ask.yaml").write_text("space: {method.rank: 'choice(2, 4)'}\n")
    overrides = ["pruner=asha", "train.max_steps=40", "train.eval_every=40"]
    sweep, faults = sweep_file.read("ask.yaml", overrides)
    assert faults == []
    _, parsed = check.check(sweep)
    assert [fault.field for fault in parsed] == ["pruner.min_steps"]


BOMBS: dict[str, bytes] = {
    "aliases": b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 10)),
    "an alias of itself": b"a: &a [*a]",
    "nesting": b"a: " + b"[" * 10_000 + b"]" * 10_000,
    "a tag": b"a: !!python/object/apply:os.system ['touch pwned']",
    "another encoding": "space: {method.rank: 'choice(2, 4)'}".encode("utf-16"),
    "a key twice": b"a: 1\na: 2",
    "no end": b"a: [",
}


@pytest.mark.parametrize("where", ["mine.yaml", "conf/model/mine.yaml"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_of_yaml_that_cannot_be_read_within_bounds_is_named_in_one_line(
    in_folder: Path, where: str, bomb: str
) -> None:
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    Path(where).write_bytes(BOMBS[bomb])
    with pytest.raises(ConfigError, match=r"mine\.yaml: cannot be read: ") as raised:
        if where == "mine.yaml":
            sweep_file.read(where, [])
        else:
            check.check(sweep_file.read(None, ["model=mine"])[0])
            sweep_file.read(None, ["model=mine"])[0].base()
    assert len(str(raised.value).splitlines()) == 1
    assert not Path("pwned").exists()


def test_what_is_no_file_is_refused_as_a_sweep(in_folder: Path) -> None:
    os.mkfifo("fifo.yaml")
    Path("zero.yaml").symlink_to("/dev/zero")
    with Path("large.yaml").open("wb") as file:
        file.truncate(2**40)
    kinds = (("fifo", "is a FIFO"), ("zero", "is a device"), ("large", "is larger than 1,048,576 bytes"))
    for name, kind in kinds:
        with pytest.raises(ConfigError, match=f"cannot be read: it {kind}"):
            sweep_file.read(f"{name}.yaml", [])


def test_references_that_double_a_text_again_and_again_are_ended(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_sweep.sweep.compose.COMPOSE_SECONDS", 0.5)
    doubling = {f"p{i}": f"${{tracker.p{i + 1}}}" * 2 for i in range(40)} | {"p40": "x"}
    Path("x.yaml").write_text(yaml.safe_dump({"tracker": doubling, "space": {"method.rank": "choice(2, 4)"}}))
    _, faults = check.check(sweep_file.read("x.yaml", [])[0])
    assert [fault.rule for fault in faults] == ["cannot be resolved: it takes longer than 0.5 s"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("method.rank=" + "[" * 3000 + "]" * 3000, "is nested too deep"),
        ("method.rank=choice(" + ",".join(map(str, range(10**5))) + ")", "must have at most 100,000 characters"),
    ],
    ids=["nesting", "length"],
)
def test_an_override_beyond_its_bounds_is_one_line(line: str, told: str) -> None:
    _, (fault,) = sweep_file.read(None, [line])
    assert fault.field == "method.rank" and told in fault.rule


def test_a_grid_of_more_cells_than_anybody_means_is_refused_at_once(in_folder: Path) -> None:
    sweep, faults = sweep_file.read(None, ["train.seed=range(0,9999)", "method.rank=choice(2,4,8,16,32,64)"])
    assert not faults
    _, (fault,) = check.check(sweep)
    assert fault.rule.startswith("must have at most 50,000 combinations") and fault.got == "59,994"
