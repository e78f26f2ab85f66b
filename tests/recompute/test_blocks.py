"""Applied to models: bitwise the same as without, less memory held, nothing else changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import recompute
from bigtrain.errors import InputError
from bigtrain.pinned import Pool
from bigtrain.recompute import blocks as blocks_module
from bigtrain.recompute.blocks import CODES, by_size, follow
from bigtrain.recompute.offload import Offloader

MAKES = ("bert", "gpt", "llama", "hf_bert", "hf_gpt", "hf_llama")
MIXED = ["selective", "none", "full"]
Make = Callable[..., Any]


@pytest.fixture
def put(host_copies: Any) -> Callable[..., None]:
    """Return `apply`, with copies between host memory and itself for `offload`."""

    def put(blocks: nn.ModuleList, policy: str | list[str]) -> None:
        if "offload" not in policy:
            recompute.apply(blocks, policy)
            return
        offloader = Offloader(host_copies, pool=Pool(registered=False), least_bytes=1)
        for block, name in zip(blocks, recompute.resolve(policy, len(blocks)), strict=True):
            follow(block, name, offloader if name == "offload" else None)

    return put


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("policy", ["selective", "full", "offload", MIXED, ["offload", "full", "offload"]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make", MAKES)
def test_loss_gradients_and_generator_are_bitwise_those_of_none(
    subject: Make, put: Make, make: str, dropout: float, policy: Any
) -> None:
    model = subject(make, dropout=dropout)
    names, plain = list(model.model.state_dict()), model.step()
    put(model.blocks, policy)
    assert same(plain, model.step())
    assert list(model.model.state_dict()) == names


@pytest.mark.parametrize("make", ["bert", "gpt", "llama", "hf_bert", "hf_llama"])
def test_each_policy_holds_less_than_the_one_before(subject: Make, put: Make, make: str) -> None:
    model = subject(make, width=32)
    held = {}
    for policy in recompute.POLICIES:
        put(model.blocks, policy)
        held[policy] = model.held_bytes()
    left = [bytes_left for bytes_left, _ in held.values()]
    assert left == sorted(left, reverse=True) and len(set(left)) == len(left)
    assert held["selective"][1] > held["full"][1] < held["none"][1]
    # Of so few of our blocks that forget activations and norms, selective recomputation may peak higher than none.
    assert held["none"][1] > held["selective"][1] or make in ("bert", "gpt")


def test_what_selective_holds_is_known(subject: Make) -> None:
    """Each block's input, the three products that something needs, attention's output and log-sum, and RNG states."""
    model = subject("gpt", dropout=0.0, width=32)
    recompute.apply(model.blocks, "full")
    full, _ = model.held_bytes()
    recompute.apply(model.blocks, "selective")
    selective, _ = model.held_bytes()
    tokens, row = 48, 48 * 32 * 4
    assert selective - full == len(model.blocks) * ((3 + 1 + 1 + 4) * row + tokens * 4 * 4)


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_a_step_leaves_nothing_behind_for_the_garbage_collector(subject: Make, put: Make, policy: str) -> None:
    model = subject("bert")
    put(model.blocks, policy)
    model.step()
    seen: list[weakref.ref[Any]] = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0].untyped_storage())))
    gc.collect()
    gc.disable()
    try:
        model.forward().backward()
        assert seen and all(reference() is None for reference in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_accumulation(subject: Make, put: Make, policy: str) -> None:
    model = subject("gpt")

    def gradients() -> list[Tensor]:
        model.model.zero_grad()
        for seed in range(3):
            model.forward(seed).backward()
        return [p.grad.clone() for p in model.model.parameters()]

    plain = gradients()
    put(model.blocks, policy)
    assert same(plain, gradients())


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_two_forwards_before_one_backward(subject: Make, put: Make, policy: str) -> None:
    model = subject("llama")

    def gradients() -> list[Tensor]:
        model.model.zero_grad()
        (model.forward(0) + 2 * model.forward(1)).backward()
        return [p.grad.clone() for p in model.model.parameters()]

    plain = gradients()
    put(model.blocks, policy)
    assert same(plain, gradients())


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_without_gradients_the_plain_forward_runs(
    subject: Make, put: Make, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subject("bert")
    with torch.no_grad():
        plain = model.forward()
    put(model.blocks, policy)
    monkeypatch.setattr("bigtrain.recompute.blocks.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(plain, model.forward())
    model.model.eval()
    model.forward().backward()
    model.model.train()
    with pytest.raises(TypeError, match="NoneType"):
        model.forward()


def test_applying_again_replaces(subject: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("gpt", layers=2)
    plain, calls = model.step(), []
    block_forward = type(model.blocks[0]).forward
    monkeypatch.setattr(type(model.blocks[0]), "forward", lambda *a, **k: (calls.append(0), block_forward(*a, **k))[1])
    for policy, expected in (("full", 4), ("full", 4), ("selective", 4), (["none", "full"], 3), ("none", 2)):
        recompute.apply(model.blocks, policy)
        calls.clear()
        assert same(plain, model.step())
        assert len(calls) == expected


def test_on_top_of_and_below_other_patches(subject: Make) -> None:
    model = subject("gpt", layers=2)
    plain = model.step()
    seen: list[str] = []

    def patch(module: nn.Module, name: str) -> None:
        forward = module.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return forward(*args, **kwargs)

        module.forward = patched  # type: ignore[method-assign]

    patch(model.blocks[0].mlp, "below")
    recompute.apply(model.blocks, "full")
    patch(model.blocks[0], "above")
    assert same(plain, model.step())
    assert seen.count("below") == 2 and seen.count("above") == 1
    recompute.apply(model.blocks, "none")
    seen.clear()
    assert same(plain, model.step())
    assert seen == ["above", "below"]


def test_a_copy_of_a_model_recomputes_with_its_own_weights(subject: Make) -> None:
    model = subject("bert")
    recompute.apply(model.blocks, "full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.blocks[0].mlp.up.weight.zero_()
    assert not torch.equal(model.forward(), twin.forward())
    twin.step()
    assert float(twin.blocks[0].mlp.up.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("policy", ["selective", "full", "offload", MIXED], ids=str)
def test_weights_updated_inside_the_backward_pass(subject: Make, put: Make, policy: Any) -> None:
    """A block's weights change once their gradients are there: after it has been recomputed, before those below are."""

    def train(policy: Any) -> list[Tensor]:
        model = subject("gpt")
        put(model.blocks, policy)

        def update(parameter: Tensor) -> None:
            assert parameter.grad is not None
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        for parameter in model.model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        losses = []
        for seed in range(3):
            loss = model.forward(seed)
            loss.backward()
            losses.append(loss.detach())
        return [*losses, *(parameter.detach() for parameter in model.model.parameters())]

    assert same(train("none"), train(policy))


