"""Each memory mechanism alone and all together, on models that are not bigtrain's: transformers', and anybody's."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import bigtrain
from bigtrain import amp, recompute
from bigtrain.config.schema import Recipe
from bigtrain.engine import Engine
from bigtrain.errors import InputError
from bigtrain.optim import Adafactor, AdamW, Lamb, Muon, build_optimizer
from bigtrain.optim.release import release
from bigtrain.planner import hardware
from bigtrain.planner.plan import Plan

pytestmark = pytest.mark.usefixtures("torch_seed")
VOCABULARY, ROWS, LENGTH, WIDTH = 96, 4, 12, 32
SHAPE = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "hidden_size": WIDTH, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "intermediate_size": 5 * WIDTH}
BF16 = {"amp": {"precision": "bf16"}}
SPLIT24 = {"amp": {"precision": "bf16", "master_weights": "split24"}}
MECHANISMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": BF16,
    "split24": SPLIT24,
    "no master weights": {"amp": {"precision": "bf16", "master_weights": "none"}},
    "bf16 states": {"optimizer": {"state": "bf16"}},
    "8bit states": {"optimizer": {"state": "8bit"}},
    "4bit states": {"optimizer": {"state": "4bit"}},
    "selective": {"recompute": {"policy": "selective"}},
    "full": {"recompute": {"policy": "full"}},
    "one policy a block": {"recompute": {"policy": ["selective", "full"]}},
    "release": {"optimizer": {"gradient_release": True}},
    "accumulation": {**SPLIT24, "train": {"micro_batch_size": 2}},
    "all": {
        **SPLIT24,
        "optimizer": {"state": "8bit", "gradient_release": True},
        "recompute": {"policy": "full"},
    },
}
each_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(use_cache=False, **SHAPE))


def gpt2() -> Any:
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "n_inner": 5 * WIDTH}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes)
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def llama(*, tied: bool = False) -> Any:
    config = transformers.LlamaConfig(use_cache=False, num_key_value_heads=1, tie_word_embeddings=tied, **SHAPE)
    return transformers.LlamaForCausalLM(config)


MAKES: dict[str, Callable[[], Any]] = {"bert": bert, "gpt2": gpt2, "llama": llama, "tied": partial(llama, tied=True)}
each_model = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


def plan_of(make: Callable[[], Any], sections: dict[str, dict[str, Any]]) -> Plan:
    """Return a plan of the length and the mechanisms; its own model is not what is trained."""
    masked = make is bert
    recipe: dict[str, dict[str, Any]] = {
        "model": {"family": "bert" if masked else "gpt", "num_attention_heads": 2},
        "data": {"vocab_size": VOCABULARY, "sequence_length": LENGTH},
        "train": {"objective": "mlm" if masked else "clm", "steps": 6, "global_batch_size": ROWS},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    }
    recipe["model"] |= {"hidden_size": WIDTH, "num_hidden_layers": 2}
    recipe["train"] |= {"micro_batch_size": ROWS, "max_grad_norm": None}
    for name, keys in sections.items():
        recipe[name] = {**recipe.get(name, {}), **keys}
    return bigtrain.plan(Recipe.model_validate({"name": "theirs", **recipe}), hardware.cpu())


def prepared(model: nn.Module, plan: Plan) -> Engine:
    """Hand a model over as the README says."""

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(parameters, plan.recipe.optimizer, master_weights=plan.recipe.amp.master_weights)

    return bigtrain.prepare(model, plan, optimizer)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def learn(engine: Engine, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        for micro in engine.micro_batches(batch()):
            engine.backward(engine.model(**micro))
        result = engine.step(None)
        assert not result.skipped and result.grad_norm.isfinite()
        losses.append(float(result.loss))
    return losses


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def layers_of(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    return found


@each_mechanism
@each_model
def test_a_transformers_model_learns_and_stays_itself(make: Callable[[], Any], mechanism: str) -> None:
    model = make()
    names, parameters = [name for name, _ in model.named_parameters()], list(model.parameters())
    tied, keys = is_tied(model), list(model.state_dict())
    losses = learn(prepared(model, plan_of(make, MECHANISMS[mechanism])))
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0] - 0.3
    assert [name for name, _ in model.named_parameters()] == names
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert is_tied(model) == tied == (make is not llama)
    assert list(model.state_dict()) == keys
    fresh = make()
    assert str(fresh.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    with torch.no_grad():
        one, other = (float(m.eval()(**batch()).loss) for m in (model, fresh))
    assert one == pytest.approx(other, rel=1e-2)


@each_mechanism
@each_model
def test_each_mechanism_follows_the_plain_run(make: Callable[[], Any], mechanism: str) -> None:
    """Bitwise where the mathematics is the same; in few bits, as near as those are."""
    start = make()
    plain, other = (
        learn(prepared(copy.deepcopy(start).eval(), plan_of(make, MECHANISMS[name]))) for name in ("plain", mechanism)
    )
    exact = mechanism in ("plain", "release")
    assert plain == other if exact else other == pytest.approx(plain, rel=0.05)


@each_model
def test_all_of_it_from_the_meta_device(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    to_empty = nn.Module.to_empty

    def poisoned(self: nn.Module, **options: Any) -> nn.Module:
        """Nothing may be left as it was allocated."""
        to_empty(self, **options)
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else -(2**31))
        return self

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)
    with torch.device("meta"):
        model = make()
    engine = prepared(model, plan_of(make, MECHANISMS["all"]))
    fresh = make()
    for (name, buffer), (_, expected) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)
    for (name, parameter), (_, expected) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert parameter.isfinite().all(), name
        spread, wanted = (float(tensor.detach().float().std()) for tensor in (parameter, expected))
        assert spread == pytest.approx(wanted, rel=0.3, abs=1e-6), name
    assert is_tied(model) == is_tied(fresh)
    losses = learn(engine)
    assert losses[-1] < losses[0] - 0.3


# What the mechanisms' READMEs show, without a recipe, a plan or an engine.


def own_loop(model: Any, optimizer: torch.optim.Optimizer, *, released: bool = False, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        if not released:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@each_model
def test_amp_alone(make: Callable[[], Any], precision: str) -> None:
    model = make()
    amp.apply(model, precision)
    losses = own_loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert losses[-1] < losses[0] - 0.3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("master_weights", ["split24", "none"])
@each_model
def test_amp_with_bf16_weights_alone(make: Callable[[], Any], master_weights: str) -> None:
    model = make()
    amp.apply(model, "bf16", master_weights=master_weights)
    losses = own_loop(model, AdamW(model.parameters(), lr=1e-2, master_weights=master_weights))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("policy", ["selective", "full", ["none", "full"]], ids=str)
@each_model
def test_recompute_alone(make: Callable[[], Any], policy: Any) -> None:
    start, losses = make(), []
    for name in ("none", policy):
        model = copy.deepcopy(start).train()
        recompute.apply(layers_of(model), name)
        torch.manual_seed(0)
        losses.append(own_loop(model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("state", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("kind", [AdamW, Lamb, Muon])
def test_an_optimizer_alone(kind: type, state: str) -> None:
    model = bert()
    losses = own_loop(model, kind(model.parameters(), lr=1e-2, state=state))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", [AdamW, Adafactor, torch.optim.AdamW])
@each_model
def test_release_alone(make: Callable[[], Any], kind: type) -> None:
    model = make().eval()
    kept = copy.deepcopy(model)
    optimizer = kind(model.parameters(), lr=1e-2)
    handle = release(model.parameters(), optimizer)
    losses = []
    for _ in range(3):
        losses += own_loop(model, optimizer, released=True, steps=1)
        assert float(handle.take_norm()) > 0
        assert all(parameter.grad is None for parameter in model.parameters())
    assert losses == own_loop(kept, kind(kept.parameters(), lr=1e-2), steps=3)


README_LINES = {
    "amp": ['amp.apply(model, "bf16")', 'amp.apply(model, "bf16", master_weights="split24")'],
    "recompute": ['recompute.apply(model.model.layers, "selective")'],
    "optim": ['AdamW(model.parameters(), lr=1e-4, state="8bit")', "release(model.parameters(), optimizer)"],
}


@pytest.mark.parametrize("folder", README_LINES)
def test_the_readmes_show_it(folder: str) -> None:
    """And every example of Python in them runs, one after the other on one model."""
    text = (Path(bigtrain.__file__).parent / folder / "README.md").read_text(encoding="utf-8")
    assert [line for line in README_LINES[folder] if line not in text] == []
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    names: dict[str, Any] = {"model": llama(), "batch": batch()}
    for example in examples:
        exec(example, names)
    names["model"](**batch()).loss.backward()


# A model of anybody.


class Pictures(nn.Module):
    """A small convolutional net with norms, dropout, a sum around each block and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(4, 16), nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.Dropout(0.1), nn.Conv2d(32, 16, 1)
            )
            for _ in range(3)
        )
        self.gain = nn.Parameter(torch.ones(16, 1, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(pictures)
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head((x * self.gain).mean((2, 3))).float(), labels)


@pytest.mark.parametrize("mechanism", ["plain", "amp", "recompute", "states", "release", "all"])
def test_any_module_in_its_own_loop(mechanism: str) -> None:
    model, every = Pictures(), mechanism == "all"
    pictures, labels = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
    masters = "split24" if every else "fp32"
    if every or mechanism == "amp":
        amp.apply(model, "bf16", master_weights=masters)
    if every or mechanism == "recompute":
        recompute.apply(model.blocks, ["selective", "full", "full"])
    state = "8bit" if every or mechanism == "states" else "fp32"
    optimizer = AdamW(model.parameters(), lr=1e-2, state=state, master_weights=masters)
    handle = release(model.parameters(), optimizer) if every or mechanism == "release" else None
    losses = []
    for _ in range(15):
        loss = model(pictures, labels)
        loss.backward()
        if handle is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            handle.take_norm()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert Pictures().load_state_dict(model.state_dict())


# What cannot be is said in one line.


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 80), nn.Linear(80, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())
        return out


