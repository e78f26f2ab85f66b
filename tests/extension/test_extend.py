"""A run with a larger vocabulary: nothing of the old one is lost, it goes on, and nothing half is ever left."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from enlarged import ADDED, larger, reading, rows_differ, whole_tensors
from trained import RELEASED, losses, train

from bigtrain.checkpoint.lock import only_user_of
from bigtrain.checkpoint.manifest import read
from bigtrain.checkpoint.store import CheckpointStore
from bigtrain.errors import CheckpointError, InputError, ResumeError
from bigtrain.extension.extend import extend
from bigtrain.training.generate import load_trained

BF16 = ("amp.precision=bf16", "amp.master_weights=split24")
WAYS = {
    "adamw": ("bert", ()),
    "lean": ("bert", (*BF16, "optimizer.state=8bit", *RELEASED)),
    "coarse": (
        "gpt",
        ("amp.precision=bf16", "amp.master_weights=none", "optimizer.name=lamb", "optimizer.state=4bit"),
    ),
    "muon": ("gpt", ("optimizer.name=muon", "optimizer.state=bf16", "model.tie_word_embeddings=false")),
    "adafactor": ("bert", (*BF16, "optimizer.name=adafactor")),
}
SHORT = ("train.steps=3", "train.eval_every=null", "checkpoint.every_steps=null")


@pytest.fixture
def run(tiny_recipes: dict[str, Path], tmp_path: Path) -> Path:
    train(tiny_recipes["gpt"], tmp_path / "run", *SHORT, "train.steps=1")
    return tmp_path / "run"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("way", WAYS)
def test_all_that_was_there_is_kept_bit_by_bit_and_the_run_goes_on(
    tiny_recipes: dict[str, Path], tmp_path: Path, way: str
) -> None:
    family, overrides = WAYS[way]
    run, more = tmp_path / "run", tmp_path / "more"
    train(tiny_recipes[family], run, *SHORT, *overrides)
    untouched = files_of(run)
    made = extend(run, str(larger(run, tmp_path / "new.json")), more)
    assert (made.step, made.tokens - made.before, made.rounded) == (3, ADDED, 0)
    assert files_of(run) == untouched
    checkpoints = [folder / "step-00000003" for folder in (run, more)]
    assert rows_differ(*checkpoints, made.before) == []
    train(more / "plan.yaml", more, "train.steps=5")
    found = losses(train(more / "plan.yaml", more, "train.steps=5"))
    assert list(found) == [4, 5]
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_old_tokens_have_the_same_logits_and_new_ones_take_no_more_than_their_share(
    tiny_recipes: dict[str, Path], tmp_path: Path, family: str
) -> None:
    train(tiny_recipes[family], tmp_path / "run", *SHORT, "train.steps=12")
    made = extend(tmp_path / "run", str(larger(tmp_path / "run", tmp_path / "new.json")))
    assert made.folder == tmp_path / "run-extended"
    before, after = load_trained(tmp_path / "run"), load_trained(made.folder)
    with torch.no_grad():
        old, new = (trained.model(*reading(made.before)) for trained in (before, after))
    assert torch.equal(new[:, : made.before], old)
    assert new.shape[1] == made.before + ADDED
    rise = torch.logsumexp(new.double(), 1) - torch.logsumexp(old.double(), 1)
    assert rise.max() <= math.log(1 + ADDED / made.before) + 1e-6
    assert after.tokenizer.encode("new0 token", add_special_tokens=False).ids[0] >= made.before


def test_a_model_with_rows_to_spare_keeps_its_size(tiny_recipes: dict[str, Path], tmp_path: Path) -> None:
    train(tiny_recipes["gpt"], tmp_path / "run", *SHORT, "train.steps=1", "model.vocab_size=350")
    made = extend(tmp_path / "run", str(larger(tmp_path / "run", tmp_path / "new.json")), tmp_path / "more")
    assert (made.before, made.tokens) == (350, 350)
    one, other = (whole_tensors(folder / "step-00000001") for folder in (tmp_path / "run", made.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_spikes_of_other_losses_are_forgotten_and_the_position_is_kept(run: Path, tmp_path: Path) -> None:
    made = extend(run / "step-00000001", str(larger(run, tmp_path / "new.json")), tmp_path / "more")
    was, now = (json.loads((folder / "step-00000001" / "state.json").read_text()) for folder in (run, made.folder))
    assert was["notes"].keys() - now["notes"].keys() <= {"spikes"}
    assert now["loader"]["row"] == was["loader"]["row"]
    assert now["loader"]["corpus"] != was["loader"]["corpus"]
    assert now["tokens"] == was["tokens"]


def test_a_tokenizer_that_shrinks_is_refused_before_anything_is_made(run: Path, tmp_path: Path) -> None:
    new = larger(run, tmp_path / "new.json", "shrinks")
    with pytest.raises(InputError, match="the vocabulary would shrink: 2 of the 300 tokens"):
        extend(run, str(new), tmp_path / "more")
    assert not [*tmp_path.glob("*more*")]


def test_a_place_that_is_taken_and_a_run_that_is_none_are_refused(run: Path, tmp_path: Path) -> None:
    new = str(larger(run, tmp_path / "new.json"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(InputError, match="--output: .*taken: is there already; name another folder"):
        extend(run, new, tmp_path / "taken")
    with pytest.raises(InputError, match="--output: .*file: is there already"):
        extend(run, new, tmp_path / "taken" / "file")
    with pytest.raises(InputError, match="--output: .*file.*: (Not a directory|File exists); make room"):
        extend(run, new, tmp_path / "taken" / "file" / "inside")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        extend(tmp_path / "taken", new)
    CheckpointStore(tmp_path / "weights").save(0, {"weights.safetensors": {}}, {"plan.yaml": "", "tokenizer.json": ""})
    with pytest.raises(CheckpointError, match="start one from it with train.init_from, and extend that"):
        extend(tmp_path / "weights", new)
    assert files_of(tmp_path / "taken") == {"file": b"mine"}


def test_a_name_that_cannot_be_taken_is_told_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if Path(target).name == "busy":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(InputError, match=r"^command line: --output: \S*/busy: Device or resource busy; .*folder$"):
        extend(run, str(larger(run, tmp_path / "new.json")), tmp_path / "busy")
    assert not [*tmp_path.glob("*busy*")]


def test_a_run_under_way_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.checkpoint.lock.PATIENCE_SECONDS", 0.0)
    new = str(larger(run, tmp_path / "new.json"))
    for path in (run, run / "step-00000001"):
        with only_user_of(run), pytest.raises(ResumeError, match="in use by process"):
            extend(path, new, tmp_path / "more")
    assert not [*tmp_path.glob("*more*")]


def test_data_that_are_gone_are_refused(tiny_recipes: dict[str, Path], tmp_path: Path, corpus_file: Path) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(corpus_file, own)
    train(tiny_recipes["gpt"], tmp_path / "run", *SHORT, "train.steps=1", f"data.source={own}")
    own.unlink()
    with pytest.raises(InputError, match="no such file"):
        extend(tmp_path / "run", str(larger(tmp_path / "run", tmp_path / "new.json")), tmp_path / "more")
    assert not [*tmp_path.glob("*more*")]


@pytest.mark.slow
def test_one_that_is_killed_leaves_nothing_half_and_the_next_is_whole(run: Path, tmp_path: Path) -> None:
    new, more = larger(run, tmp_path / "new.json"), tmp_path / "more"
    words = [sys.executable, "-m", "bigtrain", "extend", run, "--tokenizer", new, "--output", more]
    killed = subprocess.run(
        words, env={**os.environ, "BIGTRAIN_FAULTS": "publish:kill"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert not more.exists()
    assert (tmp_path / ".more.aside").is_dir()
    extend(run, str(new), more)
    assert not (tmp_path / ".more.aside").exists()
    assert {path.name for path in more.iterdir()} == {".lock", "plan.yaml", "tokenizer.json", "step-00000001"}
    assert read(more / "step-00000001")["step"] == 1
