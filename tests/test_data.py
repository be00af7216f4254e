"""From files and tasks to token batches with a loss mask."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lora_sweep import data as data_room
from lora_sweep.config import DataConfig
from lora_sweep.data import TokenSet
from lora_sweep.errors import ConfigError
from lora_sweep.model import LoadedBase
from lora_sweep.records import Example

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
BOS, EOS, A, B, C, D, E = 1, 2, 4, 5, 6, 7, 8


def words(template: str | None) -> Any:
    """One token a word; `template` says what the post-processor puts around a text."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        specials = [("<s>", BOS), ("</s>", EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


WriteLines = Callable[..., DataConfig]


@pytest.fixture
def jsonl(tmp_path: Path) -> WriteLines:
    """jsonl(lines, **fields): the configuration of a file of these lines (text as it is, anything else as JSON)."""

    def written(lines: list[Any], **knobs: Any) -> DataConfig:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        file = tmp_path / "mine.jsonl"
        file.write_text(text, encoding="utf-8")
        config: DataConfig = config_of("data=jsonl", f"data.path={file}").data
        return replace(config, **knobs)

    return written


def faults_of(config: DataConfig) -> list[str]:
    """`check` and `load` tell the same."""
    told = [str(fault) for fault in data_room.check(config)]
    with pytest.raises(ConfigError) as caught:
        data_room.load(config, words(None))
    assert [str(fault) for fault in caught.value.faults] == told
    return told


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"a b c {number}"} for number in range(count)]


def rows(tokens: TokenSet) -> set[tuple[int, ...]]:
    return {tuple(ids[:length].tolist()) for ids, length in zip(tokens.input_ids, tokens.lengths, strict=True)}


# -- the mask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_completion_and_the_end_are_counted_the_prompt_is_read(template: str | None) -> None:
    """Special tokens exactly once, whatever the tokenizer itself puts around a text."""
    tokens = data_room.tokenize([Example("c d", "a b"), Example("a b c d e")], words(template), 8)
    begins = [BOS] if template and template.startswith("<s>") else []
    expected = [[*begins, A, B, C, D, EOS], [*begins, A, B, C, D, E, EOS]]
    prompt = len(begins) + 2
    for row, ids in enumerate(expected):
        assert tokens.input_ids[row].tolist() == ids + [0] * (8 - len(ids))
        assert tokens.lengths[row] == len(ids)
        first = prompt if row == 0 else 1
        assert tokens.counted[row].tolist() == [first <= place < len(ids) for place in range(8)]


def test_a_tokenizer_without_an_end_counts_what_there_is() -> None:
    tokenizer = words("<s> $A")
    tokenizer.eos_token = None
    tokens = data_room.tokenize([Example("c d", "a b")], tokenizer, 8)
    assert tokens.input_ids[0, :5].tolist() == [BOS, A, B, C, D]
    assert tokens.counted[0].tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_the_embedded_tokenizer_puts_each_special_token_once(base: LoadedBase) -> None:
    tokenizer = base.tokenizer
    examples = [Example(" was born in Oslo.", "Ada Berg"), Example("Ada Berg was born in Oslo.")]
    tokens = data_room.tokenize(examples, tokenizer, 64)
    for ids, length in zip(tokens.input_ids.tolist(), tokens.lengths.tolist(), strict=True):
        ids = ids[:length]
        assert [ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)] == [1, 1]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Ada Berg was born in Oslo."
    counted = tokens.input_ids[0][tokens.counted[0]].tolist()
    assert tokenizer.decode(counted) == " was born in Oslo." + tokenizer.eos_token


def test_what_is_longer_than_max_length_is_cut_and_told() -> None:
    examples = [Example("a b c"), Example("a b c d"), Example("a b c d e")]
    tokens = data_room.tokenize(examples, words("<s> $A"), 5)
    assert tokens.cut == 2
    assert tokens.lengths.tolist() == [5, 5, 5]
    assert tokens.input_ids[:, :5].tolist() == [[BOS, A, B, C, EOS], [BOS, A, B, C, D], [BOS, A, B, C, D]]


def test_an_example_with_nothing_left_to_count_is_left_out() -> None:
    examples = [Example("e", "a b c d"), Example("b", "a")]
    tokens = data_room.tokenize(examples, words(None), 4)
    assert rows(tokens) == {(A, B, EOS)}
    assert tokens.cut == 1