def released_twice() -> None:
    model = Bare()
    optimizer = AdamW(model.parameters())
    release(model.parameters(), optimizer)
    release(model.parameters(), optimizer)
    model(torch.ones(2, 64)).sum().backward()


def strided(kind: Any, **options: Any) -> None:
    model = Bare()
    model.first.weight.data = torch.randn(64, 80).T
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()


def prepared_with(sections: dict[str, Any], optimizer: Any, make: Callable[[], Any] = bert) -> None:
    bigtrain.prepare(make(), plan_of(bert, sections), optimizer)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a model for its blocks": (
        lambda: recompute.apply(Bare(), "full"),
        "recompute: a Bare is no list of blocks; give the one inside it, such as model.layers",
    ),
    "pairs for blocks": (
        lambda: recompute.apply(Bare().named_children(), "full"),
        "recompute: a tuple stands where a block should; give a list of modules",
    ),
    "no blocks": (
        lambda: recompute.apply([], "full"),
        "recompute: the list of blocks is empty; give the model's repeated blocks",
    ),
    "an unknown policy": (
        lambda: recompute.apply(layers_of(bert()), "ful"),
        "recompute.policy: 'ful' is none of none, selective, full, offload; did you mean 'full'?",
    ),
    "a policy too many": (
        lambda: recompute.apply(layers_of(bert()), ["full"] * 3),
        "recompute.policy: a list of 3 for 2 blocks; write one entry a block, or one word for all",
    ),
    "compiled as nobody can": (
        lambda: recompute.apply(layers_of(bert()), "full", compiled=True),
        "recompute: compiled=True is none of None, 'whole', 'parts'",
    ),
    "offload on the CPU": (
        lambda: recompute.apply(layers_of(bert()), "offload"),
        "recompute.policy: 'offload' on the device 'cpu': the host memory is the device memory there; use full",
    ),
    "fp16 on the CPU": (
        lambda: amp.apply(Bare(), "fp16"),
        "amp.precision: fp16 does not run on the CPU; it can fp32 and bf16",
    ),
    "an unknown precision": (
        lambda: amp.apply(Bare(), "bfloat16"),
        "amp.precision: 'bfloat16' is none of fp32, bf16, fp16, fp8",
    ),
    "unknown master weights": (
        lambda: amp.apply(Bare(), "bf16", master_weights="split16"),
        "amp.master_weights: 'split16' is none of fp32, split24, none",
    ),
    "bf16 weights at fp32": (
        lambda: amp.apply(Bare(), "fp32", master_weights="split24"),
        "amp.master_weights: split24 keeps weights in bf16, and amp.precision is fp32; use fp32, or amp.precision=bf16",
    ),
    "nothing to round": (
        lambda: amp.apply(nn.ReLU(), "bf16"),
        "amp: a ReLU without parameters computes in the precision of its input",
    ),
    "an unknown state": (
        lambda: AdamW(Bare().parameters(), state="8-bit"),
        "optimizer.state: '8-bit' is none of fp32, bf16, 8bit, 4bit",
    ),
    "a rate below zero": (lambda: Lamb(Bare().parameters(), lr=-1e-3), "lr=-0.001 is below 0; use 0 or more"),
    "a beta of one": (
        lambda: Muon(Bare().parameters(), betas=(0.9, 1.0)),
        "betas=(0.9, 1.0) must be from 0 up to, not including, 1; the defaults are (0.9, 0.999)",
    ),
    "fp32 weights for split24": (
        lambda: AdamW(Bare().parameters(), master_weights="split24"),
        "a parameter of shape (80, 64) is float32; master weights split24 keep bfloat16; convert the model, or name "
        "other master weights",
    ),
    "a matrix on its side": (
        lambda: strided(AdamW, state="8bit"),
        "a parameter of shape (80, 64) and strides (1, 80) is not contiguous; make it so before the optimizer is made "
        "(parameter.data = parameter.data.contiguous())",
    ),
    "release twice": (
        released_twice,
        "gradient release: the gradient of a parameter of shape (64,) is already gone: release was called twice; call "
        "remove() on what it first returned",
    ),
    "release of what is not updated": (
        lambda: release((model := Bare()).parameters(), torch.optim.SGD(model.first.parameters(), lr=0.1)),
        "gradient release: a parameter of shape (64, 80) is not among those of SGD; give both the same parameters, or "
        "freeze it with requires_grad_(False)",
    ),
    "split24 with torch's AdamW": (
        lambda: prepared_with(SPLIT24, torch.optim.AdamW),
        "amp.master_weights: AdamW cannot keep split24; use bigtrain.optim, or fp32",
    ),
    "no blocks in the model": (
        lambda: prepared_with({"recompute": {"policy": "full"}}, AdamW, Bare),
        "Bare: has no ModuleList of blocks; name the class of its blocks with blocks=...",
    ),
}


def test_a_matrix_on_its_side_is_no_obstacle_to_the_fused_kernel() -> None:
    strided(AdamW)
    for kind in (Lamb, Adafactor):
        with pytest.raises(InputError, match="is not contiguous"):
            strided(kind)


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_one_line(case: str) -> None:
    attempt, line = WRONG[case]
    with pytest.raises(InputError) as error:
        attempt()
    assert str(error.value) == line
