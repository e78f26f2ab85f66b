from __future__ import annotations

import pytest
from pydantic import ValidationError

from bigtrain.config import schema
from bigtrain.config.data_section import DataSection
from bigtrain.config.keys import schema_keys
from bigtrain.config.reference import key_meanings


def test_it_is_the_recipe_s_own():
    assert schema.DataSection is DataSection
    assert schema.Recipe.model_fields["data"].default == DataSection()


def test_by_default_every_document_is_read():
    data = DataSection()
    assert (data.mixture, data.max_characters, data.max_tokens) == (None, None, None)
    assert (data.min_characters, data.min_letters, data.deduplicate) == (0, 0.0, False)


def test_every_key_says_what_it_means():
    meanings = key_meanings()
    assert all(meanings[key] for key in schema_keys() if key.startswith("data."))
    assert "16 bytes" in meanings["data.deduplicate"]


@pytest.mark.parametrize("values", [{"min_letters": 1.0}, {"max_tokens": 0}, {"deduplicate": 1}, {"source": []}])
def test_wrong_values(values):
    with pytest.raises(ValidationError):
        DataSection.model_validate(values)
