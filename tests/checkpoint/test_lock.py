"""One run at a time in a folder; who has it is named, who is dead has nothing."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import lock
from bigtrain.checkpoint.lock import LOCK_FILE, check_unused, only_user_of
from bigtrain.errors import ResumeError

HOLDER = """
import sys, time
from pathlib import Path
from bigtrain.checkpoint.lock import only_user_of
with only_user_of(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.0)


def test_a_folder_has_one_user_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ResumeError, match=rf"in use by process {os.getpid()} on {platform.node()}; wait for it")
    with only_user_of(tmp_path), refused, only_user_of(tmp_path):
        pass
    with only_user_of(tmp_path):
        pass


def test_looking_holds_and_writes_nothing(tmp_path: Path) -> None:
    check_unused(tmp_path)
    check_unused(tmp_path / "absent")
    assert not list(tmp_path.iterdir())
    with only_user_of(tmp_path), pytest.raises(ResumeError, match=f"in use by process {os.getpid()} on "):
        check_unused(tmp_path)
    check_unused(tmp_path)
    with only_user_of(tmp_path):
        pass


def test_what_a_dead_process_held_is_free(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match=f"in use by process {holder.pid} on "):
            check_unused(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with only_user_of(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {platform.node()}"


def test_what_a_process_is_about_to_give_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)
    held = only_user_of(tmp_path)
    held.__enter__()
    ending = threading.Timer(0.3, held.__exit__, (None, None, None))
    ending.start()
    check_unused(tmp_path)
    ending.join()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("of the user's own")
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK_FILE).symlink_to(precious)
    with pytest.raises(ResumeError, match=rf"{LOCK_FILE}: .*; make the folder writable, or delete"), only_user_of(run):
        pass
    assert precious.read_text() == "of the user's own"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / LOCK_FILE)
    for use in (only_user_of(tmp_path).__enter__, lambda: check_unused(tmp_path)):
        with pytest.raises(ResumeError, match=f"{LOCK_FILE}: .*delete"):
            use()


def test_a_holder_of_an_absurd_name_is_shown_in_one_short_line(tmp_path: Path) -> None:
    with only_user_of(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\x1b[2J\n\xff" * 5000)
        with pytest.raises(ResumeError) as caught:
            check_unused(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_without_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", unknown)
    with only_user_of(tmp_path):
        check_unused(tmp_path)
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}: its file system knows no locks; see to it that ")
