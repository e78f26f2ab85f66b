"""The command line: reads arguments, calls the library, prints; decides nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bigtrain import run_commands
from bigtrain.errors import BigtrainError, DoesNotFit, InputError
from bigtrain.recipe_commands import folder_named, recipes_app, write_file

if TYPE_CHECKING:
    from bigtrain.config.schema import Recipe
    from bigtrain.planner.hardware import Hardware
    from bigtrain.planner.plan import Plan

app = typer.Typer(
    name="bigtrain",
    help="Pretrain BERT- and GPT-class models from one recipe file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(recipes_app, name="recipes")
run_commands.add_to(app)

UsageFault: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What wrong arguments raise; newer versions of Typer bring their own copy of click, so its name has no fixed home."""

NEEDED = ("torch", "matplotlib")
"""Libraries without which some commands work and others do not."""

Scheduler = Literal["slurm", "kubernetes", "trainjob"]

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as train.steps=20.")
]


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
    device: Annotated[str | None, typer.Option(metavar="NAME", help="With --render: the device to plan for.")] = None,
) -> None:
    """Plan, then train; the same command again resumes."""
    from bigtrain.launcher import fetch_tokenizer, plan_again, started_ranks
    from bigtrain.launcher import launch as start
    from bigtrain.rendering import Command, check_local, job_file
    from bigtrain.restarts import stoppable

    if render is None and device is not None:
        raise InputError(f"command line: --device: {device}: a run takes what is here; add --render, or use plan")
    if render is not None and dry_run:
        raise InputError("command line: --dry-run: --render starts nothing either; leave out one of them")
    loaded = _load(recipe, overrides)
    if render is not None:
        typed = Command(recipe, tuple(overrides or ()), run_dir, tuple(allow or ()))
        print(job_file(render, loaded, typed, device=device), end="")
        return
    folder = run_dir or Path("runs") / loaded.name
    if not dry_run:
        check_local(loaded)
        with stoppable(folder):
            fetch_tokenizer(loaded)
    planned = plan_again(loaded, folder)
    if dry_run:
        print(planned.to_yaml())
        _print_plan(planned)
        return
    code = start(planned, folder, allowed=allow or [], written=loaded)
    world = started_ranks(loaded)
    if code == 0 and (world is None or world.first):
        example = '"The [MASK] of the file."' if planned.model.family == "bert" else '"def "'
        print(f"{folder}: done; look at {folder / 'report.html'}, or: bigtrain generate {folder} --prompt {example}")
    raise typer.Exit(code)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="A device of the table; cpu is this one.")] = None,
    memory_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="What a device may hold: 24GiB.")] = None,
    world_size: Annotated[
        str | None, typer.Option(metavar="N", help="So many ranks; 8..1024 compares each doubling.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show the speed at every memory budget.")] = False,
    png: Annotated[Path | None, typer.Option(help="With --sweep, or a range of ranks: draw it, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan, itself a recipe, to a file.")] = None,
) -> None:
    """Predict memory and speed without the device: the fastest choice that fits, and why the others lost."""
    from bigtrain.planner.scaling import world_sizes

    ranks = None if world_size is None else world_sizes(world_size)
    _check_flags(ranks, sweep=sweep, png=png, output=output)
    budget = [] if memory_budget is None else [f"memory.budget={memory_budget or repr(memory_budget)}"]
    loaded = _load(recipe, [*(overrides or []), *budget])
    hardware = _hardware(loaded, device)
    if isinstance(ranks, list):
        _scale(loaded, hardware, ranks, png, as_json)
        return
    if sweep:
        _sweep(loaded, hardware, ranks, png, as_json)
        return
    from bigtrain.planner.plan import plan as make_plan

    planned = make_plan(loaded, hardware, world_size=ranks)
    if output is not None:
        write_file(output, planned.to_yaml(), "w")
    if as_json:
        print(json.dumps(planned.as_object(), indent=1))
    else:
        _print_plan(planned)


