"""The command line: reads arguments, calls the library, prints; decides nothing."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from traceback import print_exception
from typing import Annotated, Any, Literal

import typer

from bigtrain import run_commands, terminal
from bigtrain.arguments import Overrides, RecipeArgument, command_line, flags_first, load, settings
from bigtrain.completion import complete_device
from bigtrain.errors import BigtrainError, InputError
from bigtrain.plan_commands import plan, print_plan
from bigtrain.recipe_commands import folder_named, recipes_app

app = typer.Typer(
    name="bigtrain",
    help="Pretrain BERT- and GPT-class models from one recipe file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.callback()(settings)
app.add_typer(recipes_app, name="recipes")
app.command()(plan)
run_commands.add_to(app)

UsageFault: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What wrong arguments raise; newer versions of Typer bring their own copy of click, so its name has no fixed home."""

NEEDED = ("torch", "matplotlib")
"""Libraries without which some commands work and others do not."""

Scheduler = Literal["slurm", "kubernetes", "trainjob"]


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(parser=folder_named, metavar="DIR", help="The run folder; runs/NAME without it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and plan only, print both.")] = False,
    allow: Annotated[list[str] | None, typer.Option(metavar="KEY", help="A key that may differ on resume.")] = None,
    render: Annotated[Scheduler | None, typer.Option(help="Print a scheduler's job file, submit nothing.")] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --render: the device to plan for.", autocompletion=complete_device),
    ] = None,
) -> None:
    """Plan, then train; the same command again resumes."""
    from bigtrain.config.trackers import check_trackers
    from bigtrain.launcher import fetch_tokenizer, plan_again, started_ranks
    from bigtrain.launcher import launch as start
    from bigtrain.rendering import Command, check_local, job_file
    from bigtrain.restarts import stoppable

    if render is None and device is not None:
        raise InputError(f"command line: --device: {device}: a run takes what is here; add --render, or use plan")
    if render is not None and dry_run:
        raise InputError("command line: --dry-run: --render starts nothing either; leave out one of them")
    loaded = load(recipe, overrides)
    if render is not None:
        typed = Command(recipe, tuple(overrides or ()), run_dir, tuple(allow or ()))
        print(job_file(render, loaded, typed, device=device), end="")
        return
    folder = run_dir or Path("runs") / loaded.name
    if not dry_run:
        check_local(loaded)
        check_trackers(loaded)
        with stoppable(folder):
            fetch_tokenizer(loaded)
    with terminal.working("planning", aside=dry_run):
        planned = plan_again(loaded, folder)
    if dry_run:
        print(planned.to_yaml())
        print_plan(planned)
        terminal.tell_next(command_line("launch", recipe, overrides))
        return
    code = start(planned, folder, allowed=allow or [], written=loaded)
    world = started_ranks(loaded)
    if code == 0 and (world is None or world.first):
        example = "The [MASK] of the file." if planned.model.family == "bert" else "def "
        terminal.tell(f"{folder}: done; look at {folder / 'report.html'}")
        asked = shlex.join(["bigtrain", "generate", str(folder), "--prompt", example])
        terminal.tell_next(asked, shlex.join(["bigtrain", "export", str(folder), f"{folder.name}-hf"]))
    raise typer.Exit(code)


@app.command()
def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    of_time: Annotated[bool, typer.Option("--time", help="Where a step's time goes, in place of memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that needs no network.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
) -> None:
    """Run a few real steps: memory beside predicted, or time. By cause and by block; with --time by what runs."""
    from bigtrain.launcher import adopt_environment, on_ranks_here, profile_ranks
    from bigtrain.planner.plan import plan as make_plan

    planned = make_plan(on_ranks_here(load(recipe, overrides)))
    adopt_environment(planned.hardware.kind)
    from bigtrain.profiling.output import check_writable, present, profiled

    check_writable(html, png)
    if planned.world_size > 1:
        code = profile_ranks(planned, of_time=of_time, as_json=as_json, html=html, png=png)
    else:
        with terminal.working("taking steps that are measured", aside=True):
            found = profiled(planned, of_time=of_time)
        present(found, as_json=as_json, html=html, png=png)
        code = 0
    if code == 0:
        _tell_written(html, png, aside=as_json)
        terminal.tell_next(command_line("launch", recipe, overrides), aside=as_json)
    raise typer.Exit(code)


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Read or download the data, tokenize them into shards. Trains the tokenizer if asked; goes on where it stopped."""
    from bigtrain.data.ensure import ensure_prepared

    loaded = load(recipe, overrides)
    corpus = ensure_prepared(loaded)
    counts = corpus.counts("train")
    print(f"{corpus.folder}: {counts.documents:,} documents, {counts.tokens:,} tokens to train on")
    terminal.tell_next(command_line("launch", recipe, overrides))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what this machine has, what is wrong, what to do. And what of it bigtrain will use."""
    from bigtrain.doctor import examine, lines

    with terminal.working("measuring", aside=as_json):
        findings = examine()
    faults = sum(finding.is_fault for finding in findings)
    if as_json:
        print(json.dumps({"faults": faults, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        print("\n".join(lines(findings)))
        terminal.tell_next("bigtrain doctor" if faults else "bigtrain recipes")
    raise typer.Exit(1 if faults else 0)


def main() -> None:
    """Run the command line; wrong input is one line a fault on standard error, and exit code 2."""
    try:
        code = app(flags_first(sys.argv[1:]), prog_name="bigtrain", standalone_mode=False)
    except BigtrainError as error:
        if terminal.is_verbose():
            print_exception(error)
        code = error.report()
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(f"error: this needs {error.name}, which is not installed: pip install {error.name}", file=sys.stderr)
        code = 1
    except UsageFault as error:
        if len(sys.argv) < 2:  # no wrong word, but none at all: the message is the help
            print(error.format_message())
            sys.exit(2)
        print(f"error: command line: {error.format_message().rstrip('.')}; see bigtrain --help", file=sys.stderr)
        code = 2
    sys.exit(code)


def _tell_written(*files: Path | None, aside: bool) -> None:
    for file in files:
        if file is not None:
            terminal.tell(f"{file}: written", aside=aside)
