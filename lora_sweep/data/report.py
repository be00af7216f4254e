"""What became of the rows of a data set: nothing is dropped in silence."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 5
"""Places reported of each kind; the others are counted."""


@dataclass
class RowCounts:
    """Rows that share a fate: how many, and the first few by name."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(place)

    def places(self) -> str:
        more = f", and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        return "; ".join(self.first) + more


@dataclass
class Part:
    """One set as it was made, before anything was sampled from it."""

    examples: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    """Tokens whose loss counts."""
    largest_id: int = 0
    """Of its tokens."""
    cut: RowCounts = field(default_factory=RowCounts)
    """Examples longer than data.max_length."""
    cut_tokens: int = 0
    """Tokens that the cuts cost."""
    emptied: RowCounts = field(default_factory=RowCounts)
    """Examples with nothing left to count after the cut, left out."""


@dataclass
class Report:
    """Of one preparation."""

    sources: dict[str, str] = field(default_factory=dict)
    """Name -> digest of its content, of all that the user gave."""
    rows: int = 0
    train: Part = field(default_factory=Part)
    evaluation: Part = field(default_factory=Part)
    broken: RowCounts = field(default_factory=RowCounts)
    """Rows that are no example, skipped."""
    duplicates: RowCounts = field(default_factory=RowCounts)
    """Training examples that stand in the evaluation set too, removed from training."""
    unretained: RowCounts = field(default_factory=RowCounts)
    """Rows of the retention text that could not be read."""
    unseen: list[str] = field(default_factory=list)
    """Columns that data.columns names and no row has."""
    passed_over: list[str] = field(default_factory=list)
    """Files of a folder that are no data."""
    formats: dict[str, int] = field(default_factory=dict)
    """Format -> rows that were read by it."""
    other_columns: dict[str, int] = field(default_factory=dict)
    """Column that is not used -> rows that have something in it."""
    other_keys: dict[str, int] = field(default_factory=dict)
    """Key of messages that is not used, the chat template included -> rows that have something in it."""
    renamed: dict[str, int] = field(default_factory=dict)
    """`model as assistant`: a role that is read as another -> rows."""
    empty_turns: RowCounts = field(default_factory=RowCounts)
    """Rows with a turn of the assistant in which nothing is said: it has no loss."""
    undesirable: RowCounts = field(default_factory=RowCounts)
    """Rows whose label is false, left out."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Report":
        """The inverse of `plain`."""
        parts = {name: _part(plain[name]) for name in ("train", "evaluation")}
        kinds = ("broken", "duplicates", "unretained", "empty_turns", "undesirable")
        row_counts = {name: RowCounts(**plain[name]) for name in kinds if name in plain}
        return cls(**{**plain, **parts, **row_counts})

    def warnings(self) -> list[str]:
        """What the user must hear, a line each."""
        lines = []
        if self.passed_over:
            shown = ", ".join(self.passed_over[:SHOWN]) + (", ..." if len(self.passed_over) > SHOWN else "")
            lines.append(f"data: {len(self.passed_over)} files of the folder are no data and were passed over: {shown}")
        if self.unseen:
            lines.append(f"data.columns: no row has {', '.join(f'`{name}`' for name in self.unseen)}")
        others = {name: rows for name, rows in self.formats.items() if name in ("alpaca", "dolly", "sharegpt")}
        if others:
            lines.append(f"data: read as {_listed(others)}")
        if self.other_columns:
            lines.append(f"data: columns that are not used: {_listed(self.other_columns)}")
        if self.other_keys:
            rule = "keys of messages that neither the chat template nor lora_sweep reads"
            lines.append(f"data: {rule}: {_listed(self.other_keys)}")
        if self.renamed:
            lines.append(f"data: roles: {_listed(self.renamed)}")
        if self.empty_turns.count:
            rule = "have a turn of the assistant without a word, which has no loss"
            lines.append(f"data: {self.empty_turns.count:,} of {self.rows:,} rows {rule}: {self.empty_turns.places()}")
        if self.undesirable.count:
            rule = "rows with `label: false` were left out"
            lines.append(f"data.undesirable: {self.undesirable.count:,} {rule}: {self.undesirable.places()}")
        if self.broken.count:
            lines.append(f"data: {self.broken.count:,} of {self.rows:,} rows were skipped: {self.broken.places()}")
        if self.duplicates.count:
            skipped = "training examples stand in the evaluation set too and were removed from training"
            lines.append(f"data: {self.duplicates.count:,} {skipped}: {self.duplicates.places()}")
        if self.unretained.count:
            lines.append(f"data.retention: {self.unretained.count:,} rows were skipped: {self.unretained.places()}")
        for name, part in (("training", self.train), ("evaluation", self.evaluation)):
            all_examples = part.examples + part.emptied.count
            if part.cut.count:
                share = part.cut_tokens / (part.tokens + part.cut_tokens)
                lines.append(
                    f"data.max_length: {part.cut.count:,} of {all_examples:,} {name} examples were cut, "
                    f"{share:.1%} of their tokens: {part.cut.places()}"
                )
            if part.emptied.count:
                lines.append(
                    f"data.max_length: {part.emptied.count:,} of {all_examples:,} {name} examples have nothing to "
                    f"learn within it and were left out: {part.emptied.places()}"
                )
        return lines


def _listed(rows: Mapping[str, int]) -> str:
    """The first few names, with their rows."""
    shown = [f"{name} ({count:,} row{'s' * (count != 1)})" for name, count in list(rows.items())[: 2 * SHOWN]]
    return ", ".join(shown) + (f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else "")


def _part(plain: Mapping[str, Any]) -> Part:
    # Older versions called the tokens with a loss `counted`.
    plain = {"loss_tokens" if key == "counted" else key: value for key, value in plain.items()}
    return Part(**{**plain, "cut": RowCounts(**plain["cut"]), "emptied": RowCounts(**plain["emptied"])})
