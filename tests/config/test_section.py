from __future__ import annotations

import pytest
from pydantic import ValidationError

from bigtrain.config.section import Section


class Small(Section):
    steps: int = 3


def test_strict_closed_and_immutable():
    assert Small(steps=4).steps == 4
    for values in ({"steps": "4"}, {"steps": 4.0}, {"step": 4}):
        with pytest.raises(ValidationError):
            Small.model_validate(values)
    with pytest.raises(ValidationError, match="frozen"):
        Small().steps = 5
