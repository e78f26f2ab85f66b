"""The commands about a run that there is: read arguments, call the library, print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from bigtrain import terminal
from bigtrain.arguments import Overrides
from bigtrain.errors import InputError
from bigtrain.units import format_bytes, format_count

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, a checkpoint in one, or an imported folder.")
]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; nothing is written over.")]


def add_to(app: typer.Typer) -> None:
    """Give a command line these commands."""
    app.command(name="eval")(evaluate)
    app.command(name="export")(export_model)
    app.command(name="import")(import_model)
    app.command()(generate)
    app.command()(extend)


def evaluate(run: RunArgument, overrides: Overrides = None) -> None:
    """Evaluate a run on its validation data, or on other data. Other data are named by data.source=... and the like."""
    with terminal.working("evaluating", aside=True):
        from bigtrain.training.evaluate_run import evaluate_run

        found = evaluate_run(run, overrides or [])
    print(json.dumps(found, indent=1))
    terminal.tell_next(shlex.join(["bigtrain", "export", str(run), "OUT"]), aside=True)


def export_model(
    run: RunArgument,
    out: OutArgument,
    kind: Annotated[
        Literal["pt2", "onnx"] | None,
        typer.Option("--format", help="A program of torch.export, or ONNX, in place of a Hugging Face folder."),
    ] = None,
) -> None:
    """Write a model for transformers, torch.export or ONNX. Without --format it is a Hugging Face folder."""
    if kind is not None:
        _export_program(run, out, kind)
        return
    from bigtrain.hugging_face.exporting import export_folder

    with terminal.working("exporting"):
        made = export_folder(run, out)
    files = "1 file" if made.files == 1 else f"{made.files} files"
    print(
        f"{made.folder}: {made.architecture} of {made.checkpoint}, {format_count(made.parameters)} parameters, "
        f"{format_bytes(made.size)} in {files}, {'with its' if made.tokenizer else 'without a'} tokenizer"
    )
    loader = made.loader
    terminal.tell_next(_python(f"from transformers import {loader}; {loader}.from_pretrained({_text(made.folder)})"))


def _export_program(run: Path, out: Path, kind: Literal["pt2", "onnx"]) -> None:
    from bigtrain.deployment.export import export_program

    with terminal.working("exporting"):
        made = export_program(run, out, kind)
    print(
        f"{made.file}: {made.checkpoint}, {format_count(made.parameters)} parameters in fp32, "
        f"{format_bytes(made.size)} {'with its' if made.tokenizer else 'without a'} tokenizer; "
        "input_ids and attention_mask (batch, length) to logits"
    )
    opened = {
        "pt2": f"import torch; torch.export.load({_text(made.file)}).module()",
        "onnx": f"import onnxruntime; onnxruntime.InferenceSession({_text(made.file)})",
    }
    terminal.tell_next(_python(opened[kind]))


def _python(code: str) -> str:
    return shlex.join(["python", "-c", code])


def _text(path: Path) -> str:
    """Return a path as Python writes it, in double quotes: the shell's stand around them."""
    return json.dumps(str(path), ensure_ascii=False)


def import_model(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A Hugging Face folder: config.json, safetensors.")],
    out: OutArgument,
) -> None:
    """Make of a Hugging Face folder what train.init_from takes. So do eval, generate and export."""
    from bigtrain.hugging_face.importing import import_folder

    with terminal.working("importing"):
        made = import_folder(source, out)
    shape = f"{made.config.family}, {made.config.num_hidden_layers} blocks of width {made.config.hidden_size}"
    print(f"{made.folder}: {shape}, {format_count(made.parameters)} parameters, {made.config.vocab_size:,} tokens")
    if made.left_out:
        more = f" and {len(made.left_out) - 3} more" if len(made.left_out) > 3 else ""
        print(f"left out, since this model has no such parts: {', '.join(made.left_out[:3])}{more}")
    tokenizer = f"data.tokenizer={made.folder / 'tokenizer.json'}" if made.tokenizer else "data.tokenizer=..."
    if not made.tokenizer:
        print(f"{source} has no tokenizer.json: name the model's own, or train one that is no larger")
    terminal.tell_next(shlex.join(["bigtrain", "launch", "RECIPE", f"train.init_from={made.folder}", tokenizer]))


