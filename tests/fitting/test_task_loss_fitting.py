# SPDX-License-Identifier: Apache-2.0
"""Fitting on the base's own loss: examples on disk, the trainer's steps, the warm start, evaluation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.collecting import fresh_adapter, train
from support.constants import TASK_PROMPTS
from support.live_models import assert_untouched, snapshot
from support.rows import rows_of
from torch import nn
from transformers import TrainerCallback

from peft_dnd import (
    AdapterLayout,
    CheckpointCollector,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
    write_task_without_checkpoints,
)
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, LayoutError, PairsFolderError
from peft_dnd.pairs.collator import ExampleCollator
from peft_dnd.pairs.examples import EXAMPLES_NAME, TaskExamples
from peft_dnd.pairs.writer import PairWriter


@pytest.fixture
def bare_folder(tmp_path: Path) -> Path:
    """The four tasks without any checkpoint."""
    for task, prompts in TASK_PROMPTS.items():
        write_task_without_checkpoints(tmp_path / "bare" / task, prompts, rows_of(task))
    return tmp_path / "bare"


@pytest.fixture
def bare(bare_folder: Path, layout: AdapterLayout) -> PromptCheckpointDataset:
    return PromptCheckpointDataset.from_folder(bare_folder, layout=layout)


@pytest.fixture
def mixed(tmp_path: Path, layout: AdapterLayout) -> PromptCheckpointDataset:
    """Two tasks with checkpoints and examples, and one with examples alone."""
    generator = torch.Generator().manual_seed(0)
    for task in ("law", "med"):
        writer = PairWriter(tmp_path / "mixed" / task, TASK_PROMPTS[task], layout, examples=rows_of(task))
        writer.begin()
        for step in (1, 2):
            writer.add({t.key: torch.randn(t.shape, generator=generator) * 0.05 for t in layout.tensors}, step)
        writer.close()
    write_task_without_checkpoints(tmp_path / "mixed" / "art", TASK_PROMPTS["art"], rows_of("art"))
    return PromptCheckpointDataset.from_folder(tmp_path / "mixed")


@pytest.fixture
def make_generator(layout: AdapterLayout, encoder_folder: Path) -> Callable[..., PromptConditionedLoraGenerator]:
    def make(**changes: Any) -> PromptConditionedLoraGenerator:
        settings = {"num_prompts": 3, "max_prompt_length": 12, "decoder_type": "hyper_convolution"}
        settings |= {"decoder_config": {"kernel_size": 3}, **changes}
        config = PromptConditionedLoraGeneratorConfig.from_adapters(layout, str(encoder_folder), **settings)
        torch.manual_seed(0)
        return PromptConditionedLoraGenerator(config)

    return make


def arguments(folder: Path, **changes: Any) -> DnDTrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "task_loss_weight": 1.0,
        "task_examples": 6,
    }
    return DnDTrainingArguments(output_dir=str(folder), **{**settings, **changes})


Make = Callable[..., PromptConditionedLoraGenerator]


def test_fits_without_any_checkpoint(
    bare: PromptCheckpointDataset, make_generator: Make, fresh_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    base, generator = fresh_base(), make_generator()
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(10)  # long enough for confident answers
    before = snapshot(base)
    weights = {name: parameter.clone() for name, parameter in generator.named_parameters()}
    trainer = DnDTrainer(generator, arguments(tmp_path, max_steps=30, learning_rate=1e-2), bare, bare, base_model=base)
    at_first = trainer.evaluate()
    trainer.train()
    at_last = trainer.evaluate()
    assert_untouched(base, before)
    assert all(not torch.equal(weights[name], parameter) for name, parameter in generator.named_parameters())

    # An unfitted generator writes the adapter that changes nothing, and so has the base's own loss.
    assert at_first["eval_task_loss"] == pytest.approx(at_first["eval_mean_adapter_task_loss"], rel=1e-5)
    assert at_last["eval_mean_adapter_task_loss"] == pytest.approx(at_first["eval_mean_adapter_task_loss"], rel=1e-5)
    assert at_last["eval_loss"] == at_last["eval_task_loss"] < 0.5 * at_first["eval_task_loss"]
    assert "eval_weight_loss" not in at_last and "eval_mean_adapter_loss" not in at_last
    assert generator.config.measured["training checkpoints"] == 0

    # Each task's adapter answers with its own word, not with what all tasks have in common.
    loss_of, collate = trainer.objective.task_loss, ExampleCollator()
    adapters = generator.generate_adapters({task: bare.prompts(task) for task in bare.tasks})
    for task in bare.tasks:
        batch = collate(bare.examples(task).read(range(10)))
        losses = {name: float(loss_of(adapter.state_dict(), batch)) for name, adapter in adapters.items()}
        assert min(losses, key=losses.__getitem__) == task, losses


def test_starts_from_the_adapter_that_the_base_brings(
    bare: PromptCheckpointDataset, make_generator: Make, trained_like: Callable[[int], PeftModel], tmp_path: Path
) -> None:
    base, generator = trained_like(3), make_generator()
    DnDTrainer(generator, arguments(tmp_path), bare, bare, base_model=base).evaluate()
    written = generator.generate_adapter(["court ?"]).state_dict()
    for key, matrix in live_state_dict(base, "default").items():
        torch.testing.assert_close(written[key], matrix.detach(), rtol=0, atol=1e-6)


def test_the_gradient_of_a_step_is_that_of_the_adapters(
    bare: PromptCheckpointDataset, make_generator: Make, fresh_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """The trainer's loss against each item's loss taken by PEFT on a base with the item's adapter loaded."""
    generator = make_generator(
        decoder_type="hyper_convolution", decoder_config={"kernel_size": 3, "zero_init_output": False}
    )
    trainer = DnDTrainer(generator, arguments(tmp_path, condition_noise=0.0), bare, base_model=fresh_base())
    trainer._prepare()
    batch = trainer.data_collator([bare[i] for i in range(4)])
    generator.train()
    loss = trainer.compute_loss(generator, dict(batch))
    expected = []
    for number, examples in enumerate(batch["examples"]):
        tokens = generator(batch["condition_states"][number, None], batch["condition_mask"][number, None])[0]
        matrices = generator.weight_tokenizer.decode(generator.normalization.denormalize(tokens))
        live = PeftModel(fresh_base(), generator.config.adapter_layout.lora_config())
        with torch.no_grad():
            for key, parameter in live_state_dict(live, "default").items():
                parameter.copy_(matrices[key])
        expected.append(live.eval()(**examples).loss.item())
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_what_a_decoder_writes_alike_for_all_is_taken_once(
    bare: PromptCheckpointDataset, make_generator: Make, fresh_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    settings = {"hidden_size": 16, "dropout": 0.0, "summary_noise": 0.0, "zero_init_output": False}
    generator = make_generator(decoder_type="core", decoder_config=settings)
    trainer = DnDTrainer(generator, arguments(tmp_path, condition_noise=0.0), bare, base_model=fresh_base())
    trainer._prepare()
    batch = trainer.data_collator([bare[i] for i in range(4)])
    generator.train()

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        generator.zero_grad()
        loss = trainer.compute_loss(generator, dict(batch))
        loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in generator.decoder.named_parameters()}
        return loss.detach(), found

    loss, gradients = step()
    shared, trainer.objective._shared = trainer.objective._shared, frozenset()
    assert shared == {t.key for t in generator.config.adapter_layout.tensors if t.side == "A"}
    apart, expected = step()
    torch.testing.assert_close(loss, apart)
    for name, gradient in gradients.items():
        assert expected[name].any(), name
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_warm_start_then_both_losses(
    mixed: PromptCheckpointDataset, make_generator: Make, base_model: nn.Module, tmp_path: Path
) -> None:
    silent = {"condition_noise": 0.0, "target_noise": 0.0}
    plain = DnDTrainer(make_generator(), arguments(tmp_path / "a", task_loss_weight=0.0, **silent), mixed)
    settings = {"rebuild_steps": 2, "rebuild_weight": 0.5, "task_loss_weight": 2.0, **silent}
    both = DnDTrainer(make_generator(), arguments(tmp_path / "b", **settings), mixed, mixed, base_model=base_model)
    for trainer in (plain, both):
        trainer.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, both)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[1][2] > losses[0][2] + 1

    metrics = both.evaluate()
    parts = 0.5 * metrics["eval_weight_loss"] + 2.0 * metrics["eval_task_loss"]
    assert metrics["eval_loss"] == pytest.approx(parts, rel=1e-5)
    assert {"eval_mean_adapter_loss", "eval_mean_adapter_task_loss"} <= metrics.keys()
    assert both.generator.config.measured["training checkpoints"] == 4


