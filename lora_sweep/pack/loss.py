"""Next-token cross-entropy without ever holding all logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_sweep.pack.linear import PackedLinear, Pass

CHUNK_LOGITS = 2**26
"""Logits held at once, at most: 256 MiB in fp32."""


class OutputLayer:
    """From token ids to per-token losses, the output layer applied chunk by chunk.

    Where the layer is the base's own, only to the positions that count: a token that no loss counts needs no logits.
    Where it is adapted, to chunks that hold the same positions of every row: it must tell the slots apart.
    """

    def __init__(self, model: Any, now: Pass) -> None:
        self._model = model
        self._now = now
        self._body, self._head = _parts(model)

    @property
    def selects(self) -> bool:
        """Whether logits can be had of some positions alone."""
        return self._head is not None and not isinstance(self._head, PackedLinear)

    def losses(self, input_ids: Tensor, position_ids: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
        """(rows, T - 1) nats of predicting token t + 1 from tokens up to t; no gradient.

        `position_ids`: where rows hold several examples, each counted from 0: none sees another (`separates`).
        `counted`: (n,) int64, places in the flattened (rows, T) whose next token counts; the losses of the others are
        0. Only where the layer `selects`.
        """
        labels = input_ids[:, 1:]
        with torch.no_grad():
            if self._head is None:
                return _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], labels)
            hidden = self._run(self._body, input_ids, position_ids).last_hidden_state
            if counted is None:
                chunks = self._chunks(*labels.shape)
                return torch.cat(
                    [_nll(self._logits(hidden[:, a:b].contiguous(), a), labels[:, a:b]) for a, b in chunks], 1
                )
            found = [
                _nll(self._logits(hidden.flatten(0, 1)[each][None]), input_ids.flatten()[each + 1][None])[0]
                for each in self._split(counted)
            ]
        return _placed(found, counted, input_ids)

    def backward(
        self, input_ids: Tensor, weights: Tensor, position_ids: Tensor | None = None, counted: Tensor | None = None
    ) -> Tensor:
        """Adds the gradient of sum(weights x losses); returns the losses (rows, T - 1).

        `weights` (rows, T - 1): 0 where a token does not count, else 1 / (counted tokens of its slot's step).
        `counted`: as of `losses`; all with a weight must be among them.
        """
        labels = input_ids[:, 1:]
        if self._head is None:
            losses = _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], labels)
            (losses * weights).sum().backward()
            return losses.detach()
        hidden = self._run(self._body, input_ids, position_ids).last_hidden_state
        states, gradient = hidden.detach(), torch.zeros_like(hidden)
        parts = []
        if counted is None:
            for a, b in self._chunks(*labels.shape):
                chunk = states[:, a:b].contiguous().requires_grad_()
                parts.append(self._chunk(chunk, a, labels[:, a:b], weights[:, a:b]))
                gradient[:, a:b] = chunk.grad
            found = torch.cat(parts, dim=1)
        else:
            by_place = functional.pad(weights, (0, 1)).flatten()
            for each in self._split(counted):
                chunk = states.flatten(0, 1)[each][None].requires_grad_()
                parts.append(self._chunk(chunk, 0, input_ids.flatten()[each + 1][None], by_place[each][None])[0])
                gradient.flatten(0, 1)[each] = chunk.grad[0]
            found = _placed(parts, counted, input_ids)
        if hidden.requires_grad:  # not so when only the output layer is adapted
            hidden.backward(gradient)
        return found

    def _chunk(self, hidden: Tensor, first: int, labels: Tensor, weights: Tensor) -> Tensor:
        """The losses of a chunk, whose gradient is left at its hidden states."""
        losses = _nll(self._logits(hidden, first), labels)
        (losses * weights).sum().backward()
        return losses.detach()

    def _chunks(self, rows: int, length: int) -> list[tuple[int, int]]:
        """Stretches of positions. No slot's logits are sliced out: autograd would fill a whole gradient for each."""
        size = max(1, min(length, self._most // rows))
        return [(first, min(first + size, length)) for first in range(0, length, size)]

    def _split(self, counted: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = counted.split(self._most)
        return parts

    @property
    def _most(self) -> int:
        """Positions whose logits are held at once."""
        return max(1, CHUNK_LOGITS // int(self._model.config.get_text_config().vocab_size))

    def separates(self) -> bool:
        """Whether an example packed behind another has the losses it has alone. Measured, not listed.

        It is put behind two others: not a bit may change. A low precision rounds it differently than alone.
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = torch.arange(18, device=self._model.device).view(3, 6) * 7 % vocabulary
        positions = torch.arange(6, device=ids.device).repeat(2).view(1, 12)
        alone = self.losses(ids[:1])
        behind = [self.losses(torch.cat([first, ids[0]]).view(1, 12), positions)[:, 6:] for first in ids[1:]]
        rounding = 0.1 if self._model.dtype == torch.bfloat16 else 1e-4
        near = torch.allclose(alone, behind[0], rtol=rounding, atol=rounding)
        return near and torch.equal(behind[0], behind[1])

    @staticmethod
    def _run(part: Any, input_ids: Tensor, position_ids: Tensor | None) -> Any:
        # transformers takes positions that begin anew, without a mask, as examples that must not see one another.
        where = {} if position_ids is None else {"position_ids": position_ids}
        return part(input_ids=input_ids, use_cache=False, **where)

    def _logits(self, hidden: Tensor, first: int = 0) -> Tensor:
        assert self._head is not None
        self._now.first_position = first
        logits: Tensor = self._head(hidden)
        self._now.first_position = 0
        return logits


def _placed(losses: Sequence[Tensor], counted: Tensor, input_ids: Tensor) -> Tensor:
    """(rows, T - 1) with these losses at their places, else 0."""
    whole = torch.zeros(input_ids.shape, dtype=losses[0].dtype, device=input_ids.device)
    whole.view(-1)[counted] = torch.cat(list(losses))
    return whole[:, :-1]


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _parts(model: Any) -> tuple[Any, Any]:
    """(body, output layer) where the model's logits are just output layer(body), else (model, None).

    Measured, not listed: some models scale or cap their logits on the way.
    """
    body, head = model.base_model, model.get_output_embeddings()
    if body is model or head is None:
        return model, None
    ids = torch.arange(4, device=model.device).view(1, 4)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head(body(input_ids=ids, use_cache=False).last_hidden_state)
    return (body, head) if torch.equal(whole, parts) else (model, None)
