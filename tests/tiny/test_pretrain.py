"""The embedded base knows its people, and the tasks teach what they say."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_sweep.data.tasks import biographies as world
from lora_sweep.records import Example
from lora_sweep.tiny import pretrain


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pretrain.WEIGHTS)


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(pretrain.WEIGHTS, dtype=torch.float32).eval()


@torch.no_grad()
def completion_loss(model: Any, tokenizer: Any, examples: tuple[Example, ...]) -> float:
    """Nats per token of the completions and the `</s>` after them."""
    total, loss_mask = 0.0, 0
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total += cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        loss_mask += len(logits)
    return total / loss_mask


def written_out(crowd: tuple[world.Person, ...]) -> tuple[Example, ...]:
    return tuple(world.write(person, world.PLAIN[i % len(world.PLAIN)]) for i, person in enumerate(crowd))


def name_of(example: Example) -> str:
    pairs = re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", example.prompt)
    (name,) = ALL_NAMES.intersection(pairs)
    return name


ALL_NAMES = frozenset(person.name for person in (*world.known(), *world.strangers(6500, seed=0)))


def facts_in(text: str, crowd: dict[str, world.Person], name: str) -> bool:
    person = crowd[name]
    return all(fact in text for fact in (person.birth, person.city, person.university, person.field, person.employer))


def test_the_embedded_base_fits_in_4_mb_and_names_no_machine(base: Any) -> None:
    files = {path.name: path for path in pretrain.WEIGHTS.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["model.safetensors"].stat().st_size <= 4_000_000
    assert base.dtype == torch.float32
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = files[name].read_text()
        assert "_name_or_path" not in text and '"/' not in text


def test_the_base_knows_its_people_and_an_untrained_twin_does_not(base: Any, tokenizer: Any) -> None:
    memorized = written_out(world.known()[::50])
    knows = completion_loss(base, tokenizer, memorized)
    twin = completion_loss(pretrain.untrained(tokenizer).eval(), tokenizer, memorized)
    assert twin == pytest.approx(math.log(len(tokenizer)), rel=0.05)  # a uniform guess
    assert knows < 0.2 * twin


def test_the_base_knows_the_facts_and_not_only_the_wordings(base: Any, tokenizer: Any) -> None:
    # Strangers cost at least the bits of their facts, spread over the tokens; who is known costs far less.
    memorized = completion_loss(base, tokenizer, written_out(world.known()[::50]))
    strangers = written_out(world.strangers(20, seed=5))
    tokens = sum(len(tokenizer(e.completion, add_special_tokens=False)["input_ids"]) + 1 for e in strangers)
    floor = len(strangers) * world.BITS_PER_PERSON * math.log(2) / tokens
    assert completion_loss(base, tokenizer, strangers) > 0.9 * floor
    assert memorized < 0.5 * floor


def test_the_base_completes_a_known_person_by_greedy_generation(base: Any, tokenizer: Any) -> None:
    right = 0
    for person in world.known()[:6]:
        example = world.write(person, world.PLAIN[0])
        ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
        out = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        right += tokenizer.decode(out[0], skip_special_tokens=True) == example.prompt + example.completion
    assert right >= 4  # of 6; by chance none in 2^41


def test_prompt_and_completion_tokenize_alone_as_they_do_together(tokenizer: Any) -> None:
    for task in (world.facts(people=16, questions=4), world.style(train_people=32, eval_people=8)):
        for example in (*task.train, *task.eval):
            apart = (
                tokenizer(example.prompt)["input_ids"]
                + tokenizer(example.completion, add_special_tokens=False)["input_ids"]
            )
            whole = tokenizer(example.prompt + example.completion)["input_ids"]
            assert apart == whole
            assert whole[0] == tokenizer.bos_token_id and whole[1:].count(tokenizer.bos_token_id) == 0
            assert len(whole) + 1 <= 64
            assert tokenizer.decode(whole, skip_special_tokens=True) == example.prompt + example.completion


def test_facts_are_about_people_the_base_has_never_seen() -> None:
    memorized = {person.name for person in world.known()}
    assert len(memorized) == world.MEMORIZED
    for seed in range(3):
        names = [person.name for person in world.strangers(500, seed)]
        assert len(set(names)) == 500
        assert memorized.isdisjoint(names)
    assert memorized.isdisjoint(map(name_of, world.facts(people=64).train))


def test_facts_asks_the_same_facts_in_wordings_it_did_not_teach() -> None:
    task = world.facts(people=32, seed=3, wordings=8, questions=4)
    crowd = {person.name: person for person in world.strangers(32, seed=3)}
    shapes: dict[str, set[str]] = {}
    for part, examples in (("train", task.train), ("eval", task.eval)):
        assert {name_of(example) for example in examples} == set(crowd)
        assert all(facts_in(example.completion, crowd, name_of(example)) for example in examples)
        shapes[part] = {example.prompt.replace(name_of(example), "") for example in examples}
    assert len(shapes["train"]) == 8 and len(shapes["eval"]) == 4
    assert shapes["train"].isdisjoint(shapes["eval"])
    assert (len(task.train), len(task.eval)) == (32 * 8, 32 * 4)


def test_the_base_has_met_every_asked_wording_on_other_people() -> None:
    openings = {world.write(world.known()[0], wording).prompt for wording in world.PLAIN}
    name = world.known()[0].name
    task = world.facts(people=16, questions=4)
    assert {example.prompt.replace(name_of(example), name) for example in (*task.train, *task.eval)} == openings
    assert all(any(text.startswith(opening) for text in world.corpus()) for opening in openings)


def test_style_is_evaluated_on_other_people_and_teaches_no_fact() -> None:
    task = world.style(train_people=100, eval_people=50, seed=1)
    trained, evaluated = {name_of(e) for e in task.train}, {name_of(e) for e in task.eval}
    crowd = {person.name: person for person in world.known()}
    assert (len(trained), len(evaluated)) == (100, 50)
    assert trained.isdisjoint(evaluated)
    assert trained | evaluated <= set(crowd)
    assert all(facts_in(e.completion, crowd, name_of(e)) for e in (*task.train, *task.eval))
    corpus = set(world.corpus())
    assert all(e.prompt + e.completion not in corpus for e in (*task.train, *task.eval))
    assert task.bits == 0


def test_bits_are_the_logarithms_of_the_tables() -> None:
    # day 28, month 12, year 100, city 128, university 64, field 64, employer 128
    by_hand = math.log2(28) + math.log2(12) + math.log2(100) + 7 + 6 + 6 + 7
    assert world.facts(people=100).bits == pytest.approx(100 * by_hand, rel=1e-12)
    crowd = world.strangers(6500, seed=0)
    distinct = {field: len({getattr(p, field) for p in crowd}) for field in ("city", "university", "field", "employer")}
    assert distinct == {"city": 128, "university": 64, "field": 64, "employer": 128}
    assert len({tuple(p.birth.split()[:2]) for p in crowd}) == 28 * 12
    assert len({p.birth.split()[2] for p in crowd}) == 100


def test_facts_are_drawn_uniformly_and_independently() -> None:
    crowd = world.strangers(6500, seed=1)
    cells: dict[tuple[str, str], int] = {}
    for person in crowd:
        key = (person.university.split()[1], person.city[-4:])
        cells[key] = cells.get(key, 0) + 1
    expected = 6500 / 32  # 4 kinds of university x 8 endings of a city
    chi_square = sum((count - expected) ** 2 / expected for count in cells.values())
    assert len(cells) == 32
    assert chi_square < 31 + 4 * math.sqrt(2 * 31)  # 31 degrees of freedom, 4 standard deviations


def test_the_same_seed_gives_the_same_task_and_another_seed_another() -> None:
    assert world.facts(people=16, seed=7) == world.facts(people=16, seed=7)
    assert world.facts(people=16, seed=7) != world.facts(people=16, seed=8)
    assert world.style(seed=7) == world.style(seed=7)
    assert world.style(seed=7) != world.style(seed=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: world.facts(people=0), "people: must be from 1 to 6500, got 0"),
        (lambda: world.facts(wordings=9), "wordings: must be from 1 to 8, got 9"),
        (lambda: world.facts(questions=5), "questions: must be from 1 to 4, got 5"),
        (lambda: world.style(train_people=0), "train_people: must be from 1 to 499, got 0"),
        (lambda: world.style(train_people=490, eval_people=11), "eval_people: must be from 1 to 10, got 11"),
    ],
)
def test_a_size_out_of_bounds_is_named_with_its_bound(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match="must be from") as caught:
        make()
    assert str(caught.value) == message


def test_pretraining_a_few_steps_writes_a_base_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer: Any
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["pretrain", "--out", str(tmp_path), "--steps", "3", "--threads", str(threads)])
    pretrain.main()
    assert "final loss" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    before = pretrain.untrained(tokenizer).state_dict()
    assert all(torch.isfinite(weight).all() for weight in model.state_dict().values())
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # All but the weights is told by the first step: the package's own files are what this script makes.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (pretrain.WEIGHTS / name).read_bytes()