def test_a_task_without_checkpoints_counts_in_the_task_loss_alone(
    mixed: PromptCheckpointDataset, make_generator: Make, base_model: nn.Module, tmp_path: Path
) -> None:
    assert [mixed[i]["task"] for i in range(len(mixed))] == ["art", "art", "law", "law", "med", "med"]
    settings = {"rebuild_weight": 1.0, "condition_noise": 0.0, "target_noise": 0.0}
    trainer = DnDTrainer(make_generator(), arguments(tmp_path, **settings), mixed, base_model=base_model)
    trainer._prepare()

    def loss(items: list[int], **changes: float) -> float:
        for name, value in changes.items():
            setattr(trainer.args, name, value)
        trainer.generator.train()
        batch = trainer.data_collator([mixed[i] for i in items])
        return trainer.compute_loss(trainer.generator, batch).item()

    assert loss([0, 2, 4], task_loss_weight=0.0) == pytest.approx(loss([2, 4]), rel=1e-5)
    assert loss([0, 1]) == 0.0
    assert loss([0, 1], task_loss_weight=1.0) > 1.0


def test_resume_equals_no_interruption(
    mixed: PromptCheckpointDataset, make_generator: Make, base_model: nn.Module, tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 4

    settings = {"max_steps": 7, "rebuild_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole, cut, resumed = (make_generator() for _ in range(3))
    DnDTrainer(whole, arguments(tmp_path / "a", **settings), mixed, base_model=base_model).train()
    args = arguments(tmp_path / "b", **settings)
    DnDTrainer(cut, args, mixed, base_model=base_model, callbacks=[Stop()]).train()
    # From within the warm start, so that the step at which it ends must be known again.
    DnDTrainer(resumed, args, mixed, base_model=base_model).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2")
    )
    for (name, first), second in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_worker_processes_and_accumulation_change_nothing(
    bare: PromptCheckpointDataset, make_generator: Make, base_model: nn.Module, tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "condition_noise": 0.0, "optim": "sgd", "base_gradient_checkpointing": True}
    one, other = make_generator(), make_generator()
    DnDTrainer(one, arguments(tmp_path / "a", **settings), bare, base_model=base_model).train()
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    DnDTrainer(other, arguments(tmp_path / "b", **settings), bare, base_model=base_model).train()
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), name


