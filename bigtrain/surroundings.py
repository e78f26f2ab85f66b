"""Where a command runs: versions and places, in a line for people. Nothing heavy is imported."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import bigtrain
from bigtrain.config.schema import DataSection
from bigtrain.data.cache import cache_folder

LIBRARIES = ("torch", "numpy", "datasets", "tokenizers")


def surroundings() -> str:
    """Return the versions of what a run depends on, and where the package and the cache are."""
    libraries = ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)
    places = f"package {Path(bigtrain.__file__).parent}, cache {cache_folder(DataSection.model_construct(cache=None))}"
    python = f"Python {platform.python_version()}"
    return f"bigtrain {bigtrain.__version__}, {python}, {libraries}, {platform.platform()}; {places}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
