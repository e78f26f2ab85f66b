"""transformers' own Trainer on an exported BERT, 20 steps of two classes: `fine_tuned.py MODEL FOLDER`, the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

ROWS = 160
STEPS = 20


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Texts of two kinds, each with its own words."""

    def __init__(self, model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        kinds = ("red stone river tree grows", "bird sings blue falls again")
        self.inputs = tokenizer([kinds[row % 2] for row in range(ROWS)], return_tensors="pt", padding=True)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {name: tensor[row] for name, tensor in self.inputs.items()} | {"labels": torch.tensor(row % 2)}


def main(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=7, disable_tqdm=True,
    )  # fmt: skip
    tuned = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    trainer = Trainer(model=tuned, args=arguments, train_dataset=Texts(model))
    trainer.train()
    print(json.dumps([row["loss"] for row in trainer.state.log_history if "loss" in row]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
