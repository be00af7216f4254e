"""From what the user brings to what a trial trains on: read, split, tokenized once, kept."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_sweep.config import DataConfig
from lora_sweep.data import chat, encoding, example, faults, retention, source, store, tasks, tokens
from lora_sweep.data.chat import ChatFault
from lora_sweep.data.encoding import Placed
from lora_sweep.data.example import Parsed, ParsedRow
from lora_sweep.data.file_rows import Unreadable
from lora_sweep.data.report import Report, RowCounts
from lora_sweep.data.source import Source
from lora_sweep.data.tokens import TokenSet
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.records import Example

SETS = ("train", "evaluation")
PREPARATION = 2
"""Version of what this file makes of the same rows: what an older one kept is not taken for this one's."""
MOST_NAMES = 64
"""Columns and keys counted by name; no file has more that anybody would read about."""
BATCH_EXAMPLES, BATCH_CHARACTERS = 2048, 2**21
"""Tokenized at a time: enough for the tokenizer's threads, little enough for memory."""
MOST = 0.5
"""Where more rows than this share cannot be used, it is the wrong file."""

Progress = Callable[[str, float], None]
"""(what is read, share of it done)."""


def silent(_: str, __: float) -> None:
    pass


@dataclass(frozen=True)
class Data:
    """What a trial trains on and is measured on."""

    train: TokenSet
    evaluation: TokenSet
    probe: TokenSet
    """A fixed sample of `train`."""
    retention: TokenSet | None = None
    """General text on which forgetting is measured."""
    bits: float = 0.0
    """Information content of the facts taught, where it is known."""
    report: Report = field(default_factory=Report)
    largest_id: int = 0
    """Of all its tokens."""

    @property
    def length(self) -> int:
        """T of the longest row of any set."""
        return max(each.length for each in (self.train, self.evaluation, self.probe, self.retention) if each)


def load(data: DataConfig, tokenizer: Any, progress: Progress = silent) -> Data:
    """Reads, splits and tokenizes, or maps what was prepared before. Raises ConfigError with all faults of the data.

    >>> data = load(sweep.base().data, base.tokenizer)
    >>> data.evaluation.examples, data.probe.examples
    (48, 24)
    """
    if data.name in faults.USER_DATA:
        train, evaluation, report = _user_data(data, tokenizer, progress)
        bits = 0.0
    else:
        train, evaluation, report, bits = _embedded(data, tokenizer)
    largest_id = max(report.train.largest_id, report.evaluation.largest_id)
    if data.eval_size is not None:
        evaluation = evaluation.take(tokens.sample(len(evaluation), data.eval_size, data.seed))
    probe = train.take(tokens.sample(len(train), data.probe_size, data.seed))
    sets = [train, evaluation, probe]
    if data.pack_examples:
        sets = [each.packed(data.max_length) for each in sets]
    general = None
    if data.retention is not None:
        kept = retention.load(data, tokenizer, encoding.template_text(data))
        general, largest_id = kept.tokens, max(largest_id, kept.largest_id)
        report.unretained = kept.broken
        report.sources |= {} if kept.source is None else {kept.source.name: kept.source.digest}
    return Data(sets[0], sets[1], sets[2], general, bits, report, largest_id)


# -- tasks in the package -----------------------------------------------------------------------------------------


def _embedded(data: DataConfig, tokenizer: Any) -> tuple[TokenSet, TokenSet, Report, float]:
    task, report = tasks.task(data), Report()
    sets = []
    for part, examples in ((report.train, task.train), (report.evaluation, task.eval)):
        batch = [(f"{data.name}, example {place}", each) for place, each in enumerate(examples, start=1)]
        sets.append(TokenSet.of(list(encoding.encoded(batch, tokenizer, None, data.max_length, part, report.broken))))
    _refuse_nothing(data, report)
    return sets[0], sets[1], report, task.bits


# -- what the user brings -----------------------------------------------------------------------------------------


