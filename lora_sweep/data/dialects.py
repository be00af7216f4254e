"""Messages as other tools write them (ShareGPT, axolotl, older function calls), in the words of OpenAI's chat."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_sweep.data.conversation import ROLES, ChatFault, Message, has_reply

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
"""`from` of a ShareGPT turn, in any case -> role."""

ROLE_ALIASES = {
    "model": "assistant", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "human": "user",
    "function": "tool", "ipython": "tool", "observation": "tool", "function_call": "function_call",
    "tool_call": "function_call",
}  # fmt: skip
"""`role` of other tools -> OpenAI's; `function_call` is an assistant's turn whose content is JSON of a call."""

WEIGHTS = ("weight", "loss_weight", "train", "training")
"""Keys of a message that say whether it has a loss: 1 and true, or 0 and false; null says nothing."""

READ_KEYS = ("role", "content", "from", "value", "tool_calls", "function_call", *WEIGHTS)
"""Keys of a message that are read here; a chat template may read others."""


@dataclass(frozen=True)
class Talk:
    """Messages in OpenAI's words, and what was found on the way."""

    messages: list[Any]
    silent: tuple[int, ...] = ()
    """Places of the assistant's turns without a loss: of weight 0, or empty."""
    empty: int = 0
    """Turns of the assistant without a word, a thought or a call."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(role as written, role that it is read as), where `role` names one that OpenAI has not."""
    other_keys: tuple[str, ...] = ()
    """Keys with something in them that only a chat template may read."""


def talk(messages: Any) -> Talk:
    """The messages in OpenAI's words. What is no message stays, for `conversation.check`. Raises ChatFault.

    >>> talk([{"from": "human", "value": "Up?"}, {"from": "gpt", "value": "Down."}]).messages
    [{'role': 'user', 'content': 'Up?'}, {'role': 'assistant', 'content': 'Down.'}]
    """
    if not isinstance(messages, list):
        return Talk(messages)
    read, silent, renamed, others = [], [], {}, dict[str, None]()
    empty = 0
    for place, message in enumerate(messages):
        if not isinstance(message, Mapping):
            read.append(message)
            continue
        others |= {key: None for key, value in message.items() if key not in READ_KEYS and not is_nothing(value)}
        role = _role(message)
        plain = _content(message, role)
        if "role" in message and role != message["role"]:
            renamed[str(message["role"])] = "assistant" if role == "function_call" else str(role)
        has_loss = _has_loss(message, place, role)
        plain = _with_calls(plain, role, place)
        read.append(plain)
        if plain.get("role") == "assistant":
            # A content of another kind is refused as a whole.
            is_text = isinstance(plain.get("content"), str | None)
            is_empty = is_text and not has_reply(plain)
            empty += is_empty
            if is_empty or not has_loss:
                silent.append(place)
    return Talk(read, tuple(silent), empty, tuple(renamed.items()), tuple(others))


def is_nothing(value: Any) -> bool:
    """Whether a column or key with this value holds nothing that could be passed over."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def is_message(value: Any) -> bool:
    """Whether it is one turn of a conversation, in either dialect."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def _role(message: Message) -> Any:
    if "role" not in message and "from" in message:
        name = message["from"]
        return SHAREGPT_ROLES.get(name.strip().lower(), name) if isinstance(name, str) else name
    role = message.get("role")
    if not isinstance(role, str) or role in ROLES:
        return role
    name = role.strip().lower()
    return name if name in ROLES else ROLE_ALIASES.get(name, role)


def _content(message: Message, role: Any) -> dict[str, Any]:
    """The message by its role's own name, with its content as text or as parts of text."""
    plain: dict[str, Any] = {key: value for key, value in message.items() if key not in WEIGHTS}
    if "role" in plain or "from" in plain:
        plain = {"role": role, **{key: value for key, value in plain.items() if key not in ("role", "from")}}
    if "value" in plain and "content" not in plain:
        plain = {"content" if key == "value" else key: value for key, value in plain.items()}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = [_part(part) for part in content]
    elif isinstance(content, int | float) and not isinstance(content, bool):
        plain["content"] = json.dumps(content)
    return plain


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and part.get("type") == "text" and part.get("text") is None:
        for key in ("value", "content"):
            if isinstance(part.get(key), str):
                return {"type": "text", "text": part[key]}
    return part


def _has_loss(message: Message, place: int, role: Any) -> bool:
    """Raises ChatFault: a share of a loss is none that is trained here."""
    has_loss = True
    for key in WEIGHTS:
        value = message.get(key)
        if value is None:
            continue
        if value not in (0, 1):
            raise ChatFault(f"messages[{place}] has the {key} {value!r}; a turn has a loss (1) or none (0)")
        if value == 1 and role not in ("assistant", "function_call"):
            raise ChatFault(f"messages[{place}] has {key} {value!r}, but only the assistant's turns have a loss")
        has_loss = has_loss and bool(value)
    return has_loss


def _with_calls(message: dict[str, Any], role: Any, place: int) -> dict[str, Any]:
    """Calls as `tool_calls`. Raises ChatFault where a turn that is a call holds none."""
    if role == "function_call":
        calls = _calls(message.get("content"))
        if not calls:
            raise ChatFault(f"messages[{place}] is a function call, and no JSON of one: {{name, arguments}}")
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        return {"role": "assistant", "content": None, "tool_calls": calls, **rest}
    if "function_call" not in message:
        return message
    calls = _calls(message["function_call"]) if message["function_call"] else []
    if message["function_call"] and not calls:
        raise ChatFault(f"messages[{place}] has a `function_call` that is no call: {{name, arguments}}")
    rest = {key: value for key, value in message.items() if key != "function_call"}
    if calls and not rest.get("tool_calls"):
        rest["tool_calls"] = calls
    return rest


def _calls(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    calls: Sequence[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [{"type": "function", "function": dict(call)} for call in calls]
