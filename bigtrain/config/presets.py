"""Published model shapes, by name. Sources stand beside each."""

from __future__ import annotations

from typing import Any


def _shape(
    family: str, width: int, layers: int, heads: int, mlp_width: int, positions: int, **more: int
) -> dict[str, Any]:
    return {
        "family": family,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp_width,
        "max_position_embeddings": positions,
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Devlin et al. 2018, arXiv 1810.04805, section 3; the small ones: Turc et al. 2019, arXiv 1908.08962.
    "bert-tiny": _shape("bert", 128, 2, 2, 512, 512),
    "bert-mini": _shape("bert", 256, 4, 4, 1024, 512),
    "bert-small": _shape("bert", 512, 4, 8, 2048, 512),
    "bert-base": _shape("bert", 768, 12, 12, 3072, 512),
    "bert-large": _shape("bert", 1024, 24, 16, 4096, 512),
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
    "gpt2-124m": _shape("gpt", 768, 12, 12, 3072, 1024),
    "gpt2-355m": _shape("gpt", 1024, 24, 16, 4096, 1024),
    "gpt2-774m": _shape("gpt", 1280, 36, 20, 5120, 1024),
    "gpt2-xl": _shape("gpt", 1600, 48, 25, 6400, 1024),
    # Touvron et al. 2023, arXiv 2307.09288 (Llama 2), table 1 and appendix; 70B groups its keys and values by 8.
    "llama-7b": _shape("llama", 4096, 32, 32, 11008, 4096),
    "llama-13b": _shape("llama", 5120, 40, 40, 13824, 4096),
    "llama-70b": _shape("llama", 8192, 80, 64, 28672, 4096, num_key_value_heads=8),
}
