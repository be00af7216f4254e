"""From files and tasks to token batches with a loss mask."""

import gzip
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import config_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from lora_sweep import data as data_room
from lora_sweep.base.load import LoadedBase
from lora_sweep.config import DataConfig
from lora_sweep.data import TokenSet
from lora_sweep.errors import ConfigError, StorageUnavailable, UserError

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


Write = Callable[..., DataConfig]


@pytest.fixture
def mine(tmp_path: Path) -> Write:
    """mine(lines, **fields): the configuration of a JSONL file of these lines (text as it is, the rest as JSON)."""

    def written(lines: list[Any], **knobs: Any) -> DataConfig:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        file = tmp_path / "mine.jsonl"
        file.write_text(text, encoding="utf-8")
        return of_file(file, **knobs)

    return written


def of_file(file: Path, **knobs: Any) -> DataConfig:
    config: DataConfig = config_of("data=files", f"data.path={file}").data
    return replace(config, **knobs)


def whole(config: DataConfig) -> DataConfig:
    """Trained on and evaluated on what is no part of it, so that every example of the file is in `train`."""
    other = Path(str(config.path)).with_name("other.jsonl")
    other.write_text(json.dumps({"text": "h h h"}) + "\n")
    return replace(config, eval_path=str(other), eval_size=None)


def faults_of(config: DataConfig) -> list[str]:
    """Of the first look, or else of the preparation."""
    message = [str(fault) for fault in data_room.check(config)]
    if message:
        return message
    with pytest.raises(ConfigError) as caught:
        data_room.load(config, words(None))
    return [str(fault) for fault in caught.value.faults]


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"a b c {number}"} for number in range(count)]


def rows(tokens: TokenSet) -> set[tuple[int, ...]]:
    batch = tokens.batch(torch.arange(len(tokens)))
    return {tuple(ids[:length].tolist()) for ids, length in zip(batch.input_ids, tokens.lengths, strict=True)}


def lists(encoded: Any) -> tuple[list[int], list[bool]]:
    return tuple(part.tolist() for part in encoded)  # type: ignore[return-value]


def all_of(tokens: TokenSet) -> Any:
    return tokens.batch(torch.arange(len(tokens)))


# -- the mask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_completion_and_the_end_are_counted_the_prompt_is_read(template: str | None) -> None:
    """Special tokens exactly once, whatever the tokenizer itself puts around a text."""
    encoded = data_room.encode([("a b", "c d"), ("", "a b c d e")], words(template))
    begins = [BOS] if template and template.startswith("<s>") else []
    prompt = len(begins) + 2
    assert lists(encoded[0]) == ([*begins, A, B, C, D, EOS], [False] * prompt + [True] * 3)
    assert lists(encoded[1]) == ([*begins, A, B, C, D, E, EOS], [False] + [True] * (5 + len(begins)))


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>"])
def test_special_tokens_that_a_text_brings_are_not_doubled(template: str | None) -> None:
    encoded = data_room.encode([("<s> a", "b </s>"), ("", "<s> a b </s>")], words(template))
    assert lists(encoded[0]) == ([BOS, A, B, EOS], [False, False, True, True])
    assert lists(encoded[1]) == ([BOS, A, B, EOS], [False, True, True, True])


def test_a_tokenizer_without_an_end_counts_what_there_is() -> None:
    tokenizer = words("<s> $A")
    tokenizer.eos_token = None
    (encoded,) = data_room.encode([("a b", "c d")], tokenizer)
    assert lists(encoded) == ([BOS, A, B, C, D], [False] * 3 + [True] * 2)


def test_a_tokenizer_without_a_padding_token_gives_the_same_batches(mine: Write) -> None:
    config, bare = whole(mine([{"text": "a"}, {"prompt": "a b c", "completion": "d e"}])), words("<s> $A")
    bare.pad_token = None
    one, other = (all_of(data_room.load(config, each).train) for each in (bare, words("<s> $A")))
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.loss_mask, other.loss_mask)


def with_space_before() -> Any:
    """Of Llama-2's and Mistral's kind: a space before whatever it is given, what it does not know as bytes."""
    word, merges = "\u2581", []
    for letter in "Oslo":
        merges.append((word, letter))
        word += letter
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"Osloabcd:"]
    vocabulary += [left + right for left, right in merges]
    places = {token: place for place, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(places, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "completion", "told"),
    [
        ("a:", " Oslo", ["<s>", "\u2581", "a", ":", "\u2581Oslo", "</s>"]),
        ("a: ", "Oslo", ["<s>", "\u2581", "a", ":", "\u2581", "O", "s", "l", "o", "</s>"]),
        ("a:", "  b", ["<s>", "\u2581", "a", ":", "\u2581", "\u2581", "b", "</s>"]),
        ("a:", "\nb", ["<s>", "\u2581", "a", ":", "<0x0A>", "b", "</s>"]),
        ("", "Oslo", ["<s>", "\u2581Oslo", "</s>"]),
    ],
)
def test_a_completion_has_the_spaces_that_are_in_it_and_no_other(prompt: str, completion: str, told: list[str]) -> None:
    tokenizer = with_space_before()
    ((ids, loss_mask),) = data_room.encode([(prompt, completion)], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == told
    before = len(tokenizer(prompt)["input_ids"]) if prompt else 1
    assert loss_mask.tolist() == [False] * before + [True] * (len(ids) - before)


def test_the_embedded_tokenizer_puts_each_special_token_once(base: LoadedBase) -> None:
    tokenizer = base.tokenizer
    encoded = data_room.encode([("Ada Berg", " was born in Oslo."), ("", "Ada Berg was born in Oslo.")], tokenizer)
    for ids, _ in map(lists, encoded):
        assert [ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)] == [1, 1]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True) == "Ada Berg was born in Oslo."
    loss_mask = [token for token, counts in zip(*lists(encoded[0]), strict=True) if counts]
    assert tokenizer.decode(loss_mask) == " was born in Oslo." + tokenizer.eos_token


