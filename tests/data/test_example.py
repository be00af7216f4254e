"""Records of the formats that people keep data in: what is read, what of it has a loss, and what is not used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of
from test_chat import WEATHER, assistant, marked, shown, system, tokenizer_of, user
from transformers import AutoTokenizer

from lora_sweep import data as prepared
from lora_sweep.data.chat import encode
from lora_sweep.data.conversation import Conversation
from lora_sweep.data.example import FORMATS, ParsedRow, parse
from lora_sweep.errors import ConfigError

WEIGHTS = Path(__file__).parents[2] / "lora_sweep/tiny/weights"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
Rows = list[Any] | dict[str, Any]


def conversation(record: Any, **columns: str) -> Conversation:
    row = parse(record, columns)
    assert isinstance(row.example, Conversation), row.example
    return row.example


def text_with_loss(record: Any, **columns: str) -> str:
    """As SmolLM2 reads it, with «what has a loss»."""
    (result,) = encode([conversation(record, **columns)], tokenizer_of("smollm2"), CHATML)
    return shown(result, tokenizer_of("smollm2"))


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}\n"


def said(content: str) -> str:
    return f"<|im_start|>assistant\n«{content}<|im_end|>»\n"


def end(content: str) -> str:
    return content + "<|im_end|>"


# -- what is read --------------------------------------------------------------------------------------------------

SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Up?"}, {"from": "gpt", "value": "Down."},
    ]
}  # fmt: skip
READ = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        turn("user", end("Add.\n\n1 and 2")) + said("3"),
    ),
    "alpaca without an input": (
        {"instruction": "Name a river.", "input": "", "output": "Loire"},
        turn("user", end("Name a river.")) + said("Loire"),
    ),
    "dolly": (
        {"instruction": "Whose?", "context": "Ines sold it to Tam.", "response": "Tam's", "category": "closed"},
        turn("user", end("Whose?\n\nInes sold it to Tam.")) + said("Tam's"),
    ),
    "sharegpt": (SHAREGPT, turn("system", end("Be brief.")) + turn("user", end("Up?")) + said("Down.")),
    "sharegpt with a column for the system": (
        {"conversations": SHAREGPT["conversations"][1:], "system": "Be brief."},
        turn("system", end("Be brief.")) + turn("user", end("Up?")) + said("Down."),
    ),
    "turns under a column of another name": (
        {"talk": SHAREGPT["conversations"][1:]},
        turn("user", end("Up?")) + said("Down."),
    ),
    "turns under messages": ({"messages": SHAREGPT["conversations"][1:]}, turn("user", end("Up?")) + said("Down.")),
    "a bare list": ([user("Up?"), assistant("Down.")], turn("user", end("Up?")) + said("Down.")),
    "roles of others": (
        {"messages": [{"role": "User", "content": "Up?"}, {"role": "model", "content": "Down."}]},
        turn("user", end("Up?")) + said("Down."),
    ),
    "a developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, user("Up?"), assistant("Down.")]},
        turn("system", end("Be brief.")) + turn("user", end("Up?")) + said("Down."),
    ),
    "weight 0": (
        {"messages": [user("Up?"), assistant("No idea.", weight=0), user("So?"), assistant("Down.", weight=1)]},
        turn("user", end("Up?")) + turn("assistant", end("No idea.")) + turn("user", end("So?")) + said("Down."),
    ),
    "train false": (
        {"messages": [user("Up?"), assistant("No idea.", train=False), user("So?"), assistant("Down.")]},
        turn("user", end("Up?")) + turn("assistant", end("No idea.")) + turn("user", end("So?")) + said("Down."),
    ),
    "an empty turn": (
        {"messages": [user("Up?"), assistant(""), user("So?"), assistant("Down.")]},
        turn("user", end("Up?")) + turn("assistant", end("")) + turn("user", end("So?")) + said("Down."),
    ),
    "parts with a value": (
        {"messages": [user([{"type": "text", "value": "Up?"}]), assistant([{"type": "text", "value": "Down."}])]},
        turn("user", end("Up?")) + said("Down."),
    ),
    "parts of plain text": (
        {"messages": [user(["Up?"]), assistant([{"type": "text", "text": "Down."}])]},
        turn("user", end("Up?")) + said("Down."),
    ),
    "a number as content": ({"messages": [user("2 + 2?"), assistant(4)]}, turn("user", end("2 + 2?")) + said("4")),
}


@pytest.mark.parametrize("name", READ)
def test_a_format_is_read_as_it_is_and_the_answer_alone_has_a_loss(name: str) -> None:
    record, expected = READ[name]
    columns = {"messages": "talk"} if "another name" in name else {}
    assert text_with_loss(record, **columns) == expected


def test_with_generation_tags_a_turn_of_weight_0_has_no_loss_either() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    record, expected = READ["weight 0"]
    (result,) = encode([conversation(record)], tokenizer_of("smollm2"), text)
    assert shown(result, tokenizer_of("smollm2")) == expected


CALLS = {
    "function_call of a ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "Rain."},
            {"from": "gpt", "value": "It rains."},
        ],
        "tools": json.dumps([WEATHER]),
    },
    "the older function_call": {
        "messages": [
            user("Weather?"),
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'},
            },
            {"role": "function", "name": "weather", "content": "Rain."},
            assistant("It rains."),
        ],
        "tools": [WEATHER],
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_other_dialects_are_those_of_openai(name: str) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    plain = [
        user("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Rain."},
        assistant("It rains."),
    ]
    talk = conversation(CALLS[name])
    expected = marked(plain, "qwen2_5", tools=[WEATHER])
    assert "«<tool_call>" in expected
    assert marked(list(talk.messages), "qwen2_5", tools=talk.tools) == expected


NULLS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% if m['content'] is none %}"
    "<A>{% for c in m['tool_calls'] %}{{ c['function']['name'] + ':' + c['function']['arguments'] }}{% endfor %}"
    "{% else %}<A>{{ m['content'] }}{% endif %}</s>{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
"""As DeepSeek's templates go: a call is what has null for a content, and its arguments are text."""


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", ['{"part": 0}', {"part": 0}])
def test_a_template_that_branches_on_null_gets_it_and_arguments_in_its_form(content: Any, arguments: Any) -> None:
    calls = [{"id": "c0", "type": "function", "function": {"name": "stock", "arguments": arguments}}]
    messages = [user("Stock?"), assistant(content, tool_calls=calls), {"role": "tool", "content": "7"}, assistant("7.")]
    (result,) = encode([conversation({"messages": messages})], tokenizer_of("zephyr"), NULLS)
    assert shown(result, tokenizer_of("zephyr")) == '<user>Stock?<A>«stock:{"part": 0}</s>»<tool>7<A>«7.</s>»'


