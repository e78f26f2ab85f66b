"""Which token comes next."""

from __future__ import annotations

import pytest
import torch

from bigtrain.errors import InputError
from bigtrain.generation.choice import Choice, choose, likely

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 0.0, 4.0, 1.0]])


def test_temperature_zero_takes_the_likeliest_and_of_two_the_first():
    assert choose(LOGITS, Choice(temperature=0), Choice().generator()) == [1, 0]


def test_the_coldest_temperature_takes_the_likeliest():
    for temperature in (1e-40, 5e-324):
        assert choose(LOGITS[:1] * 1e4, Choice(temperature, top_p=0.9), Choice(seed=2**64 - 1).generator()) == [1]


def test_top_k_leaves_the_likeliest_of_each_row():
    kept = likely(LOGITS, 2, None) > 0
    assert kept.tolist() == [[False, True, False, True], [True, False, True, False]]
    assert likely(LOGITS, 9, None).gt(0).all()


def test_top_p_leaves_the_fewest_that_have_the_share_together():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for share, kept in ((0.4, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 4)):
        assert int((likely(logits, None, share) > 0).sum()) == kept, share
    assert int((likely(logits, 2, 0.6) > 0).sum()) == 1  # of the two, 0.5 is more than 60% already


def test_draws_follow_the_probabilities_and_the_seed():
    many = torch.tensor([[0.0, 2.0, 1.0, 3.0]]).repeat(20_000, 1)
    drawn = torch.tensor(choose(many, Choice(temperature=2.0), Choice(seed=3).generator()))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, (many[0] / 2).softmax(-1), rtol=0, atol=0.02)
    again = torch.tensor(choose(many, Choice(temperature=2.0), Choice(seed=3).generator()))
    other = torch.tensor(choose(many, Choice(temperature=2.0), Choice(seed=4).generator()))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)


def test_torch_s_own_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    choose(LOGITS, Choice(), Choice().generator())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1.0}, "--temperature: -1.0"),
        ({"temperature": float("nan")}, "--temperature: nan"),
        ({"top_k": 0}, "--top-k: 0 leaves no token"),
        ({"seed": 2**64}, "--seed: 18446744073709551616 is no whole number"),
        ({"seed": -1}, "--seed: -1 is"),
        ({"top_p": 0.0}, "--top-p: 0.0"),
        ({"top_p": 1.5}, "--top-p: 1.5"),
    ],
)
def test_what_leaves_nothing_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        Choice(**wrong)
