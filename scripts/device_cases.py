"""What scripts/measure_device.py measures: families, sizes, lengths, precisions, policies, states, up to 120 GiB."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

PINNED = ["train.steps=1000", "train.eval_every=null", "sharding.zero_stage=0", "sharding.replicate=1",
          "sharding.offload=none", "cluster.devices_per_node=1", "logging.trackers=[]"]  # fmt: skip

Case = tuple[str, list[str]]


def _shape(family: str, vocabulary: int, width: int, blocks: int, heads: int, **more: int) -> list[str]:
    """Return overrides that leave nothing of the base recipe's shape."""
    sizes = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads} | more
    keys = [f"model.{key}={value}" for key, value in {"intermediate_size": "null", **sizes}.items()]
    return [f"model.family={family}", "model.preset=null", *keys, f"data.vocab_size={vocabulary}"]


SHAPES = {
    "gpt-124m": _shape("gpt", 50257, 768, 12, 12),
    "gpt-355m": _shape("gpt", 50257, 1024, 24, 16),
    "gpt-774m": _shape("gpt", 50257, 1280, 36, 20),
    "gpt-1558m": _shape("gpt", 50257, 1600, 48, 25),
    "bert-110m": _shape("bert", 30522, 768, 12, 12),
    "bert-335m": _shape("bert", 30522, 1024, 24, 16),
    "llama-1b": _shape("llama", 32000, 2048, 16, 32, num_key_value_heads=8, intermediate_size=8192),
    "gpt-tiny": _shape("gpt", 512, 64, 2, 2),
}
SPLIT24, STATE8, STATE4 = "amp.master_weights=split24", "optimizer.state=8bit", "optimizer.state=4bit"
RELEASE = ["train.max_grad_norm=null", "optimizer.gradient_release=true"]
COMPILED = "train.compile=true"


def cases() -> Iterator[Case]:
    """Yield every configuration for CUDA, those that tell most first."""
    yield from _single_mechanisms()
    yield from _sizes()
    yield from _precisions()
    yield from _large()


def _single_mechanisms() -> Iterator[Case]:
    """Change one thing at a time on one model."""
    for policy in ("none", "selective", "full", "offload"):
        yield _case("gpt-124m", 16, 1024, 1, f"recompute.policy={policy}")
    yield _case("gpt-124m", 16, 1024, 4)
    yield _case("gpt-124m", 16, 1024, 1, COMPILED)
    yield _case("gpt-124m", 16, 1024, 1, COMPILED, "recompute.policy=full")
    yield _case("gpt-124m", 16, 1024, 1, COMPILED, "recompute.policy=selective")
    for extra in ([SPLIT24], [SPLIT24, STATE8], ["amp.master_weights=none"], [STATE8], [STATE4], RELEASE):
        yield _case("gpt-124m", 16, 1024, 1, *extra)
    for name in ("lamb", "muon", "adafactor"):
        yield _case("gpt-124m", 16, 1024, 1, f"optimizer.name={name}")


def _sizes() -> Iterator[Case]:
    """Vary rows and lengths, families and sizes."""
    for rows, length in ((1, 1024), (4, 1024), (32, 1024), (64, 256), (4, 4096)):
        yield _case("gpt-124m", rows, length, 1)
    for rows, length in ((64, 128), (32, 512), (128, 512)):
        yield _case("bert-110m", rows, length, 1, "train.dropout=0.1")
    for rows, policy in ((16, "none"), (16, "full"), (64, "full")):
        yield _case("bert-335m", rows, 512, 1, f"recompute.policy={policy}", "train.dropout=0.1")
    yield _case("bert-335m", 8, 512, 1, "recompute.policy=full", SPLIT24, STATE8, *RELEASE)
    for rows in (8, 16):
        yield _case("gpt-355m", rows, 1024, 1)


def _precisions() -> Iterator[Case]:
    for precision, (family, length) in itertools.product(
        ("fp32", "fp16", "fp8"), (("gpt-124m", 1024), ("bert-110m", 512))
    ):
        yield _case(family, 8, length, 1, f"amp.precision={precision}")


def _large() -> Iterator[Case]:
    """Fill large devices, up to 120 GiB."""
    for rows, policy in ((8, "full"), (16, "selective"), (48, "none")):
        yield _case("gpt-774m", rows, 1024, 1, f"recompute.policy={policy}")
    for rows, extra in ((8, ["recompute.policy=full"]), (16, [SPLIT24, STATE8]), (32, []), (32, [SPLIT24, STATE8])):
        yield _case("gpt-1558m", rows, 1024, 1, *extra)
    for rows, extra in ((4, ["recompute.policy=full"]), (8, []), (16, [SPLIT24, STATE8])):
        yield _case("llama-1b", rows, 2048, 1, *extra)
    yield _case("gpt-124m", 128, 1024, 1)
    yield _case("gpt-355m", 48, 1024, 1)


def tiny_cases() -> Iterator[Case]:
    """Yield what tries the script on a CPU."""
    for policy in ("none", "full"):
        yield _case("gpt-tiny", 2, 32, 2, f"recompute.policy={policy}", "amp.precision=fp32")


def _case(family: str, rows: int, length: int, accumulation: int, *more: str) -> Case:
    """Return a configuration with its name; bf16, nothing recomputed and no compilation unless it says otherwise."""
    settings = dict(key.split("=", 1) for key in ("amp.precision=bf16", "recompute.policy=none", "train.compile=false"))
    settings |= dict(key.split("=", 1) for key in more)
    sizes = {"data.sequence_length": length, "train.micro_batch_size": rows,
             "train.global_batch_size": rows * accumulation}  # fmt: skip
    words = [family, f"{rows}x{accumulation}x{length}", *(key.partition(".")[2] for key in more)]
    name = re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-")
    keys = [*SHAPES[family], *PINNED, *(f"{key}={value}" for key, value in {**sizes, **settings}.items())]
    return name, keys
