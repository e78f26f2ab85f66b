"""Published model shapes, by name. Sources stand beside each."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Devlin et al. 2018, arXiv 1810.04805, section 3; the small ones: Turc et al. 2019, arXiv 1908.08962.
    "bert-tiny": {"family": "bert", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512, "max_position_embeddings": 512},
    "bert-mini": {"family": "bert", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024, "max_position_embeddings": 512},
    "bert-small": {"family": "bert", "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048, "max_position_embeddings": 512},
    "bert-base": {"family": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512},
    "bert-large": {"family": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 512},
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
    "gpt2-124m": {"family": "gpt", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 1024},
    "gpt2-355m": {"family": "gpt", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "max_position_embeddings": 1024},
    "gpt2-774m": {"family": "gpt", "hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20, "intermediate_size": 5120, "max_position_embeddings": 1024},
    "gpt2-xl": {"family": "gpt", "hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25, "intermediate_size": 6400, "max_position_embeddings": 1024},
    # Touvron et al. 2023, arXiv 2307.09288 (Llama 2), table 1 and appendix; 70B groups its keys and values by 8.
    "llama-7b": {"family": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096},
    "llama-13b": {"family": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "intermediate_size": 13824, "max_position_embeddings": 4096},
    "llama-70b": {"family": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "max_position_embeddings": 4096},
}  # fmt: skip
