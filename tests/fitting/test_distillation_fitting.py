# SPDX-License-Identifier: Apache-2.0
"""Fitting a generator by context distillation: from prompts alone, and mixed with task loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.constants import TASK_PROMPTS
from torch import nn

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.errors import GeneratorConfigError, PairsFolderError
from peft_dnd.fitting import TaskLoss
from peft_dnd.fitting.adapted_base import AdaptedBase
from peft_dnd.fitting.distillation import distillation_losses, top_token_divergence
from peft_dnd.fitting.teacher import distil_task
from peft_dnd.pairs.collator import DistillationCollator


CONTEXTS = {
    "law": "answer in law . ",
    "med": "answer in medicine . ",
    "geo": "what river ? ",
    "art": "colour , please ",
}


@pytest.fixture
def distilled(base_model: nn.Module, word_tokenizer, tmp_path: Path) -> Path:
    for task, context in CONTEXTS.items():
        distil_task(
            tmp_path / "pairs" / task,
            TASK_PROMPTS[task],
            teacher=base_model,
            tokenizer=word_tokenizer,
            context=context,
            apply_chat_template=False,
            max_new_tokens=3,
            top_tokens=4,
        )
    return tmp_path / "pairs"


@pytest.fixture
def fit(distilled: Path, base_model, layout, encoder, tmp_path):
    def run(pairs: Path = distilled, base=base_model, **arguments) -> DnDTrainer:
        dataset = PromptCheckpointDataset.from_folder(pairs, layout=layout)
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            dataset, text_encoder=encoder, num_prompts=4, decoder_type="core", decoder_config={"core_rank": 2}
        )
        torch.manual_seed(0)
        arguments = {"distillation_weight": 1.0, "max_steps": 12, "task_examples": 3, **arguments}
        args = DnDTrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1, **arguments,
        )  # fmt: skip
        return DnDTrainer(PromptConditionedLoraGenerator(config, encoder), args, dataset, dataset, base_model=base)

    return run


def test_the_loss_of_many_items_is_the_divergence_of_each(distilled, base_model, layout):
    dataset = PromptCheckpointDataset.from_folder(distilled, layout=layout)
    batches = [DistillationCollator()(dataset.distillation(task).draw(3, seed=1)) for task in dataset.tasks]
    chance = torch.Generator().manual_seed(0)
    matrices = {
        tensor.key: torch.randn(len(batches), *tensor.shape, generator=chance) * 0.1 for tensor in layout.tensors
    }
    base = AdaptedBase(base_model, layout)
    losses = distillation_losses(base, matrices, batches)
    for item, batch in enumerate(batches):
        with base.in_place([value[item] for value in base.values(matrices)]):
            logits = base.model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        at = batch["labels"][:, 1:] != -100
        expected = top_token_divergence(logits[:, :-1][at], batch["top_tokens"], batch["top_log_probs"]).mean()
        torch.testing.assert_close(losses[item], expected, rtol=1e-5, atol=1e-6)


def test_the_loss_on_answers_alone_is_the_base_own_loss_on_them(distilled, base_model, layout):
    dataset = PromptCheckpointDataset.from_folder(distilled, layout=layout)
    batches = [DistillationCollator()(dataset.distillation(task).draw(3, seed=1)) for task in dataset.tasks]
    chance = torch.Generator().manual_seed(0)
    matrices = {
        tensor.key: torch.randn(len(batches), *tensor.shape, generator=chance) * 0.1 for tensor in layout.tensors
    }
    task_loss = TaskLoss(base_model, layout)
    expected = task_loss.losses(
        matrices, [{name: batch[name] for name in batch if not name.startswith("top_")} for batch in batches]
    )
    losses = distillation_losses(task_loss.base, matrices, batches, answers_alone=True)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_answers_alone_are_fitted_to(fit):
    before = fit(max_steps=1, distillation_targets="answers")
    both = [before.evaluate()["eval_distillation_loss"], fit(max_steps=1).evaluate()["eval_distillation_loss"]]
    assert both[0] > both[1] > 0, "the answers' cross-entropy has the teacher's own doubt in it"
    trainer = fit(max_steps=40, distillation_targets="answers")
    trainer.train()
    after = trainer.evaluate()  # of a base that hardly prefers any token: most of it is doubt
    assert after["eval_distillation_loss"] < after["eval_mean_adapter_distillation_loss"] - 0.01
    with pytest.raises(GeneratorConfigError, match="distillation_targets must be one of"):
        fit(distillation_targets="labels")


def test_a_generator_learns_from_prompts_alone(fit):
    trainer = fit(max_steps=40)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_distillation_loss"] == pytest.approx(before["eval_mean_adapter_distillation_loss"], rel=1e-4)
    assert after["eval_distillation_loss"] < 0.7 * before["eval_distillation_loss"]
    assert after["eval_loss"] == pytest.approx(after["eval_distillation_loss"])


def test_it_is_mixed_with_task_loss(fit, distilled):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
    for task in CONTEXTS:
        write_examples(distilled / task, rows)
    metrics = fit(task_loss_weight=0.5, max_steps=1).evaluate()
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_task_loss"] + metrics["eval_distillation_loss"])


def test_what_it_needs_is_named(fit, distilled, fresh_base):
    with pytest.raises(GeneratorConfigError, match="distillation_weight is 1, so DnDTrainer needs base_model"):
        fit(base=None)
    other = fresh_base()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(PairsFolderError, match="Task 'art' was answered by another base"):
        fit(base=other).train()
    (distilled / "law" / "distillation.json").unlink()
    write_examples(distilled / "law", [{"input_ids": [3, 4], "labels": [-100, 4]}])
    with pytest.raises(PairsFolderError, match="No teacher has answered task 'law'"):
        fit()
