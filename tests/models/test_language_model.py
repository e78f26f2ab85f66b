"""What holds for every family: documents do not see each other, padding of the vocabulary is invisible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigtrain.batch import IGNORED_LABEL, unpad
from bigtrain.models import build_model

FAMILIES = ("bert", "gpt", "llama")
POSITIONS = ("input_ids", "position_ids", "cu_seqlens")


@pytest.fixture(params=FAMILIES)
def model(request, tiny, torch_seed):
    return build_model(tiny(request.param)).eval()


def where(batch):
    """Return the part of a flat batch that `hidden` and `logits` take."""
    return {name: batch[name] for name in POSITIONS}


def test_shapes_and_dtypes(model, flat_row, documents):
    batch = flat_row(documents)
    count, labelled = len(batch["input_ids"]), len(batch["labels"])
    hidden = model.hidden(**where(batch))
    logits = model.logits(**where(batch))
    loss = model(**batch)
    assert hidden.shape == (count, 32)
    assert logits.shape == (count, 100)
    assert model.logits(**where(batch), at=batch["label_positions"]).shape == (labelled, 100)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert torch.equal(model(**where(batch)), logits)


def test_the_loss_is_the_cross_entropy_of_the_logits(model, flat_row, documents):
    batch = flat_row(documents)
    at = model.logits(**where(batch), at=batch["label_positions"])
    torch.testing.assert_close(at, model.logits(**where(batch))[batch["label_positions"]])
    torch.testing.assert_close(model(**batch), F.cross_entropy(at, batch["labels"]), rtol=1e-6, atol=1e-6)


def test_smoothing_and_z_loss_are_in_training_only(tiny, flat_row, documents):
    torch.manual_seed(0)
    plain = build_model(tiny("gpt"))
    full = build_model(tiny("gpt"), z_loss=0.1, label_smoothing=0.2)
    full.load_state_dict(plain.state_dict())
    batch = flat_row(documents)
    logits = plain.logits(**where(batch), at=batch["label_positions"])
    right = F.cross_entropy(logits, batch["labels"], label_smoothing=0.2) + 0.1 * logits.logsumexp(1).square().mean()
    torch.testing.assert_close(full(**batch), right, rtol=1e-6, atol=1e-6)
    assert full.evaluate(**batch)[0] == plain.evaluate(**batch)[0]


def test_evaluate_agrees_with_the_logits(model, flat_row, documents):
    batch = flat_row(documents)
    total, correct, count = model.evaluate(**batch)
    logits = model.logits(**where(batch), at=batch["label_positions"])
    torch.testing.assert_close(total, F.cross_entropy(logits, batch["labels"], reduction="sum"), rtol=1e-6, atol=1e-5)
    assert correct.item() == (logits.argmax(1) == batch["labels"]).sum().item()
    assert count.item() == len(batch["labels"])
    assert not total.requires_grad


def test_no_labels_are_a_loss_of_zero_that_can_be_differentiated(model, flat_row, documents):
    batch = flat_row(documents, [torch.full_like(document, -100) for document in documents])
    assert len(batch["labels"]) == 0
    loss = model(**batch)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())
    assert [value.item() for value in model.evaluate(**batch)] == [0.0, 0, 0]


def test_documents_in_one_row_are_as_documents_alone(model, flat_row, documents):
    together = model.logits(**where(flat_row(documents))).split([len(document) for document in documents])
    for document, logits in zip(documents, together, strict=True):
        torch.testing.assert_close(logits, model.logits(**where(flat_row([document]))), rtol=1e-5, atol=1e-5)


def test_the_longest_length_need_not_be_given(model, flat_row, documents):
    batch = flat_row(documents)
    given = model(**batch)
    assert torch.equal(model(**{**batch, "max_seqlen": None}), given)


def test_rows_with_padding_are_as_rows_without(model):
    """From the loader's rows to the loss: what stands in the padding does not count."""
    rows = {
        "input_ids": torch.randint(0, 100, (3, 12)),
        "labels": torch.randint(0, 100, (3, 12)),
        "document_lengths": torch.tensor([[4, 5], [12, 0], [2, 0]], dtype=torch.int32),
    }
    rows["labels"][0, 9:] = rows["labels"][2, 2:] = -100
    loss = model(**unpad(rows))
    rows["input_ids"][0, 9:] = rows["input_ids"][2, 2:] = 1
    assert torch.equal(model(**unpad(rows)), loss)