def test_neither_null_nor_an_object_is_written_as_python_prints_it() -> None:
    call = [{"type": "function", "function": {"name": "stock", "arguments": {"part": 0}}}]
    talk = conversation({"messages": [user("Stock?"), assistant(None, tool_calls=call)]})
    bodies = {
        # It writes the call with a null alone, and the null as well.
        "{{ m['content'] }}{% if m['content'] is none %}{{ f['name'] }}{% endif %}": "which is not written",
        "{% if m['content'] == 'x' %}x{% else %}{{ f if m['tool_calls'] else m['content'] }}{% endif %}": "as Python",
        "{{ f['name'] }}{{ f['arguments'] }}": None,
    }
    for body, fault in bodies.items():
        text = (
            "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'user' %}{{ m['content'] }}"
            "{% else %}{% set f = (m['tool_calls'] or [{'function': {'name': m['content']}}])[0]['function'] %}"
            + body + "</s>{% endif %}{% endfor %}"
        )  # fmt: skip
        (result,) = encode([talk], tokenizer_of("zephyr"), text)
        if fault is None:
            assert shown(result, tokenizer_of("zephyr")) == '<user>Stock?<assistant>«stock{"part": 0}</s>»'
        else:
            assert isinstance(result, ValueError)
            assert fault in str(result)


