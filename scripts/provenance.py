"""What a measurement was made with: versions, commit, command."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from typing import Any


def provenance() -> dict[str, Any]:
    """Return the command, the commit, whether files differ from it, and the versions that a result depends on."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "command": " ".join(sys.argv),
        "commit": _git("rev-parse", "HEAD"),
        "edited": bool(_git("status", "--porcelain", "--", "bigtrain", "recipes", "scripts")),
        "python": platform.python_version(),
        "versions": versions,
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
