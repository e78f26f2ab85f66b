"""The commands about a run that there is: read arguments, call the library, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a checkpoint in one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as train.steps=20.")
]


def add_to(app: typer.Typer) -> None:
    """Give a command line these commands."""
    app.command(name="eval")(evaluate)
    app.command()(generate)


def evaluate(run: RunArgument, overrides: Overrides = None) -> None:
    """Evaluate a run on its own validation data, or with data.source=... on other data."""
    from bigtrain.training.evaluate_run import evaluate_run

    print(json.dumps(evaluate_run(run, overrides or []), indent=1))


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="The text to continue, or with [MASK] to fill.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add (GPT).")] = 60,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time (GPT).")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seeds the choice of tokens (GPT).")] = 0,
) -> None:
    """Continue a text (GPT), or fill its [MASK]s (BERT)."""
    from bigtrain.training.generate import continue_text, fill_masks, load_trained

    trained = load_trained(run)
    if trained.plan.model.causal:
        print(continue_text(trained, prompt, tokens=tokens, temperature=temperature, seed=seed))
        return
    for number, guesses in enumerate(fill_masks(trained, prompt), 1):
        print(f"[MASK] {number}: " + "  ".join(f"{token} {probability:.1%}" for token, probability in guesses))