# -- what is said of it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "columns", "fields"),
    [
        ({"instruction": "a", "input": "b", "output": "c", "text": "a b c", "id": 3}, {}, ("alpaca", ("text", "id"))),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            {"prompt": "instruction", "completion": "output"},
            ("prompt_completion", ("input",)),
        ),
        ({"instruction": "a", "context": "", "response": "c", "category": "x"}, {}, ("dolly", ("category",))),
        ({"prompt": "a", "text": "b"}, {}, ("text", ("prompt",))),
        ({"prompt": "a", "completion": "b", "tools": [WEATHER]}, {}, ("prompt_completion", ("tools",))),
        ({"messages": [user("a"), assistant("b")], "prompt": "a", "n": 0}, {}, ("messages", ("prompt", "n"))),
        ({"text": "a", "label": False, "x": None, "y": [], "z": ""}, {}, ("text", ("label",))),
    ],
)
def test_a_column_with_something_in_it_that_is_not_used_is_named(record: Any, columns: Any, fields: Any) -> None:
    row = parse(record, columns)
    assert (row.format, row.other_columns) == fields
    assert not isinstance(row.example, str)


def test_keys_of_messages_and_roles_are_reported_and_preference_labels_read() -> None:
    messages = [{"role": "human", "content": "a", "date": "1990"}, assistant("", name=None), assistant("b", name="x")]
    row = parse({"messages": messages, "label": False}, {})
    assert row.other_keys == ("date", "name")
    assert row.renamed == (("human", "user"),)
    assert (row.empty_turns, row.is_undesirable, row.other_columns) == (1, True, ())
    assert not parse({"messages": messages, "label": "True"}, {}).is_undesirable


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([user("a"), assistant("b", weight=0.5)], "messages[1] has the weight 0.5; a turn has a loss (1) or none (0)"),
        (
            [user("a", ) | {"train": True}, assistant("b")],
            "messages[0] has train True, but only the assistant's turns have a loss",
        ),
        (
            [user("a"), assistant("b", weight=0)],
            "every message of the assistant has the weight 0, so that there is nothing to learn from",
        ),
        ([user("a"), {"from": "function_call", "value": "stock 3"}],
         "messages[1] is a function call, and no JSON of one: {name, arguments}"),
        ([user(None), assistant("b")], "messages[0] has a `content` that is null"),
        ([user([{"type": "text"}]), assistant("b")],
         "messages[0] has a part of the type `text` in its `content` without a `text` in it"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_a_fault_of_the_row(messages: Any, fault: str) -> None:
    assert parse({"messages": messages}, {}).example == fault


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"prompt": "a", "completion": float("nan")}, "has a `completion` that is not a number, no text"),
        ({"instruction": None, "output": "x"}, "has an `instruction` that is null, no text"),
        ({"instruction": "a", "output": ["x"]}, "has an `output` that is a list, no text"),
        (
            {"prompt": [user("a")], "completion": "b"},
            "has a `prompt` that is a list and a `completion` that is text; "
            "both must be lists of messages, or both text",
        ),
        (
            {"messages": [user("a"), assistant("b", function_call="x")]},
            "messages[1] has a `function_call` that is no call: {name, arguments}",
        ),
        ({"conversations": "no JSON", "system": "x"}, "has `conversations` that are neither a list nor JSON of one"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_a_fault_of_the_row(record: Any, fault: str) -> None:
    assert parse(record, {}).example == fault


def test_a_conversation_in_json_text_has_its_system_message_too() -> None:
    turns = json.dumps(SHAREGPT["conversations"][1:])
    talk = conversation({"conversations": turns, "system": "Be brief."})
    assert talk.messages == conversation(SHAREGPT).messages


def test_every_format_can_be_named_and_refuses_what_it_is_not() -> None:
    records: dict[str, Any] = {
        "messages": {"messages": [user("a"), assistant("b")]}, "sharegpt": SHAREGPT, "text": {"text": "a"},
        "prompt_completion": {"prompt": "a", "completion": "b"}, "alpaca": READ["alpaca"][0], "dolly": READ["dolly"][0],
    }  # fmt: skip
    assert records.keys() == FORMATS.keys()
    for form, record in records.items():
        assert parse(record, {}).format == parse(record, {}, form).format == form
        for other in FORMATS.keys() - {form}:
            row = parse(record, {}, other)
            assert isinstance(row.example, str)
            assert row.remedy == f"data.format={form}"


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Any]:
    """(rows or a JSON value, its file's name, overrides) -> the prepared data."""
    number = iter(range(100))

    def load(content: Rows | str, name: str = "mine.jsonl", *overrides: str, template: str | None = CHATML) -> Any:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (folder / name).write_text(text)
        config = config_of("data=files", f"data.path={folder / name}", *FEW, *overrides).data
        if faults := prepared.check(config):
            raise ConfigError(faults)
        tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
        if template is not None:
            tokenizer = tokenizer_of("smollm2")
            tokenizer.chat_template = template
        return prepared.load(config, tokenizer)

    return load