def test_a_loss_and_batches_of_ones_own(
    bare: PromptCheckpointDataset, make_generator: Make, base_model: nn.Module, tmp_path: Path
) -> None:
    met: list[Any] = []

    def collate(rows: list[dict[str, Any]]) -> list[Any]:
        return [torch.tensor([row["input_ids"][-1:] for row in rows])]

    def loss_of(model: nn.Module, batch: list[Any]) -> torch.Tensor:
        met.append(batch)
        return model(batch[0]).logits.square().mean()

    trainer = DnDTrainer(
        make_generator(),
        arguments(tmp_path, max_steps=1, per_device_train_batch_size=2),
        bare,
        base_model=base_model,
        task_collator=collate,
        task_loss_function=loss_of,
    )
    trainer.train()
    assert [batch[0].shape for batch in met] == [(6, 1)] * 2


def test_what_is_missing_is_named(
    bare: PromptCheckpointDataset,
    pairs: PromptCheckpointDataset,
    make_generator: Make,
    base_model: nn.Module,
    tmp_path: Path,
) -> None:
    with pytest.raises(GeneratorConfigError, match="base_model"):
        DnDTrainer(make_generator(), arguments(tmp_path), bare)
    with pytest.raises(PairsFolderError, match=r"'art'.*no examples.*write_examples"):
        DnDTrainer(make_generator(), arguments(tmp_path), pairs, base_model=base_model)
    for settings in ({"task_loss_weight": 0.0}, {"rebuild_steps": 1}, {"rebuild_weight": 0.1}):
        with pytest.raises(PairsFolderError, match="no checkpoints"):
            DnDTrainer(make_generator(), arguments(tmp_path, **settings), bare, base_model=base_model)
    with pytest.raises(GeneratorConfigError, match="normalization"):
        DnDTrainer(make_generator(normalization="none"), arguments(tmp_path), bare, base_model=base_model)
    for name, value in (("task_loss_weight", -1.0), ("rebuild_steps", -1), ("task_examples", 0)):
        with pytest.raises(GeneratorConfigError, match=name):
            arguments(tmp_path, **{name: value})


