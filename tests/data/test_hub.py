from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config.schema import DataSection
from bigtrain.data import hub
from bigtrain.data.hub import HubRows, cached_tokenizer_file, hub_texts, hub_tokenizer_file, reachable
from bigtrain.errors import DataError

ORIGIN = "recipe.yaml:6"


class Made:
    """Stands in for a data set of the hub, as `datasets` gives it."""

    def __init__(self, texts: list[Any], column: str = "text") -> None:
        self.texts, self.column_names, self.features = texts, ["id", column], None

    def select_columns(self, names: list[str]) -> Made:
        assert set(names) <= set(self.column_names)
        return self

    def iter(self, batch_size: int) -> Iterator[dict[str, list[Any]]]:
        for start in range(0, len(self.texts), batch_size):
            yield {self.column_names[1]: self.texts[start : start + batch_size]}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)


def load(monkeypatch: pytest.MonkeyPatch, answer: Any) -> dict[str, Any]:
    """Let `load_dataset` answer this, or raise it, and return the call's arguments once there are some."""
    import datasets

    call: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **rest: Any) -> Any:
        call.update(name=name, subset=subset, **rest)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return call


def fault(data: DataSection) -> str:
    with pytest.raises(DataError) as raised:
        list(hub_texts(data, "user/set", ORIGIN))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_documents(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    call = load(monkeypatch, Made([f"text {number}" for number in range(600)]))
    data = DataSection(source="user/set", subset="one", split="test", streaming=True)
    assert list(hub_texts(data, "user/set", ORIGIN)) == [f"text {number}" for number in range(600)]
    assert call == {"name": "user/set", "subset": "one", "split": "test", "streaming": True}


def test_missing_column(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    load(monkeypatch, Made(["a"], "body"))
    expected = f"{ORIGIN}: data.text_column: no column 'text' in user/set; there are: id, body; write one of them"
    assert fault(DataSection(source="user/set")) == expected


def test_row_without_text(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    load(monkeypatch, Made(["a", None]))
    what = "column 'text' holds null, not text; name another column, or leave the row out"
    assert fault(DataSection(source="user/set")) == f"user/set row 2: data.text_column: {what}"


@pytest.mark.parametrize("error", [FileNotFoundError("no set\nmore"), ValueError("no set"), ConnectionError("no set.")])
def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, online: None, error: Exception) -> None:
    load(monkeypatch, error)
    text = fault(DataSection(source="user/set"))
    assert text.startswith(
        f"{ORIGIN}: data.source: 'user/set' is no file or folder here, and the hub says: no set; use"
    )


def test_offline_says_what_to_use_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, ConnectionError("Couldn't reach it"))
    text = fault(DataSection(source="user/set"))
    assert "the Hugging Face hub cannot be reached; use data.source: embedded, or a folder of files: .txt" in text


def test_offline_is_quick_with_the_real_library() -> None:
    # tests/conftest.py says HF_HUB_OFFLINE=1.
    assert "cannot be reached" in fault(DataSection(source="user/set"))


def test_offline_by_choice_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked"))
    assert not reachable()


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, True),
        (urllib.error.HTTPError("", 404, "no", {}, None), True),  # type: ignore[arg-type]
        (urllib.error.URLError("no name"), False),
        (TimeoutError(), False),
    ],
)
def test_reachable_is_whatever_answers(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception | None, expected: bool
) -> None:
    class Response:
        def close(self) -> None: ...

    def urlopen(request: urllib.request.Request, timeout: float) -> Response:
        assert request.full_url == "http://hub.example"
        if outcome:
            raise outcome
        return Response()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert reachable() is expected


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "_answers", lambda seconds: released.wait(30))
    assert not reachable(0.05)
    assert not released.is_set()
    released.set()


