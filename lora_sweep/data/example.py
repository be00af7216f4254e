"""A record of the user's data as an example to learn from: by the columns of the formats that people keep data in."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_sweep.data import chat
from lora_sweep.data.chat import ChatFault, Conversation
from lora_sweep.data.dialects import is_message, is_nothing, talk
from lora_sweep.data.file_rows import without_nulls
from lora_sweep.records import Example

Parsed = Example | Conversation

FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("system", "tools")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "alpaca": (("instruction", "output"), ("input", "system")),
    "dolly": (("instruction", "response"), ("context",)),
    "text": (("text",), ()),
}
"""data.format -> (columns that it needs, columns read beside them); the first whose columns are there is taken."""

COLUMNS = tuple(dict.fromkeys(name for needed, other in FORMATS.values() for name in (*needed, *other)))
"""What a column may mean."""

LABEL = "label"
"""Column of preference data: where it is false, the answer is one not to give."""

PAIRS = (
    ("question", "answer"), ("question", "response"),
    ("query", "response"), ("query", "answer"), ("prompt", "response"), ("prompt", "answer"),
    ("prompt", "output"), ("instruction", "completion"), ("instruction", "answer"), ("input", "output"),
    ("input", "target"), ("source", "target"), ("problem", "solution"), ("user", "assistant"), ("prompt", "chosen"),
)  # fmt: skip
"""Names of a prompt and its completion that people use; a remedy proposes them where both are there."""
TEXTS = ("content", "document", "body", "article", "chosen")

_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ParsedRow:
    """What a record is to learn from, and what of it is not read."""

    example: Parsed | str
    """Or what is wrong with the record, as a clause."""
    format: str = ""
    """By which it was read."""
    other_columns: tuple[str, ...] = ()
    """Columns with something in them that are not read."""
    other_keys: tuple[str, ...] = ()
    """Keys of its messages with something in them that only a chat template may read."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Roles: (as written, as read)."""
    empty_turns: int = 0
    """Of the assistant: they have no loss."""
    is_undesirable: bool = False
    """Whether its label says that the answer is one not to give."""
    remedy: str = field(default="", compare=False)
    """What may be typed, where names are missing."""


def parse(record: Any, columns: Mapping[str, str], form: str = "auto") -> ParsedRow:
    """An example, or what is wrong with the record.

    Args:
        columns: meaning -> the data's own name, where it has another.
        form: of FORMATS, or `auto`: the first whose columns are there.

    >>> parse({"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}, {}).other_columns
    ('id',)
    """
    if isinstance(record, list) and record and all(map(is_message, record)):
        record = {columns.get("messages", "messages"): record}
    if not isinstance(record, Mapping):
        return ParsedRow("is no JSON object")
    candidates = (form,) if form != "auto" else meanings(columns)
    names = {each: columns.get(each, each) for each in COLUMNS}
    chosen = _format(record, names, candidates)
    if chosen is None:
        return _unknown(record, columns, candidates)
    needed, beside = FORMATS[chosen]
    read = {names[each] for each in (*needed, *beside)}
    try:
        example, notes = _READERS[chosen]({each: record.get(names[each]) for each in (*needed, *beside)})
    except ChatFault as fault:
        example, notes = str(fault), {}
    if isinstance(example, Conversation):
        example = _whole(json.dumps(example.messages, ensure_ascii=False, default=str)) or example
    elif isinstance(example, Example):
        read.discard(names["tools"])  # plain text has no place for them
    label = None if chosen == "text" or LABEL in read else _label(record.get(LABEL))
    if label is not None:
        read.add(LABEL)
    others = tuple(str(name) for name, value in record.items() if name not in read and not is_nothing(value))
    return ParsedRow(example, chosen, others, is_undesirable=label is False, **notes)


