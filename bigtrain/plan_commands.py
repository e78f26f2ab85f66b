"""`bigtrain plan`: one plan, the frontier of memory and speed, or how it scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bigtrain import terminal
from bigtrain.arguments import DeviceOption, Overrides, RecipeArgument, command_line, load
from bigtrain.errors import DoesNotFit, InputError
from bigtrain.recipe_commands import write_file

if TYPE_CHECKING:
    from bigtrain.config.schema import Recipe
    from bigtrain.planner.hardware import Hardware
    from bigtrain.planner.plan import Plan


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    device: Annotated[str | None, DeviceOption] = None,
    memory_budget: Annotated[str | None, typer.Option(metavar="SIZE", help="What a device may hold: 24GiB.")] = None,
    world_size: Annotated[
        str | None, typer.Option(metavar="N", help="So many ranks; 8..1024 compares each doubling.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Show the speed at every memory budget.")] = False,
    png: Annotated[Path | None, typer.Option(help="With --sweep, or a range of ranks: draw it, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan, itself a recipe, to a file.")] = None,
) -> None:
    """Predict memory and speed without the device. Shows the fastest choice that fits, and why the others lost."""
    from bigtrain.planner.scaling import world_sizes

    ranks = None if world_size is None else world_sizes(world_size)
    _check_flags(ranks, sweep=sweep, png=png, output=output)
    budget = [] if memory_budget is None else [f"memory.budget={memory_budget or repr(memory_budget)}"]
    loaded = load(recipe, [*(overrides or []), *budget])
    hardware = _hardware(loaded, device)
    if isinstance(ranks, list):
        _scale(loaded, hardware, ranks, png, as_json)
        return
    if sweep:
        _sweep(loaded, hardware, ranks, png, as_json)
        return
    from bigtrain.planner.plan import plan as make_plan

    with terminal.working("planning", aside=True):
        planned = make_plan(loaded, hardware, world_size=ranks)
    if output is not None:
        write_file(output, planned.to_yaml(), "w")
    if as_json:
        print(json.dumps(planned.as_object(), indent=1))
    else:
        print_plan(planned)
    again = command_line("launch", recipe, [*(overrides or []), *budget])
    terminal.tell_next(again if output is None else command_line("launch", str(output)), aside=as_json)


def print_plan(planned: Plan) -> None:
    """Print a plan for people."""
    from bigtrain.planner.show import plan_lines

    for line in plan_lines(planned):
        print(line)


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

    with terminal.working("planning", aside=True):
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

    with terminal.working("planning", aside=True):
        points = sweep(recipe, hardware, world_size=world_size)
    if png is not None:
        frontier_picture(points, png)
    if as_json:
        print(json.dumps([point.as_object() for point in points], indent=1))
    else:
        print("\n".join(frontier_lines(points)))
    if all(point.choice is None for point in points):
        raise typer.Exit(DoesNotFit.exit_code)
