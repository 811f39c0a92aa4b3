# SPDX-License-Identifier: Apache-2.0
"""A generator that was fitted on what the base does goes on with new tasks: its former self or rows keep the old."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.constants import TASK_PROMPTS
from support.fitting import convolution_generator, fitting_arguments
from support.rows import rows_of
from torch import nn
from transformers import TrainerCallback

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    write_task_without_checkpoints,
)
from peft_dnd.errors import GeneratorConfigError, RegressionError, TextEncoderError
from peft_dnd.evaluation.store_scores import OWN_MEASURE, ROWS_MEASURE, written_tokens
from peft_dnd.fitting.former_self import FormerSelf
from peft_dnd.fitting.inputs import TemperedSampler
from peft_dnd.fitting.objective import REPLAY_WEIGHT, Supervision
from peft_dnd.fitting.several_bases import split_off
from peft_dnd.fitting.teacher import distil_task
from peft_dnd.generator import check_regression, revisions
from peft_dnd.text import SentenceTransformerTextEncoder


EARLY, LATE = ("art", "geo"), ("law", "med")


def arguments(folder: Path, **changes: Any) -> DnDTrainingArguments:
    settings = {
        "max_steps": 30,
        "learning_rate": 1e-2,
        "task_loss_weight": 1.0,
        "task_examples": 6,
        "replay_store_share": 1.0,  # the pairs are tiny here
        **changes,
    }
    return fitting_arguments(folder, **settings)


@pytest.fixture(scope="module")
def base(base_model: nn.Module) -> nn.Module:
    """Whose answers can be confident ones."""
    base = copy.deepcopy(base_model)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(10)
    return base


@pytest.fixture(scope="module")
def parts(
    layout: AdapterLayout, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PromptCheckpointDataset, PromptCheckpointDataset]:
    folder = tmp_path_factory.mktemp("bare")
    for task, prompts in TASK_PROMPTS.items():
        write_task_without_checkpoints(folder / task, prompts, rows_of(task))
    return PromptCheckpointDataset.from_folder(folder, layout=layout).split(LATE)


@pytest.fixture(scope="module")
def fitted(
    parts: Any, base: nn.Module, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> PromptConditionedLoraGenerator:
    """Fitted on the early tasks' rows."""
    generator = convolution_generator(parts[0], encoder_folder)
    DnDTrainer(generator, arguments(tmp_path_factory.mktemp("fit"), max_steps=100), parts[0], base_model=base).train()
    return generator


def update(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, folder: Path, **changes: Any
) -> DnDTrainer:
    return DnDTrainer(copy.deepcopy(fitted), arguments(folder, **changes), parts[1], base_model=base)