def test_tokenizer_of_the_hub(monkeypatch: pytest.MonkeyPatch, online: None, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, file: str, local_files_only: bool) -> str:
        asked.append((name, file, local_files_only))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert hub_tokenizer_file("user/model", ORIGIN) == tmp_path / "tokenizer.json"
    assert asked == [("user/model", "tokenizer.json", False)]


@pytest.mark.parametrize("name", ["user/model", "not a name at all!"])
def test_tokenizer_offline(name: str) -> None:
    with pytest.raises(DataError) as raised:
        hub_tokenizer_file(name, ORIGIN)
    assert str(raised.value).startswith(
        f"{ORIGIN}: data.tokenizer: {name!r} is no file or folder here, and the Hugging"
    )
    assert str(raised.value).endswith("use data.tokenizer: train, or a tokenizer.json")


def test_tokenizer_that_is_not_cached() -> None:
    assert cached_tokenizer_file("user/model") is None
    assert cached_tokenizer_file("not a name at all!") is None


@pytest.mark.parametrize("streaming", [False, True])
def test_the_real_library_on_a_folder(tmp_path: Path, streaming: bool, online: None) -> None:
    (tmp_path / "set").mkdir()
    rows = "".join(f'{{"id": {number}, "text": "text {number}"}}\n' for number in range(700))
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    data = DataSection(source="user/set", streaming=streaming)
    assert list(hub_texts(data, str(tmp_path / "set"), ORIGIN)) == [f"text {number}" for number in range(700)]
    with pytest.raises(DataError, match="no column 'body' in .*; there are: id, text"):
        list(hub_texts(DataSection(text_column="body", streaming=streaming), str(tmp_path / "set"), ORIGIN))
    with pytest.raises(DataError, match="the hub says: "):
        list(hub_texts(DataSection(split="elsewhere", streaming=streaming), str(tmp_path / "set"), ORIGIN))


def test_gated_sets_say_how_to_get_in(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    error = DatasetNotFoundError("Dataset 'user/set' is a gated dataset on the Hub. You must be authenticated.")
    error.__cause__ = GatedRepoError.__new__(GatedRepoError)  # a real one is made of a response
    load(monkeypatch, error)
    text = fault(DataSection(source="user/set"))
    assert text.startswith(f"{ORIGIN}: data.source: the hub says: Dataset 'user/set' is a gated dataset on the Hub.")
    assert text.endswith("; ask for access on its page, then say who you are by HF_TOKEN or: hf auth login")


def test_absent_sets_and_scripts(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    from datasets.exceptions import DatasetNotFoundError

    for error in (
        DatasetNotFoundError("Dataset 'user/set' doesn't exist on the Hub or cannot be accessed."),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
    ):
        load(monkeypatch, error)
        assert f"the hub says: {str(error).rstrip('.')}; use data.source" in fault(DataSection(source="user/set"))


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_another_type(tmp_path: Path, streaming: bool, online: None) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": 1, "text": "a", "tags": ["a"]}\n')
    for column, kind in (("id", "int64"), ("tags", "List")):
        with pytest.raises(DataError, match=f"column '{column}' of .* holds {kind}, not text; there is text in: text;"):
            data = DataSection(source="user/set", text_column=column, streaming=streaming)
            list(hub_texts(data, str(tmp_path), ORIGIN))


def test_a_state_of_another_set(tmp_path: Path, online: None) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    data = DataSection(source="user/set", streaming=True)
    with pytest.raises(DataError, match=r"cannot go on after row 7: it is another data set than it was; use another"):
        list(HubRows(data, str(tmp_path), ORIGIN, {"other": 1}, 7))


def test_faults_of_the_code_are_not_those_of_the_set(monkeypatch: pytest.MonkeyPatch, online: None) -> None:
    made = Made(["a"])
    monkeypatch.setattr(made, "iter", lambda batch_size: iter([1 / 0 for _ in range(batch_size)]))
    load(monkeypatch, made)
    with pytest.raises(ZeroDivisionError):
        list(hub_texts(DataSection(source="user/set"), "user/set", ORIGIN))
