"""A profile where the user wants it: in the terminal, as JSON, as a page, as a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bigtrain.errors import InputError
from bigtrain.memory.picture import page, picture
from bigtrain.profiling.result import Profile


def check_writable(*files: Path | None) -> None:
    """Raise InputError for a file that could not be written, before anything is measured for it."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            what = "is a folder" if file.is_dir() else f"{file.parent} is no folder that can be written"
            raise InputError(f"command line: {file}: {what}; name another file")


def present(profile: Profile, *, as_json: bool = False, html: Path | None = None, png: Path | None = None) -> None:
    """Print a profile, as a table or as one JSON object, and write it to files.

    Raises InputError for a file that cannot be written, after printing: what was measured is not lost.
    """
    found = profile.as_object()
    print(json.dumps(found, indent=1) if as_json else "\n".join(profile.lines()), flush=True)
    if html is not None:
        try:
            html.write_text(page(found), encoding="utf-8")
        except OSError as error:
            raise InputError(f"command line: {html}: {error.strerror}; name another file") from error
    if png is not None:
        picture(found, png)