def test_what_was_known_stays_and_without_replay_it_is_lost(
    fitted: PromptConditionedLoraGenerator,
    parts: Any,
    base: nn.Module,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = fitted.replay_store
    assert store is not None and {len(task.examples) for task in store.tasks.values()} == {16}
    lost = {}
    # Late tasks learn more slowly beside a former self: of two tasks that are hardly told apart it asks much.
    for way, learned in (("rows", 30), ("auto", 10), ("nothing", 30)):
        changes = {"replay_share": 0.0} if way == "nothing" else {"replay_targets": way}
        trainer = update(fitted, parts, base, tmp_path, max_steps=60, **changes)
        trainer.train()
        last = revisions(trainer.generator.config.measured)[-1]
        assert (last.number, last.added, last.replayed) == (2, LATE, 0 if way == "nothing" else 2)
        assert last.measure == ROWS_MEASURE and set(last.before) == set(EARLY)
        assert set(last.after) == {*EARLY, *LATE} and min(last.after[task] for task in LATE) > learned
        assert min(last.before.values()) > 50
        lost[way] = last.mean_lost
    assert lost["nothing"] > 50 and max(lost["rows"], lost["auto"]) < lost["nothing"] / 3
    with pytest.raises(RegressionError, match="Revision 2 of this generator lost"):
        check_regression(trainer.generator.config.measured)
    assert "Revision 2 of this generator lost" in caplog.text and "another base" not in caplog.text


def test_its_former_self_writes_as_the_generator_did(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    store = fitted.replay_store
    assert store is not None
    texts = {name: task.texts for name, task in store.tasks.items()}
    generator = copy.deepcopy(fitted)
    former = FormerSelf(generator, texts)
    assert former._generator.text_encoder is generator.text_encoder  # frozen, and large
    before = {name: written_tokens(generator, of) for name, of in texts.items()}
    with torch.no_grad():
        for parameter in generator.decoder.parameters():
            parameter.add_(0.1)
    for name in texts:
        assert torch.equal(former[name], before[name])
        assert not torch.equal(written_tokens(generator, texts[name]), before[name])
    valid = generator.weight_tokenizer.valid_mask()
    both = torch.stack([before[name][valid] for name in texts])
    assert former.spread() == pytest.approx(both.var(0, unbiased=False).mean().item(), rel=1e-4)


def test_replayed_items_are_held_against_what_was_written_for_the_same_prompts(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    trainer = update(fitted, parts, base, tmp_path, target_noise=0.0, replay_targets="former_self")
    trainer._prepare()
    assert trainer.replay is not None
    pairs = trainer.replay.pairs
    batch = trainer.data_collator([pairs[(0, pairs.item_tasks.index(task))] for task in ("geo", "law", "art")])
    assert batch["replayed"].tolist() == [True, False, True]
    assert [rows is None for rows in batch["examples"]] == [True, False, True]
    condition, supervision = split_off(batch)
    supervised = trainer.replay.supervised(supervision, condition)
    assert supervised.has_target is not None and supervised.has_target.tolist() == [True, False, True]
    written = trainer.generator(**condition)
    grids = trainer.generator.normalization.denormalize(written)
    assert supervised.targets is not None
    torch.testing.assert_close(supervised.targets[[0, 2]], grids[[0, 2]])
    # Nothing is lost yet, so that the loss is the new task's alone, a third of the batch.
    alone = Supervision(None, None, [batch["examples"][1]])
    loss = trainer.objective.loss(written, supervised, 0)
    torch.testing.assert_close(3 * loss, trainer.objective.loss(written[[1]], alone, 0), rtol=1e-4, atol=1e-5)
    # The mean of these two is as far off as they lie apart, of two thirds of the batch.
    middle = written.detach().clone()
    middle[[0, 2]] = middle[[0, 2]].mean(0)
    apart = written.detach()[[0, 2]][:, trainer.objective._valid_mask].var(0, unbiased=False).mean()
    more = trainer.objective.loss(middle, supervised, 0) - loss
    assert more.item() == pytest.approx(REPLAY_WEIGHT * 2 / 3 * apart.item() / trainer.replay.spread, rel=1e-3)


def test_rows_are_replayed_and_held_to_what_was_written_as_well(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    trainer = update(fitted, parts, base, tmp_path)
    assert trainer.replay is not None
    pairs = trainer.replay.pairs
    items = [pairs[(0, number)] for number in range(len(pairs))]
    assert all(item["examples"] is not None and item["replayed"] == (item["task"] in EARLY) for item in items)
    trainer._prepare()
    batch = trainer.data_collator(items)
    condition, supervision = split_off(batch)
    supervised = trainer.replay.supervised(supervision, condition)
    assert supervised.known(4, torch.device("cpu"))[:, :2].tolist() == [[item["replayed"], True] for item in items]


def test_rows_that_judge_are_not_replayed(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    trainer = update(fitted, parts, base, tmp_path, replay_targets="rows")
    store = fitted.replay_store
    assert store is not None and trainer.replay is not None
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, TemperedSampler)
    for name in EARLY:
        replayed = trainer.replay.pairs.examples(name)
        assert replayed is not None
        assert replayed.read(range(len(replayed))) == list(store.tasks[name].examples[4:])
        item = trainer.replay.pairs[trainer.replay.pairs.item_tasks.index(name)]
        assert item["state_dict"] is None and not item["replayed"]
    trainer._prepare()
    assert trainer.replay.former is None


def test_rows_for_another_base_are_left_alone(
    fitted: PromptConditionedLoraGenerator,
    parts: Any,
    base: nn.Module,
    base_model: nn.Module,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = update(fitted, parts, base_model, tmp_path, replay_targets="rows", max_steps=1)
    assert trainer.replay is not None
    assert all(trainer.replay.pairs.examples(name) is None for name in EARLY)
    trainer.train()  # by its former self, and judged by weights: what the rows say is for another base
    assert "for another base than this one" in caplog.text
    last = revisions(trainer.generator.config.measured)[-1]
    assert last.measure == OWN_MEASURE and last.before == pytest.approx(dict.fromkeys(EARLY, 100.0), abs=0.01)
    store = trainer.generator.replay_store
    assert store is not None and not store.tasks["art"].examples and store.tasks["law"].examples


def test_a_store_that_another_text_encoder_read_is_refused(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, encoder_folder: Path, tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path / "generator")
    half = SentenceTransformerTextEncoder.from_pretrained(str(encoder_folder))
    half.module.to(torch.bfloat16)
    other = SentenceTransformerTextEncoder.from_pretrained(str(encoder_folder))
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    for encoder, said in ((half, "float32, and this one is in bfloat16"), (other, "states that differ by")):
        generator = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator", text_encoder=encoder)
        generator.save_pretrained(tmp_path / "again")  # that needs no text encoder
        with pytest.raises(TextEncoderError, match=rf"{said}.*replay_store = None and fit with the pairs of all"):
            DnDTrainer(generator, arguments(tmp_path), parts[1], base_model=base)
        generator.replay_store = None
        assert DnDTrainer(generator, arguments(tmp_path), parts[1], base_model=base).replay is None


def distil(folder: Path, teacher: nn.Module, tokenizer: Any, early_tokens: int = 4) -> None:
    """Have a teacher answer all tasks; of the early ones so many next tokens' probabilities are kept."""
    for task, prompts in TASK_PROMPTS.items():
        distil_task(
            folder / task,
            prompts,
            teacher=teacher,
            tokenizer=tokenizer,
            context=f"answer in {task} . ",
            apply_chat_template=False,
            max_new_tokens=3,
            top_tokens=4 if task in LATE else early_tokens,
        )


def test_a_teachers_answers_are_kept_and_what_was_learned_of_them(
    layout: AdapterLayout, base_model: nn.Module, word_tokenizer: Any, encoder_folder: Path, tmp_path: Path
) -> None:
    distil(tmp_path / "pairs", base_model, word_tokenizer)
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs", layout=layout)
    early, late = pairs.split(LATE)
    settings = {"task_loss_weight": 0.0, "distillation_weight": 1.0, "task_examples": 3, "max_steps": 6}
    generator = convolution_generator(early, encoder_folder, decoder_type="core", decoder_config={"core_rank": 2})
    DnDTrainer(generator, arguments(tmp_path, **settings), early, base_model=base_model).train()
    store = generator.replay_store
    assert store is not None and all(task.distillation and not task.examples for task in store.tasks.values())
    for targets in ("auto", "rows", "former_self"):
        again = copy.deepcopy(generator)
        trainer = DnDTrainer(
            again, arguments(tmp_path, replay_targets=targets, **settings), late, base_model=base_model
        )
        assert trainer.replay is not None
        assert (trainer.replay.pairs.distillation("art") is not None) == (targets != "former_self")
        trainer.train()
        last = revisions(again.config.measured)[-1]
        assert last.measure == ROWS_MEASURE and set(last.lost) == set(EARLY) and last.replayed == 2


def test_a_teachers_answers_without_probabilities_are_replayed_and_judge(
    base_model: nn.Module, word_tokenizer: Any, layout: AdapterLayout, encoder_folder: Path, tmp_path: Path
) -> None:
    distil(tmp_path / "pairs", base_model, word_tokenizer, early_tokens=0)
    early, late = PromptCheckpointDataset.from_folder(tmp_path / "pairs", layout=layout).split(LATE)
    settings = {"task_loss_weight": 0.0, "distillation_weight": 1.0, "task_examples": 3, "max_steps": 4}
    generator = convolution_generator(early, encoder_folder)
    first = arguments(tmp_path, distillation_targets="answers", **settings)
    DnDTrainer(generator, first, early, base_model=base_model).train()
    # Of what was kept of the early tasks no probabilities are known: where these are wanted the former self stands in.
    for targets, measure in (("answers", ROWS_MEASURE), ("probabilities", OWN_MEASURE)):
        again = copy.deepcopy(generator)
        how = arguments(tmp_path, distillation_targets=targets, **settings)
        DnDTrainer(again, how, late, base_model=base_model).train()
        last = revisions(again.config.measured)[-1]
        assert last.measure == measure and set(last.lost) == set(EARLY) and last.replayed == 2


def test_rows_are_for_fits_on_what_the_base_does(tmp_path: Path) -> None:
    with pytest.raises(GeneratorConfigError, match="a fit to checkpoints replays those"):
        arguments(tmp_path, replay_targets="rows", task_loss_weight=0.0)


def test_mixtures_leave_replayed_items_as_they_are(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    trainer = update(fitted, parts, base, tmp_path, mixture_share=1.0, max_steps=4, replay_targets="former_self")
    assert trainer.replay is not None
    pairs = trainer.replay.pairs
    mixed = [trainer.data_collator._mixed(pairs[(0, number)]) for number in range(len(pairs))]
    for item in mixed:
        partner = item.get("partner")
        assert partner is None if item["task"] in EARLY else partner["task"] in LATE
    trainer.train()


def test_a_text_encoder_that_is_fitted_too_has_a_former_self_too(
    parts: Any, base: nn.Module, encoder_folder: Path, tmp_path: Path
) -> None:
    generator = convolution_generator(parts[0], encoder_folder, freeze_text_encoder=False)
    DnDTrainer(generator, arguments(tmp_path, max_steps=2), parts[0], base_model=base).train()
    trainer = DnDTrainer(generator, arguments(tmp_path, max_steps=2), parts[1], base_model=base)
    trainer._prepare()
    assert trainer.replay is not None and trainer.replay.former is not None
    assert trainer.replay.former._generator.text_encoder.module is not generator.text_encoder.module
    before = trainer.replay.former["art"]
    trainer.train()
    assert torch.equal(trainer.replay.former["art"], before)


def test_a_resumed_update_keeps_what_was_written_before_it_began(
    fitted: PromptConditionedLoraGenerator, parts: Any, base: nn.Module, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 3

    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    cut, resumed = (update(fitted, parts, base, tmp_path, **settings) for _ in range(2))
    cut.add_callback(Stop())
    cut.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.replay is not None and resumed.replay.former is not None and resumed.state.global_step == 6
    store = fitted.replay_store
    assert store is not None
    wanted = written_tokens(fitted, store.tasks["art"].texts)
    torch.testing.assert_close(resumed.replay.former["art"], wanted)
    assert not torch.allclose(written_tokens(cut.generator, store.tasks["art"].texts), wanted, atol=1e-3)