def test_padded_rows_of_the_vocabulary_stay_zero_in_training(model, flat_row, documents):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = model.tokens.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(**flat_row(documents)).backward()
        assert not model.tokens.weight.grad[100:].any()
        optimizer.step()
    padded = [parameter[100:] for parameter in model.parameters() if parameter.shape[0] == 128]
    assert padded
    assert not any(rows.any() for rows in padded)
    assert not torch.equal(model.tokens.weight, before)


def test_training_learns(model, flat_row, documents):
    batch = flat_row(documents)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model(**batch).item()
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    assert model(**batch).item() < 0.5 * first


def test_whole_bf16_runs(model, flat_row, documents):
    batch = flat_row(documents)
    exact = model(**batch)
    half, evaluated = model.bfloat16()(**batch), model.evaluate(**batch)
    assert half.dtype == evaluated[0].dtype == torch.float32
    half.backward()
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.1)
    torch.testing.assert_close(evaluated[0] / evaluated[2], half.detach(), rtol=1e-5, atol=1e-5)
    assert model.logits(**where(batch)).dtype == torch.bfloat16
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() and grad.dtype == torch.bfloat16 for grad in grads)


def every_label(batch):
    """Return the batch with a label for each token, most of which do not count."""
    labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
    labels[batch["label_positions"]] = batch["labels"]
    return {**{name: value for name, value in batch.items() if name != "label_positions"}, "labels": labels}


def test_ignored_labels_are_as_labels_that_are_not_there(model, flat_row, documents):
    model.z_loss, model.label_smoothing = 0.01, 0.1
    batch, results = flat_row(documents), []
    for rows in (batch, every_label(batch)):
        model.zero_grad()
        loss = model(**rows)
        loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append([loss.detach(), *grads, *(value.float() for value in model.evaluate(**rows))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_the_hidden_states_are_not_gathered_where_every_token_has_a_label(model, flat_row, documents, monkeypatch):
    seen, head = [], model.head
    monkeypatch.setattr(model, "head", lambda hidden: seen.append(hidden.shape[0]) or head(hidden))
    batch = flat_row(documents)
    model(**batch)
    model(**every_label(batch))
    assert seen == [len(batch["labels"]), len(batch["input_ids"])]


def test_the_same_batch_gives_the_same_bits(model, flat_row, documents):
    batch, results = flat_row(documents), []
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


several = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=2, max_size=5)
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(texts=several, random=st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(model, flat_row, texts, random):
    order = random.sample(range(len(texts)), len(texts))
    tensors = [torch.tensor(text) for text in texts]
    right = model.logits(**where(flat_row(tensors))).split([len(text) for text in texts])
    moved = [tensors[index] for index in order]
    found = model.logits(**where(flat_row(moved))).split([len(tensor) for tensor in moved])
    for index, logits in zip(order, found, strict=True):
        torch.testing.assert_close(logits, right[index], rtol=1e-4, atol=1e-5)


@quick
@given(texts=several, data=st.data())
def test_changing_one_document_changes_no_other(model, flat_row, texts, data):
    index = data.draw(st.integers(0, len(texts) - 1))
    length = len(texts[index])
    other = data.draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
    lengths = [len(text) for text in texts]
    before = model.logits(**where(flat_row([torch.tensor(text) for text in texts]))).split(lengths)
    changed = [*texts[:index], other, *texts[index + 1 :]]
    after = model.logits(**where(flat_row([torch.tensor(text) for text in changed]))).split(lengths)
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        assert place == index or torch.equal(old, new)
