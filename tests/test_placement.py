"""Where a model stands: created from the meta device, initialised by the seed alone, its repeated blocks found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.amp.precision import keep
from bigtrain.config.model import ModelConfig
from bigtrain.errors import InputError
from bigtrain.memory.measure import measure
from bigtrain.models.build import build_model
from bigtrain.placement import find_blocks, place

CPU = torch.device("cpu")


class Plain(nn.Module):
    """A stack of layers whose head is the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_tied_weights_stay_tied_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = Plain()
    place(model, CPU, seed=0)
    assert model.head.weight is model.layers[0].weight
    assert not model.head.weight.is_meta


def test_initial_weights_depend_on_the_seed_alone() -> None:
    models = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            models.append(Plain())
        place(models[-1], CPU, seed=seed)
    assert torch.equal(models[0].head.weight, models[1].head.weight)
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


def test_a_module_that_cannot_initialise_itself_is_named() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Module()
            self.inner.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = Bare()
    with pytest.raises(InputError, match=r"inner: Module is on the meta device and has no reset_parameters"):
        place(model, CPU, seed=0)


def test_blocks_are_found() -> None:
    model = Plain()
    assert find_blocks(model) == list(model.layers)
    assert find_blocks(model, nn.Linear) == list(model.layers)
    with pytest.raises(InputError, match="no ModuleList of blocks"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(InputError, match="Plain: has no module of class Conv1d; name the class of its blocks"):
        find_blocks(model, nn.Conv1d)


def test_blocks_may_be_given_one_by_one() -> None:
    model = Plain()
    assert find_blocks(model, [model.layers[1]]) == [model.layers[1]]
    with pytest.raises(InputError, match="Plain: a Linear among the blocks is not part of it"):
        find_blocks(model, [nn.Linear(4, 4)])
    with pytest.raises(InputError, match="Plain: has no ModuleList of blocks"):
        find_blocks(model, [])


def test_buffers_that_nobody_fills_are_refused_by_name() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("pos", torch.arange(6))

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), Positions())
    with pytest.raises(InputError, match="1: Positions is on the meta device"):
        place(model, CPU, seed=0)


def test_a_model_that_is_half_on_the_meta_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(InputError, match="partly on the meta device"):
        place(model, CPU, seed=0)


def own_model(**options: Any) -> nn.Module:
    shape = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    lengths = {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}
    keys: Any = {**shape, **lengths, **options}
    return build_model(ModelConfig(**keys))


def of_transformers(name: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {
        "Llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "Bert": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8},
    }
    heads = {"Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM", "GPT2": "GPT2LMHeadModel"}
    config = getattr(transformers, f"{name}Config")(vocab_size=96, tie_word_embeddings=True, **sizes[name])
    model: nn.Module = getattr(transformers, heads[name])(config)
    return model


class Parent(nn.Module):
    """Initialises what is below it, before that does so itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))
        self.inner = Plain()
        self.tail = Quiet()

    def reset_parameters(self) -> None:
        for parameter in self.inner.parameters():
            nn.init.normal_(parameter)
        nn.init.uniform_(self.scale)
        self.tail.scale.data.uniform_()


class Quiet(nn.Module):
    """Leaves its parameter as others make it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(5))

    def reset_parameters(self) -> None:
        pass


class Reader(Parent):
    """Reads numbers as it initialises."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.tail.scale.data.div_(self.scale.sum().item())


def placed_whole(model: Any, seed: int) -> None:
    """Create a model all at once and initialise it in fp32: what creating it part by part has to equal."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    model.to_empty(device=CPU)
    for first, *others in names.values():
        for name in others:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, model.get_parameter(first))
    torch.manual_seed(seed)
    if hasattr(model, "_init_weights"):
        model.apply(model._init_weights)
        return
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("kept", ["fp32", "none"])
@pytest.mark.parametrize(
    "make",
    [
        Plain,
        Parent,
        Reader,
        partial(own_model, family="bert"),
        partial(own_model, family="gpt"),
        partial(own_model, family="gpt", tie_word_embeddings=False),
        partial(of_transformers, "GPT2"),
        partial(of_transformers, "Llama"),
        partial(of_transformers, "Bert"),
    ],
)
def test_weights_are_those_of_a_model_created_whole(make: Callable[[], nn.Module], kept: str) -> None:
    with torch.device("meta"):
        model, whole = make(), make()
    rounds = partial(keep, master_weights=kept, accumulated=False)
    place(model, CPU, seed=3, keep=rounds)
    placed_whole(whole, 3)
    before = torch.get_rng_state()
    for parameter in whole.parameters():
        rounds(parameter)
    parameters, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == (torch.bfloat16 if kept == "none" else torch.float32)
        assert torch.equal(parameter, expected[name]), name
    assert torch.equal(before, torch.get_rng_state())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_rounded_model_is_never_whole_in_fp32() -> None:
    with torch.device("meta"):
        table, head = nn.Embedding(500, 64), nn.Linear(64, 500, bias=False)
        head.weight = table.weight
        model = nn.Sequential(table, *(nn.Linear(64, 64, bias=False) for _ in range(20)), head)
    elements = sum(parameter.numel() for parameter in model.parameters())
    kept = partial(keep, master_weights="none", accumulated=False)
    peak = measure(lambda: place(model, CPU, seed=0, keep=kept)).peak_bytes
    assert 2 * elements < peak < 2 * elements + 4 * 500 * 64 + 8192 < 4 * elements