class Odd(nn.Module):
    """A block with keyword tensors, a plain argument, a frozen part and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(6, 9), nn.Linear(9, 6), nn.Dropout(0.3)
        self.up.weight.requires_grad_(False)

    def forward(
        self, x: Tensor, *, bias: Tensor, scale: float, pair: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        h = torch.relu(self.up(x) + bias * scale)
        return x + self.drop(self.down(h)) * pair[0] + pair[1], {"hidden": h, "scale": scale}


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_any_arguments_and_any_outputs(put: Make, torch_seed: int, policy: str) -> None:
    blocks = nn.ModuleList(Odd() for _ in range(2))
    bias, x = torch.randn(9, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    pair = (torch.randn(6), torch.randn(6))

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        for leaf in (x, bias, *blocks.parameters()):
            leaf.grad = None
        h, total = x, torch.zeros(())
        for block in blocks:
            h, extra = block(h, bias=bias, scale=0.5, pair=pair)
            total = total + extra["hidden"].square().sum() * extra["scale"]
        (h.sum() + total).backward()
        return [
            total.detach(),
            *(leaf.grad.clone() for leaf in (x, bias, *blocks.parameters()) if leaf.grad is not None),
        ]

    plain = step()
    put(blocks, policy)
    assert same(plain, step())
    x.requires_grad_(False)
    held = step()
    recompute.apply(blocks, "none")
    assert same(held, step())


def test_a_key_value_cache_is_refused(subject: Make) -> None:
    model = subject("hf_gpt")
    recompute.apply(model.blocks, ["none", "full", "full"])
    model.batch["use_cache"] = True
    with pytest.raises(InputError, match="a block got a DynamicCache.*use_cache=False"):
        model.forward()
    with torch.no_grad():
        model.forward()


def test_bad_input(subject: Make) -> None:
    model = subject("bert")
    with pytest.raises(InputError, match="a list of 2 for 3 blocks"):
        recompute.apply(model.blocks, ["full", "full"])
    with pytest.raises(InputError, match="'offload' on the device 'cpu'"):
        recompute.apply(model.blocks, ["full", "full", "offload"])
    with pytest.raises(InputError, match="'offload' on the device 'cpu'"):
        recompute.apply(model.blocks, "offload", device="cpu")
    with pytest.raises(InputError, match="'selective' needs blocks that compile as one graph"):
        recompute.apply(model.blocks, "selective", compiled="parts")
    with pytest.raises(InputError, match="'most'"):
        recompute.apply(model.blocks, "most")
    assert not any("forward" in vars(block) for block in model.blocks)


torchs_warnings = pytest.mark.filterwarnings("ignore")
"""The compiler warns of what it does itself."""


class Dense(nn.Module):
    """A block that compiles as one graph."""

    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.broken:
            torch._dynamo.graph_break()
        return x + self.down(nn.functional.gelu(self.up(h)))


class Stack(nn.Module):
    def __init__(self, *, broken: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dense(broken=broken) for _ in range(3))

    def forward(self) -> Tensor:
        x = torch.ones(256, 64, requires_grad=True) * 0.1
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@torchs_warnings
@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "compiled"),
    [("none", "whole"), ("selective", "whole"), ("full", "whole"), ("full", "parts"), ("offload", "parts")],
)
def test_compiled_blocks_hold_no_more_than_eager_ones(host_copies: Any, policy: Any, compiled: Any) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    torch.manual_seed(0)
    stack = Stack(broken=compiled == "parts")
    eager, built = stack, copy.deepcopy(stack)
    for model, how in ((eager, None), (built, compiled)):
        offloader = Offloader(host_copies, pool=Pool(registered=False), least_bytes=1)
        for block in model.blocks:
            follow(block, policy, offloader if policy == "offload" else None, how)
    counters.clear()
    for model in (eager, built):
        model().backward()
    assert counters["stats"]["unique_graphs"] == (1 if compiled == "whole" else 2)
    for one, other in zip(eager.parameters(), built.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    peaks = []
    for model in (eager, built):
        model.zero_grad()
        peaks.append(measured(model))
    assert peaks[1] <= 1.02 * peaks[0]


@torchs_warnings
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_blocks_of_one_size_compile_once_and_other_sizes_once_more(policy: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    blocks = nn.ModuleList(Dense(broken=False) for _ in range(12))
    recompute.apply(blocks, policy, compiled="whole", size=16)

    def graphs_after(rows: int, *, training: bool = True) -> int:
        x = torch.ones(rows, 64, requires_grad=training)
        with torch.set_grad_enabled(training):
            for block in blocks.train(training):
                x = block(x)
        if training:
            x.sum().backward()
        return int(counters["stats"]["unique_graphs"])

    assert graphs_after(16) == 1
    assert [graphs_after(rows) for rows in (24, 7, 16, 40)] == [2, 2, 2, 2]
    assert [graphs_after(rows, training=False) for rows in (16, 9)] == [3, 3]
    assert graphs_after(16) == 3


def test_blocks_have_room_for_more_code_than_the_compiler_gives_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an option of `torch.compile`, or for the whole process where that has none."""
    given: list[Any] = []

    def of_torch_2_13(call: Any, *, recompile_limit: int | None = None, **how: Any) -> Any:
        given.append(recompile_limit)
        return call

    monkeypatch.setattr(torch, "compile", of_torch_2_13)
    by_size(len, 16)
    assert given == [CODES, CODES]
    config = SimpleNamespace(recompile_limit=8)
    monkeypatch.setattr(blocks_module, "import_module", lambda name: config)
    monkeypatch.setattr(torch, "compile", lambda call, **how: given.append(how) or call)
    by_size(len, None)
    assert config.recompile_limit == CODES
    assert given[2] == {"dynamic": True, "fullgraph": False}


