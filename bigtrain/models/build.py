"""From a shape to a model."""

from __future__ import annotations

from bigtrain.config.model import ModelConfig
from bigtrain.models.bert import Bert
from bigtrain.models.gpt import Decoder
from bigtrain.models.language_model import LanguageModel


def build_model(
    config: ModelConfig,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LanguageModel:
    """Build the model of a shape, initialised from torch's global seed.

    Under `torch.device("meta")` it holds no memory; `to_empty` and then each module's `reset_parameters`, in the order
    of `modules()`, give the same weights as building it in place from the same seed.
    """
    family = Bert if config.family == "bert" else Decoder
    return family(
        config,
        dropout=dropout,
        attention_dropout=attention_dropout,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