@pytest.mark.parametrize("longest", [1, 6, 7, 8, 14, 15])
def test_the_padded_length_is_the_next_multiple_of_8(longest: int) -> None:
    tokens = data_room.tokenize([Example("a " * longest), Example("b")], words(None), 64)
    assert tokens.input_ids.shape[1] == -(-(longest + 1) // 8) * 8


def test_an_example_is_the_same_whoever_shares_its_set() -> None:
    alone = data_room.tokenize([Example("c d", "a b")], words("<s> $A"), 64)
    among = data_room.tokenize([Example("a " * 30), Example("c d", "a b")], words("<s> $A"), 64)
    assert torch.equal(among.input_ids[1, :8], alone.input_ids[0])
    assert torch.equal(among.counted[1, :8], alone.counted[0])
    assert not among.counted[1, 8:].any()


# -- files --------------------------------------------------------------------------------------------------------


def test_both_kinds_of_lines_are_read_and_blank_ones_passed_over(jsonl: WriteLines) -> None:
    lines = [{"text": "a b"}, "", {"prompt": "a", "completion": "c"}, {"prompt": "", "completion": "d"}, "   "]
    config = jsonl(lines, eval_path=None)
    config = replace(config, eval_path=config.path)
    tokens = data_room.load(config, words(None)).train
    assert rows(tokens) == {(A, B, EOS), (A, C, EOS), (D, EOS)}
    assert sorted(tokens.counted.sum(dim=1).tolist()) == [1, 2, 2]


def test_other_keys_of_a_line_are_not_minded(jsonl: WriteLines) -> None:
    config = jsonl([{"text": "a b", "id": 5, "prompt": None}, *texts(5)])
    assert data_room.check(replace(config, eval_path=config.path)) == []


def test_a_byte_order_mark_is_no_fault(jsonl: WriteLines) -> None:
    config = jsonl(["\ufeff" + json.dumps({"text": "a"}), *texts(3)])
    assert data_room.check(replace(config, eval_path=config.path)) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "is no JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("just text", "is no JSON (Expecting value at column 1)"),
        ("5", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ("{}", "has neither a `text` nor a `prompt` and a `completion` with something in it"),
        ('{"text": ""}', "has neither"),
        ('{"text": "  "}', "has neither"),
        ('{"text": 5}', "has neither"),
        ('{"prompt": "a"}', "has neither"),
        ('{"prompt": "a", "completion": " "}', "has neither"),
        ('{"completion": "a"}', "has neither"),
        ('{"text": "\\ud800"}', "holds half of a surrogate pair"),
        ('{"prompt": "\\udfff", "completion": "a"}', "holds half of a surrogate pair"),
        ("[" * 100_000, "cannot be read"),
        ('{"text": ' + "1" * 5000 + "}", "cannot be read (Exceeds the limit"),
    ],
)
def test_a_broken_line_is_told_with_its_file_and_number(jsonl: WriteLines, line: str, told: str) -> None:
    config = jsonl([{"text": "a"}, "", line, {"text": "b"}])
    (fault,) = faults_of(config)
    assert fault.startswith(f"data.path: {config.path}:3: {told}")
    assert len(fault) < 300


def test_of_many_broken_lines_the_first_five_are_told_and_the_rest_counted(jsonl: WriteLines) -> None:
    config = jsonl(["x"] * 5)
    assert [fault.split(": ")[1] for fault in faults_of(config)] == [f"{config.path}:{line}" for line in range(1, 6)]
    told = faults_of(jsonl(["x"] * 12))
    assert len(told) == 6
    assert told[-1] == f"data.path: {config.path}: 7 more lines are broken"


def test_a_file_without_examples_is_a_fault(jsonl: WriteLines) -> None:
    for lines in ([], ["", " "]):
        assert faults_of(jsonl(lines)) == [f"data.path: holds no example, got {jsonl(lines).path!r}"]


def test_what_is_no_text_file_is_a_fault(jsonl: WriteLines, tmp_path: Path) -> None:
    config = jsonl(texts(3))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    for path, reason in (
        ("latin.jsonl", "is not UTF-8"),
        ("", "Is a directory"),
        ("none", "No such file or directory"),
    ):
        path = str(tmp_path / path)
        assert faults_of(replace(config, path=path)) == [f"data.path: cannot be read ({reason}), got {path!r}"]
        assert faults_of(replace(config, eval_path=path)) == [
            f"data.eval_path: cannot be read ({reason}), got {path!r}"
        ]


def test_faults_of_both_files_are_told_together(jsonl: WriteLines, tmp_path: Path) -> None:
    config = replace(jsonl(["x"]), eval_path=str(tmp_path / "none"))
    assert [fault.partition(":")[0] for fault in faults_of(config)] == ["data.path", "data.eval_path"]


def test_a_share_that_leaves_nothing_to_evaluate_is_a_fault(jsonl: WriteLines) -> None:
    (fault,) = faults_of(jsonl(texts(3), eval_share=1e-9))
    assert fault == (
        "data.eval_share: no evaluation example is left of 3 at data.eval_share=1e-09 "
        "(give data.eval_path or a larger share)"
    )
    (fault,) = faults_of(jsonl(texts(3), eval_share=1 - 1e-9))
    assert fault.startswith("data.path: holds no training example")


def test_no_example_within_max_length_is_a_fault(jsonl: WriteLines) -> None:
    config = jsonl([{"prompt": "a b c", "completion": "d"}] * 3)
    config = replace(config, max_length=3, eval_path=config.path)
    with pytest.raises(ConfigError, match=r"data\.max_length: no usable training example is left"):
        data_room.load(config, words(None))


