"""Examples -> token batches with a loss mask.

A set is held as padded tensors; the padded length depends on the set alone, never on who shares a pack.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_sweep.config import DataConfig
from lora_sweep.errors import ConfigError
from lora_sweep.records import Example, Fault
from lora_sweep.tiny import world

LENGTH_BUCKET = 8
"""Padded lengths are multiples of this many tokens."""

FAULTS_SHOWN = 5
"""Broken lines told by number; the others are counted."""


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples, padded on the right."""

    input_ids: Tensor
    """(examples, T) int64; padding is 0 and never counted."""
    counted: Tensor
    """(examples, T) bool: the loss of predicting this token counts."""
    lengths: Tensor
    """(examples,) int64."""
    cut: int
    """Examples cut at max_length."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def take(self, rows: Tensor) -> "TokenSet":
        return TokenSet(self.input_ids[rows], self.counted[rows], self.lengths[rows], self.cut)


@dataclass(frozen=True)
class Data:
    """What a trial trains on and is measured on."""

    train: TokenSet
    evaluation: TokenSet
    probe: TokenSet
    """A fixed sample of `train`."""
    bits: float = 0.0
    """Information content of the facts taught, where it is known."""


def check(data: DataConfig) -> list[Fault]:
    """Whether the files can be read and hold usable examples; tokenises nothing."""
    faults: list[Fault] = []
    _split(data, faults)
    return faults


def load(data: DataConfig, tokenizer: Any) -> Data:
    """Reads, splits and tokenises. Raises ConfigError with all faults of the files."""
    faults: list[Fault] = []
    train, evaluation, bits = _split(data, faults)
    if faults:
        raise ConfigError(faults)
    eval_size = data.eval_size or len(evaluation)
    train_set = tokenize(train, tokenizer, data.max_length)
    eval_set = tokenize(_sample(evaluation, eval_size, data.seed), tokenizer, data.max_length)
    for name, tokens in (("training", train_set), ("evaluation", eval_set)):
        if len(tokens) == 0:
            rule = f"no usable {name} example is left within data.max_length={data.max_length}"
            raise ConfigError([Fault("data.max_length", rule)])
    generator = torch.Generator().manual_seed(data.seed)
    probe = torch.randperm(len(train_set), generator=generator)[: data.probe_size]
    return Data(train_set, eval_set, train_set.take(probe.sort().values), bits)


def _split(data: DataConfig, faults: list[Fault]) -> tuple[Sequence[Example], Sequence[Example], float]:
    if data.name != "jsonl":
        return _task(data, faults)
    if data.path is None:
        faults.append(Fault("data.path", "is needed", None, "data.path=FILE.jsonl"))
        return [], [], 0.0
    examples = _read_jsonl("data.path", str(data.path), faults)
    if data.eval_path is not None:
        evaluation = _read_jsonl("data.eval_path", data.eval_path, faults)
        train = examples
    else:
        evaluation = [example for example in examples if _hash(example) < data.eval_share]
        train = [example for example in examples if _hash(example) >= data.eval_share]
    if not faults:
        if not train:
            faults.append(Fault("data.path", "holds no training example", data.path))
        if not evaluation:
            rule = f"no evaluation example is left of {len(examples)} at data.eval_share={data.eval_share}"
            faults.append(Fault("data.eval_share", rule, None, "give data.eval_path or a larger share"))
    return train, evaluation, 0.0


def _task(data: DataConfig, faults: list[Fault]) -> tuple[Sequence[Example], Sequence[Example], float]:
    if data.people is None:
        faults.append(Fault("data.people", "is needed by this task"))
        return [], [], 0.0
    try:
        if data.name == "facts":
            task = world.facts(data.people, data.seed)
        else:
            task = world.style(data.people, data.eval_size or data.people, data.seed)
    except ValueError as error:
        faults.append(Fault("data.people", str(error)))
        return [], [], 0.0
    return task.train, task.eval, task.bits


def _hash(example: Example) -> float:
    """In [0, 1), of the example's own text: a split that stays when examples are added."""
    digest = hashlib.sha256(f"{example.prompt}\0{example.completion}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _sample(examples: Sequence[Example], size: int, seed: int) -> Sequence[Example]:
    if len(examples) <= size:
        return examples
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:size]
    return [examples[i] for i in sorted(chosen.tolist())]


def _read_jsonl(field: str, path: str, faults: list[Fault]) -> list[Example]:
    examples: list[Example] = []
    broken: list[Fault] = []
    try:
        with Path(path).expanduser().open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    example = _example(line.rstrip())
                    if isinstance(example, Example):
                        examples.append(example)
                    else:
                        broken.append(Fault(field, f"{path}:{number}: {example}"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        faults.append(Fault(field, f"cannot be read ({reason})", path))
        return []
    faults += broken[:FAULTS_SHOWN]
    if len(broken) > FAULTS_SHOWN:
        faults.append(Fault(field, f"{path}: {len(broken) - FAULTS_SHOWN} more lines are broken"))
    if not examples and not broken:
        faults.append(Fault(field, "holds no example", path))
    return examples


def _example(line: str) -> Example | str:
    """An example, or what is wrong with the line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is no JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"cannot be read ({str(error).partition(';')[0]})"
    if not isinstance(record, dict):
        return "is no JSON object"
    text, prompt, completion = (record.get(key) for key in ("text", "prompt", "completion"))
    if any(isinstance(part, str) and _SURROGATE.search(part) for part in (text, prompt, completion)):
        return "holds half of a surrogate pair, which is no character"
    if isinstance(text, str) and text.strip():
        return Example(text)
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return Example(completion, prompt)
    return "has neither a `text` nor a `prompt` and a `completion` with something in it"


def tokenize(examples: Sequence[Example], tokenizer: Any, max_length: int) -> TokenSet:
    """Special tokens exactly once, the end of text counted, cut at max_length; with nothing to count left out."""
    rows: list[tuple[list[int], int]] = []
    cut = 0
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
        ends = tokenizer.eos_token_id
        if prompt and prompt[-1] == ends:
            prompt = prompt[:-1]
        ids = prompt + tokenizer(example.completion, add_special_tokens=not prompt)["input_ids"]
        if ends is not None and ids[-1:] != [ends]:
            ids = [*ids, ends]
        cut += len(ids) > max_length
        ids = ids[:max_length]
        # The first token has nothing before it to be predicted from.
        first = max(len(prompt), 1)
        if len(ids) > first:
            rows.append((ids, first))
    longest = max((len(ids) for ids, _ in rows), default=0)
    length = -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    counted = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (ids, first) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        counted[row, first : len(ids)] = True
    return TokenSet(input_ids, counted, torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64), cut)


def order(examples: int, seed: int) -> Callable[[int, int], Tensor]:
    """(first, count) -> the rows at these places of an endless walk over the set, shuffled anew each epoch."""

    @lru_cache(maxsize=2)
    def shuffled(epoch: int) -> Tensor:
        return torch.randperm(examples, generator=torch.Generator().manual_seed((seed << 20) + epoch))

    def rows(first: int, count: int) -> Tensor:
        epochs = range(first // examples, (first + count - 1) // examples + 1)
        starts = [epoch * examples for epoch in epochs]
        parts = [
            shuffled(epoch)[max(first - start, 0) : first + count - start]
            for epoch, start in zip(epochs, starts, strict=True)
        ]
        return torch.cat(parts)

    return rows
