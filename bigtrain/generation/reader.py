"""A decoder that reads its rows once, and then one token of each at a time.

B rows, L tokens in the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bigtrain.generation.cache import Cache
from bigtrain.models.dense import dense_hidden, dense_logits
from bigtrain.models.language_model import LanguageModel


class Reader:
    """A causal model in evaluation mode and what it has read; rows may differ in length.

    There is room for `tokens` tokens in each row, which must be no more than the model has positions for.
    """

    def __init__(self, model: LanguageModel, rows: int, tokens: int) -> None:
        self._model, self._device = model, model.tokens.weight.device
        self.cache = Cache(model.config, rows, tokens, like=model.tokens.weight)
        self._places = torch.zeros(rows, dtype=torch.int64, device=self._device)
        """Where the next token of each row belongs."""

    @torch.no_grad()
    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Forget what was read and read these rows; return the logits of what follows each, (B, V)."""
        ids_BL = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True).to(self._device)
        positions_BL = torch.arange(ids_BL.shape[1], device=self._device).expand_as(ids_BL)
        hidden_BLW = dense_hidden(self._model, ids_BL, positions_BL, self.cache.reading())
        self._places = torch.tensor([len(row) for row in rows], device=self._device)
        return self._last(hidden_BLW, self._places - 1)

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """Read one more token of each row; return the logits of what follows it, (B, V)."""
        ids_B1 = torch.tensor(list(tokens), device=self._device)[:, None]
        hidden_B1W = dense_hidden(self._model, ids_B1, self._places[:, None], self.cache.adding(self._places))
        self._places = self._places + 1
        return self._last(hidden_B1W, torch.zeros_like(self._places))

    def _last(self, hidden_BLW: Tensor, at_B: Tensor) -> Tensor:
        rows = torch.arange(len(at_B), device=self._device)
        return dense_logits(self._model, hidden_BLW[rows, at_B])
