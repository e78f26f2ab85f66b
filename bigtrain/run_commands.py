"""The commands about a run that there is: read arguments, call the library, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.units import format_bytes, format_count

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, a checkpoint in one, or an imported folder.")
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; nothing is written over.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to change, such as train.steps=20.")
]


def add_to(app: typer.Typer) -> None:
    """Give a command line these commands."""
    app.command(name="eval")(evaluate)
    app.command(name="export")(export_model)
    app.command(name="import")(import_model)
    app.command()(generate)
    app.command()(extend)


def evaluate(run: RunArgument, overrides: Overrides = None) -> None:
    """Evaluate a run on its own validation data, or with data.source=... on other data."""
    from bigtrain.training.evaluate_run import evaluate_run

    print(json.dumps(evaluate_run(run, overrides or []), indent=1))


def export_model(run: RunArgument, out: OutArgument) -> None:
    """Write a run's model as a Hugging Face folder, which transformers loads."""
    from bigtrain.hugging_face.exporting import export_folder

    made = export_folder(run, out)
    files = "1 file" if made.files == 1 else f"{made.files} files"
    print(
        f"{made.folder}: {made.architecture} of {made.checkpoint}, {format_count(made.parameters)} parameters, "
        f"{format_bytes(made.size)} in {files}, {'with its' if made.tokenizer else 'without a'} tokenizer"
    )
    loader = made.loader
    print(f"next: python -c \"from transformers import {loader}; {loader}.from_pretrained('{made.folder}')\"")


def import_model(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder: config.json, safetensors.")],
    out: OutArgument,
) -> None:
    """Make of a Hugging Face folder what train.init_from takes, and eval, generate and export."""
    from bigtrain.hugging_face.importing import import_folder

    made = import_folder(source, out)
    shape = f"{made.config.family}, {made.config.num_hidden_layers} blocks of width {made.config.hidden_size}"
    print(f"{made.folder}: {shape}, {format_count(made.parameters)} parameters, {made.config.vocab_size:,} tokens")
    if made.left_out:
        more = f" and {len(made.left_out) - 3} more" if len(made.left_out) > 3 else ""
        print(f"left out, since this model has no such parts: {', '.join(made.left_out[:3])}{more}")
    tokenizer = f"data.tokenizer={made.folder / 'tokenizer.json'}" if made.tokenizer else "data.tokenizer=..."
    if not made.tokenizer:
        print(f"{source} has no tokenizer.json: name the model's own, or train one that is no larger")
    print(f"next: bigtrain launch RECIPE train.init_from={made.folder} {tokenizer}")


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


def extend(
    run: RunArgument,
    tokenizer: Annotated[str, typer.Option(metavar="NEW", help="A tokenizer.json, or a folder or hub id with one.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The new run folder; RUN-extended without.")
    ] = None,
) -> None:
    """Make a run that goes on with a larger vocabulary: all tokens it has, and new ones; RUN stays as it is."""
    from bigtrain.extension.extend import extend as extend_run

    made = extend_run(run, tokenizer, output)
    print(f"{made.folder}: step {made.step}, {made.before:,} tokens in the model became {made.tokens:,}")
    if made.rounded:
        print(f"{made.rounded} moments were rounded anew: their blocks fall otherwise in the larger matrices")
    print(f"next: bigtrain launch {made.folder / 'plan.yaml'} --run-dir {made.folder}")
