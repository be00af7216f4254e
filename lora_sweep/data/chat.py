"""Conversations -> token ids and which of them count, through the tokenizer's chat template.

A conversation is rendered and tokenized once, as a whole, so special tokens stand in it exactly once, as the template
writes them. What counts is found in the rendered text and carried over to tokens by their offsets. A turn of the
assistant is what lies between the prompt that the template writes for it and the end of the conversation up to it.
Where a template writes a turn differently once more follow (thoughts stripped, an end of text), the conversation is
rendered again with a stand-in for the turn; where that does not tell either, it is a fault: never a guessed mask.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sweep.data.conversation import (
    ChatFault,
    Conversation,
    called,
    check,
    everything,
    forms,
    schemas,
    texts,
    thoughts,
)
from lora_sweep.system.bounds import BoundExceeded, bounded

__all__ = ["ChatFault", "Conversation", "TooCostly", "check", "encode", "template"]

RENDER_SECONDS, RENDER_BYTES = 5.0, 2**28
"""Most that a template may take to write one conversation; one of 1 MiB takes 0.1 s."""
MAX_TEMPLATE_BYTES = 2**20
"""Of a template's text; the largest known has a fortieth of it."""

_STAND_IN = "\uf8ffstand-in\uf8ff"
"""In place of a turn. Its ends are characters of private use: nothing around it runs on into it by chance."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_PART = re.compile(r"""['"]type['"]\s*:\s*['"]text['"]""")
"""A part of a content that was printed instead of its text."""

_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template may raise on a conversation: by itself, or in an operation on what it does not expect."""

Span = tuple[int, int]
"""[begin, end) in characters of the rendered text."""


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
    except (*_REFUSALS, SyntaxError) as error:
        raise ChatFault(f"the chat template does not compile: {error}") from None
    return text


def _refuse_powers(text: str) -> None:
    """Raises ChatFault: one power may take longer than anybody waits, and nothing interrupts it."""
    before = ""
    for line, kind, token in Environment().lex(text):
        if token == "**" and kind == "operator" and before not in ("(", ","):
            raise ChatFault(f"the chat template raises to a power, which is refused (line {line})")
        before = token if kind != "whitespace" else before


class TooCostly(Exception):
    """A template takes more than its bounds for one conversation; the message is a clause that begins with a verb."""


def encode(
    conversations: Sequence[Conversation], tokenizer: Any, chat_template: str | None = None
) -> list[tuple[list[int], list[bool]] | ChatFault]:
    """(ids, counted) of each, or what is wrong with it, in order.

    counted: the tokens of the assistant's turns from `loss_from` on, with the token that ends a turn; not the role
    headers, the other roles, nor white space after the end of a turn. With `{% generation %}` in the template, the
    template says what counts. Raises ChatFault as `template` does, TooCostly where one conversation takes more than
    RENDER_SECONDS or RENDER_BYTES.
    """
    writer = _Writer(tokenizer, template(tokenizer, chat_template))
    marked = [writer.mark(conversation) for conversation in conversations]
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


class _Writer:
    """Renders conversations with one template and finds in the text what counts."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.special: dict[str, str] = tokenizer.special_tokens_map
        own = isinstance(tokenizer.chat_template, dict) and text == tokenizer.chat_template.get("default")
        self.with_tools: str = tokenizer.chat_template.get("tool_use", text) if own else text
        self.text = text
        """Where there are tools, `with_tools`."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.tokens = {*special, *self.special.values()}
        self.token_lengths = {len(token) for token in self.tokens}
        plain, self.prompts, self.headless = text, False, False
        for asks, reply in zip(*map(forms, ([{"role": "user", "content": "a"}], [_stand_in({})])), strict=True):
            try:
                bare, wanted = (self._render(asks, None, prompt) for prompt in (False, True))
                probe = self._render([*asks, *reply], None)
            except ChatFault:
                continue
            if _STAND_IN in probe:
                # Some write the assistant's header as a prompt, some (Mistral) none at all, some with its turn only.
                plain, self.prompts = probe, bare != wanted
                self.headless = probe.startswith(bare) and not probe[len(bare) :].partition(_STAND_IN)[0].strip()
                break
        control = [re.escape(token) for token in self.tokens if token in plain]
        self.control = re.compile("|".join(sorted(control, key=len, reverse=True)) or "(?!)")

    def mark(self, conversation: Conversation) -> tuple[str, list[Span]] | ChatFault:
        """(the rendered text, what counts in it)."""
        try:
            check(conversation.messages, conversation.loss_from)
            tools = schemas(conversation.tools)
            for place, message in enumerate(conversation.messages):
                if token := self.control.search(everything(message)):
                    raise ChatFault(f"messages[{place}] holds `{token[0]}`, which the chat template writes itself")
            faults = []
            for messages in forms(conversation.messages):
                try:
                    return self._marked(messages, tools, conversation.loss_from)
                except ChatFault as fault:
                    faults.append(fault)
            return faults[0]
        except ChatFault as fault:
            return fault

    def _marked(self, messages: list[dict[str, Any]], tools: Any, loss_from: int) -> tuple[str, list[Span]]:
        if _GENERATION.search(self._used(tools)):
            text, spans = self._tagged(messages, tools, loss_from)
        else:
            text = self._render(messages, tools)
            turns = [i for i in range(loss_from, len(messages)) if messages[i]["role"] == "assistant"]
            spans = [self._turn(messages, tools, i, text) for i in turns]
        spans = [(begin, self._closed(text, begin, end)) for begin, end in spans]
        _compare(messages, loss_from, text, spans)
        return text, spans

    def _used(self, tools: Any) -> str:
        return self.with_tools if tools else self.text

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool = False) -> str:
        """The text of the messages. Raises ChatFault.

        Args:
            prompt: whether the header follows after which the assistant would go on.
        """
        return self._tracked(messages, tools, prompt, False)[0]

    def _tracked(
        self, messages: list[dict[str, Any]], tools: Any, prompt: bool = False, tracked: bool = True
    ) -> tuple[str, list[Span]]:
        """The text and the blocks in it that the template tags as generated."""
        try:
            with bounded(RENDER_SECONDS, RENDER_BYTES):
                rendered, blocks = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self._used(tools),
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=tracked,
                    **self.special,
                )
        except BoundExceeded as error:
            raise TooCostly(str(error)) from None
        except _REFUSALS as error:
            raise ChatFault(f"the chat template refuses it: {_first_line(error)}") from None
        return rendered[0], blocks[0] if tracked else []

    def _tagged(self, messages: list[dict[str, Any]], tools: Any, loss_from: int) -> tuple[str, list[Span]]:
        text, blocks = self._tracked(messages, tools)
        if loss_from:
            begun = self._begun(messages[:loss_from], tools, text)
            if begun is None:
                raise ChatFault("the chat template writes the prompt in another way once its completion follows")
            blocks = [(begin, end) for begin, end in blocks if end > begun]
        merged: list[Span] = []
        for begin, end in blocks:
            if merged and merged[-1][1] == begin:
                begin, _ = merged.pop()
            merged.append((begin, end))
        return text, merged

    def _begun(self, messages: list[dict[str, Any]], tools: Any, text: str) -> int | None:
        """Where in `text` these first messages end: with the assistant's header, or else without; None: they differ."""
        for prompt in (True, False):
            try:
                head = self._render(messages, tools, prompt)
            except ChatFault:
                continue
            if text.startswith(head):
                return len(head)
        return None

    def _turn(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> Span:
        """Where turn i of the assistant stands in `text`, its end of turn included. Raises ChatFault."""
        begin, end = self._begin(messages, tools, i, text), self._end(messages, tools, i, text)
        if begin is None or end is None:
            head, tail = self._by_stand_in(messages, tools, i, text)
            if end is None:
                end = len(text) - len(tail) + self._shared(messages, tools, i, tail)
            begin = len(head) if begin is None else begin
        if begin > end:
            raise ChatFault(_indistinct(i))
        said = "".join(texts(messages[i]))
        for words in {said, said.strip(), said.rpartition("</think>")[2].strip()} - {""}:
            if text.find(words, begin) + len(words) == end:
                raise ChatFault(f"the chat template writes nothing behind messages[{i}] that would end the turn")
        return begin, end

    def _begin(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> int | None:
        """Behind the messages before turn i and its header, where they are written as in `text`; else None."""
        try:
            begun = self._render(messages[:i], tools, prompt=True) if i else ""
            if not begun or not text.startswith(begun):
                return None
            words = "".join(texts(messages[i])).strip()
            if self.headless or (self.prompts and words and text.startswith(words, _skip(text, len(begun)))):
                return len(begun)
            # What comes first is a thought or a call, or a header that is no prompt.
            return len(begun) if self._render(messages[:i], tools) != begun else None
        except ChatFault:
            return None

    def _end(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> int | None:
        """Where the conversation up to turn i ends, where it is written as in `text`; else None."""
        if i == len(messages) - 1:
            return len(text)
        try:
            prefix = self._render(messages[: i + 1], tools)
        except ChatFault:
            return None
        return len(prefix) if text.startswith(prefix) else None

    def _by_stand_in(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> tuple[str, str]:
        """What is written before and behind turn i, in `text` as well as around a stand-in for it."""
        stand_in = _stand_in(messages[i])
        after = messages[i + 1 :]
        answers = [{**each, "content": stand_in["content"]} if each["role"] == "tool" else each for each in after]
        try:
            head, *others = self._render([*messages[:i], stand_in, *after], tools).split(_STAND_IN)
            # Without its call, a template may pass over what a tool answered; then the turn would seem to hold that.
            stand_ins = self._render([*messages[:i], stand_in, *answers], tools).count(_STAND_IN)
        except ChatFault:
            raise ChatFault(_indistinct(i)) from None
        if len(others) != 1 or stand_ins != 1 + sum(each["role"] == "tool" for each in after):
            raise ChatFault(_indistinct(i))
        tail = others[0]
        if not text.startswith(head) or not text.endswith(tail) or len(head) + len(tail) > len(text):
            raise ChatFault(_indistinct(i))
        return head, tail

    def _shared(self, messages: list[dict[str, Any]], tools: Any, i: int, tail: str) -> int:
        """How much of `tail`, which follows the words of turn i, ends the turn: what would follow them at the end."""
        closing = self._render([*messages[:i], _stand_in(messages[i])], tools).rpartition(_STAND_IN)[2]
        pairs = enumerate(zip(closing, tail, strict=False))
        shared = next((at for at, (a, b) in pairs if a != b), min(len(closing), len(tail)))
        if not closing[shared:].strip():
            return shared
        # The end of a conversation has more to it than the end of a turn (Phi-3): up to the last token of both.
        cut = next((at for at in range(shared, 0, -1) if self._token_ends(tail, at)), None)
        if cut is None:
            raise ChatFault(_indistinct(i))
        return cut

    def _token_ends(self, text: str, at: int) -> bool:
        """Whether a special token ends here."""
        return any(text[max(at - length, 0) : at] in self.tokens for length in self.token_lengths)

    def _closed(self, text: str, begin: int, end: int) -> int:
        """The end without white space behind the token that ends the turn; with it where there is no such token."""
        stripped = begin + len(text[begin:end].rstrip())
        return stripped if self._token_ends(text, stripped) else end


def _compare(messages: list[dict[str, Any]], loss_from: int, text: str, spans: list[Span]) -> None:
    """Raises ChatFault where a message's words are not in the text, or those of a counted turn not in what counts.

    A template that passes over a system message or over calls would teach something else than the data say.
    """
    if any(isinstance(message.get("content"), list) for message in messages) and _PART.search(text):
        raise ChatFault("the chat template writes parts of text as objects")
    loss_mask, behind = "\0".join(text[begin:end] for begin, end in spans), 0
    for place, message in enumerate(messages):
        words = [part.strip() for part in texts(message)]
        if message["role"] == "assistant" and place >= loss_from:
            for part in words:
                part = part.rpartition("</think>")[2].strip()  # templates may strip the thoughts
                at = loss_mask.find(part, behind)
                if at < 0:
                    raise ChatFault(f"messages[{place}] is not written by the chat template as the assistant's words")
                behind = at + len(part)
            if place == len(messages) - 1 and not all(thought in loss_mask for thought in thoughts(message)):
                raise ChatFault(f"messages[{place}] has thoughts which are not written by the chat template")
            for name in map(called, message.get("tool_calls", ())):
                if name not in loss_mask:
                    raise ChatFault(f"messages[{place}] calls `{name}`, which is not written by the chat template")
        elif message["role"] in ("system", "user") and not all(part in text for part in words):
            raise ChatFault(f"messages[{place}] (role `{message['role']}`) is not written by the chat template")


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


def _stand_in(message: dict[str, Any]) -> dict[str, Any]:
    in_parts = isinstance(message.get("content"), list)
    return {"role": "assistant", "content": [{"type": "text", "text": _STAND_IN}] if in_parts else _STAND_IN}


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _indistinct(i: int) -> str:
    return (
        f"the chat template writes messages[{i}] so that it cannot be distinguished from the rest; "
        "{% generation %} around what the assistant says would tell"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
