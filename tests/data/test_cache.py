from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data.cache import cache_folder, file_digest, fingerprint, locked, write_json, written_aside


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGTRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_recipe_chooses_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIGTRAIN_CACHE", "/elsewhere")
    assert cache_folder(DataSection(cache=str(tmp_path))) == tmp_path


def test_environment_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/general")
    assert cache_folder(DataSection()) == Path("/general/bigtrain")
    monkeypatch.setenv("BIGTRAIN_CACHE", "/own")
    assert cache_folder(DataSection()) == Path("/own")


def test_home_comes_last() -> None:
    assert cache_folder(DataSection()) == Path.home() / ".cache" / "bigtrain"
    assert cache_folder(DataSection(cache="~/data")) == Path.home() / "data"


def test_folder_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cache_folder(DataSection(cache="here")) == tmp_path / "here"


def test_fingerprint_depends_on_facts_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert len(fingerprint({})) == 24


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1000)
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_written_aside_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_aside(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), written_aside(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_write_json_is_the_same_for_the_same_value(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"b": 1, "a": 2})
    write_json(tmp_path / "two", {"a": 2, "b": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_lock_keeps_others_out_until_the_holder_dies(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    code = (
        "import sys, pathlib\n"
        "from bigtrain.data.cache import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        import fcntl

        with path.open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
    with locked(path):
        assert path.exists()
