"""Token batches with a loss mask.

Examples lie one after another in flat arrays, in memory or mapped from disk, and are padded batch by batch, to one of a
few lengths that depend on the set alone. Which of them a pass has depends on the rows of all slots in it, unless
`train.fixed_shapes` asks for the longest always.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

LENGTH_BUCKET = 8
"""Padded lengths are multiples of this many tokens."""
LENGTHS = 8
"""Different padded lengths of a set, at most."""


@dataclass(frozen=True)
class Batch:
    """Some rows of a set, padded on the right, on the CPU."""

    input_ids: Tensor
    """(rows, T) int64; padding is 0 and never counted."""
    loss_mask: Tensor
    """(rows, T) bool: the loss of predicting this token counts."""
    position_ids: Tensor | None
    """(rows, T) int64, from 0 in each example, where rows hold several examples; else None."""
    examples: Tensor | None
    """(rows, T) int64, the example's place in its set (padding: 0), where rows hold several; else None."""


@dataclass(frozen=True)
class TokenSet:
    """Tokenized examples, one a row or several."""

    tokens: NDArray[np.int32]
    """(all tokens,): the examples one after another."""
    loss_mask: NDArray[np.bool_]
    """(all tokens,)."""
    offsets: NDArray[np.int64]
    """(stored examples + 1,): where each begins in `tokens`."""
    members: NDArray[np.int64]
    """(examples,): which of the stored examples are in this set, row by row."""
    starts: NDArray[np.int64] | None = None
    """(rows + 1,): where each row begins in `members`; None: one example a row."""
    max_length: int | None = None
    """T of rows that hold several."""

    @classmethod
    def of(cls, examples: Sequence[tuple[ArrayLike, ArrayLike]]) -> "TokenSet":
        """From (ids, counted) of each example."""
        ids = [np.zeros(0, np.int32), *(np.asarray(ids, dtype=np.int32) for ids, _ in examples)]
        loss_mask = [np.zeros(0, np.bool_), *(np.asarray(loss_mask, dtype=np.bool_) for _, loss_mask in examples)]
        ends = np.cumsum([len(each) for each in ids], dtype=np.int64)
        return cls(np.concatenate(ids), np.concatenate(loss_mask), ends, np.arange(len(examples)))

    def __len__(self) -> int:
        """Rows: what a batch is counted in."""
        return self.examples if self.starts is None else len(self.starts) - 1

    @property
    def examples(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(examples,) tokens of each, special tokens included."""
        return self.offsets[self.members + 1] - self.offsets[self.members]

    @cached_property
    def length(self) -> int:
        """T: a multiple of LENGTH_BUCKET that holds every row."""
        longest = self.max_length or int(self.lengths.max(initial=0))
        return -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET

    def padded_length(self, rows: Tensor) -> int:
        """T for these rows (n,), at most `length`: one of few, so that not every batch has a shape of its own."""
        if self.starts is not None:
            return self.length
        bucket = -(-self.length // LENGTHS // LENGTH_BUCKET) * LENGTH_BUCKET
        return min(self.length, -(-int(self.lengths[rows.numpy()].max(initial=1)) // bucket) * bucket)

    @cached_property
    def by_length(self) -> NDArray[np.int64]:
        """(rows,) in which batches need the least padding."""
        return np.arange(len(self)) if self.starts is not None else np.argsort(self.lengths, kind="stable")

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """(examples,) counted tokens of each."""
        pairs = zip(self.offsets[self.members], self.offsets[self.members + 1], strict=True)
        return np.array([self.loss_mask[begin:end].sum() for begin, end in pairs], dtype=np.int64)

    def take(self, members: NDArray[np.int64]) -> "TokenSet":
        """The set of these examples, by their places in this one, one a row."""
        return replace(self, members=self.members[members], starts=None, max_length=None)

    def packed(self, max_length: int) -> "TokenSet":
        """The same examples, as many a row as `max_length` holds (best fit, the longest first)."""
        rows = _best_fit(self.lengths, max_length)
        members = np.array([member for row in rows for member in row], dtype=np.int64)
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return replace(self, members=self.members[members], starts=starts, max_length=max_length)

    def batch(self, rows: Tensor, length: int | None = None) -> Batch:
        """These rows, (n,) int64, padded to `length` tokens, or to the set's."""
        if self.starts is None:
            return self._one_each(rows.numpy(), length or self.length)
        return self._several_each(rows.tolist())

    def _one_each(self, rows: NDArray[np.int64], length: int) -> Batch:
        chosen = self.members[rows]
        starts = self.offsets[chosen][:, None]
        places = starts + np.arange(length)
        inside = places < self.offsets[chosen + 1][:, None]
        places = np.where(inside, places, starts)
        ids = np.where(inside, self.tokens[places], 0).astype(np.int64)
        return Batch(torch.from_numpy(ids), torch.from_numpy(self.loss_mask[places] & inside), None, None)

    def _several_each(self, rows: Sequence[int]) -> Batch:
        assert self.starts is not None
        shape = (len(rows), self.length)
        ids, examples = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        loss_mask, positions = np.zeros(shape, np.bool_), np.zeros(shape, np.int64)
        for place, row in enumerate(rows):
            end = 0
            for member in range(self.starts[row], self.starts[row + 1]):
                a, b = self.offsets[self.members[member]], self.offsets[self.members[member] + 1]
                begin, end = end, end + int(b - a)
                ids[place, begin:end] = self.tokens[a:b]
                loss_mask[place, begin:end] = self.loss_mask[a:b]
                positions[place, begin:end] = np.arange(end - begin)
                examples[place, begin:end] = member
            # Padding is one more example, which nobody sees and whose loss is not counted.
            positions[place, end:] = np.arange(self.length - end)
        arrays = (ids, loss_mask, positions, examples)
        return Batch(*(torch.from_numpy(array) for array in arrays))


def _best_fit(lengths: NDArray[np.int64], room: int) -> list[list[int]]:
    """Places of the examples, row by row: each, longest first, goes where the least room is left over."""
    rows: list[list[int]] = []
    rows_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit r is set when some row has room for r more tokens
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        fitting = spaces >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[left].pop()
            if not rows_by_space[left]:
                spaces &= ~(1 << left)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(place)
        rows_by_space.setdefault(left - length, []).append(row)
        spaces |= 1 << (left - length)
    return rows


def order(rows: int, seed: int) -> Callable[[int, int], Tensor]:
    """(first, count) -> the rows at these places of an endless walk over the set, shuffled anew each epoch."""

    @lru_cache(maxsize=2)
    def shuffled(epoch: int) -> Tensor:
        return torch.randperm(rows, generator=torch.Generator().manual_seed((seed << 20) + epoch))

    def walk(first: int, count: int) -> Tensor:
        epochs = range(first // rows, (first + count - 1) // rows + 1)
        starts = [epoch * rows for epoch in epochs]
        parts = [
            shuffled(epoch)[max(first - start, 0) : first + count - start]
            for epoch, start in zip(epochs, starts, strict=True)
        ]
        return torch.cat(parts)

    return walk


def sample(total: int, size: int, seed: int) -> NDArray[np.int64]:
    """A fixed choice of `size` of `total` places, in order; all where there are no more."""
    if total <= size:
        return np.arange(total)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:size]
    places: NDArray[np.int64] = chosen.sort().values.numpy()
    return places


Encoded = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""(ids, counted) of one example, (T,) each."""


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Encoded]:
    """(prompt, completion) -> ids and mask: special tokens exactly once, the end of text counted, the prompt not."""
    if not pairs:
        return []
    ends, begins = tokenizer.eos_token_id, tokenizer.bos_token_id
    prompts = _ids([prompt for prompt, _ in pairs], tokenizer, special=True)
    bare = _following([completion for _, completion in pairs], tokenizer)
    encoded = []
    for (prompt, completion), before, after in zip(pairs, prompts, bare, strict=True):
        if not prompt:
            before, after = [], tokenizer(completion)["input_ids"]
        elif before and before[-1] == ends:
            before = before[:-1]
        ids = [*before, *after]
        if begins is not None and ids[:2] == [begins, begins]:
            # The text brought its own, and the tokenizer another.
            ids, before = ids[1:], before[1:]
        if ends is not None and ids[-2:] == [ends, ends]:
            ids = ids[:-1]
        if ends is not None and ids[-1:] != [ends]:
            ids.append(ends)
        # The first token has nothing before it to be predicted from.
        first = max(len(before), 1)
        encoded.append((np.array(ids, dtype=np.int32), np.arange(len(ids)) >= first))
    return encoded


def _ids(texts: Sequence[str], tokenizer: Any, special: bool) -> list[list[int]]:
    ids_alone = {"return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, **ids_alone)["input_ids"]
    return ids


def _following(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of texts that stand behind others.

    Tokenizers of Llama-2's and Mistral's kind put a space before whatever they are given: a completion by itself would
    begin with a space that is not in it. There each text is tokenized behind a line break, whose ids are taken off.
    """
    plain = _ids(texts, tokenizer, special=False)
    (probe,), (anchor,) = (_ids([text], tokenizer, special=False) for text in ("a", "\n"))
    if not probe or not str(tokenizer.convert_ids_to_tokens(probe[0])).startswith("\u2581"):
        return plain
    behind = _ids([f"\n{text}" for text in texts], tokenizer, special=False)
    return [
        ids[len(anchor) :] if ids[: len(anchor)] == anchor else alone for ids, alone in zip(behind, plain, strict=True)
    ]