def test_a_folder_without_checkpoints_needs_a_layout(
    bare_folder: Path, pairs_folder: Path, layout: AdapterLayout
) -> None:
    dataset = PromptCheckpointDataset.from_folder(bare_folder)
    assert dataset.tasks == ("art", "geo", "law", "med") and len(dataset) == 4
    with pytest.raises(PairsFolderError, match="layout="):
        _ = dataset.layout
    with pytest.raises(PairsFolderError, match="'law' has no checkpoints"):
        dataset.mean_state_dict("law")
    other = AdapterLayout(layout.modules[:-1])
    with pytest.raises(LayoutError, match="layout="):
        PromptCheckpointDataset.from_folder(pairs_folder, layout=other)
    one, _ = PromptCheckpointDataset.from_folder(bare_folder, layout=layout).split(["law"])
    assert one.layout is layout
    with pytest.raises(PairsFolderError, match="complete"):
        write_task_without_checkpoints(bare_folder / "law", ["court"], rows_of("law"))
    write_task_without_checkpoints(bare_folder / "law", ["court"], rows_of("law", 2), overwrite=True)
    assert len(PromptCheckpointDataset.from_folder(bare_folder).examples("law")) == 2
    (bare_folder / "law" / EXAMPLES_NAME).unlink()
    with pytest.raises(PairsFolderError, match="incomplete"):
        PromptCheckpointDataset.from_folder(bare_folder)


def test_examples_come_along_while_checkpoints_are_collected(
    fresh_base: Callable[[], nn.Module], lora_config: LoraConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "pairs" / "law"
    collector = CheckpointCollector(folder, prompts=TASK_PROMPTS["law"], last=1, examples=rows_of("law"))
    train(fresh_adapter(fresh_base, lora_config), tmp_path / "run", collector, max_steps=1)
    dataset = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert [dataset.examples("law")[i] for i in range(24)] == list(rows_of("law"))
    again = CheckpointCollector(folder, prompts=TASK_PROMPTS["law"], last=1, overwrite=True)
    train(fresh_adapter(fresh_base, lora_config), tmp_path / "run", again, max_steps=1)
    assert PromptCheckpointDataset.from_folder(tmp_path / "pairs").examples("law") is None


def test_examples_are_read_by_row_and_drawn_for_good(tmp_path: Path) -> None:
    rows = [{"text": f"Zeile {i}\n\u2028🙂", "number": torch.tensor(i), "list": list(range(i))} for i in range(200)]
    assert write_examples(tmp_path, iter(rows)) == 200
    examples = pickle.loads(pickle.dumps(TaskExamples(tmp_path / EXAMPLES_NAME)))
    assert len(examples) == 200
    assert examples[-1] == {"text": "Zeile 199\n\u2028🙂", "number": 199, "list": list(range(199))}
    assert [row["number"] for row in examples.read([7, 3])] == [7, 3]
    # The same numbers in every version: a resumed fit goes on with the same examples.
    assert [row["number"] for row in examples.draw(5, seed=11)] == [113, 57, 19, 94, 175]
    everything = [row["number"] for row in examples.draw(199, seed=11)]
    assert len(set(everything)) == 199 and everything != sorted(everything)
    assert [row["number"] for row in examples.draw(500, seed=1)] == list(range(200))
    counts = torch.zeros(200)
    for seed in range(600):
        counts[[row["number"] for row in examples.draw(20, seed)]] += 1
    assert counts.min() > 30 and counts.max() < 95  # 60 each; standard deviation 7


def test_a_broken_file_of_examples_is_named(tmp_path: Path) -> None:
    path = tmp_path / EXAMPLES_NAME
    with pytest.raises(PairsFolderError, match="write_examples"):
        TaskExamples(path)
    for wrong in ([], [{}], ["text"], [{"input_ids": object()}]):
        with pytest.raises(PairsFolderError):
            write_examples(tmp_path, wrong)
    assert not list(tmp_path.iterdir())
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    with pytest.raises(CorruptFileError, match="Row 2"):
        TaskExamples(path)
    path.write_text('{"a": 1}\n7\n{"a": 3}')
    examples = TaskExamples(path)
    assert len(examples) == 3 and examples[2] == {"a": 3}
    with pytest.raises(CorruptFileError, match="Row 1"):
        examples.draw(3, seed=0)


def test_padding() -> None:
    rows = [
        {"input_ids": [5, 6], "labels": [5, -100], "other": [1, 2]},
        {"input_ids": [7], "labels": [7], "other": [1]},
    ]
    batch = ExampleCollator(pad_token_id=9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["labels"].tolist() == [[5, -100], [7, -100]]
    assert batch["other"].tolist() == [[1, 2], [1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "attention_mask" not in ExampleCollator()(rows[:1] * 2)
    assert ExampleCollator()([{"labels": 3}, {"labels": 4}])["labels"].tolist() == [3, 4]
    with pytest.raises(PairsFolderError, match="same fields"):
        ExampleCollator()([{"input_ids": [1]}, {"labels": [1]}])
    with pytest.raises(PairsFolderError, match=r"'text'.*task_collator"):
        ExampleCollator()([{"text": "law"}])
