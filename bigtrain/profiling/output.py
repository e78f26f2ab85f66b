"""A profile where the user wants it: in the terminal, as JSON, as a page, as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bigtrain.errors import InputError
from bigtrain.planner.plan import Plan


class Shown(Protocol):
    """A profile, of memory or of time: what it is in each place where the user may want it."""

    def as_object(self) -> Mapping[str, Any]:
        """Return the object that is printed as JSON."""

    def lines(self) -> list[str]:
        """Return the lines for a terminal."""

    def page(self) -> str:
        """Return the page."""

    def picture(self, path: Path) -> None:
        """Write the picture. Raises InputError for a path that cannot be written."""


def check_writable(*files: Path | None) -> None:
    """Raise InputError for a file that could not be written, before anything is measured for it."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            what = "is a folder" if file.is_dir() else f"{file.parent} is no folder that can be written"
            raise InputError(f"command line: {file}: {what}; name another file")


def profiled(plan: Plan, *, of_time: bool) -> Shown:
    """Take a few real steps of a plan and return what they held, or where their time went."""
    if of_time:
        from bigtrain.profiling.step_time import time_recipe

        return time_recipe(plan)
    from bigtrain.profiling.recipe import profile_recipe

    return profile_recipe(plan)


def present(profile: Shown, *, as_json: bool = False, html: Path | None = None, png: Path | None = None) -> None:
    """Print a profile, as a table or as one JSON object, and write it to files.

    Raises InputError for a file that cannot be written, after printing: what was measured is not lost.
    """
    print(json.dumps(profile.as_object(), indent=1) if as_json else "\n".join(profile.lines()), flush=True)
    if html is not None:
        try:
            html.write_text(profile.page(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"command line: {html}: {error.strerror}; name another file") from error
    if png is not None:
        profile.picture(png)
