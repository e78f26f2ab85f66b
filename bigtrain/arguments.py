"""What several commands take from the command line, and what they print of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain import __version__, terminal
from bigtrain.completion import complete_device, complete_override, complete_recipe
from bigtrain.errors import InputError

if TYPE_CHECKING:
    from bigtrain.config.schema import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", autocompletion=complete_recipe
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Recipe keys to change, such as train.steps=20.",
        autocompletion=complete_override,
    ),
]
DeviceOption = typer.Option(
    metavar="NAME", help="A device of the table; cpu is this one.", autocompletion=complete_device
)

FLAGS = ("--quiet", "--verbose")
"""They may stand anywhere on the command line."""


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"bigtrain {__version__}")
        raise typer.Exit


def settings(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and results only; goes anywhere.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print versions, places and tracebacks, too; goes anywhere.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Set how much is said, by this process and by those that it starts."""
    if quiet and verbose:
        raise InputError("command line: --quiet: --verbose asks for the opposite; leave out one of them")
    if quiet or verbose:
        terminal.set_verbosity("quiet" if quiet else "verbose")
    if terminal.is_verbose():
        from bigtrain.surroundings import surroundings

        terminal.tell(surroundings(), aside=True)


def flags_first(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with --quiet and --verbose before the command; after `--` all stay."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    flags = [word for word in words[:end] if word in FLAGS]
    return [*flags, *(word for word in words[:end] if word not in FLAGS), *words[end:]]


def command_line(command: str, recipe: str, overrides: Sequence[str] | None = None) -> str:
    """Return a command on a recipe as a user types it."""
    return shlex.join(["bigtrain", command, recipe, *(overrides or [])])


def load(recipe: str, overrides: Sequence[str] | None) -> Recipe:
    """Return the recipe of a command. Raises RecipeError with every fault."""
    from bigtrain.config.load import load_recipe

    return load_recipe(recipe, overrides or [])
