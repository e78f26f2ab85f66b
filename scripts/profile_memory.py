"""`bigtrain profile` as a script: a few real steps, measured beside predicted, by cause, by block, over time.

    python scripts/profile_memory.py RECIPE [KEY=VALUE ...] [--json] [--html FILE] [--png FILE]
    python scripts/profile_memory.py --model MODULE:CALLABLE [--json] [--html FILE] [--png FILE]

The callable returns a model and a sample batch; its module is also looked for in the current folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the launcher sets it, before torch starts

from bigtrain.errors import BigtrainError, InputError
from bigtrain.profiling.result import Profile


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile what the arguments name and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    try:
        present_profile(options)
    except BigtrainError as error:
        return error.report()
    return 0


def present_profile(options: argparse.Namespace) -> None:
    """Profile a recipe or a model and show what was found."""
    from bigtrain.profiling.output import check_writable, present

    if (options.recipe is None) == (options.model is None):
        raise InputError("command line: give either a recipe or --model MODULE:CALLABLE")
    check_writable(options.html, options.png)
    profile = _of_model(options.model) if options.model else _of_recipe(options.recipe, options.overrides)
    present(profile, as_json=options.json, html=options.html, png=options.png)


def _of_recipe(recipe: str, overrides: list[str]) -> Profile:
    from bigtrain.config.load import load_recipe
    from bigtrain.planner.plan import plan
    from bigtrain.profiling.recipe import profile_recipe

    return profile_recipe(plan(load_recipe(recipe, overrides)))


def _of_model(name: str) -> Profile:
    from bigtrain.profiling.model import load_model, profile_model

    model, sample = load_model(name)
    return profile_model(model, sample)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys to change")
    parser.add_argument("--model", metavar="MODULE:CALLABLE", help="a model of your own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture")
    return parser


if __name__ == "__main__":
    sys.exit(main())