FEW = ("data.eval_share=0.3", "data.eval_size=null")
PAIRS = [{"prompt": f"{n} squared?", "completion": str(n * n)} for n in range(12)]


def decoded(data: Any, tokenizer: Any) -> set[str]:
    sets = (data.train, data.evaluation)
    return {tokenizer.decode(ids) for each in sets for ids in rows_of(each)}


def rows_of(tokens: Any) -> list[list[int]]:
    batch = tokens.batch(torch.arange(len(tokens)))
    return [ids[: int(length)].tolist() for ids, length in zip(batch.input_ids, tokens.lengths, strict=True)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("orient records.json", PAIRS),
        ("orient columns.json", {key: {str(n): row[key] for n, row in enumerate(PAIRS)} for key in PAIRS[0]}),
        ("orient list.json", {key: [row[key] for row in PAIRS] for key in PAIRS[0]}),
        ("orient index.json", {str(n): row for n, row in enumerate(PAIRS)}),
        ("orient split.json", {
            "columns": list(PAIRS[0]), "index": list(range(12)), "data": [list(row.values()) for row in PAIRS]
        }),
        ("orient table.json", {"schema": {"fields": []}, "data": PAIRS}),
        ("array in a line.jsonl", PAIRS),
        ("numbers.jsonl", None),
        ("pretty.jsonl", PAIRS),
    ],
)  # fmt: skip
def test_however_records_are_contained_they_are_the_same_examples(loaded: Any, name: str, value: Any) -> None:
    first = loaded(PAIRS)
    if name == "numbers.jsonl":
        other = loaded([{**row, "completion": int(row["completion"])} for row in PAIRS], name)
    else:
        other = loaded(json.dumps(value, indent=2 if name.startswith("pretty") else None), name)
    assert other.report.rows == 12
    for key in ("train", "evaluation"):
        one, two = getattr(first, key), getattr(other, key)
        assert rows_of(one) == rows_of(two)


def test_a_file_may_be_one_conversation(loaded: Any) -> None:
    talk = {"messages": [user("Which gate?"), assistant("Gate 4.")]}
    for value in (talk, talk["messages"], [talk["messages"]]):
        with pytest.raises(ConfigError) as caught:
            loaded(json.dumps(value, indent=2), "mine.json")
        (fault,) = caught.value.faults
        assert str(fault).startswith("data.eval_share: no evaluation example is left of 1"), "it is read, and is alone"


