from __future__ import annotations

import jsonschema
import pytest
from pydantic import TypeAdapter, ValidationError

from bigtrain.config.dump import to_yaml
from bigtrain.config.keys import expects, nullable, show
from bigtrain.config.load import read_recipe
from bigtrain.config.mixture import Mixture, MixtureSource
from bigtrain.config.reference import json_schema
from bigtrain.config.yaml_reader import read_yaml
from bigtrain.errors import RecipeError

RECIPE = """\
name: r
model: {family: bert, preset: bert-tiny}
data:
  mixture:
    - {source: user/set, weight: 2, subset: "20231101.en", streaming: true}
    - source: [a.txt, b.txt]
      weight: 0.5
      text_column: "a, b"
train: {objective: mlm, steps: 100}
optimizer: {learning_rate: 0}
"""


def read(*overrides):
    return read_recipe(RECIPE.encode(), "r.yaml", overrides)


def fault(mixture):
    with pytest.raises(RecipeError) as raised:
        read(f"data.mixture={mixture}")
    return str(raised.value)


def test_sources_and_weights():
    first, second = read().data.mixture
    assert first == MixtureSource(source="user/set", weight=2, subset="20231101.en", streaming=True)
    assert (second.source, second.weight, second.split) == (["a.txt", "b.txt"], 0.5, None)
    assert read("data.mixture=null").data.mixture is None


def test_written_out_it_reads_the_same():
    text = to_yaml(read())
    assert "  mixture: [{source: user/set, weight: 2.0, subset: 20231101.en, streaming: true}, {source: [" in text
    assert read_recipe(text.encode(), "p.yaml") == read()
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(read_yaml(text, str).value)
    assert not validator.is_valid(read_yaml(text.replace("weight", "weigth"), str).value)


def test_in_words():
    assert nullable("data.mixture")
    assert expects("data.mixture") == "a list of sources such as {source: corpus.txt, weight: 1}, or null"
    assert show("data.mixture", read().data.mixture[:1]).startswith("[source 'user/set', weight 2.0, subset ")


@pytest.mark.parametrize(
    ("mixture", "text"),
    [
        ("3", "3 is not a list of sources such as {source: corpus.txt, weight: 1}, or null"),
        ("[]", "[] is not a list of sources such as {source: corpus.txt, weight: 1}, or null"),
        ("{source: a, weight: 1}", "a mapping is not a list of sources such as {source: corpus.txt, weight: 1}"),
        ("[a.txt]", "source 1 is no mapping; write {source: corpus.txt, weight: 1}"),
        ("[{source: a}]", "source 1: 'weight' is missing; write {source: corpus.txt, weight: 1}"),
        ("[{source: a, weight: 1}, {weight: 1}]", "source 2: 'source' is missing; write {source: corpus.txt"),
        ("[{source: a, weigth: 1}]", "source 1: 'weigth' is no key of a source; did you mean 'weight'?"),
        ("[{source: a, weight: 1, x: 1}]", "source 1: 'x' is no key of a source; there are source, weight, subset, "),
        ("[{source: a, weight: -1}]", "source 1: weight -1 is not a number of 0 or more"),
        ("[{source: a, weight: .inf}]", "source 1: weight inf is not a number of 0 or more"),
        ("[{source: a, weight: .nan}]", "source 1: weight nan is not a number of 0 or more"),
        (f"[{{source: a, weight: 1{'0' * 400}}}]", "source 1: weight inf is not a number"),
        ("[{source: a, weight: true}]", "source 1: weight True is not a number of 0 or more"),
        ("[{source: a, weight: half}]", "source 1: weight 'half' is not a number of 0 or more"),
        ("[{source: a, weight: 0}, {source: b, weight: 0}]", "the weights sum to 0; give at least one source a weight"),
        ("[{source: a, weight: 1e308}, {source: b, weight: 1e308}]", "the weights sum to inf; give at least one"),
        (f"[{{source: a, weight: 1{'0' * 308}}}, {{source: b, weight: 1{'0' * 308}}}]", "the weights sum to inf; give"),
        ("[{source: [], weight: 1}]", "source 1: source [] is not text; write it in quotes"),
        ("[{source: a, weight: 1, split: 3}]", "source 1: split 3 is not text; write it in quotes"),
        ("[{source: a, weight: 1, streaming: 2}]", "source 1: streaming 2 is not true or false"),
    ],
)  # fmt: skip
def test_wrong_mixtures(mixture, text):
    assert fault(mixture).startswith(f"command line: data.mixture: {text}")
    assert "\n" not in fault(mixture)


def test_a_weight_that_no_float_holds():
    with pytest.raises(ValidationError, match="source 1: weight 1000+ is not a number of 0 or more"):
        TypeAdapter(Mixture).validate_python([{"source": "a", "weight": 10**400}])


def test_an_override_of_the_source_takes_the_place_of_the_mixture():
    data = read("data.source=other.txt").data
    assert (data.source, data.mixture) == ("other.txt", None)
    one = RECIPE.replace("mixture:", "source: a.txt").partition("    - {")[0] + "train:" + RECIPE.partition("train:")[2]
    data = read_recipe(one.encode(), "r.yaml", ["data.mixture=[{source: embedded, weight: 1}]"]).data
    assert data.source == "embedded" and len(data.mixture) == 1
