"""A path, or a name on the hub."""

from __future__ import annotations

import pytest

from bigtrain.config.paths import is_local, local_path, looks_like_path


@pytest.mark.parametrize(
    "source", ["a.txt", "A.TXT", "x/b.jsonl", "a.txt.gz", "b.zst", "./a", "../a", "/a", "~/a", "a/b/c", "x.parquet"]
)
def test_written_as_a_path(source):
    assert looks_like_path(source)


@pytest.mark.parametrize(
    "source", ["wikitext", "wikimedia/wikipedia", "HuggingFaceFW/fineweb-edu", "owner/name.v1", "embedded"]
)
def test_written_as_a_hub_id(source):
    assert not looks_like_path(source)


def test_what_exists_is_local(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local("corpus")
    assert not is_local("corpora")
    assert is_local("no/such/folder")


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a") == tmp_path / "a"
    assert str(local_path("~nobodyofthisname/a")) == "~nobodyofthisname/a"
