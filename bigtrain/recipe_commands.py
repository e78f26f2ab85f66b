"""`bigtrain recipes`: the shipped ones listed, shown, copied; others' configurations translated; files written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain import terminal
from bigtrain.completion import complete_recipe
from bigtrain.errors import InputError

if TYPE_CHECKING:
    from bigtrain.translation.draft import Draft

recipes_app = typer.Typer(help="The shipped recipes.", invoke_without_command=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_recipe)]


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        from bigtrain.config.shipped import headline, shipped_recipes

        found = shipped_recipes()
        width = max(map(len, found))
        for name, path in found.items():
            print(f"{name:{width}}  {headline(path)}")
        terminal.tell("")
        terminal.tell_next("bigtrain recipes show NAME", "bigtrain launch NAME")


@recipes_app.command()
def show(name: NameArgument) -> None:
    """Print a shipped recipe."""
    from bigtrain.config.shipped import recipe_path

    print(recipe_path(name).read_text(encoding="utf-8"), end="")


@recipes_app.command()
def copy(name: NameArgument, file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Copy a shipped recipe to a file; nothing is written over."""
    from bigtrain.config.shipped import recipe_path

    write_file(file, recipe_path(name).read_text(encoding="utf-8"), "x")
    terminal.tell(f"{file}: written; next: {shlex.join(['bigtrain', 'launch', str(file)])}")


ConfigurationArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Their JSON file.")]
OutputOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the recipe to a new file.")]
RanksOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="The ranks it ran on; 1 without it.")]
ModelOption = Annotated[str | None, typer.Option(metavar="PRESET", help="A model, such as bert-base or gpt2-124m.")]


@recipes_app.command("from-deepspeed")
def from_deepspeed(
    file: ConfigurationArgument,
    output: OutputOption = None,
    world_size: RanksOption = None,
    model: ModelOption = None,
) -> None:
    """Translate a DeepSpeed configuration. What has no counterpart in a recipe is listed."""
    from bigtrain.translation.deepspeed import translate_deepspeed
    from bigtrain.translation.source import read_mapping

    _hand_over(translate_deepspeed(read_mapping(file), str(file), world_size=world_size, preset=model), output)


@recipes_app.command("from-trainer")
def from_trainer(
    file: ConfigurationArgument,
    output: OutputOption = None,
    world_size: RanksOption = None,
    model: ModelOption = None,
) -> None:
    """Translate arguments of transformers' Trainer. What has no counterpart in a recipe is listed."""
    from bigtrain.translation.source import read_mapping
    from bigtrain.translation.trainer import translate_trainer

    _hand_over(translate_trainer(read_mapping(file), str(file), world_size=world_size, preset=model), output)


def _hand_over(draft: Draft, output: Path | None) -> None:
    """Write or print a translated recipe; its notes go to standard error where nobody may see those below it."""
    if output is None:
        print(draft.text(), end="")
    else:
        write_file(output, draft.text(), "x")
    if output is not None or not sys.stdout.isatty():
        for note in draft.notes():
            print(note, file=sys.stderr)
    if output is not None:
        print(f"{output}: written; complete what is marked placeholder; next: bigtrain plan {output}")


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
