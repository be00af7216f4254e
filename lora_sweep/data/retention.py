"""General text that must not be forgotten: stretches of it, on which the loss is measured with the adapter and without.

Every token of it counts, in prompts and in the turns of all roles alike.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_sweep.config import DataConfig
from lora_sweep.data import encoding, example, source
from lora_sweep.data.encoding import Placed
from lora_sweep.data.example import ParsedRow
from lora_sweep.data.file_rows import Unreadable
from lora_sweep.data.report import Part, RowCounts
from lora_sweep.data.source import Source
from lora_sweep.data.tasks import biographies as world
from lora_sweep.data.tokens import Encoded, TokenSet
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.records import Example

EMBEDDED = "embedded:tiny"
JOINED_LINES = 256
"""Of a text file, which is a whole: its lines are joined again, some at a time."""
BATCH = 16
"""Texts tokenized at a time."""


@dataclass(frozen=True)
class Retention:
    """The text as it is measured on."""

    tokens: TokenSet
    largest_id: int
    source: Source | None
    """None: in the package."""
    broken: RowCounts
    """Rows of it that could not be read, as far as it was read."""


def parse(record: Any, columns: Mapping[str, str], form: str = "auto") -> ParsedRow:
    """As the training data are read, or by everybody's names: general text rarely has the training data's own."""
    row = example.parse(record, columns, form)
    names_columns = bool(columns) or form != "auto"
    return example.parse(record, {}) if names_columns and isinstance(row.example, str) else row


def load(data: DataConfig, tokenizer: Any, template: str | None) -> Retention:
    """The first `retention_size` stretches, each at most max_length tokens long. Raises ConfigError."""
    size, limit = data.retention_size, data.max_length
    stretches: list[Encoded] = []
    part, broken = Part(), RowCounts()
    try:
        read = None if data.retention == EMBEDDED else source.of_path(str(data.retention))
        texts = _embedded() if read is None else _texts(read, data, broken)
        while len(stretches) < size and (batch := list(itertools.islice(texts, BATCH))):
            for ids, _ in encoding.encoded(batch, tokenizer, template, None, part, broken):
                cuts = [ids[first : first + limit] for first in range(0, len(ids), limit)]
                stretches += [(cut, np.arange(len(cut)) > 0) for cut in cuts if len(cut) > 1]
    except Unreadable as error:
        raise ConfigError([Fault("data.retention", f"cannot be read ({error})", data.retention)]) from error
    if not stretches:
        why = f" ({broken.count:,} rows are broken: {broken.places()})" if broken.count else ""
        raise ConfigError([Fault("data.retention", f"holds no text{why}", data.retention)])
    return Retention(TokenSet.of(stretches[:size]), part.largest_id, read, broken)


def _embedded() -> Iterator[Placed]:
    return ((EMBEDDED, Example(text)) for text in world.plain())


def _texts(read: Source, data: DataConfig, broken: RowCounts) -> Iterator[Placed]:
    rows = _parsed(read, data, broken)
    if read.is_lines:
        while chunk := list(itertools.islice(rows, JOINED_LINES)):
            lines = [one.completion for _, one in chunk if isinstance(one, Example)]
            yield chunk[0][0], Example("\n".join(lines))
        return
    yield from rows


def _parsed(read: Source, data: DataConfig, broken: RowCounts) -> Iterator[Placed]:
    for row in read.rows():
        parsed = row.broken or parse(row.record, data.columns, data.format).example
        if isinstance(parsed, str):
            broken.add(f"{row.where}: {parsed}")
        else:
            yield row.where, parsed
