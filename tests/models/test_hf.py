"""Weights carried to transformers and back: the same bits, the same logits, loss and gradients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtrain.errors import CheckpointError, InputError
from bigtrain.models import build_model
from bigtrain.models.hf import from_hugging_face, to_hugging_face

CASES = {
    "bert": ("bert", {}),
    "bert-untied": ("bert", {"tie_word_embeddings": False}),
    "gpt": ("gpt", {}),
    "gpt-untied": ("gpt", {"tie_word_embeddings": False}),
    "gpt-wide": ("gpt", {"intermediate_size": 128}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-full": ("llama", {"num_key_value_heads": 4, "rope_theta": 500.0, "norm_eps": 1e-3}),
    "llama-aligned": ("llama", {"vocab_size": 128}),
}
CLASSES = {"bert": "BertForMaskedLM", "gpt": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


@pytest.fixture(params=CASES)
def config(request, tiny):
    family, changes = CASES[request.param]
    return tiny(family, **changes)


@pytest.fixture
def model(config, torch_seed):
    """Return a model whose every weight is random, biases and norms included."""
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter[: config.vocab_size] += 0.1 * torch.randn_like(parameter[: config.vocab_size])
    return model


def load_theirs(config_json: dict[str, Any], tensors: dict[str, torch.Tensor], folder) -> Any:
    """Return transformers' model, read from a folder as anyone would read it; nothing may be missing or left over."""
    import transformers

    (folder / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, config_json["architectures"][0])
    theirs, report = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return theirs.eval()


