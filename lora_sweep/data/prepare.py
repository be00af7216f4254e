"""From what the user brings to what a trial trains on: read, split, tokenized once, kept."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_sweep.config import DataConfig
from lora_sweep.data import encoding, example, retention, source, store, tokens
from lora_sweep.data.chat import MAX_TEMPLATE_BYTES
from lora_sweep.data.encoding import Placed
from lora_sweep.data.example import Parsed
from lora_sweep.data.file_rows import Row, Unreadable
from lora_sweep.data.report import Report
from lora_sweep.data.source import Source
from lora_sweep.data.tasks import biographies as world
from lora_sweep.data.tasks import real_facts
from lora_sweep.data.tokens import TokenSet
from lora_sweep.errors import ConfigError, Fault
from lora_sweep.records import Example
from lora_sweep.system import files

USER_DATA = ("files", "hub")
"""Of data.name: what the user brings, tokenized once and kept."""
ONLY_OWN_DATA = ("path", "eval_path", "columns", "chat_template")
ONLY_HUB = ("subset", "split", "revision", "eval_split")
"""Fields that mean nothing of other data: passed over, they would train on something else than was meant."""
SETS = ("train", "evaluation")
HEAD_ROWS = 100
"""Rows read before anything is prepared."""
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


def check(data: DataConfig) -> list[Fault]:
    """Whether the files are there and their first rows are examples; tokenizes nothing, asks no hub."""
    faults = [
        Fault("data.columns", f"must name {', '.join(example.COLUMNS)}", name)
        for name in data.columns
        if name not in example.COLUMNS
    ]
    if not faults and not example.meanings(data.columns):
        rule = "must name what goes together: " + "; ".join(" and ".join(form) for form in example.FORMS)
        faults.append(Fault("data.columns", rule, ", ".join(data.columns)))
    faults += _unread(data)
    if faults:
        return faults
    if data.name not in USER_DATA:
        try:
            _task(data)
        except ConfigError as error:
            faults += error.faults
    elif data.path is None:
        remedy = "data.path=FILE.jsonl" if data.name == "files" else "data.path=ORGANISATION/NAME"
        faults.append(Fault("data.path", "is needed", None, remedy))
    elif data.name == "files":
        faults += _head_faults("data.path", data.path, data.columns)
    elif Path(data.path).expanduser().exists():
        faults.append(Fault("data.path", "lies here, it is no hub id", data.path, f"data=files data.path={data.path}"))
    if data.eval_path is not None:
        faults += _head_faults("data.eval_path", data.eval_path, data.columns)
    if data.retention is not None and data.retention != retention.EMBEDDED:
        faults += _head_faults("data.retention", data.retention, data.columns, retention.parse)
    if data.chat_template is not None:
        try:
            _template_text(data)
        except ConfigError as error:
            faults += error.faults
    return faults


def _unread(data: DataConfig) -> list[Fault]:
    """Fields that are given and would not be read."""
    is_own, is_hub = data.name in USER_DATA, data.name == "hub"
    given = [key for key in (*ONLY_OWN_DATA, *ONLY_HUB) if getattr(data, key) not in (None, {})]
    faults = []
    for key in given:
        got = getattr(data, key)
        if not is_own:
            faults.append(Fault(f"data.{key}", f"is not read by data={data.name}", got, "say data=files or data=hub"))
        elif key in ONLY_HUB and not is_hub:
            faults.append(Fault(f"data.{key}", "is of a hub data set, files have none", got, f"data.{key}=null"))
    if is_hub and data.eval_path is not None and data.eval_split is not None:
        faults.append(Fault("data.eval_split", "and data.eval_path exclude each other", data.eval_split))
    return faults


def _head_faults(
    key: str, path: str, columns: Mapping[str, str], parse: Callable[[Any, Mapping[str, str]], Any] = example.parse
) -> list[Fault]:
    """Of a file: unreadable, empty, or not one usable example among its first rows."""
    try:
        parsed = [row.broken or parse(row.record, columns) for row in _head(path)]
    except Unreadable as error:
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).expanduser().exists()
        remedy = f"a data set of the hub is data=hub data.path={path}" if is_id and not Path(path).suffix else ""
        return [Fault(key, f"cannot be read ({error})", path, remedy if key == "data.path" else "")]
    reasons = [each for each in parsed if isinstance(each, str)]
    if not parsed:
        return [Fault(key, "holds no example", path)]
    if len(reasons) == len(parsed):
        where = next(iter(_head(path))).where
        many = f"none of the first {len(parsed)} rows" if len(parsed) > 1 else "its only row"
        asks_names = not columns and reasons[0].startswith("has no ")
        remedy = "name them: data.columns='{prompt: question, completion: answer}'" if asks_names else ""
        return [Fault(key, f"{many} can be used; {where} {reasons[0]}", path, remedy)]
    return []


def _head(path: str) -> Iterator[Row]:
    return itertools.islice(source.rows_of_path(path)(), HEAD_ROWS)


def load(data: DataConfig, tokenizer: Any, progress: Progress = silent) -> Data:
    """Reads, splits and tokenizes, or maps what was prepared before. Raises ConfigError with all faults of the data.

    >>> data = load(sweep.base().data, base.tokenizer)
    >>> data.evaluation.examples, data.probe.examples
    (48, 24)
    """
    if data.name in USER_DATA:
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
        kept = retention.load(data, tokenizer, _template_text(data))
        general, largest_id = kept.tokens, max(largest_id, kept.largest_id)
        report.unretained = kept.broken
        report.sources |= {} if kept.source is None else {kept.source.name: kept.source.digest}
    return Data(sets[0], sets[1], sets[2], general, bits, report, largest_id)


# -- tasks in the package -----------------------------------------------------------------------------------------


def _task(data: DataConfig) -> world.Task:
    """Raises ConfigError."""
    if data.subjects is None:
        raise ConfigError([Fault("data.subjects", "is needed by this task")])
    try:
        if data.name == "facts":
            return world.facts(data.subjects, data.seed)
        if data.name == "real_facts":
            return real_facts.facts(data.subjects, data.seed)
        return world.style(data.subjects, data.eval_size or data.subjects, data.seed)
    except ValueError as error:
        raise ConfigError([Fault("data.subjects", str(error))]) from error
    except ModuleNotFoundError as error:
        rule = f"{data.name} needs the package {error.name}"
        raise ConfigError([Fault("data", rule, None, 'pip install "lora-sweep[real]"')]) from error


def _embedded(data: DataConfig, tokenizer: Any) -> tuple[TokenSet, TokenSet, Report, float]:
    task, report = _task(data), Report()
    sets = []
    for part, examples in ((report.train, task.train), (report.evaluation, task.eval)):
        batch = [(f"{data.name}, example {place}", each) for place, each in enumerate(examples, start=1)]
        sets.append(TokenSet.of(list(encoding.encoded(batch, tokenizer, None, data.max_length, part, report.broken))))
    _refuse_nothing(data, report)
    return sets[0], sets[1], report, task.bits


# -- what the user brings -----------------------------------------------------------------------------------------


def _user_data(data: DataConfig, tokenizer: Any, progress: Progress) -> tuple[TokenSet, TokenSet, Report]:
    train, evaluation = _sources(data)
    template = _template_text(data)
    settings = {
        "train": [train.digest, train.files],
        "evaluation": data.eval_share if evaluation is None else [evaluation.digest, evaluation.files],
        "columns": data.columns,
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


def _template_text(data: DataConfig) -> str | None:
    if data.chat_template is None:
        return None
    try:
        return files.read_text(Path(data.chat_template).expanduser(), MAX_TEMPLATE_BYTES)
    except (OSError, files.Unsafe) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fault = Fault("data.chat_template", f"cannot be read ({reason})", data.chat_template, "a jinja file is needed")
        raise ConfigError([fault]) from error


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

    def write(self, folder: Path, train: Source, evaluation: Source | None) -> dict[str, Any]:
        """Returns the report; raises ConfigError where training would be meaningless."""
        with store.Writer(folder, "train") as to_train, store.Writer(folder, "evaluation") as to_evaluation:
            self._writers = {"train": to_train, "evaluation": to_evaluation}
            self._read(train, evaluation)
        _refuse_nothing(self._data, self._report)
        self._report.unseen = sorted(self._unseen)
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
        try:
            for row in read.rows():
                rows += 1
                self._progress(read.name, row.share)
                if self._unseen and isinstance(row.record, Mapping):
                    self._unseen -= row.record.keys()
                parsed = row.broken or example.parse(row.record, self._data.columns)
                if isinstance(parsed, str):
                    report.broken.add(f"{row.where}: {parsed}")
                else:
                    yield row.where, parsed
        except Unreadable as error:
            raise ConfigError([Fault(key, f"cannot be read ({error})", read.name)]) from error
        report.rows += rows
        broken = report.broken.count - broken
        if not rows:
            raise ConfigError([Fault(key, "holds no example", read.name)])
        if broken > MOST * rows:
            rule = f"{broken:,} of {rows:,} rows cannot be used: {report.broken.places()}"
            raise ConfigError([Fault(key, rule, read.name, "is it the right file?")])

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
    faults = []
    for name, part in (("training", train), ("evaluation", evaluation)):
        if not part.examples and part.emptied.count:
            rule = f"no usable {name} example is left within data.max_length={data.max_length}: {part.emptied.places()}"
            faults.append(Fault("data.max_length", rule))
    if not train.examples and not train.emptied.count:
        left = [f"{report.duplicates.count:,} stand in the evaluation set"] if report.duplicates.count else []
        left += [f"{report.broken.count:,} are broken: {report.broken.places()}"] if report.broken.count else []
        why = f" ({'; '.join(left)})" if left else ""
        faults.append(Fault("data.path", f"holds no training example{why}", data.path))
    if not evaluation.examples and not evaluation.emptied.count:
        if data.eval_path is None and data.eval_split is None:
            rule = f"no evaluation example is left of {train.examples:,} at data.eval_share={data.eval_share}"
            faults.append(Fault("data.eval_share", rule, None, "give data.eval_path or a larger share"))
        else:
            key = "data.eval_path" if data.eval_path is not None else "data.eval_split"
            faults.append(Fault(key, "holds no evaluation example", data.eval_path or data.eval_split))
    if faults:
        raise ConfigError(faults)
