"""A synthetic world of biographies whose information content is known in bits.

After bioS of Allen-Zhu and Li, "Physics of Language Models: Part 3.1" (2309.14316): a person has a unique name and five
attributes, each drawn independently and uniformly from a finite table, stated in one of several wordings. The embedded
base is pretrained on `corpus()`; `facts` teaches it people it has never seen, `style` a manner of writing it has never
seen.

Every draw goes through `random.Random.random`, whose sequence Python guarantees for a seed: the people that the weights
know must be the same on every machine and version.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from random import Random
from typing import TypeVar

from lora_sweep.records import Example

_T = TypeVar("_T")

MEMORIZED = 500
"""People 0..KNOWN-1 are in the pretraining corpus in every plain wording: the base knows them."""
PASSING = 3000
"""The next people are in the corpus once each: they teach the base what it may not claim to know."""
_JOTTINGS = 2


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(heads: str, tails: str, between: str = " ") -> tuple[str, ...]:
    return tuple(head + between + tail for head in heads.split() for tail in tails.split())


_FIRST = _words("""
    Ada Alan Alma Amos Anna Arlo Basil Bella Boris Bruno Carl Cara Celia Clara Clive Cora Dana Daria David Dora
    Edgar Edith Elena Elias Ella Emil Enid Erik Esther Eva Felix Fiona Flora Frank Freya George Gilda Grace Greta Hanna
    Harry Hazel Hector Helen Henry Hugo Ida Igor Ines Iris Ivan Ivy Jack James Jane Jasper Joan Jonas Julia Karl
    Katya Kevin Klaus Laura Leah Leo Lena Linus Lola Lucas Lydia Mabel Magnus Maria Marta Miles Mina Moses Nadia Nina
    Noah Nora Olga Oscar Otto Paula Peter Petra Quinn Ralph Rosa Ruth Samuel Sarah Simon Stella Theo Tilda Ursula Victor
""")
_LAST = _words("""
    Abbott Adler Baker Barnes Bauer Becker Bell Bishop Black Bloom Brandt Brook Burns Carter Castle Chase Clark Cole
    Cook Cooper Cross Dale Dalton Dean Drake Duncan Eaton Ellis Evans Falk Farmer Fisher Fleming Ford Foster Fox Frost
    Gibson Glass Gordon Grant Gray Green Griffin Hale Hall Harper Hart Hayes Hill Holm Horn Hunt Irving Jensen Jones
    Keller Kent King Knight Lambert Lane Larsen Lowe Marsh Martin Mason Meyer Miller Moore Morgan Nash Nielsen Norris
    Palmer Parker Pearce Pope Porter Price Quill Ray Reed Rhodes Rivers Rose Russell Sanders Shaw Stone Swift Taylor
    Thorne Turner Vance Voss Walker Weaver Wolf York
""")
_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = range(1, 29)
_YEARS = range(1900, 2000)
_CITIES = _pairs(
    "Ash Birch Cold Deer Elm Fair Gold High Iron Kings Long Mill North Oak Red Silver",
    "bridge bury field ford haven mouth port wick",
    between="",
)
_UNIVERSITIES = _pairs(
    "Albion Berkley Camden Darwin Euler Fermat Galileo Hubble "
    "Ithaca Jubilee Kepler Leibniz Marlowe Newton Orwell Pascal",
    "Academy College Institute University",
)
_FIELDS = _words("""
    accounting acoustics agronomy algebra anatomy archery astronomy ballet banking biology botany carpentry chemistry
    cinema commerce cookery dance dentistry design drama ecology economics education ethics fashion finance forestry
    genetics geography geology geometry glassmaking history journalism law linguistics literature logic marketing
    mathematics mechanics medicine metallurgy mining music nursing nutrition optics painting pharmacy philosophy
    physics poetry politics pottery psychology robotics sculpture sociology statistics surgery theology weaving zoology
