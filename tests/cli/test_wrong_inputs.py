"""Wrong inputs of the kinds that people give: each is one line a fault, exit code 2, and what it proposes works."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_sweep.cli.validate import validate_sweep
from lora_sweep.errors import ConfigError, Fault

FILES = {
    "empty.jsonl": ("", "data.path: holds no example"),
    "blank.jsonl": ("\n\n", "data.path: holds no example"),
    "words.jsonl": ("just words\nand more\n", "none of the first 2 rows can be used; words.jsonl:1 is no JSON"),
    "nulls.jsonl": ('{"prompt": null, "completion": "a"}\n', "its only row cannot be used; nulls.jsonl:1 has a `prompt`"),
    "questions.jsonl": ('{"question": "a", "answer": "b"}\n' * 2, "but `question`, `answer`"),
    "queries.jsonl": ('{"query": "a", "response": "b"}\n', "but `query`, `response`"),
    "pairs.csv": ("input,output\na,b\n", "pairs.csv:2 has no `text`"),
    "preferences.jsonl": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "but `prompt`, `chosen`, `rejected`"),
    "talks.jsonl": (
        '{"dialogue": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', "but `dialogue`",
    ),
    "labels.jsonl": (
        '{"prompt": "a", "completion": "b", "label": true}\n{"prompt": "a", "completion": "c", "label": false}\n',
        "data.undesirable: must be skip or train: 1 of the first 2 rows of labels.jsonl have `label: false`",
    ),
    "number.jsonl": ("5\n", "number.jsonl:1 is no JSON object"),
    "list.jsonl": ("[1]\n", "list.jsonl:1 is no JSON object"),
    "roles.jsonl": ('{"messages": [{"role": "narrator", "content": "a"}]}\n', "messages[0] has the role `narrator`"),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}\n', "no message of the assistant has something"),
    "image.jsonl": ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', "a part of the type `image`"),
    "weight.jsonl": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}\n',
        "messages[1] has the weight 0.5; a turn has a loss (1) or none (0)",
    ),
    "several.json": ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "holds several arrays of objects (train, test)"),
    "broken.json": ('{"text": ', "broken.json:1: is no JSON (Expecting value at column 10)"),
    "split.json": ('{"columns": ["a"], "data": [[1, 2]]}', "has rows in `data` that are no lists of 1 values"),
    "twice.csv": ("text,text\na,b\n", "twice.csv:1: names a column twice (text, text)"),
    "sheet.xlsx": ("x", "is of no known kind"),
    "void.jsonl": ('{"text": ""}\n', "void.jsonl:1 has an empty `text`"),
    "truth.jsonl": ('{"prompt": "a", "completion": true}\n', "has a `completion` that is true or false, no text"),
    "word.jsonl": ('{"messages": "hello"}\n', "has `messages` that are neither a list nor JSON of one"),
    "object.jsonl": ('{"messages": {"role": "user", "content": "a"}}\n', "has `messages` that are one object"),
    "documents.jsonl": ('{"document": "a b c"}\n', "but `document`"),
}  # fmt: skip
"""Name -> (content, what is said of it)."""
WITH_REMEDY = {
    *{"questions.jsonl", "queries.jsonl", "pairs.csv", "preferences.jsonl", "talks.jsonl", "documents.jsonl"},
    "labels.jsonl",
}
"""Files that are data once something is typed; the others have to be mended."""

QUESTIONS = "data=files data.path=questions.jsonl"
LINES = {
    "data=files": "data.path: is needed (data.path=...)",
    "data=files data.path=nothing.jsonl": "data.path: cannot be read (No such file or directory), got 'nothing.jsonl'",
    "data=files data.path=org/set": "data.path: cannot be read (No such file or directory), got 'org/set' (a data set",
    "data=facts data.path=questions.jsonl": "data.path: is not read by data=facts",
    f"{QUESTIONS} data.split=train": "data.split: is of a hub data set, files have none, got 'train' (data.split=null)",
    f"{QUESTIONS} data.columns={{promt:question}}": "data.columns: must name messages, tools, conversations",
    f"{QUESTIONS} data.columns={{prompt:question}}": "data.path: none of the first 2 rows can be used; questions.jsonl:1",
    f"{QUESTIONS} data.columns={{prompt:question,text:answer}}": "data.columns: must name what goes together: messages",
    f"{QUESTIONS} data.format=alpaca": "data.path: none of the first 2 rows can be used; questions.jsonl:1 has no `ins",
    f"{QUESTIONS} data.format=csv": "data.format: must be 'auto', 'alpaca', 'dolly', 'sharegpt', 'messages', 'prompt_",
    f"{QUESTIONS} data.columns={{prompt:a,completion:b}}": "data.path: none of the first 2 rows can be used; questions",
    f"{QUESTIONS} data.columns={{prompt:question,completion:answer}} data.chat_template=no.jinja":
        "data.chat_template: cannot be read (No such file or directory), got 'no.jinja' (a jinja file is needed)",
    "data=facts data.format=text": "data.format: is not read by data=facts, got 'text' (say data=files or data=hub)",
    "data.subjects=0": "data.subjects: must be at least 1, got 0",
    "data=facts data.subjects=100000": "data.subjects: people: must be from 1 to 6500, got 100000",
    "method.rank=0": "method.rank: must be at least 1, got 0",
    "method.rank=4.5": "method.rank: must be a valid integer",
    "method.rank=true": "method.rank: must be a number, got True",
    "method.rank=choice(4,4)": "method.rank: a choice must not repeat a value (4)",
    "method.rank=choice()": "method.rank=choice(): is not in Hydra's override grammar",
    "method.rank=range(4,4)": "method.rank: the range is empty (its end is exclusive)",
    "method.rank=interval(8,4)": "method.rank: low < high must hold",
    "method.alpha=-1": "method.alpha: must be greater than 0, got -1",
    "method.use_rslora=2": "method.use_rslora: must be a valid boolean",
    "method.dropout=1": "method.dropout: must be less than 1, got 1",
    "method.target_modules=nothing": "method.target_modules: matches no module of the base, got 'nothing'",
    "method.ranks=4": "method.ranks: unknown key (did you mean rank?)",
    "optimizer.base_lr=0": "optimizer.base_lr: must be greater than 0, got 0",
    "optimizer.base_lr=abc": "optimizer.base_lr: must be a valid number",
    "optimizer.base_lr=tag(log,interval(0,1))": "optimizer.base_lr: a logarithmic interval must start above 0",
    "optimizer.base_lr=interval(1e-4,1e-3)": "optimizer.base_lr: a grid cannot run over an interval",
    "optimizer.optim=adam": "optimizer.optim: must be 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit' or 'sgd'",
    "optimizer.eps_rule=torchh": "optimizer.eps_rule: must be 'torch' or 'scaled', got 'torchh'",
    "optimizer.ratio=-1": "optimizer.ratio: must be greater than 0, got -1",
    "train.max_steps=0": "train.max_steps: must be at least 1, got 0",
    "train.eval_every=100": "train.eval_every: must be at most train.max_steps=24, got 100",
    "train.warmup_steps=24": "train.warmup_steps: must be below train.max_steps=24, got 24",
    "train.slots=0": "train.slots: must be at least 1, got 0",
    "train.slots=choice(1,2)": "train.slots: cannot be swept, it says how a study is run, not what is trained",
    "launcher.threads=choice(1,2)": "launcher.threads: cannot be swept, only keys of model, data, method, optimizer",
    "model.trust_remote_code=choice(true,false)": "model.trust_remote_code: cannot be swept, it says how a study is run",
    "sampler=bayes": "sampler: must be one of grid, random, tpe, got 'bayes'",
    "pruner=halving": "pruner: must be one of asha, median, none, got 'halving'",
    "tracker=mlflow": "tracker: must be one of none, wandb, got 'mlflow'",
    "model=llama": "model: must be one of gemma2_9b_nf4",
    "model=local": "model.path: is needed (model.path=...)",
    "model=local model.path=./none": "model.path: ",
    "model.dtype=fp8": "model.dtype: must be 'auto', 'fp32', 'bf16' or 'fp64', got 'fp8'",
    "launcher.device=gpu": "launcher.device: must be auto, cpu, cuda or cuda:N, got 'gpu'",
    "launcher.threads=0": "launcher.threads: must be at least 1, got 0",
    "study.name=a/b": "study.name: must be a plain name: letters, digits, `.`, `_`, `-`, no path parts, got 'a/b'",
    "study.root=''": "study.root: must name a folder, in printable characters, got '' (study.root=. is the working",
    "study.fold=maybe": "study.fold: must be 'exact', 'near' or 'off', got 'maybe'",
    "health.action=shout": "health.action: must be 'flag' or 'stop', got 'shout'",
    "health.look_evry=3": "health.look_evry: unknown key (did you mean check_every?)",
    "pick.form=dora": "pick.form: must be 'lora', 'rslora' or 'loraplus', got 'dora'",
    "tracker.tags=['']": "tracker.tags: must not be empty, got ''",
    "tracker.entity='my team'": "tracker.entity: must be a plain name",
    "tracker.project='a/b'": "tracker.project: must be a plain name",
    "sweeps=grid": "sweeps: unknown key",
    "=4": "=: unknown key",
    "method.rank": "method.rank: is not in Hydra's override grammar: missing EQUAL at '<EOF>' (key=value)",
    "method.rank=": "method.rank: must be a valid integer",
    "method.rank=choice(4": "method.rank=choice(4: is not in Hydra's override grammar",
    "data@x=facts": "data@x=facts: deletions and packages are not read (data=OPTION chooses another)",
    "~method.alpha": "~method.alpha: deletions and packages are not read (method.alpha=VALUE gives the key one value",
    "hydra.verbose=true": "hydra.verbose: Hydra's own settings are not read",
    "r=8": "r: unknown key (did you mean method.rank?)",
    "max_steps=8": "max_steps: unknown key (did you mean train.max_steps?)",
    "optimizer.base_lr={min:1e-4,max:1e-3}": "optimizer.base_lr: must be in Hydra's grammar",
    "method.alpha=${nothing.there}": "method.alpha: Interpolation key 'nothing.there' not found",
    "method.alpha=${power:10,400}": "method.alpha: OverflowError raised while resolving",
}  # fmt: skip
"""Words of the command line -> the beginning of the one line."""


@pytest.fixture(autouse=True)
def mine(in_folder: Path) -> None:
    for name, (content, _) in FILES.items():
        Path(name).write_text(content)


def faults_of(words: list[str]) -> list[Fault]:
    try:
        validate_sweep("quickstart", words)
    except ConfigError as error:
        return list(error.faults)
    return []


def proposed(fault: Fault) -> Iterator[str]:
    """Overrides that the remedy gives as they are to be typed."""
    for word in re.findall(
        r"'?((?:data|model|method|optimizer|train|launcher|study)\.\w+=(?:'[^']*'|\S+))", fault.remedy
    ):
        value = word.rstrip(",;").removesuffix("'") if word.count("'") == 1 else word
        if not {"...", "VALUE", "FILE"} & set(re.split(r"[=./]", value)) and "..." not in value:
            yield value.replace("'", "")


def test_there_are_many() -> None:
    assert len(FILES) + len(LINES) >= 80


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_data_is_one_line_and_its_remedy_works(name: str) -> None:
    words = ["data=files", f"data.path={name}"]
    (fault,) = faults_of(words)
    assert FILES[name][1] in str(fault)
    assert len(str(fault).splitlines()) == 1
    for remedy in proposed(fault):
        assert fault.field not in {other.field for other in faults_of([*words, remedy]) if other.rule == fault.rule}
    has_columns = name in (
        "questions.jsonl",
        "queries.jsonl",
        "pairs.csv",
        "preferences.jsonl",
        "documents.jsonl",
        "talks.jsonl",
    )
    assert bool(list(proposed(fault))) == (has_columns or name == "labels.jsonl")


@pytest.mark.parametrize("line", LINES)
def test_words_that_cannot_be_read_are_one_line_and_what_it_proposes_works(line: str) -> None:
    words = line.split(" ") if "' " not in line and "my team" not in line else [line]
    (fault,) = faults_of(words)
    assert str(fault).startswith(LINES[line])
    assert len(str(fault).splitlines()) == 1
    if "data=hub" in fault.remedy:
        return  # tests/test_hub.py asks one
    for remedy in proposed(fault):
        kept = [word for word in words if word.partition("=")[0] != remedy.partition("=")[0]]
        left: list[Any] = faults_of([*kept, remedy])
        assert not any(other.rule == fault.rule for other in left)


@pytest.mark.parametrize("line", ["method.rank=0", "data=files data.path=questions.jsonl", "r=8", "study.fold=maybe"])
def test_the_program_ends_with_2_and_without_a_traceback(run: Any, line: str) -> None:
    for verb in ("plan", "launch"):
        said = run(verb, "quickstart", *line.split(" "))
        assert said.code == 2
        assert "Traceback" not in said.err
        assert len(said.err.strip().splitlines()) == 1
        assert not Path("outputs").exists()