def meanings(columns: Mapping[str, str]) -> tuple[str, ...]:
    """Formats that have all of these columns; none where they do not go together."""
    return tuple(name for name, (needed, beside) in FORMATS.items() if columns.keys() <= {*needed, *beside})


def _format(record: Mapping[str, Any], names: Mapping[str, str], candidates: Sequence[str]) -> str | None:
    """The first whose columns are there with something in them, else one with a null: a mistake in such a record."""
    for enough in (all, any):
        for form in candidates:
            needed = [names[each] for each in FORMATS[form][0]]
            if all(name in record for name in needed) and enough(record[name] is not None for name in needed):
                return form
    return None


def _label(value: Any) -> bool | None:
    """Of preference data; None where it is none."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _unknown(record: Mapping[str, Any], columns: Mapping[str, str], candidates: Sequence[str]) -> ParsedRow:
    names = ", ".join(f"`{name}`" for name in record) or "nothing"
    empty = [f"`{name}`" for name, value in record.items() if value is None]
    nulls = f" ({', '.join(empty)}: null)" if empty else ""
    wanted = "`text`, no `prompt` with a `completion` and no `messages`"
    if columns or len(candidates) == 1:
        wanted = " and ".join(f"`{columns.get(each, each)}`" for each in FORMATS[candidates[0]][0])
    own = _format(record, {each: each for each in COLUMNS}, tuple(FORMATS))
    if own is not None:
        remedy = f"leave data.columns out, and it is read as {own}" if columns else f"data.format={own}"
    else:
        remedy = _remedy(record)
    return ParsedRow(f"has no {wanted}, but {names}{nulls}", remedy=remedy)


def _remedy(record: Mapping[str, Any]) -> str:
    """data.columns for what the record has; empty where nothing of it is text."""
    by_lower = {str(name).lower(): str(name) for name in record}
    for pair in PAIRS:
        if set(pair) <= by_lower.keys():
            prompt, completion = (by_lower[each] for each in pair)
            if isinstance(record[prompt], list) == isinstance(record[completion], list):
                return _columns({"prompt": prompt, "completion": completion})
    for name, value in record.items():
        if isinstance(value, list) and value and all(map(is_message, value)):
            return _columns({"messages": str(name)})
    worded = [str(name) for name, value in record.items() if isinstance(value, str) and value.strip()]
    for name in TEXTS:
        if name in by_lower and by_lower[name] in worded:
            return _columns({"text": by_lower[name]})
    if len(worded) == 2:
        return _columns({"prompt": worded[0], "completion": worded[1]})
    return _columns({"text": worded[0]}) if len(worded) == 1 else ""


def _columns(names: Mapping[str, str]) -> str:
    pairs = (f"{key}: {value}" if re.fullmatch(r"\w+", value) else f'{key}: "{value}"' for key, value in names.items())
    return f"data.columns='{{{', '.join(pairs)}}}'"


# -- formats ------------------------------------------------------------------------------------------------------

Notes = dict[str, Any]
"""Fields of ParsedRow."""


def _text(values: Mapping[str, Any]) -> tuple[Parsed | str, Notes]:
    text = values["text"]
    if not isinstance(text, str):
        return f"has a `text` that is no text but {_kind(text)}", {}
    return _whole(text) or (Example(text) if text.strip() else "has an empty `text`"), {}


def _pair(values: Mapping[str, Any]) -> tuple[Parsed | str, Notes]:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], values["tools"], len(prompt))
    if isinstance(prompt, list) != isinstance(completion, list):
        kinds = f"a `prompt` that is {_kind(prompt)} and a `completion` that is {_kind(completion)}"
        return f"has {kinds}; both must be lists of messages, or both text", {}
    texts = {}
    for name, value in (("prompt", prompt), ("completion", completion)):
        worded = _worded(value)
        if worded is None:
            mend = '; write "" where there is no prompt' if value is None and name == "prompt" else ""
            return f"has a `{name}` that is {_kind(value)}, no text{mend}", {}
        if broken := _whole(worded):
            return broken, {}
        texts[name] = worded
    if not texts["completion"].strip():
        return "has an empty `completion`", {}
    return Example(texts["completion"], texts["prompt"]), {}


def _instruction(task: str, beside: str, answer: str, heading: str) -> Any:
    """A reader of single questions: a turn of the user and one of the assistant."""

    def read(values: Mapping[str, Any]) -> tuple[Parsed | str, Notes]:
        texts = {}
        for name in (task, beside, answer, "system"):
            value = values.get(name)
            worded = "" if value is None and name in (beside, "system") else _worded(value)
            if worded is None:
                return f"has {_a(name)} `{name}` that is {_kind(value)}, no text", {}
            if broken := _whole(worded):
                return broken, {}
            texts[name] = worded
        if not texts[answer].strip():
            return f"has an empty `{answer}`", {}
        question = "\n\n".join(text for text in (texts[task], texts[beside]) if text.strip())
        if not question:
            return f"has an empty `{task}`", {}
        system = [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
        messages = [*system, {"role": "user", "content": question}, {"role": "assistant", "content": texts[answer]}]
        parts = (("Instruction", texts[task]), (heading, texts[beside]))
        prompt = "".join(f"### {name}:\n{text}\n\n" for name, text in parts if text.strip())
        before = f"{texts['system']}\n\n" if system else ""
        return Conversation(messages, plain=Example(texts[answer], f"{before}{prompt}### Response:\n")), {}

    return read


def _messages(values: Mapping[str, Any]) -> tuple[Parsed | str, Notes]:
    return _conversation(values["messages"], values["tools"], 0)


def _sharegpt(values: Mapping[str, Any]) -> tuple[Parsed | str, Notes]:
    turns, system = _parsed(values["conversations"]), values["system"]
    if isinstance(turns, list) and isinstance(system, str) and system.strip():
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(turns, values["tools"], 0, "conversations")


def _conversation(messages: Any, tools: Any, loss_from: int, name: str = "messages") -> tuple[Parsed | str, Notes]:
    """Raises ChatFault."""
    messages = _parsed(messages)
    if isinstance(messages, str):
        return f"has `{name}` that are neither a list nor JSON of one", {}
    if isinstance(messages, Mapping):
        return f"has `{name}` that are one object, not a list of messages", {}
    read = talk(messages)
    chat.check(read.messages, loss_from, read.silent)
    notes = {"other_keys": read.other_keys, "renamed": read.renamed, "empty_turns": read.empty}
    return Conversation(read.messages, tools, loss_from, read.silent), notes


_READERS: Mapping[str, Any] = {
    "text": _text,
    "prompt_completion": _pair,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _instruction("instruction", "input", "output", "Input"),
    "dolly": _instruction("instruction", "context", "response", "Context"),
}


def _parsed(messages: Any) -> Any:
    """CSV and text columns hold a conversation as JSON; a text that is none stays."""
    if not isinstance(messages, str):
        return messages
    try:
        return json.loads(messages)
    except (ValueError, RecursionError):
        return messages


def _worded(value: Any) -> str | None:
    """A text, or a number as JSON writes it; None where it is neither."""
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return json.dumps(value) if is_number else None


def _a(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _kind(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    names = {
        type(None): "null", str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list",
        dict: "an object",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _whole(text: str) -> str:
    return "holds half of a surrogate pair, or a byte that is no UTF-8" if _HALF.search(text) else ""


def digest(example: Parsed) -> int:
    """64 bits of the example's own content: what the split and the search for duplicates go by."""
    if isinstance(example, Example):
        content = f"{example.prompt}\0{example.completion}"
    else:
        # The same conversation is the same one in a columnar file, whose objects have keys without value.
        parts = [example.messages, example.tools, example.loss_from, *([example.silent] if example.silent else [])]
        content = json.dumps(without_nulls(parts), sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8])
