"""A record of the user's data as an example to learn from, by TRL's column conventions."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lora_sweep.data import chat
from lora_sweep.data.chat import ChatFault, Conversation
from lora_sweep.data.file_rows import without_nulls
from lora_sweep.records import Example

COLUMNS = ("text", "prompt", "completion", "messages", "tools")
"""What a column may mean: plain text; a prompt (not counted) and its completion; a conversation, with its tools."""

FORMS = (("text",), ("prompt", "completion"), ("prompt", "completion", "tools"), ("messages",), ("messages", "tools"))
"""What makes an example."""

_HALF = re.compile("[\ud800-\udfff]")

Parsed = Example | Conversation


def parse(record: Any, columns: Mapping[str, str]) -> Parsed | str:
    """An example, or what is wrong with the record.

    Args:
        columns: meaning -> the data's own name, where it has another.
    """
    if not isinstance(record, Mapping):
        return "is no JSON object"
    values = {meaning: record.get(columns.get(meaning, meaning)) for meaning in meanings(columns)}
    values = {name: value for name, value in values.items() if value is not None}
    if "messages" in values:
        return _conversation(values["messages"], values.get("tools"), 0)
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], values.get("tools"), len(prompt))
    if prompt is not None and completion is not None:
        return _pair(prompt, completion)
    if "text" in values:
        return _text(values["text"])
    form = next((form for form in FORMS if columns and columns.keys() <= set(form)), ())
    wanted = " and ".join(f"`{columns.get(meaning, meaning)}`" for meaning in form)
    names = ", ".join(f"`{name}`" for name in record) or "nothing"
    return f"has no {wanted or '`text`, no `prompt` with a `completion` and no `messages`'}, but {names}"


def meanings(columns: Mapping[str, str]) -> tuple[str, ...]:
    """What is read where these are named: the forms that hold them all; nothing where they do not go together."""
    read = {meaning for form in FORMS if columns.keys() <= set(form) for meaning in form}
    return tuple(meaning for meaning in COLUMNS if meaning in read)


def _text(text: Any) -> Parsed | str:
    if not isinstance(text, str):
        return f"has a `text` that is no text but {_kind(text)}"
    return _whole(text) or (Example(text) if text.strip() else "has an empty `text`")


def _pair(prompt: Any, completion: Any) -> Parsed | str:
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            return f"has a `{name}` that is no text but {_kind(value)}"
        if broken := _whole(value):
            return broken
    return Example(completion, prompt) if completion.strip() else "has an empty `completion`"


def _conversation(messages: Any, tools: Any, loss_from: int) -> Parsed | str:
    if isinstance(messages, str):
        # CSV and text columns hold a conversation as JSON.
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return "has `messages` that are neither a list nor JSON of one"
    try:
        chat.check(messages, loss_from)
    except ChatFault as fault:
        return str(fault)
    if broken := _whole(json.dumps(messages, ensure_ascii=False, default=str)):
        return broken
    return Conversation(messages, tools, loss_from)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _whole(text: str) -> str:
    return "holds half of a surrogate pair, or a byte that is no UTF-8" if _HALF.search(text) else ""


def digest(example: Parsed) -> int:
    """64 bits of the example's own content: what the split and the search for duplicates go by."""
    if isinstance(example, Example):
        content = f"{example.prompt}\0{example.completion}"
    else:
        # The same conversation is the same one in a columnar file, whose objects have keys without value.
        fields = without_nulls([example.messages, example.tools, example.loss_from])
        content = json.dumps(fields, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8])
