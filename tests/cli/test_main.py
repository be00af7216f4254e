"""The verbs from the outside: what a user types, sees and finds on disk."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import Run

from lora_sweep.tiny.pretrain import WEIGHTS

Tree = dict[str, bytes | None]


def tree(folder: Path) -> Tree:
    """Everything below the folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def small(**more: object) -> str:
    """A sweep file of two cells that would run in no time; written as mine.yaml."""
    content = {
        "data": {"subjects": 8, "eval_size": 4, "probe_size": 4},
        "train": {"max_steps": 2, "eval_every": 1, "batch_size": 2, "eval_batch_size": 4, "slots": 2},
        "tracker": {"name": "none"},
        "space": {"method.rank": "choice(2,4)"},
    }
    Path("mine.yaml").write_text(json.dumps(content | more))
    return "mine.yaml"


def refused(run: Run, *words: str) -> list[str]:
    """The lines told; nothing else is said or done."""
    before = tree(Path.cwd())
    said = run(*words)
    assert said.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    assert tree(Path.cwd()) == before
    lines = said.err.splitlines()
    assert lines
    assert all(": " in line and len(line) < 600 for line in lines)
    return lines


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("method.rnk=8", "method.rnk: unknown key (did you mean rank?)"),
        ("methd.rank=8", "methd: unknown group (did you mean method?)"),
        ("rank=8", "rank: unknown key (did you mean method.rank?)"),
        ("method.alpha=high", "method.alpha: must be a valid number, unable to parse string as a number, got 'high'"),
        ("method.rank=-1", "method.rank: must be at least 1, got -1"),
        ("method.rank=choice(4,-1)", "method.rank: must be at least 1, got -1"),
        ("method.rank=4", "space: is empty (give it an axis: method.rank: choice(4, 16))"),
        (
            "optimizer.base_lr=interval(0.1,0.5)",
            "optimizer.base_lr: a grid cannot run over an interval, got 'interval(0.1, 0.5)' "
            "(choice(...), or sampler=tpe)",
        ),
        ("method.rank=choice(8,8)", "method.rank: a choice must not repeat a value (8), got 'choice(8,8)'"),
        (
            "method.target_modules=[q_prj]",
            "method.target_modules: matches no module of the base, got 'q_prj' (linears are q_proj, k_proj, v_proj, "
            "o_proj, gate_proj, up_proj, down_proj, lm_head)",
        ),
        ("data=fcts", "data: must be one of facts, files, hub, real_facts, style, got 'fcts' (did you mean facts?)"),
        ("model.path=./none", "model.path: no such checkpoint folder, got './none'"),
        (
            "study.name=../elsewhere",
            "study.name: must be a plain name: letters, digits, `.`, `_`, `-`, no path parts, got '../elsewhere'",
        ),
        (
            "study.name=/etc",
            "study.name: must be a plain name: letters, digits, `.`, `_`, `-`, no path parts, got '/etc'",
        ),
        (
            "hydra.run.dir=x",
            "hydra.run.dir: Hydra's own settings are not read (the sampler is sampler=grid, random or tpe; devices are "
            "launcher.device; studies lie in study.root)",
        ),
        ("launcher.device=cuda:99", "launcher.device: this machine has "),
        ("train.eval_every=3", "train.eval_every: must be at most train.max_steps=2, got 3"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "launch"])
def test_one_slip_is_one_clear_line_and_nothing_is_left_behind(run: Run, verb: str, wrong: str, told: str) -> None:
    (line,) = refused(run, verb, small(), wrong)
    assert line.startswith(told)
    if not told.endswith("has "):
        assert line == told


def test_several_faults_of_all_rooms_are_told_at_once(run: Run) -> None:
    Path("broken.jsonl").write_text("{\n")
    Path("file").touch()
    file = small(space={"method.rank": "choice(8,8)", "method.alpha": "choice(4,-4)", "train.sed": "choice(1,2)"})
    wrong = ["method.target_modules=[q_prj]", "data=files", "data.path=broken.jsonl", "study.root=file"]
    lines = refused(run, "launch", file, *wrong)
    assert sorted(line.partition(":")[0] for line in lines) == [
        "data.path",
        "method.alpha",
        "method.rank",
        "method.target_modules",
        "study.root",
        "train.sed",
    ]


