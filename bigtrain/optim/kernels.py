"""Which kernels of other libraries are there. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def nvidia_apex_present() -> bool:
    """Tell whether NVIDIA's apex, compiled with its CUDA kernels, is installed; nothing is imported.

    PyPI's `apex` is another package: what counts is the compiled module `amp_C` beside `apex/optimizers/fused_lamb.py`.
    """
    if importlib.util.find_spec("amp_C") is None:
        return False
    apex = importlib.util.find_spec("apex")
    folders = (apex.submodule_search_locations or ()) if apex else ()
    return any((Path(folder) / "optimizers" / "fused_lamb.py").is_file() for folder in folders)
