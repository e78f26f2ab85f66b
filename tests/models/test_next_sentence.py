"""The next-sentence head: equal to transformers' BertForPreTraining, and counted as it is built."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bigtrain.models import build_model, shape
from bigtrain.models.hf import from_hugging_face, to_hugging_face
from bigtrain.models.next_sentence import next_sentence_loss, next_sentence_score


@pytest.fixture(params=[{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def config(request, tiny):
    return tiny("bert", next_sentence=True, **request.param)


@pytest.fixture
def model(config, torch_seed):
    return build_model(config).eval()


@pytest.fixture
def pairs(torch_seed):
    """Return three pairs of 20 tokens, padded rows, labels of some tokens and of all pairs."""
    ids, labels = torch.randint(0, 100, (3, 20)), torch.full((3, 20), -100)
    labels[:, [2, 5, 11]] = ids[:, [2, 5, 11]]
    segments = (torch.arange(20) > torch.tensor([[8], [3], [15]])).long()
    return ids, segments, labels, torch.tensor([0, 1, 1])


def flat(pairs):
    """Return the same pairs as a flat row."""
    ids, segments, labels, next_sentence_labels = pairs
    at = (labels.flatten() != -100).nonzero()[:, 0]
    where = {
        "input_ids": ids.flatten(),
        "position_ids": torch.arange(20).repeat(3),
        "cu_seqlens": torch.tensor([0, 20, 40, 60], dtype=torch.int32),
        "segment_ids": segments.flatten(),
    }
    task = {"labels": labels.flatten()[at], "label_positions": at, "next_sentence_labels": next_sentence_labels}
    return where, task


def test_built_as_counted(config):
    with torch.device("meta"):
        built = build_model(config)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in built.named_parameters()]
    assert list(shape.parameter_shapes(config).items()) == shapes
    assert shape.stored_tensors(config) == len(shapes)
    assert shape.stored_parameters(config) == sum(parameter.numel() for parameter in built.parameters())


def test_the_head_is_in_the_flops_once_a_row(tiny):
    with_head, without = (shape.flops_per_token(tiny("bert", next_sentence=has), 16) for has in (True, False))
    assert with_head - without == 6 * 32 * 34 // 16


def test_the_weights_of_the_other_task_start_as_without_it(tiny):
    torch.manual_seed(5)
    alone = build_model(tiny("bert")).state_dict()
    torch.manual_seed(5)
    both = build_model(tiny("bert", next_sentence=True)).state_dict()
    assert all(torch.equal(tensor, both[name]) for name, tensor in alone.items())


def test_logits_losses_and_gradients_equal_those_of_transformers(config, model, pairs, tmp_path):
    import transformers

    config_json, tensors = to_hugging_face(config, model.state_dict())
    assert config_json["architectures"] == ["BertForPreTraining"]
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    theirs.eval()

    (ids, segments, labels, answers), (where, task) = pairs, flat(pairs)
    right = theirs(input_ids=ids, token_type_ids=segments, labels=labels, next_sentence_label=answers)
    found = model(**where, **task)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model.logits(**where).view_as(right.prediction_logits), right.prediction_logits, **close)
    torch.testing.assert_close(model.next_sentence_logits(**where), right.seq_relationship_logits, **close)
    torch.testing.assert_close(found.mlm_loss + found.nsp_loss, right.loss, rtol=1e-6, atol=1e-6)

    (found.mlm_loss + found.nsp_loss).backward()
    right.loss.backward()
    _, gradients = to_hugging_face(config, {name: p.grad for name, p in model.named_parameters()})
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_there_and_back_is_the_same_in_every_bit(config, model):
    config_json, tensors = to_hugging_face(config, model.state_dict())
    again, back = from_hugging_face(config_json, tensors)
    assert again == config
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.items())


def test_a_masked_language_model_comes_without_the_head(config, model):
    config_json, tensors = to_hugging_face(config, model.state_dict())
    without, back = from_hugging_face({**config_json, "architectures": ["BertForMaskedLM"]}, tensors)
    assert not without.next_sentence
    assert model.state_dict().keys() - back.keys() == {
        f"next_sentence.{part}.{kind}" for part in ("pooler", "head") for kind in ("weight", "bias")
    }


def test_the_second_segment_is_read(model, pairs):
    where, _ = flat(pairs)
    other = {**where, "segment_ids": torch.zeros_like(where["segment_ids"])}
    assert not torch.allclose(model.next_sentence_logits(**where), model.next_sentence_logits(**other))
    first = {name: value for name, value in where.items() if name != "segment_ids"}
    torch.testing.assert_close(model.logits(**first), model.logits(**other), rtol=1e-5, atol=1e-5)


def test_evaluation_gives_the_sums_of_both_tasks(model, pairs):
    where, task = flat(pairs)
    losses, found = model(**where, **task), model.evaluate(**where, **task)
    assert [int(found[place]) for place in (2, 5)] == [9, 3]
    torch.testing.assert_close(found[0] / 9, losses.mlm_loss)
    torch.testing.assert_close(found[3] / 3, losses.nsp_loss)
    right = model.next_sentence_logits(**where).argmax(1) == task["next_sentence_labels"]
    assert int(found[4]) == int(right.sum())


def test_ignored_labels_count_nothing():
    logits, labels = torch.tensor([[1.0, 0.0], [0.5, 2.0], [3.0, 1.0]]), torch.tensor([0, -100, 1])
    expected = F.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    torch.testing.assert_close(next_sentence_loss(logits, labels), expected)
    assert next_sentence_loss(logits.bfloat16(), labels).dtype == torch.float32
    total, correct, count = next_sentence_score(logits, labels)
    torch.testing.assert_close(total, 2 * expected)
    assert (int(correct), int(count)) == (1, 2)
    logits.requires_grad_()
    nothing = next_sentence_loss(logits, torch.full((3,), -100))
    nothing.backward()
    assert nothing == 0 and logits.grad is not None and not logits.grad.any()


def test_a_model_without_the_head_says_so(tiny, pairs):
    where, task = flat(pairs)
    with pytest.raises(ValueError, match="no next-sentence head; train it with train.objective=mlm_nsp"):
        build_model(tiny("bert"))(**where, **task)