def test_a_real_model_that_moves_is_rounded_first() -> None:
    moved: list[torch.dtype] = []

    class Moving(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            moved.append(self.weight.dtype)
            return super().to(*args, **kwargs)

    place(Moving(2, 2), torch.device("meta"), seed=0, keep=partial(keep, master_weights="none", accumulated=False))
    assert moved == [torch.bfloat16]


def test_views_of_one_memory_are_different_tensors() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.empty(4)
            self.left, self.right = nn.Parameter(both[:2]), nn.Parameter(both[2:])
            self.count = nn.Buffer(torch.zeros(()), persistent=False)

        def reset_parameters(self) -> None:
            nn.init.ones_(self.left)
            nn.init.zeros_(self.right)
            self.count.zero_()

    with torch.device("meta"):
        model = Views()
    model.right.requires_grad_(False)
    place(model, CPU, seed=0)
    assert model.left.tolist() == [1, 1] and model.right.tolist() == [0, 0]
    assert not model.right.requires_grad and list(model.state_dict()) == ["left", "right"]


@pytest.mark.parametrize("kept", ["fp32", "none"])
def test_what_is_cut_is_what_would_have_been_there(kept: str) -> None:
    with torch.device("meta"):
        table, head = nn.Embedding(9, 4), nn.Linear(4, 9)
        head.weight = table.weight
        model = nn.Sequential(table, nn.Linear(4, 4), head)
        whole = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        whole[2].weight = whole[0].weight
    rounds = partial(keep, master_weights=kept, accumulated=False)
    asked: list[str] = []

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        asked.append(name)
        return tensor[:2].clone()

    found = place(model, CPU, seed=3, keep=rounds, cut=cut)
    assert place(whole, CPU, seed=3, keep=rounds) == {}
    expected = dict(whole.named_parameters())
    assert found.keys() == expected.keys() and sorted(asked) == sorted(expected)
    assert all(torch.equal(part, expected[name][:2]) for name, part in found.items())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [parameter.dtype for parameter in model.parameters()] == [
        parameter.dtype for parameter in whole.parameters()
    ]
    assert model[2].weight is model[0].weight


def test_a_model_that_is_cut_is_never_whole() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    made: list[dict[str, torch.Tensor]] = []
    peak = measure(
        lambda: made.append(place(model, CPU, seed=0, cut=lambda _name, tensor: tensor[:16].clone()))
    ).peak_bytes
    parts = 20 * 4 * 16 * 64
    assert parts < peak <= parts + 2 * 4 * 64 * 64 + 8192


def test_a_real_model_is_not_cut() -> None:
    model = nn.Linear(3, 3)
    assert place(model, CPU, seed=0, cut=lambda _name, tensor: tensor[:1]) == {}
    assert model.weight.shape == (3, 3) and not model.weight.is_meta


def test_buffers_stay_whole() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(3)
    found = place(model, CPU, seed=0, cut=lambda _name, tensor: tensor.clone())
    assert sorted(found) == ["bias", "weight"] and model.running_var.tolist() == [1, 1, 1]


class Titan(nn.Module):
    """A model in torchtitan's manner: layers by name, a table that is computed, one method that initialises all."""

    def __init__(self, left_out: bool = False) -> None:
        super().__init__()
        self.left_out = left_out
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 4) for number in range(3)})
        self.scale = nn.Parameter(torch.empty(4))
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> Tensor:
        return torch.arange(4).float()

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        self.table = self.compute()
        for layer in self.layers.values():
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if not self.left_out:
            nn.init.ones_(self.scale)


def test_a_model_may_initialise_all_of_itself() -> None:
    made, cut = [], {}
    for _ in range(2):
        with torch.device("meta"):
            made.append(Titan())
        cut = place(made[-1], CPU, seed=3, cut=(lambda _, tensor: tensor.clone()) if len(made) == 2 else None)
    plain = Titan()
    torch.manual_seed(3)
    plain.init_weights()
    assert torch.equal(made[0].table, plain.table) and torch.equal(made[1].table, plain.table)
    for name, parameter in plain.named_parameters():
        assert torch.equal(made[0].get_parameter(name), parameter) and torch.equal(cut[name], parameter)
        assert made[1].get_parameter(name).is_meta
    assert find_blocks(plain) == list(plain.layers.values())


def test_what_such_a_method_leaves_out_is_refused_by_name() -> None:
    with torch.device("meta"):
        model = Titan(left_out=True)
    with pytest.raises(InputError, match=r"scale of a Titan is on the meta device, and init_weights\(\) leaves it out"):
        place(model, CPU, seed=0)


def test_a_dictionary_of_different_modules_is_no_list_of_blocks() -> None:
    named = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    with pytest.raises(InputError, match="has no ModuleList"):
        find_blocks(nn.Sequential(named))