def split(config: DataConfig, tokenizer: Any) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    loaded = data_room.load(config, tokenizer)
    return rows(loaded.train), rows(loaded.evaluation)


def test_an_example_stays_on_its_side_when_others_are_added(jsonl: WriteLines, base: LoadedBase) -> None:
    before = split(jsonl(texts(300), eval_share=0.2, eval_size=None), base.tokenizer)
    after = split(jsonl(texts(600)[::-1], eval_share=0.2, eval_size=None), base.tokenizer)
    for side in (0, 1):
        assert before[side] < after[side]
    assert not after[0] & after[1]
    assert len(after[0]) + len(after[1]) == 600
    # 600 draws at .2: within four standard deviations.
    assert abs(len(after[1]) - 120) < 4 * (600 * 0.2 * 0.8) ** 0.5


def test_twins_lie_on_the_same_side(jsonl: WriteLines, base: LoadedBase) -> None:
    train, evaluation = split(jsonl(texts(50) * 2, eval_share=0.3, eval_size=None), base.tokenizer)
    assert not train & evaluation


def test_an_evaluation_file_is_used_whole_and_the_training_file_too(jsonl: WriteLines, tmp_path: Path) -> None:
    config = jsonl([{"text": "a"}, {"text": "b"}])
    (tmp_path / "eval.jsonl").write_text('{"text": "c"}\n')
    assert split(replace(config, eval_path=str(tmp_path / "eval.jsonl")), words(None)) == (
        {(A, EOS), (B, EOS)},
        {(C, EOS)},
    )


# -- samples ------------------------------------------------------------------------------------------------------


def test_evaluation_and_probe_are_fixed_samples_of_the_asked_size(jsonl: WriteLines, base: LoadedBase) -> None:
    config = jsonl(texts(200), eval_share=0.5, eval_size=20, probe_size=10)
    first, again, other = (
        data_room.load(replace(config, seed=seed), base.tokenizer)
        for seed in (config.seed, config.seed, config.seed + 1)
    )
    assert (len(first.evaluation), len(first.probe)) == (20, 10)
    assert rows(first.probe) < rows(first.train)
    assert not rows(first.evaluation) & rows(first.train)
    for part in ("train", "evaluation", "probe"):
        assert torch.equal(getattr(first, part).input_ids, getattr(again, part).input_ids)
    assert rows(first.evaluation) != rows(other.evaluation)
    assert rows(first.probe) != rows(other.probe)


def test_a_sample_larger_than_its_set_is_the_set(jsonl: WriteLines, base: LoadedBase) -> None:
    loaded = data_room.load(jsonl(texts(20), eval_share=0.5, eval_size=1000, probe_size=1000), base.tokenizer)
    assert len(loaded.train) + len(loaded.evaluation) == 20
    assert torch.equal(loaded.probe.input_ids, loaded.train.input_ids)


@pytest.mark.parametrize("name", ["facts", "style"])
def test_the_embedded_tasks_load_in_the_asked_size(base: LoadedBase, name: str) -> None:
    config = config_of(f"data={name}", "data.people=12", "data.eval_size=6", "data.probe_size=4").data
    assert data_room.check(config) == []
    loaded = data_room.load(config, base.tokenizer)
    assert (len(loaded.evaluation), len(loaded.probe)) == (6, 4)
    assert len(loaded.train) % 12 == 0
    assert loaded.train.cut == loaded.evaluation.cut == 0
    assert loaded.train.counted.any(dim=1).all()
    # Facts carry bits, a manner carries none.
    assert (loaded.bits > 0) == (name == "facts")


@pytest.mark.parametrize(("people", "told"), [(None, "is needed by this task"), (10**7, "")])
def test_people_that_the_world_does_not_have_are_a_fault(people: int | None, told: str) -> None:
    (fault,) = data_room.check(replace(config_of("data=style").data, people=people))
    assert fault.field == "data.people"
    assert told in fault.rule


# -- the order of training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [1, 7, 64])
def test_each_epoch_meets_each_example_once_in_an_order_of_its_own(examples: int) -> None:
    walk = data_room.order(examples, seed=3)(0, 5 * examples).view(5, examples)
    for epoch in walk:
        assert sorted(epoch.tolist()) == list(range(examples))
    assert examples == 1 or len({tuple(epoch.tolist()) for epoch in walk}) > 1


def test_the_order_depends_on_the_seed_alone_not_on_how_it_is_asked() -> None:
    whole = data_room.order(10, seed=3)(0, 60).tolist()
    by_fours = data_room.order(10, seed=3)
    assert [row for first in range(0, 60, 4) for row in by_fours(first, 4).tolist()] == whole
    # Slots that began later ask for earlier places of the same walk.
    assert by_fours(8, 4).tolist() == whole[8:12]
    assert data_room.order(10, seed=4)(0, 60).tolist() != whole
