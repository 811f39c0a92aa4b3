# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model on a text file with LoRA, as always; one line is not as always.

    python run_clm.py --model MODEL --train-file train.txt --output adapter --generator GENERATOR --prompts prompts.txt

Training starts from the adapter that the generator writes for the prompts, in place of zeros. Without `--generator` it
is the script that it was before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from peft_dnd import DnDConfig


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save the adapter, and give the losses on the text: before the first step, and of the last epoch."""
    options = parse(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)

    lora = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if options.generator:
        lora = DnDConfig(generator=options.generator, prompts=options.prompts.read_text(encoding="utf-8").splitlines())
    model = get_peft_model(model, lora)

    def blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(tokenizer(batch["text"]).input_ids))
        whole = len(ids) // options.block_size * options.block_size
        cut = [ids[start : start + options.block_size] for start in range(0, whole, options.block_size)]
        return {"input_ids": cut, "labels": cut}

    text = load_dataset("text", data_files={"train": str(options.train_file)}, split="train")
    training = TrainingArguments(
        str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        save_strategy="no",
        report_to="none",
    )
    blocks_of_text = text.map(blocks, batched=True, remove_columns=["text"])
    trainer = Trainer(
        model, training, train_dataset=blocks_of_text, eval_dataset=blocks_of_text, data_collator=default_data_collator
    )
    before = trainer.evaluate()["eval_loss"]
    after = trainer.train().training_loss
    trainer.save_model(str(options.output))
    print(f"loss before training: {before:.4f}; mean while training: {after:.4f}; adapter in {options.output}")
    return {"before": before, "after": after}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--train-file", type=Path, required=True, help="text to train on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--generator", help="folder or Hub id of a generator for this base")
    parser.add_argument("--prompts", type=Path, help="with --generator: a prompt of the task on each line")
    parser.add_argument("--rank", type=int, default=8, help="without --generator, which decides it")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a training example")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    if bool(options.generator) != bool(options.prompts):
        parser.error("--generator and --prompts go together")
    return options


if __name__ == "__main__":
    main()
