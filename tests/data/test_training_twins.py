"""Chat templates against the twins that TRL trains with: what counts is the same, but for what is listed here."""

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from test_chat import WEATHER, answer, assistant, system, user
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from lora_sweep.data.conversation import ChatFault, Conversation, forms, texts
from lora_sweep.data.dialects import talk
from lora_sweep.data.renderer import Renderer

FOLDER = Path(trl.__file__).parent / "chat_templates"
WEIGHTS = Path(__file__).parents[2] / "lora_sweep/tiny/weights"
TWINS = sorted(file.name.removesuffix("_training.jinja") for file in FOLDER.glob("*_training.jinja"))
SPECIAL = re.compile(
    r"<[|｜][^<>|｜]{1,40}[|｜]>|<[a-z_]+\|>|<\|[a-z_]+>|<[/a-z_]*(?:start|end|turn|of|bos|eos)[a-z_]*>|\[/?[A-Z_]{3,20}\]|\[gMASK\]|<sop>|</?s>"
)
"""Special tokens, as templates write them."""


def call(city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return assistant("", tool_calls=[{"type": "function", "id": "abcdefgh1", "function": function}])


TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [user("Where is Rome?"), assistant("In Italy.")],
    "two": [user("Where is Rome?"), assistant("In Italy."), user("And Oslo?"), assistant("In Norway.")],
    "three": [user("a"), assistant("b"), user("c"), assistant("d"), user("e"), assistant("f")],
    "system": [system("Be brief."), user("Rome?"), assistant("In Italy."), user("Oslo?"), assistant("In Norway.")],
    "lines": [user("Two lines\n\n please"), assistant("One.\n\nTwo."), user("Ok\n"), assistant("`x`\n- y")],
    "same": [user("Yes"), assistant("Yes"), user("Yes"), assistant("Yes")],
    "call": [user("Weather in Rome?"), call("Rome"), answer("Rain."), assistant("It rains.")],
    "calls": [
        *[user("Weather in Rome?"), call("Rome"), answer("Rain."), assistant("It rains.")],
        *[user("And Oslo?"), call("Oslo"), answer("Snow."), assistant("It snows.")],
    ],
    "thoughts": [
        *[user("2 + 2?"), assistant("4", reasoning_content="Add.")],
        *[user("3 + 3?"), assistant("6", reasoning_content="Add again.")],
    ],
    "thoughts inline": [
        *[user("2 + 2?"), assistant("<think>\nAdd.\n</think>\n\n4")],
        *[user("3 + 3?"), assistant("<think>\nAdd again.\n</think>\n\n6")],
    ],
}

HEADERS = {
    "deepseek_r1_distill": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "deepseekv3": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
}
"""What these twins count and no other does: the header of the role, which stands in the prompt that a model answers."""

STOPS = {"diffusion_gemma": ("<|tool_response>",)}
"""Counts here and not in the twin: what the template itself writes behind a call that nothing follows yet."""

