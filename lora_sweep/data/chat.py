"""Conversations -> token ids and which of them count, through the tokenizer's chat template.

A conversation is rendered and tokenized once, as a whole, so special tokens stand in it exactly once, as the template
writes them. What counts is found in the rendered text (`renderer.py`) and carried over to tokens by their offsets.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sweep.data.conversation import ChatFault, Conversation, check
from lora_sweep.data.renderer import REFUSALS, RENDER_BYTES, RENDER_SECONDS, Renderer, Span, TooCostly
from lora_sweep.system.bounds import BoundExceeded, bounded

__all__ = ["ChatFault", "Conversation", "TooCostly", "check", "encode", "template"]

MAX_TEMPLATE_BYTES = 2**20
"""Of a template's text; the largest known has a fortieth of it."""


def template(tokenizer: Any, chat_template: str | None) -> str:
    """The jinja text that is used: `chat_template` (the text of the user's file) or the tokenizer's own.

    Raises ChatFault: there is none, it does not compile, or the tokenizer cannot say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ChatFault("the tokenizer is one without offsets (a slow one); chat needs its fast kind (tokenizer.json)")
    try:
        text: str = tokenizer.get_chat_template(chat_template)
    except ValueError:
        several = isinstance(tokenizer.chat_template, dict)
        lacks = "several chat templates and no default" if several else "no chat template"
        raise ChatFault(f"the tokenizer has {lacks}; give data.chat_template=FILE.jinja") from None
    if len(text) > MAX_TEMPLATE_BYTES:
        raise ChatFault(f"the chat template must have at most {MAX_TEMPLATE_BYTES:,} characters, got {len(text):,}")
    try:
        with bounded(RENDER_SECONDS, RENDER_BYTES):
            _refuse_powers(text)
            render_jinja_template([], chat_template=text)
    except BoundExceeded as error:
        raise ChatFault(f"the chat template {error} to compile") from None
    except TemplateSyntaxError as error:
        raise ChatFault(f"the chat template does not compile: {error.message} (line {error.lineno})") from None
    except (*REFUSALS, SyntaxError) as error:
        raise ChatFault(f"the chat template does not compile: {error}") from None
    return text


def _refuse_powers(text: str) -> None:
    """Raises ChatFault: one power may take longer than anybody waits, and nothing interrupts it."""
    before = ""
    for line, kind, token in Environment().lex(text):
        if token == "**" and kind == "operator" and before not in ("(", ","):
            raise ChatFault(f"the chat template raises to a power, which is refused (line {line})")
        before = token if kind != "whitespace" else before


def encode(
    conversations: Sequence[Conversation], tokenizer: Any, chat_template: str | None = None
) -> list[tuple[list[int], list[bool]] | ChatFault]:
    """(ids, counted) of each, or what is wrong with it, in order.

    counted: the tokens of the assistant's turns from `loss_from` on that are not `silent`, with the tags of a thought
    and with all that ends a turn (Phi-3 writes an end of text behind the last one); not the role headers, the other
    roles, nor white space after the end of a turn, which nothing generates. With `{% generation %}` in the template,
    the template says what counts. Raises ChatFault as `template` does, TooCostly where one conversation takes more
    than RENDER_SECONDS or RENDER_BYTES.
    """
    renderer = Renderer(tokenizer, template(tokenizer, chat_template))
    marked = [renderer.mark(conversation) for conversation in conversations]
    whole = [mark for mark in marked if not isinstance(mark, ChatFault)]
    if not whole:
        return [mark for mark in marked if isinstance(mark, ChatFault)]
    tokens = tokenizer(
        [text for text, _ in whole],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # the length is cut later
    )
    loss_mask = map(_loss_mask, whole, tokens["offset_mapping"])
    encoded = iter(zip(tokens["input_ids"], loss_mask, strict=True))
    results: list[tuple[list[int], list[bool]] | ChatFault] = []
    for mark in marked:
        if isinstance(mark, ChatFault):
            results.append(mark)
        else:
            ids, mask = next(encoded)
            results.append((ids, mask) if any(mask) else ChatFault("no token of it counts"))
    return results


def _loss_mask(marked: tuple[str, list[Span]], offsets: list[Span]) -> list[bool]:
    """Of each token, whether it counts: whether its first character that is no white space lies in a span.

    Byte-level tokenizers give a word's token with or without the space before it, so that space cannot decide.
    A token of white space alone lies where it begins.
    """
    text, spans = marked
    begins = [begin for begin, _ in offsets]
    loss_mask = [False] * len(offsets)

    def first(at: int) -> int:
        """The first token that lies at or behind this character."""
        token = bisect_left(begins, at)
        if token:
            begin, end = offsets[token - 1]
            if end > at and not text[begin:at].strip() and text[at:end].strip():
                return token - 1  # its space lies before, its word behind
            while token < len(offsets) and offsets[token] == (at, at) and end < at:
                token, end = token + 1, at  # white space whose offsets have been trimmed to nothing
        return token

    for begin, end in spans:
        for token in range(first(begin), first(end)):
            loss_mask[token] = True
    if loss_mask:
        loss_mask[0] = False  # nothing before it to be predicted from
    return loss_mask
