# SPDX-License-Identifier: Apache-2.0
"""Fit a generator on a folder of pairs: in one process, or in many on one machine or several.

    python examples/distributed/fit.py --pairs pairs --text_encoder sentence-transformers/all-MiniLM-L6-v2 \
        --output_dir generator --max_steps 1000 --per_device_train_batch_size 16
    torchrun --nproc-per-node 8 examples/distributed/fit.py ...
    accelerate launch --config_file examples/distributed/fsdp.yaml examples/distributed/fit.py ...

All options but the first few are those of `DnDTrainingArguments`. `--resume_from_checkpoint latest` goes on where the
last run into the same `output_dir` was saved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, set_seed

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


@dataclass
class Options:
    """What is fitted on what."""

    pairs: str = field(metadata={"help": "The pairs folder."})
    text_encoder: str = field(metadata={"help": "Folder or Hub id of a sentence-transformers model."})
    held_out: list[str] = field(default_factory=list, metadata={"help": "Tasks to evaluate on, not to fit on."})
    generator: str = field(
        default="{}", metadata={"help": "JSON: what PromptConditionedLoraGeneratorConfig.from_adapters takes beside."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads of each process."})


def main() -> None:
    """Fit, save, and evaluate if there are held-out tasks."""
    options, arguments = HfArgumentParser((Options, DnDTrainingArguments)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    pairs, held_out = PromptCheckpointDataset.from_folder(options.pairs), None
    if options.held_out:
        pairs, held_out = pairs.split(options.held_out)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs, options.text_encoder, **json.loads(options.generator)
    )
    set_seed(arguments.seed)  # every process starts from the same weights
    trainer = DnDTrainer(PromptConditionedLoraGenerator(config), arguments, pairs, held_out)
    resume = arguments.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "latest" else resume)
    # Every process calls this: sharded weights are gathered from all of them, and the first one writes.
    trainer.save_model()
    trainer.save_state()
    if held_out is not None:
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