def _user_data(data: DataConfig, tokenizer: Any, progress: Progress) -> tuple[TokenSet, TokenSet, Report]:
    train, evaluation = _sources(data)
    template = encoding.template_text(data)
    settings = {
        "train": [train.digest, train.files],
        "evaluation": data.eval_share if evaluation is None else [evaluation.digest, evaluation.files],
        "columns": data.columns,
        "format": data.format,
        "undesirable": data.undesirable,
        "preparation": PREPARATION,
        "chat_template": template,
        "max_length": data.max_length,
        "tokenizer": _tokenizer_digest(tokenizer),
    }
    folder = store.folder_of(settings)
    plain = store.report(folder, SETS)
    if plain is None:
        work = _Preparation(data, tokenizer, template, progress)
        plain = store.write(folder, SETS, lambda staging: work.write(staging, train, evaluation))
    sources = {each.name: each.digest for each in (train, evaluation) if each is not None}
    if template is not None:
        sources[str(data.chat_template)] = hashlib.sha256(template.encode()).hexdigest()
    passed_over = [name for each in (train, evaluation) if each is not None for name in each.passed_over]
    report = Report.of({**plain, "sources": sources, "passed_over": passed_over})
    return store.read(folder, "train"), store.read(folder, "evaluation"), report


def _sources(data: DataConfig) -> tuple[Source, Source | None]:
    """(training, evaluation where it is given). Raises ConfigError."""
    faults: list[Fault] = []

    def opened(key: str, got: str, make: Callable[[], Source]) -> Source | None:
        try:
            return make()
        except Unreadable as error:
            faults.append(Fault(key, f"cannot be read ({error})", got))
        except ConfigError as error:
            # Two splits of one data set fail alike.
            faults.extend(fault for fault in error.faults if fault not in faults)
        return None

    path, split = str(data.path), data.split or "train"
    if data.name == "hub":
        train = opened("data.path", path, lambda: source.of_hub(data, split, "data.split"))
    else:
        train = opened("data.path", path, lambda: source.of_path(path))
    evaluation = None
    if data.eval_path is not None:
        eval_path = data.eval_path
        evaluation = opened("data.eval_path", eval_path, lambda: source.of_path(eval_path))
    elif data.eval_split is not None and data.name == "hub":
        eval_split = data.eval_split
        evaluation = opened("data.eval_split", eval_split, lambda: source.of_hub(data, eval_split, "data.eval_split"))
    if train is None or faults:
        raise ConfigError(faults)
    return train, evaluation


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of all that decides its tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = tokenizer.special_tokens_map  # which templates write
    rest = (type(tokenizer).__name__, tokenizer.eos_token_id, tokenizer.chat_template, sorted(special.items()))
    return hashlib.sha256(f"{content}\0{rest}".encode()).hexdigest()