def generate(
    run: RunArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to continue, or with [MASK] to fill; - reads it. Repeatable.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file that holds the text.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add (GPT).")] = 60,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time (GPT).")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many of the likeliest (GPT).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the fewest of this probability (GPT).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the choice of tokens (GPT).")] = 0,
) -> None:
    """Continue a text (GPT), or fill its [MASK]s (BERT)."""
    from bigtrain.generation.choice import Choice

    texts = _prompts(prompt or [], prompt_file)
    choice = Choice(temperature, top_k, top_p, seed)
    with terminal.working("loading the model", aside=True):
        from bigtrain.training.generate import continue_texts, fill_masks, load_trained

        trained = load_trained(run)
    export = shlex.join(["bigtrain", "export", str(run), "OUT"])
    if not trained.plan.model.causal:
        for text in texts:
            for number, guesses in enumerate(fill_masks(trained, text), 1):
                shown = "  ".join(f"{token} {probability:.1%}" for token, probability in guesses)
                print(f"[MASK] {number}: {shown}")
        terminal.tell_next(export, aside=True)
        return
    found = continue_texts(trained, texts, tokens=tokens, choice=choice)
    print("\n\n".join(found.texts))
    if found.kept is not None:
        longest = trained.plan.model.max_position_embeddings
        note = f"note: the model reads {longest} tokens at once; a text that filled them went on from its last"
        terminal.tell(f"{note} {found.kept}", aside=True)
    if terminal.is_verbose():
        speed = found.tokens / max(found.seconds, 1e-9)
        terminal.tell(f"{found.tokens} tokens in {found.seconds:.2f} s, {speed:.1f} tokens/s", aside=True)
    terminal.tell_next(export, aside=True)


def _prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Return the texts that are asked for; raises InputError where there is none, or one cannot be read."""
    if bool(prompts) == (file is not None):
        raise InputError("command line: --prompt: give the text here, or with --prompt-file FILE, and one of the two")
    if file is not None:
        return [_prompt(f"--prompt-file: {file}", "name a text file", partial(file.expanduser().read_text, "utf-8"))]
    return [
        _prompt("--prompt: standard input", "pipe a text into it", sys.stdin.read)
        if text == "-"
        else _prompt("--prompt", "give a text", partial(str, text))
        for text in prompts
    ]


def _prompt(place: str, instead: str, read: Callable[[], str]) -> str:
    try:
        text = read()
        text.encode("utf-8")  # arguments and streams may hold bytes that are none
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text in UTF-8"
        raise InputError(f"command line: {place}: {why}; {instead}") from error
    return text


def extend(
    run: RunArgument,
    tokenizer: Annotated[str, typer.Option(metavar="NEW", help="A tokenizer.json, or a folder or hub id with one.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The new run folder; RUN-extended without.")
    ] = None,
) -> None:
    """Make a run that goes on with a larger vocabulary. It has all tokens of RUN, and new ones; RUN stays as it is."""
    from bigtrain.extension.extend import extend as extend_run

    with terminal.working("extending"):
        made = extend_run(run, tokenizer, output)
    print(f"{made.folder}: step {made.step}, {made.before:,} tokens in the model became {made.tokens:,}")
    if made.rounded:
        print(f"{made.rounded} moments were rounded anew: their blocks fall otherwise in the larger matrices")
    plan_file = str(made.folder / "plan.yaml")
    terminal.tell_next(shlex.join(["bigtrain", "launch", plan_file, "--run-dir", str(made.folder)]))
