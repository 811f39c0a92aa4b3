# SPDX-License-Identifier: Apache-2.0
"""A small fit whose result is the same in one process and in several; run by `test_distributed`, under `torchrun`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


class Watched(DnDTrainer):
    """Notes which checkpoints are met, and how often this process writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[str] = []
        self.wrapped_in = ""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.wrapped_in = type(model).__name__
        self.seen += [hashlib.sha256(target.numpy().tobytes()).hexdigest() for target in inputs["target_tokens"]]
        return super().compute_loss(model, inputs, *args, **kwargs)


def fit(folder: Path, output: Path, accumulation: int) -> dict[str, Any]:
    """Fit on `pairs` with both losses, with `encoder` and `base`; say what happened in this process."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    arguments = DnDTrainingArguments(
        output_dir=str(output),
        max_steps=6,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,
        condition_noise=0.0,
        target_noise=0.0,
        task_loss_weight=1.0,
        rebuild_weight=1.0,
        rebuild_steps=2,
        task_examples=2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    pairs = PromptCheckpointDataset.from_folder(folder / "pairs")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        str(folder / "encoder"),
        num_prompts=3,
        max_prompt_length=16,
        decoder_type="set_transformer",
        decoder_config={"hidden_size": 16, "num_heads": 2, "summary_noise": 0.0},
    )
    torch.manual_seed(rank)  # unlike weights, which DDP makes alike; the one process has those of rank 0

    def scorer(task: str, adapter: GeneratedAdapter) -> float:
        # As if scoring were random: each process finds something else.
        return sum(tensor.abs().sum().item() for tensor in adapter.state_dict().values()) + rank

    trainer = Watched(
        PromptConditionedLoraGenerator(config),
        arguments,
        pairs,
        PromptCheckpointDataset.from_folder(folder / "pairs", ["art", "geo", "law"]),  # 9: uneven for two processes
        adapter_scorer=scorer,
        base_model=LlamaForCausalLM.from_pretrained(folder / "base"),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradients": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "metrics": {name: value for name, value in metrics.items() if not name.endswith(("_runtime", "_second"))},
        "seen": trainer.seen,
        "wrapped_in": trainer.wrapped_in,
        "noise_seed": torch.initial_seed(),
        "may_write": trainer.args.should_save,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, destination = map(Path, sys.argv[1:])
    result = fit(root, destination, accumulation=1)
    (root / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result), encoding="utf-8")
