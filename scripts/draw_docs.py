"""Draw the pictures of the documentation: docs/profile.png, docs/img/frontier.png and docs/img/loss.png.

Each comes from the command that its page names: `bigtrain profile`, `bigtrain plan --sweep`, `bigtrain launch`. The run
of the loss curve takes about 90 s on two idle cores. `scripts/bench_plan_scale.py` draws those of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bigtrain.charts import palette, plot

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PICTURES = ("profile", "frontier", "loss")


def main() -> None:
    """Draw all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"which of {', '.join(PICTURES)}; all")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "build" / "loss_run", help="where the run is kept")
    asked = parser.parse_args()
    if unknown := set(asked.pictures) - set(PICTURES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    wanted = asked.pictures or PICTURES
    if "profile" in wanted:
        bigtrain("profile", "quickstart_gpt", "recompute.policy=none", "--png", DOCS / "profile.png")
    if "frontier" in wanted:
        bigtrain("plan", "bert_large", "--device", "rtx4090", "--sweep", "--png", DOCS / "img" / "frontier.png")
    if "loss" in wanted:
        bigtrain("launch", "quickstart_gpt", "logging.every_steps=5", "train.eval_every=50", "--run-dir", asked.run_dir)
        draw_loss(asked.run_dir / "metrics.jsonl", DOCS / "img" / "loss.png")


def bigtrain(*words: str | Path) -> None:
    """Run a command of bigtrain."""
    command = [sys.executable, "-m", "bigtrain", *map(str, words)]
    print("$ " + " ".join(["bigtrain", *command[3:]]), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def draw_loss(metrics: Path, path: Path) -> None:
    """Write the losses of a run, in training and evaluation, over its steps as PNG."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps, evaluations = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    drawn = plot.new_figure(9, 4)
    axes = drawn.subplots()
    plot.tidy(axes, "Loss, in nats per token", note="quickstart_gpt on a CPU")
    trained = [row["step"] for row in steps], [row["loss"] for row in steps]
    evaluated = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
    axes.plot(*trained, color=palette.LIGHT["cause-1"], linewidth=1, label="training")
    axes.plot(*evaluated, color=palette.LIGHT["second"], linewidth=1.6, marker="o", markersize=3.5, label="evaluation")
    level = evaluations[-1]["eval_unigram_loss"]
    axes.axhline(level, color=palette.LIGHT["quiet"], linewidth=1, linestyle="--")
    end = steps[-1]["step"]
    axes.annotate(
        f"token frequencies alone: {level:.2f}", (end, level), xytext=(0, 4), textcoords="offset points", ha="right",
        fontsize=8.5, color=palette.LIGHT["quiet"],
    )  # fmt: skip
    plot.ticks(axes, "x", float(end), "count")
    axes.set_xlabel("step", fontsize=8.5, color=palette.LIGHT["quiet"])
    axes.legend(frameon=False, fontsize=8.5)
    plot.save(drawn, path)


if __name__ == "__main__":
    main()