def test_what_is_not_used_or_read_otherwise_is_reported_with_its_rows(loaded: Any) -> None:
    rows = [
        {"messages": [{"role": "human", "content": f"{n}?", "at": n + 1}, assistant(f"{n}.")], "source": "x"}
        for n in range(12)
    ]
    rows[3]["messages"] = [user("3?"), assistant(""), user("well?"), assistant("3.")]
    report = loaded(rows).report
    assert "data: columns that are not used: `source` (12 rows)" in report.warnings()
    keys = "data: keys of messages that neither the chat template nor lora_sweep reads: `at` (11 rows)"
    assert keys in report.warnings()
    assert "data: roles: `human` as user (11 rows)" in report.warnings()
    (empty,) = (line for line in report.warnings() if "without a word" in line)
    assert empty.startswith("data: 1 of 12 rows have a turn of the assistant without a word, which has no loss: ")
    assert "mine.jsonl:4" in empty
    reads = CHATML.replace("{{ m.content }}", "{{ m.at }}{{ m.content }}")
    assert not any("`at`" in line for line in loaded(rows, template=reads).report.warnings())


def test_undesirable_rows_are_refused_left_out_or_trained_as_the_setting_says(loaded: Any) -> None:
    rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(PAIRS)]
    with pytest.raises(ConfigError) as caught:
        loaded(rows)
    (fault,) = caught.value.faults
    assert fault.field == "data.undesirable"
    assert "6 of the first 12 rows" in str(fault) and "mine.jsonl:2" in str(fault)
    assert fault.remedy.startswith("data.undesirable=skip")
    left = loaded(rows, "mine.jsonl", "data.undesirable=skip")
    assert left.report.train.examples + left.report.evaluation.examples == 6
    assert any(
        line.startswith("data.undesirable: 6 rows with `label: false` were left") for line in left.report.warnings()
    )
    every = loaded(rows, "mine.jsonl", "data.undesirable=train")
    assert every.report.train.examples + every.report.evaluation.examples == 12


def test_one_undesirable_row_far_behind_the_first_is_refused_too(loaded: Any) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}", "label": n != 150} for n in range(200)]
    with pytest.raises(ConfigError, match=r"data\.undesirable: must be skip or train: 1 of 200 rows"):
        loaded(rows)


def test_without_a_chat_template_alpaca_and_dolly_stand_under_headings(loaded: Any) -> None:
    rows = [{"instruction": "Add.", "input": f"{n} and 1", "output": f"{n + 1}"} for n in range(12)]
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    texts = decoded(loaded(rows, template=None), tokenizer)
    assert any("### Instruction:\nAdd.\n\n### Input:\n3 and 1\n\n### Response:\n4" in text for text in texts)
    masks = loaded(rows, template=None).train
    assert int(masks.counts.min()) >= 1


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"question": "a", "answer": "b"}, "data.columns='{prompt: question, completion: answer}'"),
        ({"Query": "a", "Response": "b", "id": 1}, "data.columns='{prompt: Query, completion: Response}'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "data.columns='{prompt: prompt, completion: chosen}'"),
        (
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "data.columns='{messages: chosen}'",
        ),
        ({"dialogue": [user("a"), assistant("b")]}, "data.columns='{messages: dialogue}'"),
        ({"content": "a b"}, "data.columns='{text: content}'"),
        ({"the words": "a b"}, "data.columns='{text: \"the words\"}'"),
        ({"x": 1.5, "y": [1, 2]}, ""),
    ],
)
def test_the_remedy_for_unknown_columns_names_those_that_are_there_and_works(record: Any, remedy: str) -> None:
    row = parse(record, {})
    assert isinstance(row.example, str)
    assert row.remedy == remedy
    if remedy:
        overrides = ["data=files", "data.path=x", remedy.replace("'", "")]
        columns = config_of(*overrides).data.columns
        assert not isinstance(parse(record, columns).example, str)


def test_a_row_is_the_same_however_it_is_compared() -> None:
    assert parse({"text": "a"}, {}) == ParsedRow(parse({"text": "a"}, {}).example, "text")


def test_a_system_message_of_alpaca_comes_first() -> None:
    record = {"instruction": "a", "input": "", "output": "b", "system": "Be kind."}
    assert conversation(record).messages[0] == system("Be kind.")
