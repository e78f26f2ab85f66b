"""What a measurement was made with: versions, commit, command."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the command, the commit, whether files differ from it, and the versions that a result depends on.

    A library that is not there has version None. Where this is no checkout, the commit is the environment's COMMIT, or
    empty, and nobody knows whether files differ: None. `sources` is the environment's SOURCES, where it is given.
    """
    commit = _git("rev-parse", "HEAD")
    edited = bool(_git("status", "--porcelain", "--", "bigtrain", "recipes", "scripts")) if commit else None
    versions = {name: _version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "command": " ".join(sys.argv),
        "commit": commit or os.environ.get("COMMIT", ""),
        "edited": edited,
        **({"sources": os.environ["SOURCES"]} if "SOURCES" in os.environ else {}),
        "python": platform.python_version(),
        "versions": versions,
    }


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
