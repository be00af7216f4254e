"""One chat template at work: what it makes of a conversation, and where in that text the assistant's turns stand.

A turn of the assistant is what lies between the prompt that the template writes for it and the end of the conversation
up to it. Where a template writes a turn differently once more follow (thoughts stripped, an end of text), the
conversation is rendered again with a stand-in for the turn; where that does not show it either, it is a fault: never a
guessed mask. Where a template ends a turn with the next role's token alone (GLM), the model stops at that token: it
counts, and the last turn, behind which the template writes nothing, gets it too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sweep.data.conversation import (
    ChatFault,
    Conversation,
    Message,
    arguments_of,
    called,
    check,
    everything,
    forms,
    schemas,
    texts,
    thoughts,
)
from lora_sweep.system.bounds import BoundExceeded, bounded

RENDER_SECONDS, RENDER_BYTES = 5.0, 2**28
"""Most that a template may take to write one conversation; one of 1 MiB takes 0.1 s."""

_STAND_IN = "\uf8ffstand-in\uf8ff"
"""In place of a turn. Its ends are characters of private use: nothing around it runs on into it by chance."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
"""The beginning of a thought, or one without words, as templates write it before a turn."""

_PART = re.compile(r"""['"]type['"]\s*:\s*['"]text['"]""")
"""A part of a content that was printed instead of its text."""