class _Preparation:
    """One pass over the sources into a store folder."""

    def __init__(self, data: DataConfig, tokenizer: Any, template: str | None, progress: Progress) -> None:
        self._data, self._tokenizer, self._template, self._progress = data, tokenizer, template, progress
        self._report = Report()
        self._writers: dict[str, store.Writer] = {}
        self._waiting: dict[str, list[Placed]] = {"train": [], "evaluation": []}
        self._characters = 0
        self._unseen = set(data.columns.values())
        self._keys: Counter[str] = Counter()

    def write(self, folder: Path, train: Source, evaluation: Source | None) -> dict[str, Any]:
        """Returns the report; raises ConfigError where training would be meaningless."""
        with store.Writer(folder, "train") as to_train, store.Writer(folder, "evaluation") as to_evaluation:
            self._writers = {"train": to_train, "evaluation": to_evaluation}
            self._read(train, evaluation)
        _refuse_nothing(self._data, self._report)
        self._report.unseen = sorted(self._unseen)
        self._report.other_keys = self._unread_keys()
        return self._report.plain()

    def _read(self, train: Source, evaluation: Source | None) -> None:
        held_out: set[int] = set()
        if evaluation is not None:
            for place, one in self._examples(evaluation, "data.eval_path"):
                held_out.add(example.digest(one))
                self._put("evaluation", place, one)
        for place, one in self._examples(train, "data.path"):
            fingerprint = example.digest(one)
            if evaluation is None:
                # By the example's own content: a split that stays when examples are added, twins on one side.
                self._put("evaluation" if fingerprint < self._data.eval_share * 2**64 else "train", place, one)
            elif fingerprint in held_out:
                self._report.duplicates.add(place)
            else:
                self._put("train", place, one)
        self._flush()

    def _examples(self, read: Source, key: str) -> Iterator[Placed]:
        report, rows, broken = self._report, 0, self._report.broken.count
        refused = RowCounts()
        try:
            for row in read.rows():
                rows += 1
                self._progress(read.name, row.share)
                if self._unseen and isinstance(row.record, Mapping):
                    self._unseen -= row.record.keys()
                if row.broken:
                    report.broken.add(f"{row.where}: {row.broken}")
                    continue
                parsed = example.parse(row.record, self._data.columns, self._data.format)
                if isinstance(parsed.example, str):
                    report.broken.add(f"{row.where}: {parsed.example}")
                elif parsed.is_undesirable and self._data.undesirable != "train":
                    (refused if self._data.undesirable == "refuse" else report.undesirable).add(row.where)
                else:
                    self._count(row.where, parsed)
                    yield row.where, parsed.example
        except Unreadable as error:
            raise ConfigError([Fault(key, f"cannot be read ({error})", read.name)]) from error
        report.rows += rows
        if refused.count:
            raise ConfigError([faults.undesirable_fault(read.name, refused.count, refused.first[0], f" of {rows:,}")])
        broken = report.broken.count - broken
        if not rows:
            raise ConfigError([Fault(key, "holds no example", read.name)])
        if broken > MOST * rows:
            rule = f"{broken:,} of {rows:,} rows cannot be used: {report.broken.places()}"
            raise ConfigError([Fault(key, rule, read.name, "is it the right file?")])

    def _count(self, place: str, row: ParsedRow) -> None:
        """What of the row is not read, or is read as something else."""
        report = self._report
        renamed = [f"`{role}` as {other}" for role, other in row.renamed]
        for names, counts in (
            ([row.format], report.formats),
            ([f"`{name}`" for name in row.other_columns], report.other_columns),
            (renamed, report.renamed),
            (row.other_keys, self._keys),
        ):
            for name in names:
                if name in counts or len(counts) < MOST_NAMES:
                    counts[name] = counts.get(name, 0) + 1
        if row.empty_turns:
            report.empty_turns.add(place)

    def _unread_keys(self) -> dict[str, int]:
        """Keys of messages that the chat template does not name either."""
        try:
            text = chat.template(self._tokenizer, self._template) if self._keys else ""
        except ChatFault:
            return {}
        words = set(re.findall(r"\w+", text))
        return {f"`{key}`": count for key, count in self._keys.items() if key not in words}

    def _put(self, name: str, place: str, one: Parsed) -> None:
        self._waiting[name].append((place, one))
        self._characters += len(one.completion) + len(one.prompt) if isinstance(one, Example) else 1000
        if self._characters > BATCH_CHARACTERS or len(self._waiting[name]) >= BATCH_EXAMPLES:
            self._flush()

    def _flush(self) -> None:
        report = self._report
        for name, part in (("train", report.train), ("evaluation", report.evaluation)):
            batch, self._waiting[name] = self._waiting[name], []
            limits = self._tokenizer, self._template, self._data.max_length
            for one in encoding.encoded(batch, *limits, part, report.broken):
                self._writers[name].add(one)
        self._characters = 0


def _refuse_nothing(data: DataConfig, report: Report) -> None:
    """Raises ConfigError where one side holds nothing to learn from or to measure on."""
    train, evaluation = report.train, report.evaluation
    wrong = []
    for name, part in (("training", train), ("evaluation", evaluation)):
        if not part.examples and part.emptied.count:
            rule = f"no usable {name} example is left within data.max_length={data.max_length}: {part.emptied.places()}"
            wrong.append(Fault("data.max_length", rule))
    is_split = data.name in faults.USER_DATA and data.eval_path is None and data.eval_split is None
    left = [f"{report.duplicates.count:,} stand in the evaluation set"] if report.duplicates.count else []
    left += [f"{report.broken.count:,} are broken: {report.broken.places()}"] if report.broken.count else []
    why = f" ({'; '.join(left)})" if left else ""
    if not train.examples and not train.emptied.count and is_split and evaluation.examples:
        rule = f"holds out every example ({evaluation.examples:,}), by their hashes: none is left to train on{why}"
        wrong.append(Fault("data.eval_share", rule, data.eval_share, "give a smaller share, or data.eval_path=FILE"))
    elif not train.examples and not train.emptied.count:
        wrong.append(Fault("data.path", f"holds no training example{why}", data.path))
    if not evaluation.examples and not evaluation.emptied.count:
        if data.eval_path is None and data.eval_split is None:
            rule = f"no evaluation example is left of {train.examples:,} at data.eval_share={data.eval_share}"
            if train.examples:
                wrong.append(Fault("data.eval_share", rule, None, "give data.eval_path or a larger share"))
        else:
            key = "data.eval_path" if data.eval_path is not None else "data.eval_split"
            wrong.append(Fault(key, "holds no evaluation example", data.eval_path or data.eval_split))
    if wrong:
        raise ConfigError(wrong)
