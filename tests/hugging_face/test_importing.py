"""From Hugging Face's folders to runs: bitwise, and what does not fit is refused before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bigtrain
from bigtrain.checkpoint.store import find_checkpoint
from bigtrain.errors import CheckpointError, InputError, RecipeError
from bigtrain.hugging_face.exporting import export_folder
from bigtrain.hugging_face.importing import import_folder
from bigtrain.launcher import check_init_from, plan_again
from bigtrain.training.evaluate_run import evaluate_run
from bigtrain.training.generate import load_trained

Saved = Callable[..., tuple[Path, Any]]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "bert-untied-bf16": ("bert", {"tie_word_embeddings": False, "dtype": torch.bfloat16}),
    "gpt": ("gpt", {"shard": "20KB"}),
    "gpt-untied-f16": ("gpt", {"tie_word_embeddings": False, "dtype": torch.float16}),
    "llama": ("llama", {"dtype": torch.bfloat16, "shard": "20KB"}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 128}),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_in_and_out_again_is_the_same_in_every_bit(saved: Saved, tmp_path: Path, case: str) -> None:
    family, changes = CASES[case]
    folder, model = saved(family, **changes)
    before = tensors_of(folder)
    made = import_folder(folder, tmp_path / "in")
    assert (made.config.family, made.tokenizer, made.left_out) == (family, False, ())
    unread = 100 if case.startswith("bert-untied") else 0  # the bias that transformers does not read
    assert made.parameters == sum(parameter.numel() for parameter in model.parameters()) - unread
    find_checkpoint(tmp_path / "in")
    exported = export_folder(tmp_path / "in", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert (exported.files, exported.tokenizer) == (1, False)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    given = json.loads((folder / "config.json").read_text())
    assert {key: value for key, value in given.items() if kept.get(key) != value and value is not None} == {
        "transformers_version": given["transformers_version"]
    }


@pytest.mark.parametrize("family", ("bert", "gpt", "llama"))
def test_the_model_computes_what_theirs_does(saved: Saved, tmp_path: Path, family: str) -> None:
    folder, model = saved(family)
    import_folder(folder, tmp_path / "in")
    from bigtrain.checkpoint.state import load_weights
    from bigtrain.models import build_model

    config = import_folder(folder, tmp_path / "again").config
    own = build_model(config)
    load_weights(own, tmp_path / "in")
    ids = torch.randint(0, 100, (33,))
    with torch.no_grad():
        right = model(ids[None]).logits[0]
        found = own.eval().logits(ids, torch.arange(33), torch.tensor([0, 33], dtype=torch.int32))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def gpt_tokenizer(folder: Path, size: int = 300) -> None:
    from bigtrain.data.tokenizer import train_tokenizer

    texts = ["red green blue stone river tree bird sings falls grows slowly again"] * 20
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, "gpt", size, False).to_str())


def test_the_files_beside_the_weights_come_out_as_they_came(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("gpt", vocab_size=310, bos_token_id=305, eos_token_id=[306, 2])
    gpt_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    texts = {"tokenizer_config.json": '{"eos_token": "x"}', "vocab.json": "{}", "merges.txt": "a b\r\n"}
    texts |= {"special_tokens_map.json": "[1]", "chat_template.jinja": "{{ x }}", "generation_config.json": '{"k": 1}'}
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    import_folder(folder, tmp_path / "in")
    assert json.loads((tmp_path / "in" / "tokenizer.json").read_text())["truncation"] is None
    out = export_folder(tmp_path / "in", tmp_path / "out").folder
    for name in (*texts, "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (305, [306, 2], None)
    (tmp_path / "in" / "merges.txt").write_text("other")
    with pytest.raises(CheckpointError, match=r"merges\.txt: damaged"):
        export_folder(tmp_path / "in", tmp_path / "again")


def test_a_run_starts_from_it_and_goes_on_without_it(
    saved: Saved, tmp_path: Path, tiny_recipes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = saved("llama", vocab_size=310)
    gpt_tokenizer(folder)
    import_folder(folder, tmp_path / "in")
    start = tmp_path / "in"
    edits = [f"train.init_from={start}", f"data.tokenizer={start / 'tokenizer.json'}", "optimizer.weight_decay=0"]
    edits += ["optimizer.learning_rate=0", "train.steps=1"]
    recipe = bigtrain.load_recipe(tiny_recipes["gpt"], edits)
    planned = bigtrain.plan(recipe)
    assert (planned.model.family, planned.model.num_key_value_heads, planned.model.vocab_size) == ("llama", 2, 310)
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    check_init_from(planned)
    bigtrain.train(planned, tmp_path / "run")
    assert ", from given weights\n" in capsys.readouterr().out
    export_folder(tmp_path / "run", tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    stored = bigtrain.load_recipe(tmp_path / "run" / "plan.yaml")
    assert bigtrain.plan(stored).recipe == planned.recipe == stored
    tokenizer = (start / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    start.rename(tmp_path / "elsewhere")
    more = [*edits[2:-1], "train.steps=2", f"data.tokenizer={tokenizer}", edits[0]]
    again = plan_again(bigtrain.load_recipe(tiny_recipes["gpt"], more), tmp_path / "run")
    assert again.model == planned.model
    bigtrain.train(again, tmp_path / "run", allowed=["data.tokenizer"])
    assert (tmp_path / "run" / "step-00000002").is_dir()
    with pytest.raises(RecipeError, match=r"train\.init_from: .*in: holds no checkpoint"):
        check_init_from(bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], more)))


def test_the_folder_itself_is_evaluated(saved: Saved, tmp_path: Path, corpus_file: Path) -> None:
    folder, _ = saved("gpt", vocab_size=300)
    import_folder(folder, tmp_path / "bare")
    data = [f"data.source={corpus_file}", "data.validation_fraction=0.1", "data.sequence_length=32"]
    with pytest.raises(InputError, match=r"^command line: data\.tokenizer: missing: .*bare was imported without"):
        evaluate_run(tmp_path / "bare", data)
    gpt_tokenizer(folder)
    import_folder(folder, tmp_path / "in")
    found = evaluate_run(tmp_path / "in", data)
    assert found["step"] is None
    assert found["eval_loss"] > 3
    named = f"data.tokenizer={folder / 'tokenizer.json'}"
    assert evaluate_run(tmp_path / "bare", [*data, named])["eval_loss"] == found["eval_loss"]
    assert load_trained(tmp_path / "in").plan.model.vocab_size == 300


def test_a_head_of_one_objective_alone_is_no_hindrance(
    tmp_path: Path, tiny_recipes: dict[str, Path], corpus_file: Path
) -> None:
    still = ["optimizer.learning_rate=0", "optimizer.weight_decay=0", "train.steps=1", "train.eval_every=null"]
    recipe, source = tiny_recipes["bert"], None
    for objective in ("mlm", "mlm_nsp", "mlm"):
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        start = [] if source is None else [f"train.init_from={source}"]
        loaded = bigtrain.load_recipe(recipe, [*still, f"train.objective={objective}", *start])
        bigtrain.train(bigtrain.plan(loaded), run)
        made = export_folder(run, tmp_path / f"out-{run.name}")
        assert made.architecture == ("BertForPreTraining" if objective == "mlm_nsp" else "BertForMaskedLM")
        tensors = tensors_of(made.folder)
        if source is not None:
            before = tensors_of(tmp_path / f"out-{source.name}")
            both = before.keys() & tensors.keys()
            assert len(both) == min(len(before), len(tensors))
            assert all(torch.equal(before[name], tensors[name]) for name in both)
        source = run


def test_a_folder_that_was_not_imported_is_told_apart(
    saved: Saved, tmp_path: Path, tiny_recipes: dict[str, Path]
) -> None:
    folder, _ = saved("gpt")
    planned = bigtrain.plan(bigtrain.load_recipe(tiny_recipes["gpt"], [f"train.init_from={folder}"]))
    with pytest.raises(RecipeError, match=r"a Hugging Face folder; first: bigtrain import .*gpt-theirs OUT, and give"):
        check_init_from(planned)


def change(folder: Path, **keys: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **keys}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_does_not_fit_is_refused_and_nothing_is_made(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("bert")
    out = tmp_path / "in"
    config = (folder / "config.json").read_text()
    for keys, text in (
        ({"architectures": ["T5Model"]}, "architectures: T5Model; supported are BertForMaskedLM, "),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map: names code"),
        ({"hidden_act": "relu"}, rf"^{folder / 'config.json'}: hidden_act: 'relu' is not supported"),
        ({"num_hidden_layers": 3}, rf"^{folder}: bert.encoder.layer.2"),
        ({"initializer_range": -1.0}, "config.json: initializer_range: -1.0"),
    ):
        change(folder, **keys)
        with pytest.raises(InputError, match=text):
            import_folder(folder, out)
        (folder / "config.json").write_text(config)
    gpt_tokenizer(folder)
    with pytest.raises(InputError, match=r"tokenizer\.json: has 300 tokens, and config\.json a vocabulary of 100"):
        import_folder(folder, out)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        import_folder(folder, out)
    (folder / "tokenizer.json").unlink()
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[:5]] and None)
    with pytest.raises(CheckpointError) as caught:
        import_folder(folder, out)
    assert len(caught.value.faults) == 3
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        import_folder(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir() if "theirs" not in path.name) == ["in"]


def test_parts_that_no_model_here_has_are_named(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("bert")
    rewrite(folder, lambda tensors: tensors.update({"bert.pooler.dense.weight": torch.ones(32, 32)}))
    rewrite(folder, lambda tensors: tensors.update({"bert.embeddings.position_ids": torch.arange(40)}))
    left_out = import_folder(folder, tmp_path / "in").left_out
    assert sorted(left_out) == ["bert.embeddings.position_ids", "bert.pooler.dense.weight"]


def test_a_damaged_import_is_found(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("gpt")
    import_folder(folder, tmp_path / "in")
    path = tmp_path / "in" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged"):
        find_checkpoint(tmp_path / "in")
