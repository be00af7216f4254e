"""Examples -> token ids and what counts of them, with an account of each: cut, emptied, broken."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_sweep.config import DataConfig
from lora_sweep.data import chat, tokens
from lora_sweep.data.chat import MAX_TEMPLATE_BYTES, ChatFault, Conversation, TooCostly
from lora_sweep.data.example import Parsed
from lora_sweep.data.report import Part, RowCounts
from lora_sweep.data.tokens import Encoded
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.records import Example
from lora_sweep.system import files

Placed = tuple[str, Parsed]
"""(where it stands, the example)."""


def template_text(data: DataConfig) -> str | None:
    """Of data.chat_template; None where the tokenizer's own is used. Raises ConfigError."""
    if data.chat_template is None:
        return None
    try:
        return files.read_text(Path(data.chat_template).expanduser(), MAX_TEMPLATE_BYTES)
    except (OSError, files.Unsafe) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fault = Fault("data.chat_template", f"cannot be read ({reason})", data.chat_template, "a jinja file is needed")
        raise ConfigError([fault]) from error


def encoded(
    batch: Sequence[Placed], tokenizer: Any, template: str | None, max_length: int | None, part: Part, broken: RowCounts
) -> Iterator[Encoded]:
    """The batch tokenized and cut (None: whole), in its order; each example's fate is entered in `part` and `broken`.

    Raises ConfigError where the chat template itself is of no use.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        batch = [(place, _without_template(one)) for place, one in batch]
    plain = [(one.prompt, one.completion) for _, one in batch if isinstance(one, Example)]
    talks = [one for _, one in batch if isinstance(one, Conversation)]
    pairs = iter(tokens.encode(plain, tokenizer))
    turns = iter(_turns(talks, tokenizer, template))
    for place, one in batch:
        each_tokens = next(pairs) if isinstance(one, Example) else next(turns)
        if isinstance(each_tokens, ChatFault):
            broken.add(f"{place}: {each_tokens}")
            continue
        ids, loss_mask = each_tokens
        if max_length is not None and len(ids) > max_length:
            part.cut.add(place)
            part.cut_tokens += len(ids) - max_length
            ids, loss_mask = ids[:max_length], loss_mask[:max_length]
        if not loss_mask.any():
            part.emptied.add(place)
            continue
        part.examples += 1
        part.tokens += len(ids)
        part.loss_tokens += int(loss_mask.sum())
        part.largest_id = max(part.largest_id, int(ids.max()))
        yield ids, loss_mask


def _without_template(one: Parsed) -> Parsed:
    """In the wording of its own format, where it has one."""
    return one.plain if isinstance(one, Conversation) and one.plain is not None else one


def _turns(talks: Sequence[Conversation], tokenizer: Any, template: str | None) -> Sequence[Encoded | ChatFault]:
    try:
        encoded_talks = chat.encode(talks, tokenizer, template) if talks else []
    except ChatFault as fault:
        raise ConfigError([Fault("data.chat_template", str(fault))]) from fault
    except TooCostly as error:
        which = "the tokenizer's own chat template" if template is None else "the chat template"
        rule = f"{which} {error} to write one conversation"
        raise ConfigError(
            [Fault("data.chat_template", rule, None, "give another: data.chat_template=FILE.jinja")]
        ) from error
    return [
        each if isinstance(each, ChatFault) else (np.array(each[0], np.int32), np.array(each[1], np.bool_))
        for each in encoded_talks
    ]
