"""Next-token cross-entropy without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_sweep.pack.linear import Pass

CHUNK_LOGITS = 2**26
"""Logits held at once, at most: 256 MiB in fp32."""


class OutputLayer:
    """From token ids to per-token losses, the output layer applied chunk by chunk along the positions.

    A chunk holds the same positions of every row, so that no slot's logits are sliced out: slicing would make autograd
    fill a full-size gradient with zeros for each slot.
    """

    def __init__(self, model: Any, now: Pass) -> None:
        self._model = model
        self._now = now
        self._body, self._head = _parts(model)

    def _chunks(self, rows: int, length: int) -> list[tuple[int, int]]:
        vocabulary = self._model.config.get_text_config().vocab_size
        size = max(1, min(length, CHUNK_LOGITS // (rows * vocabulary)))
        return [(first, min(first + size, length)) for first in range(0, length, size)]

    def losses(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(rows, T - 1) nats of predicting token t + 1 from tokens up to t; no gradient.

        `position_ids`: where rows hold several examples, each counted from 0: none sees another (`separates`).
        """
        with torch.no_grad():
            if self._head is None:
                return _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], input_ids[:, 1:])
            hidden = self._run(self._body, input_ids, position_ids).last_hidden_state
            rows, length = input_ids.shape[0], input_ids.shape[1] - 1
            parts = [
                _nll(self._logits(hidden[:, a:b].contiguous(), a), input_ids[:, a + 1 : b + 1])
                for a, b in self._chunks(rows, length)
            ]
        return torch.cat(parts, dim=1)

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

    def backward(self, input_ids: Tensor, weights: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Adds the gradient of sum(weights x losses); returns the losses (rows, T - 1).

        `weights` (rows, T - 1): 0 where a token does not count, else 1 / (counted tokens of its slot's step).
        """
        labels = input_ids[:, 1:]
        if self._head is None:
            losses = _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], labels)
            (losses * weights).sum().backward()
            return losses.detach()
        hidden = self._run(self._body, input_ids, position_ids).last_hidden_state
        parts, gradients = [], []
        for a, b in self._chunks(*labels.shape):
            chunk = hidden.detach()[:, a:b].contiguous().requires_grad_()
            losses = _nll(self._logits(chunk, a), labels[:, a:b])
            (losses * weights[:, a:b]).sum().backward()
            parts.append(losses.detach())
            gradients.append(chunk.grad)
        gradients.append(torch.zeros_like(hidden[:, -1:]))
        if hidden.requires_grad:  # not so when only the output layer is adapted
            hidden.backward(torch.cat(gradients, dim=1))
        return torch.cat(parts, dim=1)

    @staticmethod
    def _run(part: Any, input_ids: Tensor, position_ids: Tensor | None) -> Any:
        # transformers takes positions that begin anew, without a mask, as examples that must not see one another.
        where = {} if position_ids is None else {"position_ids": position_ids}
        return part(input_ids=input_ids, use_cache=False, **where)

    def _logits(self, hidden: Tensor, first: int) -> Tensor:
        assert self._head is not None
        self._now.first_position = first
        logits: Tensor = self._head(hidden)
        self._now.first_position = 0
        return logits


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
