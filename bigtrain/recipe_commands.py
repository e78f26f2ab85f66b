"""`bigtrain recipes`: the shipped recipes listed, shown and copied; and files of the user's written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigtrain.errors import InputError

recipes_app = typer.Typer(help="The shipped recipes.", invoke_without_command=True, rich_markup_mode=None)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        from bigtrain.config.shipped import headline, shipped_recipes

        found = shipped_recipes()
        width = max(map(len, found))
        for name, path in found.items():
            print(f"{name:{width}}  {headline(path)}")
        print("\nnext: bigtrain recipes show NAME, or bigtrain launch NAME")


@recipes_app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Print a shipped recipe."""
    from bigtrain.config.shipped import recipe_path

    print(recipe_path(name).read_text(encoding="utf-8"), end="")


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME")], file: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a shipped recipe to a file of your own; nothing is written over."""
    from bigtrain.config.shipped import recipe_path

    write_file(file, recipe_path(name).read_text(encoding="utf-8"), "x")
    print(f"{file}: written; next: bigtrain launch {file}")


def folder_named(text: str | Path) -> Path:
    """Return the folder that an option names. Raises typer.BadParameter for an empty or an impossible name."""
    if not str(text):
        raise typer.BadParameter("it is empty; name a folder")
    folder = Path(text)
    try:
        folder.exists()
    except OSError as error:
        raise typer.BadParameter(f"{error.strerror}; name another folder") from None
    return folder


def write_file(file: Path, text: str, mode: str) -> None:
    """Write a file that was named on the command line; mode "x" writes over nothing.

    Raises InputError if it cannot be.
    """
    try:
        with file.open(mode, encoding="utf-8") as target:
            target.write(text)
    except OSError as error:
        raise InputError(f"command line: {file}: {error.strerror}; name another file") from error
