"""Models of several makes, one training step of each, and the memory that it holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain.config.model import NORM_EPS, ModelConfig
from bigtrain.models.build import build_model

Step = Callable[[], Tensor]
TOKENS, LENGTH = 48, 12


def own(family: str, dropout: float, layers: int, width: int) -> tuple[nn.Module, nn.ModuleList, dict[str, Any]]:
    config = ModelConfig(
        family=family,  # type: ignore[arg-type]
        vocab_size=96,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2 if family == "llama" else 4,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        norm_eps=NORM_EPS[family],
    )
    model = build_model(config, dropout=dropout, attention_dropout=dropout)
    ids = torch.randint(0, 96, (TOKENS,))
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(TOKENS) % LENGTH,
        "cu_seqlens": torch.arange(0, TOKENS + 1, LENGTH, dtype=torch.int32),
        "labels": ids[::3].clone(),
        "label_positions": torch.arange(0, TOKENS, 3),
        "max_seqlen": LENGTH,
    }
    return model, model.blocks, batch


def theirs(family: str, dropout: float, layers: int, width: int) -> tuple[nn.Module, nn.ModuleList, dict[str, Any]]:
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ids = torch.randint(0, 96, (TOKENS // LENGTH, LENGTH))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][0, 9:] = 0
    shape = {
        "vocab_size": 96,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 4 * width,
        "use_cache": False,
    }
    if family == "bert":
        bert = BertForMaskedLM(
            BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **shape)
        ).train()
        return bert, bert.bert.encoder.layer, batch
    if family == "gpt":
        drops = {"resid_pdrop": dropout, "attn_pdrop": dropout, "embd_pdrop": dropout}
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": LENGTH}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        gpt = GPT2LMHeadModel(GPT2Config(vocab_size=96, use_cache=False, **sizes, **drops, **ends)).train()
        return gpt, gpt.transformer.h, batch
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attention_dropout=dropout, **shape)).train()
    return llama, llama.model.layers, batch


class Subject:
    """A model with its blocks and a batch."""

    def __init__(self, make: str, dropout: float, layers: int, width: int) -> None:
        torch.manual_seed(0)
        maker = theirs if make.startswith("hf_") else own
        self.model, self.blocks, self.batch = maker(make.removeprefix("hf_"), dropout, layers, width)

    def forward(self, seed: int = 1) -> Tensor:
        torch.manual_seed(seed)
        out = self.model(**self.batch)
        loss: Tensor = out if isinstance(out, Tensor) else out.loss
        return loss

    def step(self, seed: int = 1) -> list[Tensor]:
        """Return the loss, every gradient and the generator's state of one step."""
        self.model.zero_grad()
        loss = self.forward(seed)
        loss.backward()
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        return [loss.detach(), *gradients, torch.get_rng_state()]

    def held_bytes(self) -> tuple[int, int]:
        """Return the bytes that a forward pass leaves, and the most that a step holds above the start."""
        self.model.zero_grad()
        gc.collect()
        return measure(self.forward)


def measure(forward: Step) -> tuple[int, int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss = forward()
        with torch.profiler.record_function("backward from here"):
            pass
        loss.backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    turn = next(event.start_ns() for event in events if event.name() == "backward from here")
    now = most = left = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
            left = now if event.start_ns() < turn else left
    return left, most


@pytest.fixture
def subject(torch_seed: int) -> Callable[..., Subject]:
    """Return a maker of models: `subject("hf_bert")`."""

    def make(make: str, *, dropout: float = 0.1, layers: int = 3, width: int = 16) -> Subject:
        return Subject(make, dropout, layers, width)

    return make


class HostCopies:
    """Copies that happen at once, and a list of what was asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def start(self, source: Tensor, target: Tensor) -> str:
        target.copy_(source)
        self.log.append(f"start {float(source.flatten()[0]):g}")
        return self.log[-1].removeprefix("start ")

    def wait(self, ticket: str) -> None:
        self.log.append(f"wait {ticket}")

    def abandon(self, ticket: str, target: Tensor) -> None:
        self.log.append(f"abandon {ticket}")


@pytest.fixture
def host_copies() -> HostCopies:
    """Return copies from host memory to host memory."""
    return HostCopies()