NO_CALLS = {
    "cohere", "cohere2", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3", "phi3_5",
    "qwen2_5_vl", "smolvlm",
}  # fmt: skip
"""Templates that write no call, or not with an answer behind it: such conversations are refused."""
NO_THOUGHTS = {
    *{"cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "lfm2", "lfm2_v2"},
    *{"llama3", "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"},
}
"""Templates that write no `reasoning_content`."""
REFUSED = {
    *((name, kind) for name in NO_CALLS for kind in ("call", "calls")),
    *((name, "thoughts") for name in NO_THOUGHTS),
    ("gemma", "system"),
    *{("deepseek_r1_distill", "calls"), ("deepseekv3", "calls")},  # they write no header before the second call
    *{("deepseek_r1_distill", "thoughts inline"), ("deepseekv3", "thoughts inline")},  # they drop what was thought
}


def tokenizer_of(name: str) -> Any:
    special = sorted(set(SPECIAL.findall((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))))
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    tokenizer.add_tokens([AddedToken(each, special=True, normalized=False) for each in special], special_tokens=True)
    return tokenizer


@cache
def renderer_of(name: str) -> Renderer:
    return Renderer(tokenizer_of(name), (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def of_twin(name: str, messages: list[Any], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """What the twin writes and tags, in the first form of the conversation of which it writes every word."""
    special = renderer_of(name).special
    text = (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    for form in forms(messages):
        try:
            rendered, blocks = render_jinja_template(
                [form], tools=tools, chat_template=text, return_assistant_tokens_mask=True, **special
            )
        except Exception:  # whatever a template may raise on a form that it does not know
            continue
        words = (each.rpartition("</think>")[2].strip() for message in messages for each in texts(message))
        if all(word in rendered[0] for word in words):
            return rendered[0], blocks[0]
    raise AssertionError(f"{name} writes no form of it")


def differences(mine: tuple[str, Any], theirs: tuple[str, Any]) -> Iterator[str]:
    """Stretches of the text of both that count in one alone, without white space."""
    (text, spans), (other, blocks) = mine, theirs
    counts = [{at for begin, end in marks for at in range(begin, end)} for marks in (spans, blocks)]
    matched = SequenceMatcher(None, text, other, autojunk=False).get_matching_blocks()
    for at, there, size in matched:
        here = "".join(
            text[at + i] if ((at + i in counts[0]) != (there + i in counts[1])) else "\0" for i in range(size)
        )
        yield from (stretch.strip() for stretch in here.split("\0") if stretch.strip())


@pytest.mark.parametrize("name", TWINS)
def test_what_counts_is_what_counts_in_the_twin(name: str) -> None:
    listed = {*HEADERS.get(name, ()), *STOPS.get(name, ())}
    for kind, messages in TALKS.items():
        read = talk(messages)
        tools = [WEATHER] if kind.startswith("call") else None
        mark = renderer_of(name).mark(Conversation(read.messages, tools, silent=read.silent))
        if (name, kind) in REFUSED:
            assert isinstance(mark, ChatFault), kind
            continue
        assert not isinstance(mark, ChatFault), f"{kind}: {mark}"
        other = {each for each in differences(mark, of_twin(name, messages, tools)) if each not in listed}
        assert other == set(), kind


def test_there_are_as_many_twins_as_were_looked_at() -> None:
    assert len(TWINS) >= 31
    assert {*HEADERS, *STOPS, *NO_CALLS, *NO_THOUGHTS} <= set(TWINS)


GLM = "[gMASK]<sop><|user|>\nRome?<|assistant|>«\n<think></think>\nIn Italy.<|user|>»"
GPT = "<|start|>user<|message|>Rome?<|end|><|start|>assistant«<|channel|>final<|message|>In Italy.<|return|>»"


def shown(name: str, messages: list[Any], tools: Any = None) -> str:
    mark = renderer_of(name).mark(Conversation(messages, tools))
    assert not isinstance(mark, ChatFault), mark
    text, spans = mark
    for begin, end in reversed(spans):
        text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
    return text


def test_a_turn_that_the_next_role_ends_counts_with_its_token_and_so_does_the_last() -> None:
    """GLM-4.5, marked by hand: it stops at `<|user|>` and at `<|observation|>`."""
    assert shown("glm4moe", [user("Rome?"), assistant("In Italy.")]) == GLM
    two = [user("Rome?"), assistant("In Italy."), user("Oslo?"), assistant("In Norway.")]
    assert shown("glm4moe", two) == f"{GLM}\nOslo?<|assistant|>«\n<think></think>\nIn Norway.<|user|>»"
    called = [user("Weather?"), call("Rome"), answer("Rain."), assistant("It rains.")]
    assert "</tool_call><|observation|>»\n<tool_response>\nRain.\n</tool_response>" in shown(
        "glm4moe", called, [WEATHER]
    )


def test_a_turn_in_the_middle_ends_in_the_token_of_any_message() -> None:
    """GPT-OSS, marked by hand: `<|end|>` in the middle, `<|return|>` at the end, `<|call|>` behind a call."""
    assert shown("gptoss", [user("Rome?"), assistant("In Italy.")]).endswith(GPT)
    two = [user("Rome?"), assistant("In Italy."), user("Oslo?"), assistant("In Norway.")]
    middle = GPT.replace("<|return|>", "<|end|>")
    last = "<|start|>user<|message|>Oslo?<|end|><|start|>assistant«<|channel|>final<|message|>In Norway.<|return|>»"
    assert shown("gptoss", two).endswith(middle + last)
    called = [user("Weather?"), call("Rome"), answer("Rain."), assistant("It rains.")]
    assert "«to=" not in shown("gptoss", called, [WEATHER])
    assert '{"city": "Rome"}<|call|>»' in shown("gptoss", called, [WEATHER])
    assert "<|end|>" not in shown("gptoss", two).split("«")[2].partition("»")[0]


GEMMA = "<|turn>user\nWhere is Rome?<turn|>\n<|turn>model\n«In Italy.<turn|>»\n<|turn>user\nAnd Oslo?<turn|>\n<|turn>model\n«In Norway.<turn|>»\n"
GEMMA_CALL = (
    '<|turn>model\n«<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|><|tool_response>»'
    'response:weather{value:<|"|>Rain.<|"|>}<tool_response|>«It rains.<turn|>»\n'
)
LFM = "<|im_start|>user\nWhere is Rome?<|im_end|>\n<|im_start|>assistant\n«In Italy.<|im_end|>»\n<|im_start|>user\nAnd Oslo?<|im_end|>\n<|im_start|>assistant\n«In Norway.<|im_end|>»\n"
LFM_CALL = (
    "<|im_start|>assistant\n«<|tool_call_start|>[weather(city='Rome')]<|tool_call_end|><|im_end|>»\n"
    "<|im_start|>tool\nRain.<|im_end|>\n<|im_start|>assistant\n«It rains.<|im_end|>»\n"
)
HEAD, HEAD_USER = ("<|start_header_id|>" + role + "<|end_header_id|>\n\n" for role in ("assistant", "user"))
LLAMA = f"{HEAD_USER}Where is Rome?<|eot_id|>{HEAD}«In Italy.<|eot_id|>»{HEAD_USER}And Oslo?<|eot_id|>{HEAD}«In Norway.<|eot_id|>»"
LLAMA_CALL = (
    f'{HEAD}«{{"name": "weather", "parameters": {{"city": "Rome"}}}}<|eot_id|>»'
    f'<|start_header_id|>ipython<|end_header_id|>\n\n"Rain."<|eot_id|>{HEAD}«It rains.<|eot_id|>»'
)
UNTWINNED = {
    **{f"gemma4{version}": (GEMMA, GEMMA_CALL) for version in ("", "_v3", "_v4", "_v5")},
    "gemma4_v2": (
        GEMMA,
        '«<|tool_call>call:weather{city:<|"|>Rome<|"|>}<tool_call|><turn|>»\n<|turn>tool\nRain.<turn|>\n'
        "<|turn>model\n«It rains.<turn|>»\n",
    ),
    **dict.fromkeys(("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"), (LFM, LFM_CALL)),
    **dict.fromkeys(("llama3_1", "llama3_2"), (LLAMA, LLAMA_CALL)),
}
"""The end of what templates without a twin write of two questions and of a call, marked by hand."""


@pytest.mark.parametrize("name", UNTWINNED)
def test_templates_without_a_twin_are_as_marked_by_hand(name: str) -> None:
    two, called = UNTWINNED[name]
    assert shown(name, TALKS["two"]).endswith(two)
    assert shown(name, TALKS["call"], [WEATHER]).endswith(called)


def test_every_template_of_trl_is_held_to_a_twin_or_to_a_hand() -> None:
    names = {file.name.removesuffix(".jinja") for file in FOLDER.glob("*.jinja")}
    assert {name for name in names if not name.endswith("_training")} <= {*TWINS, *UNTWINNED}
