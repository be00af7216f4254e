"""Conversations as OpenAI's chat writes them: what is allowed, and the forms in which chat templates expect them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_sweep.records import Example

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatFault(ValueError):
    """A conversation or a template cannot be used; the message is one clause."""


@dataclass(frozen=True)
class Conversation:
    """Messages to learn from."""

    messages: Sequence[Message]
    """As `check` wants them."""
    tools: Any = None
    """JSON schemas of the functions that may be called: a list, JSON of one, or None."""
    loss_from: int = 0
    """Place of the first message whose turns count: 0, or the length of a conversational prompt."""
    silent: tuple[int, ...] = ()
    """Places of the assistant's turns that are read and have no loss: of weight 0, or without a word."""
    plain: Example | None = None
    """The same where there is no chat template, if its format has a wording of its own."""

    def turns(self) -> Iterator[int]:
        """Places of the messages that have a loss."""
        places = range(self.loss_from, len(self.messages))
        return (place for place in places if _is_turn(self.messages[place]) and place not in self.silent)


def check(messages: Any, loss_from: int = 0, silent: Sequence[int] = ()) -> None:
    """Raises ChatFault unless these are messages with something of the assistant at `loss_from` or later."""
    if not isinstance(messages, list) or not messages:
        raise ChatFault("`messages` is no list with something in it")
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatFault(f"messages[{place}] is no object with a `role` and a `content`")
        if wrong := _wrong(message):
            raise ChatFault(f"messages[{place}] {wrong}")
    replies = [place for place in range(loss_from, len(messages)) if has_reply(messages[place])]
    if not replies:
        raise ChatFault("no message of the assistant has something in it to learn from")
    if all(place in silent for place in replies):
        raise ChatFault("every message of the assistant has the weight 0, so that there is nothing to learn from")


def _wrong(message: Message) -> str:
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    if role not in ROLES:
        return f"has the role `{role}`, not one of {', '.join(ROLES)}" if role else "has no `role`"
    if calls:
        if role != "assistant":
            return f"has `tool_calls`, but the role `{role}`"
        if not isinstance(calls, list) or not all(called(call) for call in calls):
            return "has `tool_calls` that are no list of objects with a `function` and its `name`"
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                if kind == "text":
                    return "has a part of the type `text` in its `content` without a `text` in it"
                return f"has a part of the type `{kind}` in its `content`; only text can be learnt from"
    elif content is None and not _is_turn(message):
        return "has a `content` that is null" if "content" in message else "has no `content`"
    elif not isinstance(content, str | None):
        return "has a `content` that is neither text nor a list of text parts"
    return ""


def called(call: Any) -> str:
    """Of the function that is called; empty where there is none."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Of a call, as they stand: an object, or JSON text of one."""
    return call.get("function", call).get("arguments")


def _is_turn(message: Message) -> bool:
    return bool(message["role"] == "assistant") if "role" in message else False


def has_reply(message: Message) -> bool:
    """Whether the assistant says, calls or thinks something in it."""
    if not _is_turn(message):
        return False
    return bool(message.get("tool_calls") or "".join(texts(message)).strip() or any(thoughts(message)))


def texts(message: Message) -> list[str]:
    """Of its content, part by part."""
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [content] if content else []


def forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The same conversation in the forms that templates may expect, the most common first.

    One text a message and arguments as objects; as it was given; arguments as JSON text; null, then nothing, for the
    content of a call, since some templates branch on it; all contents as parts.
    """
    plain = [_plain(message) for message in messages]
    tried = [plain]
    yield plain
    # Nearly every template takes the first: the others are made when they are needed.
    for form in _other_forms(messages, plain):
        if form not in tried:
            tried.append(form)
            yield form


def _other_forms(messages: Sequence[Message], plain: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    yield [{key: value for key, value in message.items() if value is not None} for message in messages]
    in_text = [_with_text_arguments(message) for message in plain]
    yield in_text
    for content in (None, ""):
        for form in (plain, in_text):
            yield [_with_content(message, content) for message in form]
    yield [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
        for message in plain
    ]


def _plain(message: Message) -> dict[str, Any]:
    """As most templates want it: no key without value, content as one text, arguments of calls as objects."""
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = "".join(texts(message))
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    else:
        plain.pop("tool_calls", None)
    return plain


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _plain_call(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        if isinstance(parsed, dict):
            return {**call, "arguments": parsed}
    return dict(call)


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_text_call(call) for call in message["tool_calls"]]}


def _text_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _text_call(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else {**call}


def _with_content(message: dict[str, Any], content: str | None) -> dict[str, Any]:
    """The message with this for a content that holds nothing."""
    return message if message.get("content") else {**message, "content": content}


def schemas(tools: Any) -> list[dict[str, Any]] | None:
    """Of the functions that may be called. Raises ChatFault."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ChatFault("`tools` is neither a list nor JSON of one") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ChatFault("`tools` is no list of JSON schemas")
    return tools


def thoughts(message: Message) -> list[str]:
    """What the assistant thinks before it speaks, in its content or beside it."""
    said = [part.partition("</think>")[0] for part in texts(message) if "</think>" in part]
    replies = [message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)]
    return [thought.rpartition("<think>")[2].strip() for thought in [*said, *replies] if isinstance(thought, str)]


def everything(message: Message) -> str:
    """All that the message would have a template write."""
    values = (value for key, value in message.items() if key != "role" and value is not None)
    return "\0".join(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=str) for v in values)
