"""Stand-ins keep nothing, and a block between them holds what it holds anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bigtrain.memory.stand_in import Call, Kind, Place, alone, bare, moves, stand_in
from bigtrain.memory.trace import Counting, as_fake, fake_like, fakes

ROWS, WIDTH = 8, 16
HIDDEN_BYTES = ROWS * WIDTH * 4


class Masked(nn.Module):
    """Saves its mask, and no input: exp saves its output."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.exp() * mask


def kind_of(block: nn.Module, *others: Tensor) -> Kind:
    with fakes():
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
    leaves, spec = tree_flatten(((x, *others), {}))
    return Kind(block, None, leaves, spec, [x], tree_flatten(x)[1])


def test_a_block_alone_keeps_what_its_backward_waits_for() -> None:
    kind = kind_of(Masked(), fake_like(torch.ones(ROWS, 1)))
    forward, kept, backward = alone(kind)[:3]
    assert kept == HIDDEN_BYTES  # exp's output; not the block's input, nor its output
    assert forward == 2 * HIDDEN_BYTES
    assert backward == HIDDEN_BYTES  # each gradient replaces the one before, as its tensor is freed
    assert kind.shared == {1}


def test_gradients_of_parameters_stay_and_are_added_to() -> None:
    kind = kind_of(as_fake(nn.Linear(WIDTH, WIDTH, bias=False)))
    (_, kept, first), (_, _, second) = alone(kind)[:3], alone(kind)[:3]
    weight_bytes = WIDTH * WIDTH * 4
    assert kept == HIDDEN_BYTES
    assert kind.block.weight.grad is not None
    assert first == second == weight_bytes + HIDDEN_BYTES


def test_stand_ins_keep_nothing_between_the_marks() -> None:
    kind = kind_of(Masked(), fake_like(torch.ones(ROWS, 1)))
    counting = Counting()
    call = Call(kind.block, kind, counting)
    with counting.running():
        (y,) = stand_in(call, kind.made, kind.moving)
        assert counting.live == HIDDEN_BYTES
        torch.autograd.backward(y.sum())
        del y
    assert list(call.marks) == ["arrived", "left"]
    assert call.marks["left"][1] - call.marks["arrived"][1] == HIDDEN_BYTES


def test_an_output_that_is_an_input_is_handed_on() -> None:
    kind = kind_of(Masked(), fake_like(torch.ones(ROWS, 1)))
    kind.outs, kind.out_spec = tree_flatten((kind.leaves[0], Place(1), "text"))
    new, mask = fake_like(torch.ones(2)), fake_like(torch.ones(3))
    out = kind.output([new], [None, mask])
    assert out[0] is new and out[1] is mask and out[2] == "text"


def test_bare_tensors_get_gradients_and_have_no_past() -> None:
    with fakes():
        x = torch.empty(2, requires_grad=True) * 2
    assert moves(x) and moves(bare(x)) and bare(x).grad_fn is None
    assert not moves(1) and bare("text") == "text"