_REFUSES = "the chat template refuses it"
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template may raise on a conversation: by itself, or in an operation on what it does not expect."""

Span = tuple[int, int]
"""[begin, end) in characters of the rendered text."""


class TooCostly(Exception):
    """A template takes more than its bounds for one conversation; the message is a clause that begins with a verb."""


class Renderer:
    """Renders conversations with one template, and says where in the text the turns with a loss stand."""

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
        self.stop = self._next_role()
        control = [re.escape(token) for token in self.tokens if token in plain]
        self.control = re.compile("|".join(sorted(control, key=len, reverse=True)) or "(?!)")

    def mark(self, conversation: Conversation) -> tuple[str, list[Span]] | ChatFault:
        """(the rendered text, what counts in it)."""
        try:
            check(conversation.messages, conversation.loss_from, conversation.silent)
            tools = schemas(conversation.tools)
            for place, message in enumerate(conversation.messages):
                if token := self.control.search(everything(message)):
                    raise ChatFault(f"messages[{place}] holds `{token[0]}`, which the chat template writes itself")
            faults = []
            for messages in forms(self._addressed(conversation.messages)):
                try:
                    return self._marked(messages, tools, conversation)
                except ChatFault as fault:
                    faults.append(fault)
            # What a template makes of a conversation is more to the point than why it takes another form for none.
            return next((each for each in faults if not str(each).startswith(_REFUSES)), faults[0])
        except ChatFault as fault:
            return fault

    def _addressed(self, messages: Sequence[Message]) -> Sequence[Message]:
        """A developer is who a system message was from before templates knew the role."""
        if "developer" in self.text:
            return messages
        return [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]

    def _next_role(self) -> str:
        """The token of the next role, where that alone ends a turn; empty where something of the turn's own does."""
        asks = [{"role": "user", "content": "a"}]
        for ask, turn in zip(*map(forms, (asks, [_stand_in({})])), strict=True):
            try:
                behind = self._render([*ask, *turn], None).rpartition(_STAND_IN)[2]
                follows = self._render([*ask, *turn, *ask], None).rpartition(_STAND_IN)[2]
            except ChatFault:
                continue
            return "" if behind.strip() else self._token_at(follows)
        return ""

    def _token_at(self, text: str) -> str:
        """The special token that the text begins with; empty where it begins with none."""
        return max((token for token in self.tokens if token and text.startswith(token)), key=len, default="")

    def _marked(self, messages: list[dict[str, Any]], tools: Any, conversation: Conversation) -> tuple[str, list[Span]]:
        turns = list(conversation.turns())
        if _GENERATION.search(self._used(tools)):
            text, spans = self._tagged(messages, tools, conversation)
        else:
            text = self._whole(messages, tools)
            spans = [self._turn(messages, tools, i, text) for i in turns]
        spans = [(begin, self._closed(text, begin, end)) for begin, end in spans]
        _compare(messages, turns, text, spans)
        if self._prints_null(messages, tools, text):
            raise ChatFault("the chat template writes a `content` of null as None")
        return text, spans

    def _prints_null(self, messages: list[dict[str, Any]], tools: Any, text: str) -> bool:
        if all(message.get("content", "") is not None for message in messages):
            return False
        empty = [message if message.get("content") else {**message, "content": ""} for message in messages]
        try:
            return text.count("None") > self._whole(empty, tools).count("None")
        except ChatFault:
            return False  # it needs the null

    def _whole(self, messages: list[dict[str, Any]], tools: Any) -> str:
        """The text of the messages, its last turn ended as if more followed."""
        text = self._render(messages, tools)
        return text + self.stop if messages[-1]["role"] == "assistant" and self.stop else text

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
        except REFUSALS as error:
            raise ChatFault(f"{_REFUSES}: {_first_line(error)}") from None
        return rendered[0], blocks[0] if tracked else []

    def _tagged(self, messages: list[dict[str, Any]], tools: Any, conversation: Conversation) -> tuple[str, list[Span]]:
        text, blocks = self._tracked(messages, tools)
        loss_from = conversation.loss_from
        if loss_from:
            begun = self._begun(messages[:loss_from], tools, text)
            if begun is None:
                raise ChatFault("the chat template writes the prompt in another way once its completion follows")
            blocks = [(begin, end) for begin, end in blocks if end > begun]
        for i in conversation.silent:
            first, last = self._begun(messages[:i], tools, text) if i else 0, self._end(messages, tools, i, text)
            if first is None or last is None:
                raise ChatFault(_indistinct(i))
            blocks = [(begin, end) for begin, end in blocks if end <= first or begin >= last]
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
        if "<think>" in self.text and (thought := _THOUGHT.search(text, 0, begin)):
            begin = thought.start()  # the tags are the assistant's, whether or not a prompt may hold them
        said = "".join(texts(messages[i]))
        for words in {said, said.strip(), said.rpartition("</think>")[2].strip()} - {""}:
            if text.find(words, begin) + len(words) == end:
                raise ChatFault(f"the chat template writes nothing behind messages[{i}] that would end the turn")
        return begin, end

    def _begin(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> int | None:
        """Behind the messages before turn i and its header, where they are written as in `text`; else None."""
        try:
            begun = self._render(messages[:i], tools, prompt=True) if i else ""
            if "<think>" in self.text:
                begun = _THOUGHT.sub("", begun)  # a prompt may hold the tags, the turn another thought
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
            prefix = self._whole(messages[: i + 1], tools)
        except ChatFault:
            return None
        return len(prefix) if text.startswith(prefix) else None

    def _by_stand_in(self, messages: list[dict[str, Any]], tools: Any, i: int, text: str) -> tuple[str, str]:
        """What is written before and behind turn i, in `text` as well as around a stand-in for it."""
        stand_in = _stand_in(messages[i])
        after = messages[i + 1 :]
        answers = [{**each, "content": stand_in["content"]} if each["role"] == "tool" else each for each in after]
        try:
            head, *others = self._whole([*messages[:i], stand_in, *after], tools).split(_STAND_IN)
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
        closing = self._whole([*messages[:i], _stand_in(messages[i])], tools).rpartition(_STAND_IN)[2]
        if (token := self._token_at(tail)) and not closing.startswith(token):
            # The last turn ends in a token of its own (GPT-OSS); this one in that of any message, or of the next role.
            before = self._render(messages[:i], tools) if i else ""
            if before.rstrip().endswith(token) or (self.stop and closing.startswith(self.stop)):
                return len(token)
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


def _compare(messages: list[dict[str, Any]], turns: Sequence[int], text: str, spans: list[Span]) -> None:
    """Raises ChatFault where a message's words are not in the text, or those of a counted turn not in what counts.

    A template that passes over a system message or over calls would teach something else than the data say; so would
    one that prints a value of Python.
    """
    if any(isinstance(message.get("content"), list) for message in messages) and _PART.search(text):
        raise ChatFault("the chat template writes parts of text as objects")
    for place, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            for part in (call, call.get("function"), arguments_of(call)):
                if isinstance(part, Mapping) and part and str(part) in text:
                    raise ChatFault(f"the chat template writes the call in messages[{place}] as Python prints it")
    loss_mask, behind = "\0".join(text[begin:end] for begin, end in spans), 0
    for place, message in enumerate(messages):
        words = [part.strip() for part in texts(message)]
        if place in turns:
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
        elif message["role"] in ("system", "user", "developer") and not all(part in text for part in words):
            raise ChatFault(f"messages[{place}] (role `{message['role']}`) is not written by the chat template")


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