def test_data_that_cannot_be_read_is_told_with_its_place(run: Run) -> None:
    Path("broken.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (line,) = refused(run, "launch", small(data={}), "data=files", "data.path=broken.jsonl")
    assert line.startswith(
        "data.eval_share: holds out every example (1), by their hashes: none is left to train on (1 are"
    )
    assert "broken.jsonl:2: has no `text`, no `prompt` with a" in line
    (line,) = refused(run, "launch", "mine.yaml", "data=files", "data.path=none.jsonl")
    assert line == "data.path: cannot be read (No such file or directory), got 'none.jsonl'"
    (line,) = refused(run, "launch", "mine.yaml", "data=files")
    assert line == "data.path: is needed (data.path=...)"


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(run: Run) -> None:
    Path("file").write_text("")
    (line,) = refused(run, "launch", small(), "study.root=file")
    assert line.startswith("study.root: ")
    assert line.endswith("is a file, no folder, got 'file'")
    # Not even root may write here.
    (line,) = refused(run, "launch", small(), "study.root=/proc/nothing")
    assert line == "study.root: /proc cannot be written, got '/proc/nothing' (choose another study.root)"


def test_a_sweep_file_that_is_not_there_names_the_nearest(run: Run) -> None:
    (line,) = refused(run, "launch", "sweeps/quikstart.yaml")
    assert line == ("SWEEP: no such file, got 'sweeps/quikstart.yaml' (did you mean sweeps/quickstart.yaml?)")
    (line,) = refused(run, "plan", "method.rank=8")
    assert line.startswith("SWEEP: must be a sweep file, got 'method.rank=8'")


def test_an_empty_space_is_told(run: Run) -> None:
    for space in ("{}", "null"):
        (line,) = refused(run, "launch", small(space=json.loads(space)))
        assert line == "space: is empty (give it an axis: method.rank: choice(4, 16))"


@pytest.mark.parametrize("target", ["os.system", "optuna.samplers._base.np.load", "optuna.create_study"])
def test_a_target_outside_optunas_classes_is_refused(run: Run, target: str) -> None:
    instance = {"_target_": target, "command": "touch alarm", "file": "mine.yaml"}
    (line,) = refused(run, "launch", small(sampler={"name": "optuna", "n_trials": 2, "instance": instance}))
    assert line.startswith(f"sampler.instance._target_: must be a class of optuna.samplers, got '{target}'")


def test_a_sweep_file_reads_no_secrets(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/the-secret")
    for text in ("${oc.env:HOME}", "${oc.${study.name}:HOME}"):
        (line,) = refused(run, "launch", small(study={"name": "env"}, tracker={"entity": text}))
        assert line.startswith("tracker.entity: refused: only the resolvers times, divide, power")
        assert "secret" not in line


def test_a_checkpoint_that_is_a_pickle_is_refused(run: Run) -> None:
    shutil.copytree(WEIGHTS, "pickled")
    Path("pickled/model.safetensors").unlink()
    Path("pickled/pytorch_model.bin").write_bytes(pickle.dumps({}))
    (line,) = refused(run, "launch", small(), "model=local", "model.path=pickled")
    assert line.startswith("model.path: holds no safetensors; pickled weights can run code and are refused")


def test_train_refuses_an_axis_and_says_what_runs_one(run: Run) -> None:
    (line,) = refused(run, "train", "method.rank=choice(2,4)")
    assert line == "method.rank: train runs one trial, got 'choice(2, 4)' (use launch)"


@pytest.mark.parametrize("verb", ["status", "pick"])
def test_a_study_that_is_not_there_is_the_users_mistake(run: Run, verb: str) -> None:
    Path("empty").mkdir()
    for folder in ("none", "empty"):
        (line,) = refused(run, verb, folder)
        assert "no study here" in line


def test_a_word_that_is_no_verb_or_option_is_the_users_mistake(run: Run) -> None:
    for words in (["lunch"], ["plan", "--jsn", small()], ["plan"]):
        said = run(*words)
        assert said.code == 2
        assert "Traceback" not in said.err


def test_code_beside_a_checkpoint_is_asked_for_on_the_command_line_only(run: Run) -> None:
    message = "model.trust_remote_code: is heard on the command line only, got True (model.trust_remote_code=true after"
    (line,) = refused(run, "plan", small(model={"trust_remote_code": True}))
    assert line.startswith(message)
    (line,) = refused(run, "plan", small(space={"model.trust_remote_code": "choice(true,false)"}))
    assert "cannot be swept" in line
    said = run("plan", small(), "model.trust_remote_code=true")
    assert said.code == 0
    assert said.err == "model.trust_remote_code is on: code that lies beside embedded:tiny runs with your rights\n"


def test_a_tokenizer_that_outgrew_its_base_is_told_before_anything_starts(run: Run) -> None:
    """As a checkpoint is when tokens for chat were added and its embedding was not resized."""
    shutil.copytree(WEIGHTS, "grown")
    file = Path("grown/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "</s>":
            tokenizer["added_tokens"].append(token | {"id": 1024, "content": "<|im_end|>"})
    file.write_text(json.dumps(tokenizer))
    rows = [json.dumps({"text": f"Ada {n}<|im_end|>"}) for n in range(50)]
    Path("mine.jsonl").write_text("\n".join(rows))
    own = ["model=local", "model.path=grown", "model.dtype=fp32", "data=files", "data.path=mine.jsonl"]
    for verb in ("plan", "launch"):
        (line,) = refused(run, verb, small(), *own)
        assert line.startswith("model.path: its tokenizer gives the id 1024, its embedding ends at 1023, got 'grown'")
    Path("mine.jsonl").write_text("\n".join(row.replace("<|im_end|>", " was" * 200) for row in rows))
    said = run("plan", small(), *own, "data.max_length=200", "data.eval_share=0.3")
    assert said.code == 0
    assert said.err.splitlines()[-1] == "data.max_length: rows have up to 200 tokens, the base was made for 128"


def test_what_became_of_the_rows_of_a_file_is_said_and_counted(run: Run) -> None:
    lines = [json.dumps({"prompt": f"Ada {n} was", "completion": " born in Oslo" * n}) for n in range(1, 30)]
    Path("mine.jsonl").write_text("\n".join([*lines[:9], '{"prompt": ', *lines[9:]]))
    Path("eval.jsonl").write_text("\n".join(lines[:4]))
    own = ["data=files", "data.path=mine.jsonl", "data.eval_path=eval.jsonl", "data.max_length=64"]
    said = run("plan", small(data={"probe_size": 4}), *own, "--json")
    assert said.code == 0
    plan = json.loads(said.out)
    assert (plan["train_examples"], plan["eval_examples"]) == (25, 4)
    assert (plan["rows_skipped"], plan["duplicates_removed"]) == (1, 4)
    assert plan["lengths"]["max"] == 64
    assert plan["share_cut"] == plan["examples_cut"] / 25
    skipped, removed, cut = said.err.splitlines()
    assert skipped == "data: 1 of 34 rows were skipped: mine.jsonl:10: is no JSON (Expecting value at column 12)"
    assert removed.startswith("data: 4 training examples stand in the evaluation set too")
    assert cut.startswith(f"data.max_length: {plan['examples_cut']} of 25 training examples were cut")


# -- plan ---------------------------------------------------------------------------------------------------------


def test_plan_shows_cells_sizes_and_time_and_leaves_nothing_behind(run: Run) -> None:
    file = small()
    before = tree(Path.cwd())
    said = run("plan", file, "method.use_rslora=choice(true,false)")
    assert (said.code, said.err) == (0, "")
    assert tree(Path.cwd()) == before
    assert said.out.startswith("mine: 4 cells, 4 distinct runs, over method.rank, method.use_rslora\n")
    for word in (
        "base",
        "adapter, rank 2",
        "examples",
        "tokens",
        "lengths",
        "cut",
        "left out",
        "epoch",
        "time",
    ):
        assert f"{word} " in said.out
    assert "cell 0001: rank=2 use_rslora=false" in said.out


def test_plan_as_json_says_nothing_else_and_counts_right(run: Run) -> None:
    said = run("plan", small(), "--json")
    assert (said.code, said.err) == (0, "")
    plan = json.loads(said.out)
    assert (plan["cells"], plan["distinct_runs"], plan["classes"]) == (2, 2, [])
    assert plan["axes"] == {"method.rank": "choice(2, 4)"}
    assert (plan["train_examples"], plan["eval_examples"], plan["examples_cut"]) == (8, 4, 0)
    # Seven linears a layer, four layers: q, k, v, o of 128 x 128 and three of 128 x 344.
    a_rank = 4 * (4 * (128 + 128) + 3 * (128 + 344))
    assert plan["adapter_parameters"] == {"2": 2 * a_rank, "4": 4 * a_rank}
    # Two steps of two examples out of eight.
    assert (plan["epochs"], plan["steps_per_epoch"]) == (0.5, 4)
    assert plan["adapter_mib"]["4"] == plan["adapter_parameters"]["4"] * 4 / 2**20
    assert 0 < plan["lengths"]["median"] <= plan["lengths"]["p95"] <= plan["lengths"]["max"] <= 64
    assert plan["lengths"]["padded"] % 8 == 0
    assert 0 < plan["train_tokens"] < plan["tokens"]
    assert plan["seconds"] > 0


def test_plan_shows_the_classes_and_what_keeps_others_apart(run: Run) -> None:
    axes = ("method.rank=4", "method.alpha=choice(4,8,16)", "optimizer.ratio=choice(1,2,4)")
    said = run("plan", small(), *axes, "optimizer.eps_rule=scaled")
    assert said.out.startswith("mine: 9 cells, 5 distinct runs, over method.alpha, optimizer.ratio\n")
    assert "\ncell 0001 runs for 0003: bitwise\ncell 0002 runs for 0004 0006: bitwise\n" in said.out
    said = run("plan", small(), *axes)
    assert said.out.startswith("mine: 9 cells, 9 distinct runs")
    assert "study.fold=near would leave 5 runs, equal up to 2e-03 of the loss (eps)" in said.out
    plan = json.loads(run("plan", small(), *axes, "study.fold=near", "--json").out)
    assert plan["distinct_runs"] == 5
    assert plan["classes"][0] == {"cells": [1, 3], "grade": "near", "reasons": ["eps"], "size": 2e-3}


def test_warnings_stand_under_plan_and_in_its_json_and_are_no_fault(run: Run) -> None:
    few = "data.eval_size: 4 evaluation examples distinguish runs"
    said = run("plan", small())
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[-1].startswith(f"warning: {few}")
    (warning,) = json.loads(run("plan", small(), "--json").out)["warnings"]
    assert f"{warning['field']}: {warning['sentence']}".startswith(few)
    assert json.loads(run("plan", small(), "data.eval_size=200", "--json").out)["warnings"] == []
    said = run("launch", small())
    assert said.code == 0
    assert said.out.splitlines()[1].startswith(f"warning: {few}"), "before anything is trained"


def test_plan_says_that_drawn_cells_may_be_fewer_runs_unless_folding_is_off(run: Run) -> None:
    words = ("plan", small(), "sampler=random", "sampler.n_trials=3", "method.alpha=choice(8,16)")
    message = "\na cell that is drawn and is the same run as one before it is not run, but ends as that one\n"
    assert message in run(*words).out
    assert message not in run(*words, "study.fold=off").out


def test_options_may_stand_anywhere(run: Run) -> None:
    file = small()
    plans = [
        json.loads(run(*words).out)
        for words in (["plan", "--json", file, "train.seed=1,2"], ["plan", file, "train.seed=1,2", "--json"])
    ]
    assert [plan["cells"] for plan in plans] == [4, 4]
