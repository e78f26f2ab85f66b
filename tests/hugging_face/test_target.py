"""A folder that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.errors import BigtrainError, InputError
from bigtrain.hugging_face.target import check_unused, new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end_even_where_an_empty_folder_is(tmp_path: Path) -> None:
    for out in (tmp_path / "a" / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with new_folder(out, 1) as aside:
            (aside / "file").write_text("x")
            assert not (out / "file").exists()
        assert names(out) == ["file"]
        assert names(out.parent)[-1] == out.name
        assert not [name for name in names(out.parent) if name.endswith(".partial")]
    assert (tmp_path / "empty").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out", 1) as aside:
        (aside / "file").write_text("x")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []
    with pytest.raises(BigtrainError, match="No space left on device; free some space"), new_folder(tmp_path / "o", 1):
        raise OSError(28, os.strerror(28))


@pytest.mark.parametrize("name", ("EBUSY", "EACCES", "EPERM", "ENOTEMPTY", "EXDEV"))
def test_a_name_that_cannot_be_taken_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = getattr(errno, name)

    def refused(self: Path, target: Path) -> Path:
        raise OSError(number, os.strerror(number), str(self), None, str(target))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(BigtrainError) as caught, new_folder(tmp_path / "out", 1):
        pass
    expected = f"{tmp_path / 'out'}: {os.strerror(number)}; see to it that it can be used, or name another folder"
    assert str(caught.value) == expected
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_the_next_time_and_what_another_writes_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
import time
from pathlib import Path
from bigtrain.hugging_face.target import new_folder
with new_folder(Path({str(out)!r}), 1) as aside:
    (aside / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    with new_folder(tmp_path / "out", 1) as aside:
        assert len(names(tmp_path)) == 2
        (aside / "file").write_text("x")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(names(tmp_path)) == 2
    assert names(out) == ["file"]
    (out / "file").unlink()
    with new_folder(out, 1):
        pass
    assert names(tmp_path) == ["out"]


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, text in (("full", "is not empty"), ("file", "is not a folder"), ("link", "is not a folder")):
        with pytest.raises(InputError, match=rf"^command line: OUT: .*{name}: exists and {text}; name another folder"):
            check_unused(tmp_path / name)
    with pytest.raises(InputError, match="is not empty"), new_folder(tmp_path / "full", 1):
        pass
    with pytest.raises(InputError, match="is not empty"), new_folder(tmp_path / "late", 1) as aside:
        (aside / "file").write_text("x")
        (tmp_path / "late").mkdir()
        (tmp_path / "late" / "mine").write_text("x")
    assert names(tmp_path / "late") == ["mine"]


def test_a_disk_that_has_no_room_is_told_before(tmp_path: Path) -> None:
    needed = r"are needed and .* free; name a folder on another disk"
    with pytest.raises(InputError, match=needed), new_folder(tmp_path / "out", 2**62):
        pass
    with pytest.raises(InputError, match="File exists|Not a directory"), new_folder(Path("/dev/null/out"), 0):
        pass