@app.command()
def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page that needs no network.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture.")] = None,
) -> None:
    """Run a few real steps: memory measured beside predicted, by cause, by block, over time."""
    from bigtrain.launcher import adopt_environment, on_ranks_here, profile_ranks
    from bigtrain.planner.plan import plan as make_plan

    planned = make_plan(on_ranks_here(_load(recipe, overrides)))
    adopt_environment(planned.hardware.kind)
    from bigtrain.profiling.output import check_writable, present

    check_writable(html, png)
    if planned.world_size > 1:
        raise typer.Exit(profile_ranks(planned, as_json=as_json, html=html, png=png))
    from bigtrain.profiling.recipe import profile_recipe

    present(profile_recipe(planned), as_json=as_json, html=html, png=png)


@app.command()
def prepare(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Read or download the data, train the tokenizer if asked, tokenize into shards; goes on where it was stopped."""
    from bigtrain.data.ensure import ensure_prepared

    loaded = _load(recipe, overrides)
    corpus = ensure_prepared(loaded)
    counts = corpus.counts("train")
    print(f"{corpus.folder}: {counts.documents:,} documents, {counts.tokens:,} tokens to train on")
    print("next: " + " ".join(["bigtrain launch", recipe, *(overrides or [])]))


@app.command()
def doctor() -> None:
    """Show what this machine has, what of it bigtrain will use, and what is wrong."""
    from bigtrain.doctor import examine

    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{finding.mark}  {finding.what:{width}}  {finding.text}")
    raise typer.Exit(1 if any(finding.is_fault for finding in findings) else 0)


def main() -> None:
    """Run the command line; wrong input is one line a fault on standard error, and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except BigtrainError as error:
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


def _load(recipe: str, overrides: list[str] | None) -> Recipe:
    from bigtrain.config.load import load_recipe

    return load_recipe(recipe, overrides or [])


def _hardware(recipe: Recipe, device: str | None) -> Hardware | None:
    from bigtrain.planner.settle import named_hardware

    return None if device is None else named_hardware(recipe, device)


def _check_flags(ranks: int | list[int] | None, *, sweep: bool, png: Path | None, output: Path | None) -> None:
    several = "--sweep" if sweep else "a range of --world-size" if isinstance(ranks, list) else ""
    if sweep and isinstance(ranks, list):
        raise InputError("command line: --sweep: is of one world size; leave out --sweep, or write one --world-size")
    if png is not None and not several:
        raise InputError("command line: --png: draws what --sweep or a range of --world-size finds; add one of them")
    if several and output is not None:
        raise InputError(f"command line: --output: {several} is of many plans; leave it out, or --output")


def _scale(recipe: Recipe, hardware: Hardware | None, ranks: list[int], png: Path | None, as_json: bool) -> None:
    from bigtrain.planner.scaling import scale, scaling_lines, scaling_picture

    found = scale(recipe, hardware, ranks)
    if png is not None:
        scaling_picture({recipe.name: found}, png)
    if as_json:
        print(json.dumps([one.as_object() for one in found], indent=1))
    else:
        print("\n".join(scaling_lines(found)))
    if all(one.choice is None for one in found):
        raise typer.Exit(DoesNotFit.exit_code)


def _sweep(recipe: Recipe, hardware: Hardware | None, world_size: int | None, png: Path | None, as_json: bool) -> None:
    from bigtrain.planner.frontier import frontier_lines, frontier_picture
    from bigtrain.planner.plan import sweep

    points = sweep(recipe, hardware, world_size=world_size)
    if png is not None:
        frontier_picture(points, png)
    if as_json:
        print(json.dumps([point.as_object() for point in points], indent=1))
    else:
        print("\n".join(frontier_lines(points)))
    if all(point.choice is None for point in points):
        raise typer.Exit(DoesNotFit.exit_code)


def _print_plan(planned: Plan) -> None:
    from bigtrain.planner.show import plan_lines

    for line in plan_lines(planned):
        print(line)
