# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One task of the worked example: training its LoRA adapter, and asking a model its questions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from base import as_question, collate_examples, load_base, tokenize_example
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from world import Example, Task, World


SETTINGS: dict[str, Any] = {
    "rank": 4,
    "alpha": 16,
    "steps": 80,
    "checkpoints": 10,
    "batch_size": 32,
    "learning_rate": 3e-3,
}
_LONGEST_ANSWER = 8


def train_adapter(base_folder: Path, world: World, task: Task, callbacks: Sequence[TrainerCallback] = ()) -> nn.Module:
    """Train a LoRA adapter on a task's examples, with plain PEFT and transformers.

    Args:
        base_folder: The base model's folder.
        world: The world.
        task: The task.
        callbacks: More callbacks, a `CheckpointCollector` for one.

    Returns:
        The trained `PeftModel`.
    """
    base, tokenizer = load_base(base_folder)
    torch.manual_seed(world.seed)
    lora = LoraConfig(
        r=SETTINGS["rank"], lora_alpha=SETTINGS["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora)
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=SETTINGS["steps"],
            per_device_train_batch_size=SETTINGS["batch_size"],
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="cosine",
            seed=world.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[tokenize_example(tokenizer, example) for example in world.training_examples(task)],
            data_collator=partial(collate_examples, pad_token_id=tokenizer.pad_token_id),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


@torch.no_grad()
def score(model: nn.Module, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """The share of questions that a model answers exactly, letter by letter, decoding greedily."""
    model.eval()
    questions = [as_question(example.prompt) for example in examples]
    inputs = tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**inputs, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
    answers = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)) / len(examples)
