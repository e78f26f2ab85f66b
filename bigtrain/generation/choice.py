"""Which token comes next: the likeliest, or one drawn from the likely ones.

B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigtrain.errors import InputError


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    `temperature` divides the logits; 0 takes the likeliest token each time. `top_k` leaves that many of the likeliest,
    `top_p` then the fewest that have this probability together (Holtzman et al. 2019, arXiv 1904.09751, section 3.1);
    None leaves all.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"command line: --temperature: {self.temperature} is no number of 0 or more; 0.8 is usual")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"command line: --top-k: {self.top_k} leaves no token; use 1 or more")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"command line: --seed: {self.seed} is no whole number from 0 to 2^64 - 1; 0 is usual")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"command line: --top-p: {self.top_p} is no share above 0 and up to 1; 0.95 is usual")

    def generator(self) -> torch.Generator:
        """Return a new generator of random numbers; torch's own is left alone."""
        return torch.Generator().manual_seed(self.seed)


def choose(logits_BV: Tensor, choice: Choice, generator: torch.Generator) -> list[int]:
    """Return a token for each row. Random numbers are drawn on the host: the same ones for every device."""
    logits_BV = logits_BV.float().cpu()
    if choice.temperature == 0:
        chosen_B: list[int] = logits_BV.argmax(-1).tolist()
        return chosen_B
    below_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double()  # the likeliest stays 0 however cold it is
    probabilities_BV = likely((below_BV / choice.temperature).float(), choice.top_k, choice.top_p)
    drawn_B: list[int] = torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0].tolist()
    return drawn_B


def likely(logits_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the probabilities, 0 for all but the likely tokens, (B, V); they need not sum to 1."""
    probabilities_BV = logits_BV.softmax(-1)
    if top_k is None and top_p is None:
        return probabilities_BV
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = 0
    if top_p is not None:
        total_B1 = sorted_BV.sum(-1, keepdim=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        sorted_BV[before_BV >= top_p * total_B1] = 0
    return torch.zeros_like(probabilities_BV).scatter_(-1, order_BV, sorted_BV)
