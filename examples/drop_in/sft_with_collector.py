# SPDX-License-Identifier: Apache-2.0
"""Train adapters with TRL's SFTTrainer, and keep what a generator is fitted on, by one callback.

    python sft_with_collector.py --model MODEL --tasks tasks --pairs pairs

A task is a file `tasks/<name>.jsonl` with one `{"prompt": ..., "completion": ...}` a line. Tasks that are complete are
passed over: the same command, run again, does what is left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from peft_dnd import CheckpointCollector
from peft_dnd.pairs import uncollected


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a LoRA adapter for each task that is left."""
    options = parse(arguments)
    files = sorted(options.tasks.glob("*.jsonl")) or sys.exit(f"There is no .jsonl file in {options.tasks}.")
    for name in uncollected([path.stem for path in files], options.pairs):
        rows = load_dataset("json", data_files=str(options.tasks / f"{name}.jsonl"), split="train")
        trainer = SFTTrainer(
            model=options.model,
            args=SFTConfig(
                str(options.runs / name),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                bf16=torch.cuda.is_available(),
                seed=0,  # the same for all tasks, as is the adapter that they start from
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=rows,
            peft_config=LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[CheckpointCollector(options.pairs / name, prompts=rows["prompt"][:], last=options.checkpoints)],
        )
        trainer.train()
        print(f"{name}: {options.checkpoints} checkpoints in {options.pairs / name}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a .jsonl for each task")
    parser.add_argument("--pairs", type=Path, required=True, help="the pairs folder")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the trainer's own folders")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=125)
    parser.add_argument("--checkpoints", type=int, default=50, help="how many of the last steps to keep")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