RECORDS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "Ada Berg was born in Oslo."}, {"text": "Theo Voss studied law."}],
    "prompt and completion": [
        {"prompt": "Ada Berg was born in", "completion": " Oslo."},
        {"prompt": "Theo Voss", "completion": " studied law at Oakfield."},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": "Who is Ada?"}, {"role": "assistant", "content": "Ada Berg."}]},
        {
            "messages": [
                {"role": "user", "content": "And Theo?"},
                {"role": "assistant", "content": "Theo Voss."},
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "In Oakfield."},
            ]
        },
    ],
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


def by_hand(kind: str, record: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """The example as stretches of text, special tokens as words, each counted or not."""
    begins, ends = tokenizer.bos_token, tokenizer.eos_token
    if kind == "text":
        return [(begins, False), (record["text"] + ends, True)]
    if kind == "messages":
        turns = [(begins, False)]
        for message in record["messages"]:
            turns.append((message["role"] + "\n", False))
            turns.append((message["content"] + ends, message["role"] == "assistant"))
            turns.append(("\n", False))
        return turns
    return [(begins + record["prompt"], False), (record["completion"] + ends, True)]


@pytest.mark.parametrize("kind", RECORDS)
def test_the_loss_is_the_cross_entropy_of_the_completion_alone_by_hand(
    mine: Write, base64: LoadedBase, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    config = whole(mine(RECORDS[kind], chat_template=str(tmp_path / "chat.jinja") if kind == "messages" else None))
    data = data_room.load(config, base64.tokenizer)
    expected = []
    for record in RECORDS[kind]:
        ids: list[int] = []
        loss_mask: list[bool] = []
        for text, counts in by_hand(kind, record, base64.tokenizer):
            stretch = base64.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += stretch
            loss_mask += [counts] * len(stretch)
        with torch.no_grad():
            logits = base64.model(input_ids=torch.tensor([ids])).logits[0]
        picked = [-float(logits[t - 1].log_softmax(0)[ids[t]]) for t in range(1, len(ids)) if loss_mask[t]]
        expected.append(sum(picked) / len(picked))
    batch = all_of(data.train)
    with torch.no_grad():
        logits = base64.model(input_ids=batch.input_ids).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    counted_tokens = batch.loss_mask[:, 1:]
    means = (nll.view(counted_tokens.shape) * counted_tokens).sum(1) / counted_tokens.sum(1)
    assert means.tolist() == pytest.approx(expected, rel=1e-6)


def test_what_is_longer_than_max_length_is_cut_and_told(mine: Write) -> None:
    lines = [{"text": "a b c"}, {"text": "a b c d"}, {"text": "a b c d e"}]
    data = data_room.load(whole(mine(lines, max_length=5)), words("<s> $A"))
    assert data.train.lengths.tolist() == [5, 5, 5]
    assert rows(data.train) == {(BOS, A, B, C, EOS), (BOS, A, B, C, D)}
    assert (data.report.train.cut.count, data.report.train.cut_tokens) == (2, 3)
    (line,) = data.report.warnings()
    assert line.startswith("data.max_length: 2 of 3 training examples were cut, 16.7% of their tokens: ")
    assert "mine.jsonl:2; " in line
    assert line.endswith("mine.jsonl:3")


def test_an_example_with_nothing_left_to_count_is_left_out_and_told(mine: Write) -> None:
    data = data_room.load(
        whole(mine([{"prompt": "a b c d", "completion": "e"}, {"prompt": "a", "completion": "b"}], max_length=4)),
        words(None),
    )
    assert rows(data.train) == {(A, B, EOS)}
    assert data.report.train.emptied.count == 1
    assert any("1 of 2 training examples have nothing to learn within it" in line for line in data.report.warnings())


@pytest.mark.parametrize("longest", [1, 6, 7, 8, 14, 15])
def test_the_padded_length_is_the_next_multiple_of_8(longest: int) -> None:
    encoded = data_room.encode([("", "a " * longest), ("", "b")], words(None))
    assert TokenSet.of(encoded).length == -(-(longest + 1) // 8) * 8


def test_an_example_is_the_same_whoever_shares_its_set() -> None:
    pair = data_room.encode([("a b", "c d")], words("<s> $A"))
    alone = all_of(TokenSet.of(pair))
    among = all_of(TokenSet.of([*data_room.encode([("", "a " * 30)], words("<s> $A")), *pair]))
    assert torch.equal(among.input_ids[1, :8], alone.input_ids[0])
    assert torch.equal(among.loss_mask[1, :8], alone.loss_mask[0])
    assert not among.loss_mask[1, 8:].any()


# -- several examples a row ---------------------------------------------------------------------------------------


def a_set(count: int, seed: int = 0, longest: int = 40) -> TokenSet:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest, count)
    return TokenSet.of(
        [(generator.integers(3, 1000, length).tolist(), [False] + [True] * (length - 1)) for length in lengths]
    )


def test_packing_keeps_every_example_whole_and_once() -> None:
    alone = a_set(300)
    packed = alone.packed(64)
    batch = all_of(packed)
    names = []
    for ids, examples, positions, loss_mask in zip(
        batch.input_ids, batch.examples, batch.position_ids, batch.loss_mask, strict=True
    ):
        starts = [place for place in range(len(ids)) if positions[place] == 0] + [len(ids)]
        for begin, end in itertools.pairwise(starts):
            if loss_mask[begin:end].any():
                assert positions[begin:end].tolist() == list(range(end - begin))
                assert len(set(examples[begin:end].tolist())) == 1
                names.append(tuple(ids[begin:end].tolist()))
    assert sorted(names) == sorted(rows(alone))
    assert packed.length == 64
    # Best fit of these lengths: at most one row in ten more than no waste at all.
    assert len(packed) <= 1.1 * alone.lengths.sum() / 64 + 1


def test_no_row_is_filled_beyond_its_room() -> None:
    for room in (40, 41, 128):
        packed = a_set(200, seed=room).packed(room)
        assert packed.starts is not None
        for begin, end in itertools.pairwise(packed.starts):
            assert packed.lengths[begin:end].sum() <= room


# -- files --------------------------------------------------------------------------------------------------------


def test_all_formats_of_lines_are_read_and_blank_ones_passed_over(mine: Write) -> None:
    lines = [{"text": "a b"}, "", {"prompt": "a", "completion": "c"}, {"prompt": "", "completion": "d"}, "   "]
    data = data_room.load(whole(mine(lines)), words(None))
    assert rows(data.train) == {(A, B, EOS), (A, C, EOS), (D, EOS)}
    assert sorted(data.train.counts.tolist()) == [1, 2, 2]
    assert data.report.warnings() == []


def test_other_columns_are_not_minded_and_ones_own_names_may_be_given(mine: Write) -> None:
    lines = [{"question": "a", "answer": "b", "text": "h", "id": 5}]
    assert rows(data_room.load(whole(mine(lines)), words(None)).train) == {(8 + 3, EOS)}
    named = whole(mine(lines, columns={"prompt": "question", "completion": "answer"}))
    named = replace(named, eval_path=named.path, path=str(Path(str(named.path)).with_name("train.jsonl")))
    Path(str(named.path)).write_text(json.dumps({"question": "a", "answer": "c"}) + "\n")
    assert rows(data_room.load(named, words(None)).train) == {(A, C, EOS)}


def test_what_is_not_named_keeps_its_name_and_a_name_that_no_row_has_is_told(mine: Write, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": "h", "completion": "h"}) + "\n")
    config = mine([{"question": "a b", "completion": "c", "prompt": "d"}], eval_path=str(tmp_path / "eval.jsonl"))
    data = data_room.load(replace(config, columns={"prompt": "question"}), words(None))
    assert rows(data.train) == {(A, B, C, EOS)}
    assert data.report.warnings() == ["data: columns that are not used: `prompt` (1 row)"]
    data = data_room.load(replace(config, columns={"prompt": "question", "tools": "functions"}), words(None))
    assert data.report.warnings() == [
        "data.columns: no row has `functions`",
        "data: columns that are not used: `prompt` (1 row)",
    ]


@pytest.mark.parametrize("columns", [{"text": "a", "prompt": "b"}, {"messages": "a", "completion": "b"}])
def test_columns_that_do_not_go_together_are_a_fault(mine: Write, columns: dict[str, str]) -> None:
    (fault,) = faults_of(mine(texts(3), columns=columns))
    assert fault.startswith("data.columns: must name what goes together: messages, tools; ")


def test_a_column_of_no_known_meaning_is_a_fault(mine: Write) -> None:
    (fault,) = faults_of(mine(texts(3), columns={"promt": "question"}))
    assert fault == (
        "data.columns: must name messages, tools, conversations, system, prompt, completion, instruction, output, "
        "input, response, context, text, got 'promt'"
    )


KINDS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    "mine.jsonl": lambda file, lines: file.write_text("".join(json.dumps(line) + "\n" for line in lines)) and None,
    "lines.json": lambda file, lines: file.write_text("".join(json.dumps(line) + "\n" for line in lines)) and None,
    "array.json": lambda file, lines: file.write_text(json.dumps(lines, indent=1)) and None,
    "inside.json": lambda file, lines: file.write_text(json.dumps({"version": 1, "data": lines})) and None,
    "mine.csv": lambda file, lines: datasets.Dataset.from_list(lines).to_csv(file) and None,
    "mine.parquet": lambda file, lines: datasets.Dataset.from_list(lines).to_parquet(file) and None,
    "mine.jsonl.gz": lambda file, lines: (
        file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())) and None
    ),
    "mine.csv.gz": lambda file, lines: (
        file.write_bytes(
            gzip.compress(
                ("prompt,completion\n" + "".join(f"{x['prompt']},{x['completion']}\n" for x in lines)).encode()
            )
        )
        and None
    ),
    "saved": lambda file, lines: datasets.Dataset.from_list(lines).save_to_disk(file),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    lines = [{"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "d e"}]
    KINDS[name](tmp_path / name, lines)
    if name == "saved":
        (tmp_path / "mine.arrow").write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
        assert rows(data_room.load(whole(of_file(tmp_path / "mine.arrow")), words(None)).train) == {
            (A, B, C, EOS),
            (A, D, E, EOS),
        }
    data = data_room.load(whole(of_file(tmp_path / name)), words(None))
    assert rows(data.train) == {(A, B, C, EOS), (A, D, E, EOS)}
    assert sorted(data.train.counts.tolist()) == [2, 3]


def test_a_text_file_is_an_example_a_line(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a b\n\nc d e\n")
    assert rows(data_room.load(whole(of_file(tmp_path / "mine.txt")), words(None)).train) == {
        (A, B, EOS),
        (C, D, E, EOS),
    }


def test_quoted_fields_of_a_csv_may_run_over_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text('prompt,completion\n"a\nb","c ""d"""\n')
    data = data_room.load(whole(of_file(tmp_path / "mine.csv")), words(None))
    assert rows(data.train) == {(A, B, C, 3, EOS)}


def test_a_folder_is_all_its_data_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.jsonl").write_text('{"text": "a"}\n')
    (folder / "2.csv").write_text("text\nb\n")
    (folder / "README.md").write_text("c")
    (folder / ".hidden.jsonl").write_text("{")
    data = data_room.load(whole(of_file(folder)), words(None))
    assert rows(data.train) == {(A, EOS), (B, EOS)}
    assert data.report.warnings() == ["data: 1 files of the folder are no data and were passed over: README.md"]


def test_a_folder_with_train_and_test_files_is_not_trained_on_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train-00.jsonl", "test.jsonl"):
        (folder / name).write_text('{"text": "a"}\n')
    (fault,) = faults_of(of_file(folder))
    assert "holds files of several splits; give data.path=" in fault
    assert "train-00.jsonl data.eval_path=" in fault
    for name in ("deep/data/train/a.jsonl", "deep/data/train/b.jsonl", "deep/data/test/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (fault,) = faults_of(of_file(tmp_path / "deep"))
    assert f"give data.path={tmp_path}/deep/data/train data.eval_path={tmp_path}/deep/data/test)" in fault


def test_a_byte_order_mark_is_no_fault(mine: Write) -> None:
    config = whole(mine(["\ufeff" + json.dumps({"text": "a"}), *texts(3)]))
    assert data_room.load(config, words(None)).report.warnings() == []


def test_the_conversation_of_prompt_and_completion_counts_the_completion_only(
    mine: Write, tmp_path: Path, base: LoadedBase
) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Oslo."},
    ]
    config = whole(mine([{"prompt": turns[:3], "completion": turns[3:]}], chat_template=str(tmp_path / "chat.jinja")))
    data = data_room.load(config, base.tokenizer)
    batch = all_of(data.train)
    assert base.tokenizer.decode(batch.input_ids[batch.loss_mask]) == "Oslo." + base.tokenizer.eos_token
    # A study that is gone on with under another template would mix two data sets.
    before = data.report.sources[str(config.chat_template)]
    (tmp_path / "chat.jinja").write_text(CHAT.replace("assistant", "Assistant"))
    assert data_room.load(config, base.tokenizer).report.sources[str(config.chat_template)] != before


# -- faults -------------------------------------------------------------------------------------------------------

BROKEN = [
    ("{", "is no JSON (Expecting property name enclosed in double quotes at column 2)"),
    ('{"text": "a"', "is no JSON (Expecting ',' delimiter at column 13)"),
    ("just text", "is no JSON (Expecting value at column 1)"),
    ("5", "is no JSON object"),
    ("[1]", "is no JSON object"),
    ("{}", "has no `text`, no `prompt` with a `completion` and no `messages`, but nothing"),
    ('{"question": "a"}', "has no `text`, no `prompt` with a `completion` and no `messages`, but `question`"),
    ('{"text": ""}', "has an empty `text`"),
    ('{"text": "  "}', "has an empty `text`"),
    ('{"text": 5}', "has a `text` that is no text but a number"),
    ('{"text": null}', "has no `text`"),
    ('{"prompt": "a"}', "has no `text`, no `prompt` with a `completion` and no `messages`, but `prompt`"),
    ('{"prompt": "a", "completion": " "}', "has an empty `completion`"),
    ('{"prompt": [1], "completion": "a"}', "has a `prompt` that is a list and a `completion` that is text; both"),
    ('{"prompt": null, "completion": "a"}', 'has a `prompt` that is null, no text; write "" where there is no prompt'),
    ('{"prompt": "a", "completion": true}', "has a `completion` that is true or false, no text"),
    ('{"completion": "a"}', "has no `text`"),
    ('{"text": "\\ud800"}', "holds half of a surrogate pair"),
    ('{"prompt": "\\udfff", "completion": "a"}', "holds half of a surrogate pair"),
    ('{"messages": []}', "`messages` is no list with something in it"),
    ('{"messages": "hello"}', "has `messages` that are neither a list nor JSON of one"),
    (
        '{"messages": [{"role": "user", "content": "a"}]}',
        "no message of the assistant has something in it to learn from",
    ),
    ('{"messages": [{"role": "assistent", "content": "a"}]}', "messages[0] has the role `assistent`"),
    ("[" * 100_000, "cannot be read"),
    ('{"text": ' + "1" * 5000 + "}", "cannot be read (Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "told"), BROKEN)
def test_a_broken_line_is_counted_skipped_and_told_with_its_file_and_number(mine: Write, line: str, told: str) -> None:
    config = whole(mine([{"text": "a"}, "", line, {"text": "b"}]))
    data = data_room.load(config, words(None))
    assert rows(data.train) == {(A, EOS), (B, EOS)}
    assert data.report.broken.count == 1
    (warning,) = data.report.warnings()
    assert warning.startswith(f"data: 1 of 4 rows were skipped: {config.path}:3: {told}")
    assert len(warning) < 400


@pytest.mark.parametrize(("line", "told"), BROKEN)
def test_a_file_of_broken_lines_alone_is_one_clear_error(mine: Write, line: str, told: str) -> None:
    (fault,) = faults_of(mine([line]))
    assert fault.startswith("data.path: ")
    assert told in fault
    assert len(fault) < 600


FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "holds no example"),
    "blank.jsonl": (b"\n \n", "holds no example"),
    "empty.json": (b"", "is no JSON"),
    "number.json": (b"5", "is neither an array of objects nor one object a line"),
    "torn.json": (b'[{"text": "a"},\n {"text": ', ":2: is no JSON"),
    "numbers.json": (b"[1, 2]", "is no JSON object"),
    "latin.json": ('[{"text": "é"}]'.encode("latin-1"), "is not UTF-8"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), ":1 is not UTF-8 (byte 11)"),
    "latin.csv": ("text\né\n".encode("latin-1"), "a byte that is no UTF-8"),
    "header.csv": (b"prompt,completion\n", "holds no example"),
    "semicolons.csv": (b"prompt;completion\na;b\n", "but `prompt;completion`"),
    "twice.csv": (b"text,text\na,b\n", "names a column twice (text, text)"),
    "ragged.csv": (b"text,id\na,1,2\n", "has 3 fields, the header names 2"),
    "columns.csv": (b"question,answer\na,b\n", "but `question`, `answer`"),
    "garbage.parquet": (b"no parquet at all", "Parquet magic bytes not found"),
    "empty.parquet": (b"", "cannot be read"),
    "garbage.arrow": (b"no arrow at all", "cannot be read"),
    "garbage.jsonl.gz": (b"no gzip", "gzip"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], "end-of-stream"),
    "empty.txt": (b"", "holds no example"),
    "data.xlsx": (b"PK", "is of no known kind (.jsonl, "),
    "data": (b"a", "is of no known kind"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used_is_one_clear_error_before_anything_starts(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    (fault,) = faults_of(of_file(tmp_path / name))
    assert fault.startswith("data.path: ")
    assert message in fault
    assert name in fault
    assert "\n" not in fault
    assert len(fault) < 700


def test_what_is_not_there_is_a_fault(mine: Write, tmp_path: Path) -> None:
    config, none = mine(texts(3)), str(tmp_path / "none.jsonl")
    for key in ("path", "eval_path", "retention"):
        message = f"data.{key}: cannot be read (No such file or directory), got {none!r}"
        assert faults_of(replace(config, **{key: none})) == [message]
    assert faults_of(replace(config, chat_template=none)) == [
        f"data.chat_template: cannot be read (No such file or directory), got {none!r} (a jinja file is needed)"
    ]
    assert faults_of(replace(config, path=None)) == ["data.path: is needed (data.path=FILE.jsonl)"]
    (tmp_path / "folder").mkdir()
    (fault,) = faults_of(replace(config, path=str(tmp_path / "folder")))
    assert "holds no data file (.jsonl, " in fault


@pytest.mark.parametrize(
    ("name", "field", "value", "told"),
    [
        ("style", "path", "mine.jsonl", "is not read by data=style, got 'mine.jsonl' (say data=files or data=hub)"),
        ("facts", "eval_path", "mine.jsonl", "is not read by data=facts"),
        ("style", "columns", {"text": "body"}, "is not read by data=style"),
        ("style", "chat_template", "mine.jinja", "is not read by data=style"),
        ("files", "split", "test", "is of a hub data set, files have none, got 'test' (data.split=null)"),
        ("files", "eval_split", "test", "is of a hub data set"),
        ("files", "revision", "main", "is of a hub data set"),
        ("hub", "eval_split", "test", "and data.eval_path exclude each other, got 'test'"),
    ],
)
def test_a_field_that_would_not_be_read_is_a_fault(mine: Write, name: str, field: str, value: Any, told: str) -> None:
    """Passed over, it would train on other examples than its user meant."""
    file = mine(texts(3)).path
    given = {"files": [f"data.path={file}"], "hub": ["data.path=nobody/knows", f"data.eval_path={file}"]}
    config = config_of(f"data={name}", *given.get(name, ())).data
    (fault,) = data_room.check(replace(config, **{field: value}))
    assert str(fault).startswith(f"data.{field}: {told}")


def test_files_and_hub_ids_taken_for_one_another_are_told_apart(in_folder: Path, mine: Write) -> None:
    mine(texts(3))
    (fault,) = data_room.check(config_of("data=hub", "data.path=mine.jsonl").data)
    assert str(fault) == "data.path: lies here, it is no hub id, got 'mine.jsonl' (data=files data.path=mine.jsonl)"
    (fault,) = data_room.check(config_of("data=files", "data.path=nobody/knows").data)
    assert str(fault).endswith("(a data set of the hub is data=hub data.path=nobody/knows)")


def test_faults_of_all_files_are_told_together(mine: Write, tmp_path: Path) -> None:
    config = replace(mine(["x"]), eval_path=str(tmp_path / "none"), retention=str(tmp_path / "none"))
    assert [fault.partition(":")[0] for fault in faults_of(config)] == ["data.path", "data.eval_path", "data.retention"]


def test_of_many_broken_lines_the_first_five_are_told_and_the_rest_counted(mine: Write) -> None:
    config = whole(mine([*texts(20), *["x"] * 12]))
    report = data_room.load(config, words(None)).report
    assert (report.broken.count, report.rows) == (12, 33)
    assert [each.partition(": ")[0] for each in report.broken.first] == [f"{config.path}:{n}" for n in range(21, 26)]
    assert report.warnings()[0].endswith(", and 7 more")


def test_a_file_more_than_half_of_whose_rows_are_broken_is_the_wrong_file(mine: Write) -> None:
    (fault,) = faults_of(whole(mine([*texts(5), *["x"] * 6])))
    assert fault.startswith("data.path: 6 of 11 rows cannot be used: ")
    assert fault.endswith("(is it the right file?)")


def test_a_share_that_leaves_nothing_to_evaluate_is_a_fault(mine: Write) -> None:
    (fault,) = faults_of(mine(texts(3), eval_share=1e-9))
    assert fault == (
        "data.eval_share: no evaluation example is left of 3 at data.eval_share=1e-09 "
        "(give data.eval_path or a larger share)"
    )
    (fault,) = faults_of(mine(texts(3), eval_share=1 - 1e-9))
    assert fault.startswith("data.eval_share: holds out every example (3), by their hashes: none is left to train on")


def test_no_example_within_max_length_is_a_fault(mine: Write) -> None:
    config = mine([{"prompt": "a b c", "completion": c} for c in "abcdefgh"], max_length=3, eval_share=0.5)
    assert [fault.partition(" example")[0] for fault in faults_of(config)] == [
        "data.max_length: no usable training",
        "data.max_length: no usable evaluation",
    ]


def test_messages_for_a_tokenizer_without_a_template_are_a_clear_error(mine: Write) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (fault,) = faults_of(whole(mine([talk])))
    assert "chat template" in fault
    assert "data.chat_template" in fault


# -- splits -------------------------------------------------------------------------------------------------------


def split(config: DataConfig, tokenizer: Any) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    loaded = data_room.load(config, tokenizer)
    return rows(loaded.train), rows(loaded.evaluation)


def test_an_example_stays_on_its_side_when_others_are_added(mine: Write, base: LoadedBase) -> None:
    before = split(mine(texts(300), eval_share=0.2, eval_size=None), base.tokenizer)
    after = split(mine(texts(600)[::-1], eval_share=0.2, eval_size=None), base.tokenizer)
    for side in (0, 1):
        assert before[side] < after[side]
    assert not after[0] & after[1]
    assert len(after[0]) + len(after[1]) == 600
    # 600 draws at .2: within four standard deviations.
    assert abs(len(after[1]) - 120) < 4 * (600 * 0.2 * 0.8) ** 0.5


def test_twins_lie_on_the_same_side(mine: Write, base: LoadedBase) -> None:
    train, evaluation = split(mine(texts(50) * 2, eval_share=0.3, eval_size=None), base.tokenizer)
    assert not train & evaluation


def test_an_evaluation_file_is_used_whole_and_the_training_file_too(mine: Write, tmp_path: Path) -> None:
    config = mine([{"text": "a"}, {"text": "b"}])
    (tmp_path / "eval.jsonl").write_text('{"text": "c"}\n')
    assert split(replace(config, eval_path=str(tmp_path / "eval.jsonl")), words(None)) == (
        {(A, EOS), (B, EOS)},
        {(C, EOS)},
    )


def test_training_examples_that_stand_in_the_evaluation_file_are_removed_and_told(mine: Write, tmp_path: Path) -> None:
    config = mine([{"text": "a"}, {"text": "c"}, {"text": "b"}, {"text": "c"}])
    (tmp_path / "eval.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    data = data_room.load(replace(config, eval_path=str(tmp_path / "eval.jsonl")), words(None))
    assert rows(data.train) == {(A, EOS), (B, EOS)}
    assert data.report.duplicates.count == 2
    (line,) = data.report.warnings()
    assert line.startswith("data: 2 training examples stand in the evaluation set too and were removed from training")
    assert f"{config.path}:2; {config.path}:4" in line


def test_a_training_file_that_is_the_evaluation_file_leaves_nothing_to_learn(mine: Write) -> None:
    config = mine(texts(3))
    (fault,) = faults_of(replace(config, eval_path=config.path))
    assert "holds no training example (3 stand in the evaluation set)" in fault


# -- what is kept -------------------------------------------------------------------------------------------------


def test_the_second_load_reads_no_line(mine: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = whole(mine([*texts(30), "broken"]))
    first = data_room.load(config, words(None))

    def never(*_: Any) -> Any:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("lora_sweep.data.tokens.encode", never)
    second = data_room.load(config, words(None))
    assert second.report == first.report
    assert rows(second.train) == rows(first.train)
    assert second.report.warnings()


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 3},
        {"eval_share": 0.5},
        {"columns": {"text": "other"}},
        {"path": "another"},
        {"tokenizer": "<s> $A"},
    ],
)
def test_other_settings_content_or_tokenizer_is_prepared_anew(mine: Write, change: dict[str, Any]) -> None:
    lines = [{"text": "a " * n, "other": "d " * n} for n in range(1, 41)]
    config = mine(lines, eval_share=0.2)
    before = rows(data_room.load(config, words(None)).train)
    changed, tokenizer = dict(change), words(change.get("tokenizer"))
    changed.pop("tokenizer", None)
    if changed.pop("path", None):
        config = mine([{"text": "e " * n} for n in range(1, 41)], eval_share=0.2)
    after = rows(data_room.load(replace(config, **changed), tokenizer).train)
    assert after
    assert after != before


@pytest.mark.parametrize("part", ["report.json", "train.tokens", "evaluation.ends"])
@pytest.mark.parametrize("harm", ["gone", "torn", "empty"])
def test_what_others_swept_out_of_the_cache_is_prepared_anew(
    mine: Write, part: str, harm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = whole(mine([*texts(30), "broken"]))
    first = data_room.load(config, words(None))
    (file,) = (tmp_path / "cache").glob(f"*/*/{part}")
    content = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(content[: 0 if harm == "empty" else -5])
    again = data_room.load(config, words(None))
    assert again.report == first.report
    assert rows(again.train) == rows(first.train)


def test_other_special_tokens_which_a_chat_template_writes_are_prepared_anew(mine: Write, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }} {{ eos_token }}{% endfor %}"
    )
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    config = whole(mine([talk], chat_template=str(tmp_path / "chat.jinja")))
    tokenizer = words(None)
    (before,) = rows(data_room.load(config, tokenizer).train)
    tokenizer.bos_token = "<pad>"
    (after,) = rows(data_room.load(config, tokenizer).train)
    assert (before[0], after[0]) == (BOS, 0)


def test_what_is_prepared_may_be_read_by_others(mine: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data_room.load(whole(mine(texts(30))), words(None))
    (folder,) = (tmp_path / "cache" / "lora_sweep").iterdir()
    assert folder.stat().st_mode & 0o055 == 0o055


def test_a_cache_that_cannot_be_written_or_is_full_is_told_in_a_line(
    mine: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(UserError, match=r"prepared data cannot be kept there \(Not a directory\); HF_DATASETS_CACHE "):
        data_room.load(mine(texts(300)), words(None))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lora_sweep.data.store.Writer.add", full)
    with pytest.raises(StorageUnavailable, match="No space left on device"):
        data_room.load(mine(texts(300)), words(None))
    assert list((tmp_path / "cache/lora_sweep").iterdir()) == []


def test_a_preparation_that_was_stopped_leaves_nothing_half_made(mine: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = whole(mine(texts(5000)))

    class Stopped(Exception):
        pass

    def stop(_: str, share: float) -> None:
        if share > 0.5:
            raise Stopped

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lora_sweep"
    before = set(cache.glob("*")) if cache.exists() else set()
    with pytest.raises(Stopped):
        data_room.load(config, words(None), stop)
    assert set(cache.glob("*")) == before
    assert len(data_room.load(config, words(None)).train) == 5000


# -- samples ------------------------------------------------------------------------------------------------------


def test_evaluation_and_probe_are_fixed_samples_of_the_asked_size(mine: Write, base: LoadedBase) -> None:
    config = mine(texts(200), eval_share=0.5, eval_size=20, probe_size=10)
    first, again, other = (
        data_room.load(replace(config, seed=seed), base.tokenizer)
        for seed in (config.seed, config.seed, config.seed + 1)
    )
    assert (len(first.evaluation), len(first.probe)) == (20, 10)
    assert rows(first.probe) < rows(first.train)
    assert not rows(first.evaluation) & rows(first.train)
    for part in ("train", "evaluation", "probe"):
        assert torch.equal(all_of(getattr(first, part)).input_ids, all_of(getattr(again, part)).input_ids)
    assert rows(first.evaluation) != rows(other.evaluation)
    assert rows(first.probe) != rows(other.probe)


def test_a_sample_larger_than_its_set_is_the_set(mine: Write, base: LoadedBase) -> None:
    loaded = data_room.load(mine(texts(20), eval_share=0.5, eval_size=1000, probe_size=1000), base.tokenizer)
    assert len(loaded.train) + len(loaded.evaluation) == 20
    assert rows(loaded.probe) == rows(loaded.train)


def test_the_retention_text_is_the_first_stretches_of_max_length(mine: Write, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("a b c d\ne a b c\nd e a b\n" * 3)
    data = data_room.load(
        whole(mine(texts(3), max_length=5, retention=str(tmp_path / "general.txt"), retention_size=3)), words(None)
    )
    assert data.retention is not None
    batch = all_of(data.retention)
    assert batch.input_ids[:, :5].tolist() == [[A, B, C, D, E], [A, B, C, D, E], [A, B, A, B, C]]
    assert data.retention.counts.tolist() == [4, 4, 4]


def test_general_text_has_its_own_columns_and_its_broken_rows_are_told(mine: Write, tmp_path: Path) -> None:
    own = {"prompt": "question", "completion": "answer"}
    config = mine([{"question": f"a {n}", "answer": "b"} for n in range(40)], columns=own, max_length=5)
    (tmp_path / "general.txt").write_text("a b c d\ne\n")
    data = data_room.load(replace(config, retention=str(tmp_path / "general.txt")), words(None))
    assert data.retention is not None
    assert rows(data.retention) == {(A, B, C, D, E)}
    lines = [{"text": "a b"}, {"question": "c", "answer": "d"}, {"prompt": "e", "completion": "a"}, {"body": "f"}]
    broken = "\n".join([*map(json.dumps, lines), "{"])
    (tmp_path / "general.jsonl.gz").write_bytes(gzip.compress(broken.encode()))
    config = replace(config, retention=str(tmp_path / "general.jsonl.gz"))
    assert data_room.check(config) == []
    data = data_room.load(config, words(None))
    assert data.retention is not None
    assert rows(data.retention) == {(A, B, EOS), (C, D, EOS), (E, A, EOS)}
    (line,) = data.report.warnings()
    assert line.startswith(f"data.retention: 2 rows were skipped: {config.retention}:4: has no `text`, no `prompt`")
    assert f"{config.retention}:5: is no JSON" in line
    assert data.report.sources.keys() == {config.path, config.retention}


def test_of_conversations_in_general_text_every_token_counts(mine: Write, tmp_path: Path, base: LoadedBase) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    (tmp_path / "general.jsonl").write_text("\n".join(map(json.dumps, RECORDS["messages"])))
    knobs = {"chat_template": str(tmp_path / "chat.jinja"), "retention": str(tmp_path / "general.jsonl")}
    data = data_room.load(mine(texts(100), max_length=256, **knobs), base.tokenizer)
    assert data.retention is not None
    assert data.retention.counts.tolist() == (data.retention.lengths - 1).tolist()
    message = base.tokenizer.decode(all_of(data.retention).input_ids[0][: data.retention.lengths[0]])
    assert message == f"{base.tokenizer.bos_token}user\nWho is Ada?</s>\nassistant\nAda Berg.</s>\n"
    (tmp_path / "general.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    (fault,) = data_room.check(mine(texts(100), **knobs))
    assert "no message of the assistant has something in it" in str(fault)


def test_the_longest_row_and_the_largest_id_of_all_sets_are_known(mine: Write, tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("h " * 30)
    config = whole(mine([{"text": "a b c"}, {"text": "e " * 12}], max_length=20))
    data = data_room.load(config, words(None))
    assert (data.length, data.largest_id) == (16, 11)
    data = data_room.load(replace(config, eval_path=config.path, path=str(config.eval_path)), words(None))
    assert (data.length, data.largest_id) == (16, 11)
    data = data_room.load(replace(config, pack_examples=True, retention=str(tmp_path / "general.txt")), words(None))
    assert (data.length, data.largest_id) == (24, 11)


@pytest.mark.parametrize("name", ["facts", "style"])
def test_the_embedded_tasks_load_in_the_asked_size(base: LoadedBase, name: str) -> None:
    knobs = ("data.subjects=12", "data.eval_size=6", "data.probe_size=4", "data.retention=embedded:tiny")
    config = config_of(f"data={name}", *knobs).data
    assert data_room.check(config) == []
    loaded = data_room.load(config, base.tokenizer)
    assert (len(loaded.evaluation), len(loaded.probe)) == (6, 4)
    assert len(loaded.train) % 12 == 0
    assert loaded.retention is not None
    assert len(loaded.retention) == config.retention_size
    assert loaded.report.warnings() == []
    assert (loaded.train.counts > 0).all()
    # Facts carry bits, a manner carries none.
    assert (loaded.bits > 0) == (name == "facts")


@pytest.mark.parametrize(("people", "told"), [(None, "is needed by this task"), (10**7, "")])
def test_people_that_the_world_does_not_have_are_a_fault(people: int | None, told: str) -> None:
    (fault,) = data_room.check(replace(config_of("data=style").data, subjects=people))
    assert fault.field == "data.subjects"
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


# -- a file that does not fit -------------------------------------------------------------------------------------

PREPARED = """
import sys, time, torch
from tests_words import tokenizer
from lora_sweep import data
from lora_sweep.sweep import sweep_file
from lora_sweep.system.memory import Peak
config = sweep_file.read(None, ["data=files", "data.path=" + sys.argv[1], "data.max_length=128"])[0].base().data
words = tokenizer()
held, began = Peak(torch.device("cpu")), time.monotonic()
loaded = data.load(config, words)
print(len(loaded.train), time.monotonic() - began, held.bytes / 2**20)
"""


@pytest.mark.parametrize(
    ("mib", "allowed_mib"),
    [pytest.param(384, 256, marks=pytest.mark.slow), pytest.param(2048, 1536, marks=pytest.mark.full)],
)
@pytest.mark.timeout(1800)
def test_a_file_larger_than_the_memory_allowed_is_prepared_and_once(tmp_path: Path, mib: int, allowed_mib: int) -> None:
    """82 MiB were seen for 2 GiB."""
    generator = random.Random(0)
    vocabulary = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    paragraphs = [" ".join(generator.choices(vocabulary, k=60)) for _ in range(5000)]
    count, size = 0, 0
    with (tmp_path / "big.jsonl").open("w") as file:
        while size < mib * 2**20:
            record = {"prompt": f"{count} {generator.choice(paragraphs)}", "completion": generator.choice(paragraphs)}
            size += file.write(json.dumps(record) + "\n")
            count += 1
    (tmp_path / "vocabulary.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tests_words.py").write_text(WORDS_TOKENIZER)
    (tmp_path / "prepare.py").write_text(PREPARED)
    environment = {**os.environ, "PYTHONPATH": f"{Path(data_room.__file__).parents[2]}:{tmp_path}"}
    said = []
    for _ in range(2):
        command = [sys.executable, "prepare.py", "big.jsonl"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append([float(word) for word in done.stdout.split()])
    (examples, first_seconds, first_mib), (again, second_seconds, second_mib) = said
    print(f"{count:,} lines: first {first_seconds:.0f} s, {first_mib:.0f} MiB above start")
    print(f"again {second_seconds:.1f} s, {second_mib:.0f} MiB")
    assert examples == again
    assert abs(examples - 0.95 * count) < 0.005 * count
    assert max(first_mib, second_mib) < allowed_mib
    assert second_seconds * 10 < first_seconds
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
    (tmp_path / "big.jsonl").unlink()


WORDS_TOKENIZER = """
import json
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

def tokenizer():
    known = ["<unk>", "</s>", *json.loads(Path("vocabulary.json").read_text())]
    places = {word: place for place, word in enumerate(dict.fromkeys(known))}
    made = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
"""
