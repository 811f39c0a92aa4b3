# SPDX-License-Identifier: Apache-2.0
"""Fit a generator to a pairs folder, look at it on a held-out task, and share it.

python fit_and_push.py --pairs pairs --held-out tax --output generator                       # a folder
python fit_and_push.py --pairs pairs --held-out tax --output generator --push me/generator   # and the Hub
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Fit, save, push; gives the held-out task's figures."""
    options = parse(arguments)
    training, held_out = PromptCheckpointDataset.from_folder(options.pairs).split(held_out=options.held_out)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(training, text_encoder=options.text_encoder)
    generator = PromptConditionedLoraGenerator(config)
    settings = DnDTrainingArguments(
        str(options.output / "fitting"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        save_strategy="no",
        report_to="none",
    )
    trainer = DnDTrainer(generator, settings, train_dataset=training, eval_dataset=held_out)
    trainer.train()
    figures = trainer.evaluate()
    print(f"error of the held-out weights: {figures['eval_loss']:.4f}")
    print(f"error of the mean training adapter there: {figures['eval_mean_adapter_loss']:.4f}")

    generator.save_pretrained(options.output, include_text_encoder=True)
    if options.push:
        generator.push_to_hub(options.push, include_text_encoder=True, private=options.private)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True, help="the pairs folder")
    parser.add_argument("--held-out", action="append", required=True, help="a task to measure on; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder for the generator")
    parser.add_argument("--text-encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="folder or Hub id")
    parser.add_argument("--push", help="repository on the Hub, user/name; after `hf auth login`")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
