"""From a file to a Recipe, strictly."""

from __future__ import annotations

import os
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.checks import recipe_faults
from bigtrain.config.keys import schema_keys, sections
from bigtrain.config.load import LARGEST_FILE, load_recipe, read_recipe
from bigtrain.config.unbuilt import BUILT, unbuilt_faults
from bigtrain.errors import RecipeError

RECIPE = """\
model: {family: bert, preset: bert-base}
train:
  objective: mlm
  steps: 100
optimizer:
  learning_rate: 6e-4
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(content, name="r.yaml"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


def error_of(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def test_load(written):
    recipe = load_recipe(written(RECIPE), ["train.steps=7"])
    assert (recipe.name, recipe.train.steps, recipe.optimizer.learning_rate) == ("r", 7, 6e-4)
    assert recipe.origin("optimizer.learning_rate") == "r.yaml:6"
    assert recipe.origin("train.steps") == "command line"


def test_a_path_object_and_an_absolute_path(written, tmp_path):
    written(RECIPE)
    assert load_recipe(tmp_path / "r.yaml").origin("train") == f"{tmp_path}/r.yaml:2"


def test_byte_order_mark_and_carriage_returns(written):
    content = b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode()
    recipe = load_recipe(written(content))
    assert recipe.origin("optimizer.learning_rate") == "r.yaml:6"


def test_the_file_names_the_run_unless_it_says_so(written):
    assert load_recipe(written(RECIPE, "my-run.yaml")).name == "my-run"
    assert load_recipe(written(RECIPE + "name: other\n")).name == "other"
    assert load_recipe(written(RECIPE, "my run é 2.yaml")).name == "my-run-2"
    assert load_recipe(written(RECIPE, "文書.yaml")).name == "recipe"


def test_a_section_of_comments_alone_is_empty(written):
    assert load_recipe(written(RECIPE + "data:\n  # nothing yet\n")).data.sequence_length == 512


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "r.yaml: the file is empty"),
        (b"# nothing\n", "r.yaml: the file is empty"),
        (b"\xef\xbb\xbf", "r.yaml: the file is empty"),
        (b"- a\n", "r.yaml: a recipe is a mapping of sections such as 'model:'"),
        (b"just text", "r.yaml: a recipe is a mapping of sections such as 'model:'"),
        (b"a: 1\nb: \xff\n", "r.yaml: not UTF-8 at byte 8 (0xff); save the file as UTF-8"),
        (RECIPE.encode("utf-16"), "r.yaml: not UTF-8 at byte 0 (0xff); save the file as UTF-8"),
        (b"a: [", "r.yaml:1: broken YAML: a bracket or quote that is not closed; close it"),
        (b"a: 1\n---\nb: 1", "r.yaml:2: a second document starts here; a recipe is one document"),
        (b" " * (LARGEST_FILE + 1), "r.yaml: larger than 256 KiB; this is not a recipe"),
    ],
)
def test_files_that_are_no_recipe(written, content, line):
    text = error_of(written(content))
    assert text.startswith(line) or line in text.splitlines()


def test_a_broken_file_and_a_broken_override_are_told_together(written):
    text = error_of(written(b"a: ["), "train.stps=4", "seed=5")
    assert [line.split(":")[0] for line in text.splitlines()] == ["r.yaml", "command line"]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("bert_larg", "bert_larg: no such file; did you mean 'bert_large'?"),
        ("rr.yaml", "rr.yaml: no such file; did you mean 'r.yaml'?"),
        ("no/such/bert_large.yaml", "no/such/bert_large.yaml: no such file; did you mean 'bert_large'?"),
        ("zzzzzzzz", "zzzzzzzz: no such file; the shipped recipes are bert_base, "),
        (".", ".: is a folder; name a recipe file in it"),
        ("a\0b", "'a\\x00b': "),
        ("a\nb", "'a\\nb': no such file"),
        ("x" * 300, "x" * 300 + ": "),
        ("", ".: is a folder"),
    ],
)
def test_paths(written, path, line):
    written(RECIPE)
    assert error_of(path).startswith(line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(written):
    name = written(RECIPE)
    os.chmod(name, 0)  # noqa: PTH101
    assert error_of(name) == "r.yaml: cannot be read: Permission denied"


def test_a_shipped_recipe_by_name(written):
    assert load_recipe("quickstart_gpt", ["seed=3"]).seed == 3
    written(RECIPE, "quickstart_gpt")
    assert load_recipe("quickstart_gpt").model.family == "bert", "a file of that name comes first"


def test_faults_come_in_stages(written, monkeypatch):
    monkeypatch.setitem(BUILT, "logging.sample_every", (None,))
    name = written(RECIPE + "amp: {precison: bf16}\n")
    unbuilt, unfit = "logging.sample_every=5", "model.num_attention_heads=5"
    assert error_of(name, unbuilt, unfit).splitlines() == [
        "r.yaml:7: amp.precison: unknown key; did you mean 'precision'?"
    ]
    name = written(RECIPE)
    assert "num_attention_heads" in error_of(name, unbuilt, unfit)
    assert "not in this version" in error_of(name, unbuilt)


def test_read_recipe_asks_the_schema_alone():
    recipe = read_recipe(RECIPE.replace("bert-base", "nonsense").encode(), "x", name="r")
    assert recipe.model.preset == "nonsense"


def test_loading_imports_nothing_heavy():
    code = "import sys, bigtrain.config.load; print(*sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    loaded = set(out.stdout.split())
    assert not loaded & {"torch", "numpy", "rich", "datasets", "tokenizers", "transformers", "pyarrow", "typer"}


words = st.sampled_from(
    [
        *sections(),
        *(key.rpartition(".")[2] for key in schema_keys()),
        "bert",
        "auto",
        "null",
        "6e-4",
        "16GiB",
        "32B",
        "[1, 2]",
        "{a: b}",
    ]
)
lines = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", " ", "  ", "    ", "\t", "- "]),
    words,
    st.sampled_from([":", ": ", " ", ":\t", ": &a ", ": *a", ": !t "]),
    words,
)


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(st.lists(lines, max_size=8).map("\n".join), st.text(string.printable, max_size=60), st.text(max_size=30))
)
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    try:
        read_recipe(text.encode("utf-8", "surrogatepass"), "r.yaml")
    except RecipeError as error:
        assert error.faults
        assert len(str(error).splitlines()) == len(error.faults)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_are_a_recipe_error(content):
    with pytest.raises(RecipeError):
        read_recipe(content, "r.yaml")


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20), st.builds("{}={}".format, st.sampled_from(list(schema_keys())), st.text(max_size=15))
        ),
        max_size=4,
    )
)
def test_any_override_is_taken_or_a_recipe_error(overrides):
    try:
        read_recipe(RECIPE.encode(), "r.yaml", overrides)
    except RecipeError as error:
        assert len(str(error).splitlines()) == len(error.faults)


WELL_WRITTEN = (
    RECIPE,
    f"{RECIPE}data:\n  source: embedded\n  sequence_length: 128\ncluster: {{nodes: 1, timeout: 60s}}\n",
)
NASTY = (
    *(
        "",
        " ",
        "\t",
        "\n",
        "\n\n  ",
        ": ",
        "- ",
        "? ",
        "#",
        "# ",
        ",",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "|",
        ">",
        "%",
        "@",
        "`",
    ),
    *(
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!x ",
        "<<: *a",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\ufeff",
        "\x00",
        "\u2028",
    ),
    *(
        "~",
        "null",
        "no",
        "on",
        ".nan",
        "-.inf",
        "1e400",
        "0x10",
        "1_0",
        "9" * 50,
        "-1",
        "1:30",
        "24GiB",
        "6%",
        "é",
        "文",
        "\U0001f600",
    ),
    *("model: ", "steps: 5\n", "train: {}\n", "[embedded, embedded]", "a.b", "'x': ", "\\", "\r", "\r\n", "\x85"),
)
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(NASTY)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=3100, deadline=None)
@given(st.sampled_from(WELL_WRITTEN), edits)
def test_any_change_of_a_recipe_is_a_recipe_or_a_recipe_error(text, changes):
    """With the tests above 5,000 texts; what is read must also pass through the checks."""
    for place, dropped, put in changes:
        at = round(place * len(text))
        text = text[:at] + put + text[at + dropped :]
    try:
        recipe = read_recipe(text.encode("utf-8", "surrogatepass"), "r.yaml")
    except RecipeError as error:
        assert error.faults
        lines = str(error).splitlines()
        assert len(lines) == len(error.faults)
        assert all(line.startswith("r.yaml") and line.isprintable() for line in lines)
        return
    assert all(str(fault).isprintable() for fault in recipe_faults(recipe) or unbuilt_faults(recipe))