@torchs_warnings
@pytest.mark.slow
def test_a_graph_break_in_a_whole_block_is_an_error() -> None:
    torch._dynamo.reset()
    stack = Stack(broken=True)
    recompute.apply(stack.blocks, "selective", compiled="whole")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        stack()
    recompute.apply(stack.blocks, "none")
    stack().backward()


@torchs_warnings
@pytest.mark.slow
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_a_compiled_block_never_comes_from_the_cache_of_another(policy: str) -> None:
    """pytorch#194658: constants inside a checkpoint are not part of the cache's key."""
    losses = []
    for scale in (1.0, 3.0):
        torch._dynamo.reset()
        torch.manual_seed(0)
        stack = Stack(broken=False)
        for block in stack.blocks:
            block.norm.eps = 0.1 * scale
        eager = stack()
        recompute.apply(stack.blocks, policy, compiled="whole")
        compiled = stack()
        torch.testing.assert_close(eager, compiled)
        losses.append(float(compiled.detach()))
    assert losses[0] != losses[1]


def measured(model: nn.Module) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model().backward()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("policy", "device"),
    [
        ("selective", "cpu"),
        *(pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in ("selective", "full", "offload")),
    ],
)
def test_on_a_device(subject: Make, policy: str, device: str) -> None:
    model = subject("gpt", layers=6, width=512 if device == "cuda" else 64)
    model.model.to(device)
    model.batch = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in model.batch.items()
    }
    plain = model.step()
    recompute.apply(model.blocks, policy)
    assert all(torch.equal(one, other) for one, other in zip(plain, model.step(), strict=True))