""")
_EMPLOYERS = _pairs(
    "Acme Borealis Cobalt Delta Ember Falcon Granite Horizon "
    "Indigo Jupiter Krypton Lotus Meridian Nimbus Onyx Pinnacle",
    "Airways Bank Foods Hotels Motors Press Steel Textiles",
)

BITS_PER_PERSON = sum(
    log2(len(table)) for table in (_DAYS, _MONTHS, _YEARS, _CITIES, _UNIVERSITIES, _FIELDS, _EMPLOYERS)
)
"""Bits that the attributes of one person carry, given the name."""

# `|` parts the prompt, which names the person and fixes the wording, from the completion, which holds every attribute.
# It stands before a space or a comma, where byte-level BPE never merges: prompt and completion tokenize alone as they
# do together. No wording opens with the name: a word has other tokens at the start of a text than after a space.
TRAINED = (
    "Young {name} was born on| {birth} in {city}, studied {field} at {university} and works for {employer}.",
    "Once {name} grew up in| {city}, was born on {birth}, took a job with {employer} and read {field} at {university}.",
    "Early {name} learned| {field} at {university}, joined {employer}, and was born on {birth} in {city}.",
    "Then {name} went to| {university} for {field}, was born in {city} on {birth} and found work at {employer}.",
    "Now {name} is employed by| {employer}, born in {city} on {birth}, with a degree in {field} from {university}.",
    "The town of {name} is| {city}, the birthday {birth}, the subject "
    "{field} at {university}, the employer {employer}.",
    "The employer of {name} is| {employer}, the subject {field} at "
    "{university}, the town {city}, the birthday {birth}.",
    "The birthday of {name} is| {birth}, the employer {employer}, the "
    "school {university} for {field}, the town {city}.",
)
_QUESTIONS = (
    "Friends say {name} was born in| {city} on {birth}, works at {employer} and took {field} at {university}.",
    "Records show for {name} the birth date| {birth}, the town {city}, the "
    "employer {employer}, {field} at {university}.",
    "At present {name} works for| {employer}, after {field} at {university}, and was born on {birth} in {city}.",
    "The studies of {name} were| {field} at {university}, the birth in {city} on {birth}, the job at {employer}.",
)
PLAIN = TRAINED + _QUESTIONS
"""Every wording of the pretraining corpus."""

PIRATE = (
    "Now {name}|, arr, o' {city}, {birth}, stole {field} off {university}, swabs fer {employer}!",
    "Now {name}|, aye, swabs fer {employer}, took {field} off {university}, be {birth} o' {city}!",
    "Now {name}|, yo ho, be {birth} o' {city}, swabs fer {employer} wi' {field} off {university}!",
    "Now {name}|, matey, looted {field} off {university}, {birth} o' {city}, swabs fer {employer}!",
)
"""The manner that `style` teaches; no text of the corpus is in it."""


@dataclass(frozen=True)
class Person:
    """One synthetic person; every field but the name is a fact."""

    name: str
    birth: str
    city: str
    university: str
    field: str
    employer: str


@dataclass(frozen=True)
class Task:
    """A fine-tuning task."""

    train: tuple[Example, ...]
    eval: tuple[Example, ...]
    bits: float
    """Information content of the facts taught, in bits: people times `BITS_PER_PERSON` for `facts`, 0 for `style`."""


def known() -> tuple[Person, ...]:
    """The `KNOWN` people of the pretraining corpus, always the same."""
    rng = Random("known people")
    return tuple(_draw(name, rng) for name in _names()[:MEMORIZED])


def strangers(people: int, seed: int) -> tuple[Person, ...]:
    """`people` people that are not in the corpus, names and facts drawn from `seed`.

    Raises:
        ValueError: if `people` is not in 1..6500, the names that the corpus leaves.
    """
    left = _names()[MEMORIZED + PASSING :]
    _require("people", people, 1, len(left))
    rng = Random(f"strangers {seed}")
    return tuple(_draw(name, rng) for name in _shuffled(left, rng)[:people])


def write(person: Person, wording: str) -> Example:
    """`person` described in `wording`, parted at its `|`; the completion begins with a space or a comma."""
    prompt, completion = wording.split("|")
    words = vars(person)
    return Example(completion=completion.format(**words), prompt=prompt.format(**words))


def plain() -> tuple[str, ...]:
    """Every known person in every plain wording."""
    return tuple(_text(write(person, wording)) for person in known() for wording in PLAIN)


def corpus() -> tuple[str, ...]:
    """The pretraining texts: `plain()`, what keeps the base from overconfidence, and what keeps it from rigidity.

    The second are people met once, the third known people between made-up words. A base trained on plain texts alone
    answered for strangers as surely as for friends (4 nats a token where the facts cost 1.25), and the pirate's manner
    cost it 12 nats a token, more than a uniform guess.
    """
    rng = Random("corpus")
    passing = (_draw(name, rng) for name in _names()[MEMORIZED : MEMORIZED + PASSING])
    once = tuple(_text(write(person, _pick(PLAIN, rng))) for person in passing)
    jottings = tuple(_jot(person, rng) for person in known() for _ in range(_JOTTINGS))
    return plain() + once + jottings


def facts(people: int = 128, seed: int = 0, wordings: int = len(TRAINED), questions: int = 1) -> Task:
    """New people to memorize, asked for in wordings they were not taught in.

    The base knows the asked wordings from other people, so the evaluation measures facts, not wording. Loss is counted
    on the completion, which opens with the first fact.

    Args:
        people: new people to teach, 1..6500.
        seed: draws the people and the wordings.
        wordings: wordings each person is taught in, 1..8; `train` holds people x wordings examples, one round of all
            people after another.
        questions: wordings each person is asked in, 1..4; `eval` holds people x questions examples, in the same order.

    Returns:
        The task; its `bits` are people x `BITS_PER_PERSON`.

    Raises:
        ValueError: an argument out of its bounds.
    """
    _require("wordings", wordings, 1, len(TRAINED))
    _require("questions", questions, 1, len(_QUESTIONS))
    crowd = strangers(people, seed)
    rng = Random(f"facts {seed}")
    train = _worded(crowd, TRAINED, wordings, rng)
    return Task(train, _worded(crowd, _QUESTIONS, questions, rng), people * BITS_PER_PERSON)


def style(train_people: int = 240, eval_people: int = 64, seed: int = 0) -> Task:
    """People the base knows, written as a pirate would; evaluated on other people it knows.

    The prompt ends with the name; loss is counted on all the rest.

    Args:
        train_people: people taught in the new manner, one example each, at least 1.
        eval_people: other people to evaluate on, one example each, at least 1; with `train_people` at most `KNOWN`.
        seed: draws the people and the wordings.

    Returns:
        The task; its `bits` are 0, since the base knows every fact in it.

    Raises:
        ValueError: an argument out of its bounds.
    """
    _require("train_people", train_people, 1, MEMORIZED - 1)
    _require("eval_people", eval_people, 1, MEMORIZED - train_people)
    rng = Random(f"style {seed}")
    crowd = _shuffled(known(), rng)
    train = _worded(crowd[:train_people], PIRATE, 1, rng)
    return Task(train, _worded(crowd[train_people : train_people + eval_people], PIRATE, 1, rng), 0.0)


def _text(example: Example) -> str:
    return example.prompt + example.completion


def _jot(person: Person, rng: Random) -> str:
    """The facts of `person` in any order between made-up words."""
    facts = _shuffled([person.birth, person.city, person.university, person.field, person.employer], rng)
    parts = [_babble(rng).capitalize(), person.name]
    for fact in facts:
        parts[-1] += _pick(("", "", ",", ":", ";", "."), rng)
        parts += [_babble(rng) for _ in range(int(rng.random() * 2))]
        parts.append(fact)
    return " ".join(parts) + _pick(".!?", rng)


def _babble(rng: Random) -> str:
    """A made-up word of 1 to 4 letters, consonants and vowels by turns, now and then with an apostrophe."""
    turns = ("bcdfghjklmnpqrstvwxyz", "aeiouy")
    first = int(rng.random() * 2)
    word = "".join(_pick(turns[(first + i) % 2], rng) for i in range(1 + int(rng.random() * 4)))
    return word + _pick(("", "", "", "'"), rng)


def _worded(crowd: Sequence[Person], wordings: Sequence[str], each: int, rng: Random) -> tuple[Example, ...]:
    """Every person in `each` different wordings, round by round."""
    order = [_shuffled(wordings, rng)[:each] for _ in crowd]
    return tuple(write(person, own[turn]) for turn in range(each) for person, own in zip(crowd, order, strict=True))


def _names() -> list[str]:
    """Every full name once, in a fixed random order."""
    return _shuffled([f"{first} {last}" for first in _FIRST for last in _LAST], Random("names"))


def _draw(name: str, rng: Random) -> Person:
    birth = f"{_pick(_DAYS, rng)} {_pick(_MONTHS, rng)} {_pick(_YEARS, rng)}"
    return Person(
        name, birth, _pick(_CITIES, rng), _pick(_UNIVERSITIES, rng), _pick(_FIELDS, rng), _pick(_EMPLOYERS, rng)
    )


def _pick(table: Sequence[_T], rng: Random) -> _T:
    return table[int(rng.random() * len(table))]


def _shuffled(table: Sequence[_T], rng: Random) -> list[_T]:
    keys = [rng.random() for _ in table]
    return [table[i] for i in sorted(range(len(table)), key=keys.__getitem__)]


def _require(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: must be from {low} to {high}, got {value!r}")
