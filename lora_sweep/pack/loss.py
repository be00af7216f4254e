"""Next-token cross-entropy without ever holding all logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils

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

    def losses(self, input_ids: Tensor, position_ids: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
        """(rows, T - 1) nats of predicting token t + 1 from tokens up to t; no gradient.

        Args:
            position_ids: where rows hold several examples, each counted from 0: none sees another (`separates`).
            loss_mask: (n,) int64, places in the flattened (rows, T) whose next token counts; the losses of the others
                are 0. Only where the layer `selects`.
        """
        with torch.no_grad():
            if self._head is None:
                return _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], input_ids[:, 1:])
            hidden = self._run(self._body, input_ids, position_ids).last_hidden_state.flatten(0, 1)
            by_chunk = torch.zeros(input_ids.shape, dtype=_loss_dtype(hidden), device=hidden.device)
            for at, first in self._pieces(input_ids, loss_mask):
                by_chunk.view(-1)[at] = _nll(self._logits(hidden[at], first), input_ids.flatten()[at + 1])
        return by_chunk[:, :-1]

    def backward(
        self, input_ids: Tensor, weights: Tensor, position_ids: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor:
        """Adds the gradient of sum(weights x losses); returns the losses (rows, T - 1).

        `weights` (rows, T - 1): 0 where a token does not count, else 1 / (counted tokens of its slot's step).

        Args:
            loss_mask: as of `losses`; all with a weight must be among them.
        """
        if self._head is None:
            losses = _nll(self._run(self._model, input_ids, position_ids).logits[:, :-1], input_ids[:, 1:])
            (losses * weights).sum().backward()
            return losses.detach()
        hidden = self._run(self._body, input_ids, position_ids).last_hidden_state
        states, gradient = hidden.detach().flatten(0, 1), torch.zeros_like(hidden)
        by_chunk = torch.zeros(input_ids.shape, dtype=_loss_dtype(hidden), device=hidden.device)
        by_place = functional.pad(weights, (0, 1)).flatten()
        for at, first in self._pieces(input_ids, loss_mask):
            piece = states[at].requires_grad_()
            losses = _nll(self._logits(piece, first), input_ids.flatten()[at + 1])
            (losses * by_place[at]).sum().backward()
            by_chunk.view(-1)[at] = losses.detach()
            gradient.view(-1, gradient.shape[-1])[at] = piece.grad
        if hidden.requires_grad:  # not so when only the output layer is adapted
            hidden.backward(gradient)
        return by_chunk[:, :-1]

    def _pieces(self, input_ids: Tensor, loss_mask: Tensor | None) -> Iterator[tuple[Tensor, int]]:
        """(places in the flattened (rows, T) whose logits are held at once, the position of the first).

        All places: (rows, n), the same positions of every row. No slot's logits are sliced out: autograd would fill a
        whole gradient for each.
        """
        most = max(1, CHUNK_LOGITS // int(self._model.config.get_text_config().vocab_size))
        if loss_mask is not None:
            for each in loss_mask.split(most):
                yield each[None], 0
            return
        rows, T = input_ids.shape
        places = torch.arange(rows * T, device=input_ids.device).view(rows, T)[:, :-1]
        first = 0
        for part in places.split(max(1, most // rows), dim=1):
            yield part, first
            first += part.shape[1]

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
        with _knowing(_one_example if position_ids is None else _examples):
            return part(input_ids=input_ids, use_cache=False, **where)

    def _logits(self, hidden: Tensor, first: int) -> Tensor:
        assert self._head is not None
        self._now.first_position = first
        logits: Tensor = self._head(hidden)
        self._now.first_position = 0
        return logits


@contextmanager
def _knowing(examples: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Whether rows hold several examples is known here.

    transformers looks at all positions of each pass: the host would wait for the device, and the attention kernel, so
    the last bits, would depend on whether any row of any slot holds two.
    """
    theirs = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = examples
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = theirs


def _one_example(_: Tensor) -> None:
    return None


def _examples(position_ids: Tensor) -> Tensor:
    """(rows, T) which example of its row a token is of."""
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return begins.cumsum(-1)


def _loss_dtype(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(_loss_dtype(logits))
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
