# SPDX-License-Identifier: Apache-2.0
"""What evaluation while fitting reads and reports: whole sets of prompts, and NaN where a generator diverged."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)


Make = Callable[..., DnDTrainer]


@pytest.fixture
def make_trainer(pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path) -> Make:
    """Trainers with the default decoder and the default set sizes, but for four prompts at most."""

    def make(freeze: bool = True, callbacks: Any = None, base_model: Any = None, **changes: Any) -> DnDTrainer:
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            pairs, str(encoder_folder), num_prompts=4, freeze_text_encoder=freeze
        )
        torch.manual_seed(0)
        generator = PromptConditionedLoraGenerator(config)
        settings = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}
        args = DnDTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", **{**settings, **changes}
        )
        return DnDTrainer(generator, args, pairs, pairs, callbacks=callbacks, base_model=base_model)

    return make


class Diverge(TrainerCallback):
    """After the second step every weight of the decoder is NaN."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            for parameter in model.decoder.parameters():
                nn.init.constant_(parameter, nan)


def test_a_generator_that_diverged_is_not_the_best(make_trainer: Make) -> None:
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(callbacks=[Diverge()], load_best_model_at_end=True, **every_step)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] > 0 and isnan(losses[1]) and isnan(losses[2])
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    assert all(parameter.isfinite().all() for parameter in trainer.generator.parameters())


def test_what_a_prediction_alone_says_of_a_diverged_generator(make_trainer: Make) -> None:
    trainer = make_trainer(prediction_loss_only=True)
    assert trainer.evaluate()["eval_loss"] > 0
    Diverge().on_step_end(None, type("State", (), {"global_step": 2}), None, model=trainer.generator)
    assert isnan(trainer.evaluate()["eval_loss"])


def test_what_is_missing_is_told_by_the_supervision_and_not_by_nan(
    make_trainer: Make, base_model: nn.Module, pairs: PromptCheckpointDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer.objective, "task_loss", object())
    trainer.args.task_loss_weight, trainer.args.rebuild_weight = 2.0, 3.0
    # Two items, of which only the first has a checkpoint.
    known = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    losses = torch.tensor([[0.5, 1.0, 4.0, 8.0, nan, nan], [nan, nan, 6.0, 10.0, nan, nan]])

    def metrics(**changes: float) -> dict[str, float]:
        items = losses.clone()
        for place, value in changes.items():
            items[int(place[1]), int(place[2])] = value
        return trainer._metrics(EvalPrediction(predictions=items.numpy(), label_ids=known.numpy()))

    assert metrics() == {
        "loss": 3 * 0.5 + 2 * 5.0,
        "weight_loss": 0.5,
        "mean_adapter_loss": 1.0,
        "task_loss": 5.0,
        "mean_adapter_task_loss": 9.0,
    }
    diverged = metrics(i00=nan)
    assert isnan(diverged["loss"]) and isnan(diverged["weight_loss"]) and diverged["task_loss"] == 5.0
    diverged = metrics(i12=nan)
    assert isnan(diverged["loss"]) and isnan(diverged["task_loss"]) and diverged["weight_loss"] == 0.5
    # A loss that does not count is reported all the same.
    trainer.args.rebuild_weight = 0.0
    assert metrics(i00=nan)["loss"] == 10.0 and isnan(metrics(i00=nan)["weight_loss"])


@pytest.mark.parametrize("freeze", [True, False])
def test_evaluation_reads_whole_sets_and_fitting_small_ones(
    make_trainer: Make, pairs: PromptCheckpointDataset, freeze: bool
) -> None:
    trainer = make_trainer(freeze)

    def sizes(batches: Any) -> list[int]:
        found = []
        for batch in batches:
            if freeze:
                found += batch["condition_mask"].any(-1).sum(-1).tolist()
            else:
                found += [len(prompts) for prompts in batch["prompts"]]
        return found

    assert min(sizes(trainer.get_train_dataloader())) < 4
    assert sizes(trainer.get_eval_dataloader()) == [4] * len(pairs)
    assert sizes(trainer.get_eval_dataloader(pairs)) == [4] * len(pairs)
    assert sizes(trainer.get_test_dataloader(pairs)) == [4] * len(pairs)
    # The collator of fitting is in its place again.
    assert min(sizes(trainer.get_train_dataloader())) < 4


def test_evaluation_does_not_depend_on_the_smallest_set(make_trainer: Make) -> None:
    losses = []
    for smallest in (1, 0):
        trainer = make_trainer(smallest_prompt_set=smallest)
        torch.manual_seed(0)
        for parameter in trainer.generator.decoder.parameters():  # which writes the same for all at first
            nn.init.normal_(parameter, std=0.1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] != pytest.approx(1.0, abs=1e-3)


def test_a_text_encoder_is_fitted_under_the_default_decoder(make_trainer: Make) -> None:
    trainer = make_trainer(freeze=False, max_steps=4, learning_rate=3e-3)
    before = {name: p.clone() for name, p in trainer.generator.text_encoder.module.named_parameters()}
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    after = dict(trainer.generator.text_encoder.module.named_parameters())
    assert any("attention" in name and not torch.equal(p, after[name]) for name, p in before.items())


def test_prompts_of_tasks_with_fewer_are_read_as_if_alone(make_trainer: Make, pairs: PromptCheckpointDataset) -> None:
    trainer = make_trainer(freeze=False, max_steps=2)
    trainer.train()
    generator = trainer.generator.eval()
    tasks = [pairs.prompts("law")[:1], pairs.prompts("med")[:3]]
    with torch.no_grad():
        together = generator(prompts=tasks)
        alone = torch.cat([generator(prompts=[prompts]) for prompts in tasks])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
