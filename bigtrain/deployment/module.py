"""A trained model as others call one: padded rows and their mask in, logits out.

B rows, L tokens in each, H query heads, K key and value heads, D numbers per head, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.dense import dense_hidden, dense_logits, shared_heads
from bigtrain.models.language_model import LanguageModel


class PaddedModel(nn.Module):
    """The weights of a model, which are not copied, behind `input_ids` and `attention_mask`.

    A row's tokens count from 0 at its first token that the mask holds, so that padding may stand before or after them.
    """

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of each token, (B, L) to (B, L, V); those of padding mean nothing, and are finite.

        `attention_mask` (B, L) is 1 where a token is and 0 where padding is. BERT reads every token as one of the
        first segment.
        """
        positions_BL = (attention_mask.cumsum(1) - 1).clamp(min=0)
        allowed_B1LL = _allowed(attention_mask, causal=self.model.config.causal)

        def attend(_: int, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
            keys, values = (shared_heads(part, q_BHLD.shape[1]) for part in (k_BKLD, v_BKLD))
            return F.scaled_dot_product_attention(q_BHLD, keys, values, attn_mask=allowed_B1LL)

        return dense_logits(self.model, dense_hidden(self.model, input_ids, positions_BL, attend))


def _allowed(attention_mask: Tensor, *, causal: bool) -> Tensor:
    """Return which key each query may see, (B, 1, L, L).

    Each sees itself, padding too: the softmax over nothing is no number, and would spread.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    itself_LL = places[:, None] == places
    allowed_B1LL = attention_mask.bool()[:, None, None, :]
    if causal:
        allowed_B1LL = allowed_B1LL & (places[:, None] >= places)
    return allowed_B1LL | itself_LL