@dataclass
class Padded:
    """Documents as padded rows with an attention mask, and their labels in transformers' alignment."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def pad(documents, labels) -> Padded:
    """Put each document into a row of its own. The first document is as long as the row, the others are padded."""
    shape = (len(documents), max(len(document) for document in documents))
    rows = Padded(torch.full(shape, 3), torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100))
    for index, (document, label) in enumerate(zip(documents, labels, strict=True)):
        rows.input_ids[index, : len(document)] = document
        rows.attention_mask[index, : len(document)] = 1
        rows.labels[index, : len(document)] = label
    return rows


def both_batches(config, documents, flat_row):
    """Return the same documents and labels flat and padded."""
    if config.causal:
        return flat_row(documents), pad(documents, documents)
    labels = [torch.where(torch.rand(len(d)) < 0.4, torch.randint(0, 100, (len(d),)), -100) for d in documents]
    return flat_row(documents, labels), pad(documents, labels)


def test_logits_loss_and_gradients_equal_those_of_transformers(config, model, documents, flat_row, tmp_path):
    flat, rows = both_batches(config, documents, flat_row)
    theirs = load_theirs(*to_hugging_face(config, model.state_dict()), tmp_path)
    right = theirs(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels)
    right_logits = right.logits[rows.attention_mask.bool()]
    logits = model.logits(flat["input_ids"], flat["position_ids"], flat["cu_seqlens"])
    loss = model(**flat)
    torch.testing.assert_close(logits, right_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, right.loss, rtol=1e-6, atol=1e-6)

    loss.backward()
    right.loss.backward()
    ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    _, found = to_hugging_face(config, ours)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(found) == set(expected)
    unread = {name for name, gradient in expected.items() if gradient is None}
    assert unread <= {"cls.predictions.bias"}
    for name, gradient in found.items():
        if name in unread:
            continue
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_evaluation_equals_that_of_transformers(config, model, documents, flat_row, tmp_path):
    flat, rows = both_batches(config, documents, flat_row)
    theirs = load_theirs(*to_hugging_face(config, model.state_dict()), tmp_path)
    with torch.no_grad():
        right = theirs(input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=rows.labels).loss
    total, _, count = model.evaluate(**flat)
    torch.testing.assert_close(total / count, right, rtol=1e-6, atol=1e-6)


def test_there_and_back_is_the_same_in_every_bit(config, model):
    state = model.state_dict()
    again, back = from_hugging_face(*to_hugging_face(config, state))
    assert again == config
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_what_transformers_saves_comes_in_and_goes_out_the_same(config, torch_seed, tmp_path):
    import transformers

    config_json, _ = to_hugging_face(config, build_model(config).state_dict())
    kind = getattr(transformers, CLASSES[config.family])
    theirs = kind(kind.config_class(**{key: value for key, value in config_json.items() if key != "architectures"}))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    read, state = from_hugging_face(json.loads((tmp_path / "config.json").read_text()), tensors)
    assert read == config
    _, back = to_hugging_face(read, state)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    build_model(read).load_state_dict(state)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dtypes_are_kept(tiny, dtype):
    state = build_model(tiny("gpt")).to(dtype).state_dict()
    config_json, tensors = to_hugging_face(tiny("gpt"), state)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert {tensor.dtype for tensor in from_hugging_face(config_json, tensors)[1].values()} == {dtype}


def test_the_padding_of_the_vocabulary_stays_inside(config, model):
    _, tensors = to_hugging_face(config, model.state_dict())
    assert not [
        name
        for name, tensor in tensors.items()
        if config.vocab_size != 128 and 128 in tensor.shape[:1] and "mlp" not in name
    ]
    _, state = from_hugging_face(*to_hugging_face(config, model.state_dict()))
    assert state["tokens.weight"].shape == (config.padded_vocab_size, 32)
    assert not state["tokens.weight"][config.vocab_size :].any()


def test_tensors_are_contiguous_and_own_their_memory_once(config, model):
    _, tensors = to_hugging_face(config, model.state_dict())
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


HEADS = {"bert": "cls.predictions.decoder.weight", "gpt": "lm_head.weight", "llama": "lm_head.weight"}
TOKENS = {
    "bert": "bert.embeddings.word_embeddings.weight",
    "gpt": "transformer.wte.weight",
    "llama": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("family", CLASSES)
def test_a_tied_head_may_be_there_if_it_is_the_same(tiny, family):
    config = tiny(family, tie_word_embeddings=True)
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    without = from_hugging_face(config_json, tensors)[1]
    tensors[HEADS[family]] = tensors[TOKENS[family]].clone()
    found = from_hugging_face(config_json, tensors)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())
    alone = {name: tensor for name, tensor in tensors.items() if name != TOKENS[family]}
    if family == "bert":
        alone["cls.predictions.decoder.bias"] = alone.pop("cls.predictions.bias")
    found = from_hugging_face(config_json, alone)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in without.items())
    tensors[HEADS[family]][0, 0] += 1
    with pytest.raises(CheckpointError, match=f"{HEADS[family]}: differs from {TOKENS[family]}.*tie_word_embeddings"):
        from_hugging_face(config_json, tensors)


def test_untied_bert_reads_the_bias_that_transformers_reads(tiny, torch_seed):
    config = tiny("bert", tie_word_embeddings=False)
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    tensors["cls.predictions.decoder.bias"] = torch.randn(100)
    read = from_hugging_face(config_json, tensors)[1]["decoder_bias"]
    assert torch.equal(read[:100], tensors["cls.predictions.decoder.bias"])
    del tensors["cls.predictions.decoder.bias"]
    tensors["cls.predictions.bias"] = torch.randn(100)
    read = from_hugging_face(config_json, tensors)[1]["decoder_bias"]
    assert torch.equal(read[:100], tensors["cls.predictions.bias"])


OLD = {
    "bert": ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.seq_relationship.bias"],
    "gpt": ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"],
}


@pytest.mark.parametrize("family", CLASSES)
def test_buffers_of_older_versions_are_passed_over(tiny, family):
    config = tiny(family)
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    tensors |= {name: torch.ones(3) for name in OLD[family]}
    assert from_hugging_face(config_json, tensors)[0] == config


def test_older_names_of_bert_are_understood(tiny):
    config = tiny("bert")
    state = build_model(config).state_dict()
    config_json, tensors = to_hugging_face(config, state)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    older["cls.predictions.decoder.bias"] = older["cls.predictions.bias"]
    assert older.keys() != tensors.keys()
    _, found = from_hugging_face(config_json, older)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("family", ("gpt", "llama"))
def test_a_checkpoint_without_the_prefix_is_understood(tiny, family):
    config = tiny(family)
    state = build_model(config).state_dict()
    config_json, tensors = to_hugging_face(config, state)
    bare = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in tensors.items()}
    _, found = from_hugging_face(config_json, bare)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_the_first_three_differences_are_named(tiny):
    config = tiny("gpt")
    config_json, tensors = to_hugging_face(config, build_model(config).state_dict())
    del tensors["transformer.h.0.ln_1.weight"]
    tensors["transformer.h.0.ln_1.bias"] = torch.zeros(7)
    tensors["transformer.h.9.ln_1.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        from_hugging_face(config_json, tensors)
    assert [str(fault) for fault in caught.value.faults] == [
        "transformer.h.0.ln_1.weight: missing; a tensor of shape [32] should be there",
        "transformer.h.0.ln_1.bias: has shape [7]; the configuration says [32]",
        "transformer.h.9.ln_1.bias: not a tensor of this model; the configuration describes another one",
    ]
    with pytest.raises(CheckpointError) as caught:
        from_hugging_face(config_json, {})
    assert len(caught.value.faults) == 3


def test_a_state_of_another_shape_is_not_written(tiny):
    state = build_model(tiny("gpt", num_hidden_layers=1)).state_dict()
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attention_norm\.weight: missing"):
        to_hugging_face(tiny("gpt"), state)
    with pytest.raises(CheckpointError, match=r"tokens\.weight: has shape \[128, 32\]"):
        to_hugging_face(tiny("gpt", hidden_size=64), state)


def test_other_architectures_are_refused():
    known = "BertForMaskedLM, BertForPreTraining, GPT2LMHeadModel, Llama"
    with pytest.raises(InputError, match=f"architectures: T5Model; supported are {known}"):
        from_hugging_face({"architectures": ["T5Model"]}, {})
