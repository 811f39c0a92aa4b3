# SPDX-License-Identifier: Apache-2.0
"""Fitting learns tasks from prompts, resumes as if never interrupted, and says what it measured."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.fitting import convolution_generator, fitting_arguments
from torch import nn
from transformers import TrainerCallback

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.adapters.tokenizer import weight_statistics
from peft_dnd.errors import GeneratorConfigError, LayoutError
from peft_dnd.pairs.statistics import task_balanced_grids, token_spread
from peft_dnd.pairs.writer import PairWriter


@pytest.fixture
def make_generator(
    pairs: PromptCheckpointDataset, encoder_folder: Path
) -> Callable[..., PromptConditionedLoraGenerator]:
    return partial(convolution_generator, pairs, encoder_folder)


def test_learns_each_task_from_its_prompts(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    generator = make_generator()
    before = {name: parameter.clone() for name, parameter in generator.named_parameters()}
    trainer = DnDTrainer(generator, fitting_arguments(tmp_path, max_steps=120), pairs)
    trainer.train()
    assert all(not torch.equal(before[name], parameter) for name, parameter in generator.named_parameters())

    # Each task's adapter must come out near its own checkpoints and far from the other tasks'.
    adapters = generator.generate_adapters({task: pairs.prompts(task) for task in pairs.tasks})
    own = {task: generator.weight_tokenizer.encode(pairs.mean_state_dict(task)) for task in pairs.tasks}
    spread = generator.normalization.scale.square().mean().sqrt()
    for task, adapter in adapters.items():
        grid = generator.weight_tokenizer.encode(adapter.state_dict())
        distance = {other: (grid - own[other]).square().mean().sqrt() / spread for other in own}
        assert min(distance, key=distance.__getitem__) == task
        assert distance[task] < 0.5 * min(distance[other] for other in own if other != task)


def test_statistics_weights_and_measurements(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    train, held_out = pairs.split(held_out=["art"])
    generator = make_generator()
    trainer = DnDTrainer(generator, fitting_arguments(tmp_path), train, held_out)
    trainer.train()
    metrics = trainer.evaluate()

    mean, scale = weight_statistics(generator.weight_tokenizer, task_balanced_grids(train, generator.weight_tokenizer))
    assert torch.equal(generator.normalization.mean, mean)
    assert torch.equal(generator.normalization.scale, scale)
    spread = token_spread(train, generator.weight_tokenizer, generator.normalization)
    assert torch.equal(trainer.objective.token_weight, spread.weights("between_task"))

    target = generator.normalization.normalize(
        torch.stack([generator.weight_tokenizer.encode(held_out[i]["state_dict"]) for i in range(len(held_out))])
    )
    valid = generator.weight_tokenizer.valid_mask()
    assert metrics["eval_mean_adapter_loss"] == pytest.approx(target[:, valid].square().mean().item(), rel=1e-4)
    assert metrics["eval_loss"] > 0

    trainer.save_model()
    card = (tmp_path / "README.md").read_text()
    assert "eval_loss" in card and "training tasks | 3" in card
    assert "Nothing has been measured" not in card
    assert not list(tmp_path.glob("*.bin"))
    assert json.loads((tmp_path / "training_args.json").read_text())["loss_weighting"] == "between_task"
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    prompts = pairs.prompts("art")
    expected = generator.generate_adapter(prompts).state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in again.generate_adapter(prompts).state_dict().items())


def test_resume_equals_no_interruption(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 4

    # 12 checkpoints in batches of 4 are 3 steps an epoch: step 4 stands in the middle of the second.
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "condition_noise": 1e-2}
    whole = make_generator()
    DnDTrainer(whole, fitting_arguments(tmp_path / "whole", **settings), pairs).train()

    DnDTrainer(make_generator(), fitting_arguments(tmp_path / "cut", **settings), pairs, callbacks=[Stop()]).train()
    torch.manual_seed(99)
    resumed = make_generator()
    trainer = DnDTrainer(resumed, fitting_arguments(tmp_path / "cut", **settings), pairs)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    for (name, first), second in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_prompts_are_read_once_and_drawn_anew_at_every_visit(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []

    class Watched(DnDTrainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            seen.extend(inputs["condition_states"])
            targets.extend(inputs["target_tokens"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Watched(make_generator(), fitting_arguments(tmp_path, max_steps=9), pairs)
    trainer.train()
    assert trainer.embeddings.encoder_calls == len(pairs.tasks)
    assert len({states.numpy().tobytes() for states in seen}) > len(seen) * 2 / 3
    # Three epochs: each checkpoint was met three times.
    met = [target.numpy().tobytes() for target in targets]
    assert sorted(met.count(one) for one in set(met)) == [3] * len(pairs)


def test_gradient_accumulation_equals_a_larger_batch(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    settings = {"max_steps": 3, "condition_noise": 0.0, "target_noise": 0.0, "optim": "sgd"}
    one, other = make_generator(), make_generator()
    DnDTrainer(one, fitting_arguments(tmp_path / "a", per_device_train_batch_size=4, **settings), pairs).train()
    accumulated = fitting_arguments(
        tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    DnDTrainer(other, accumulated, pairs).train()
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), name


def test_mixed_precision_trains_float32_weights(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    generator = make_generator()
    trainer = DnDTrainer(generator, fitting_arguments(tmp_path, bf16=True, max_steps=20), pairs)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert generator.dtype == torch.float32
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_changes_nothing(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    plain, checkpointed = make_generator(), make_generator()
    DnDTrainer(plain, fitting_arguments(tmp_path, max_steps=2), pairs).train()
    DnDTrainer(checkpointed, fitting_arguments(tmp_path, max_steps=2, gradient_checkpointing=True), pairs).train()
    assert checkpointed.decoder.gradient_checkpointing
    for first, second in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6)


def test_no_weight_decay_on_norms_and_biases(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    generator = make_generator()
    trainer = DnDTrainer(generator, fitting_arguments(tmp_path), pairs)
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in generator.named_parameters():
        bare = name.endswith("bias") or ".norm." in name
        assert decay[id(parameter)] == (0.0 if bare else 0.1), name


def test_a_run_that_starts_again_reads_no_prompt_twice(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    def fitted() -> tuple[int, dict[str, torch.Tensor]]:
        generator = make_generator()
        settings = fitting_arguments(tmp_path / "run", max_steps=2, prompt_states_dir=str(tmp_path / "states"))
        trainer = DnDTrainer(generator, settings, pairs)
        trainer.train()
        return trainer.embeddings.encoder_calls, {**generator.state_dict()}

    calls, first = fitted()
    calls_again, second = fitted()
    assert (calls, calls_again) == (len(pairs.tasks), 0)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_text_encoder_can_be_fitted_too_and_is_carried(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    generator = make_generator(
        freeze_text_encoder=False,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3, "zero_init_output": False},
    )
    before = {name: p.clone() for name, p in generator.text_encoder.module.named_parameters()}
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    DnDTrainer(generator, fitting_arguments(tmp_path, **settings), pairs).train()
    moved = [name for name, p in generator.text_encoder.module.named_parameters() if not torch.equal(p, before[name])]
    assert any("attention" in name for name in moved)

    prompts = pairs.prompts("law")
    expected = generator.generate_adapter(prompts).state_dict()
    generator.save_pretrained(tmp_path / "final")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "final")
    assert all(torch.equal(t, expected[k]) for k, t in loaded.generate_adapter(prompts).state_dict().items())

    resumed = make_generator(freeze_text_encoder=False)
    DnDTrainer(resumed, fitting_arguments(tmp_path, **settings), pairs).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-1")
    )
    for (name, first), second in zip(generator.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), name


def test_a_fit_that_was_interrupted_in_a_step_resumes_to_the_same_bytes(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    whole, cut, resumed = make_generator(), make_generator(), make_generator()
    DnDTrainer(whole, fitting_arguments(tmp_path / "whole"), pairs).train()

    settings = fitting_arguments(tmp_path / "cut", save_strategy="steps", save_steps=2)
    steps = 0

    def interrupt_the_fourth(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore the signal
    try:
        with cut.decoder.register_forward_hook(interrupt_the_fourth), pytest.raises(KeyboardInterrupt):
            DnDTrainer(cut, settings, pairs).train()
    finally:
        signal.signal(signal.SIGINT, handler)
    DnDTrainer(resumed, settings, pairs).train(resume_from_checkpoint=True)
    found = resumed.state_dict()
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.state_dict().items())


def test_scores_held_out_tasks_beside_shuffled_prompts(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    train, held_out = pairs.split(held_out=["art", "geo"])
    generator = make_generator(
        decoder_type="hyper_convolution", decoder_config={"kernel_size": 3, "zero_init_output": False}
    )
    digests: dict[tuple[str, str], float] = {}

    def scorer(task: str, adapter: Any) -> float:
        return digests.setdefault((task, adapter.provenance["prompts_sha256"]), float(len(digests)))

    metrics = DnDTrainer(generator, fitting_arguments(tmp_path), train, held_out, adapter_scorer=scorer).evaluate()
    own = {
        task: generator.generate_adapter(held_out.prompts(task)).provenance["prompts_sha256"]
        for task in held_out.tasks
    }
    assert set(digests) == {(task, own[other]) for task in own for other in own}
    assert metrics["eval_score"] == (digests["art", own["art"]] + digests["geo", own["geo"]]) / 2
    assert metrics["eval_shuffled_score"] == (digests["art", own["geo"]] + digests["geo", own["art"]]) / 2
    assert generator.config.measured["eval_score"] == metrics["eval_score"]


def test_weights_of_the_paper_and_none(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    for weighting in ("within_task", "none"):
        trainer = DnDTrainer(
            make_generator(), fitting_arguments(tmp_path, loss_weighting=weighting, max_steps=1), pairs
        )
        trainer.train()
        assert (trainer.objective.token_weight is None) == (weighting == "none")
    with pytest.raises(GeneratorConfigError, match=r"loss_weighting.*'typo'"):
        fitting_arguments(tmp_path, loss_weighting="typo")
    with pytest.raises(GeneratorConfigError, match="condition_noise"):
        fitting_arguments(tmp_path, condition_noise=-1.0)


def test_without_normalisation_tokens_are_the_weights(
    pairs: PromptCheckpointDataset, make_generator: Callable[..., PromptConditionedLoraGenerator], tmp_path: Path
) -> None:
    generator = make_generator(normalization="none")
    DnDTrainer(generator, fitting_arguments(tmp_path, max_steps=1), pairs).train()
    grid = torch.randn(generator.weight_tokenizer.grid_shape)
    assert torch.equal(generator.normalization.denormalize(grid), grid)
    generator.generate_adapter(["court"])


def test_pairs_of_another_layout_are_refused(
    make_generator: Callable[..., PromptConditionedLoraGenerator], base_model: nn.Module, tmp_path: Path
) -> None:
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["q_proj"]), base_model)
    writer = PairWriter(tmp_path / "pairs" / "law", ["court"], layout)
    writer.begin()
    writer.add({tensor.key: torch.ones(tensor.shape) for tensor in layout.tensors}, 1)
    writer.close()
    other = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    with pytest.raises(LayoutError, match=r"train_dataset.*down_proj"):
        DnDTrainer(make_generator(), fitting_arguments(tmp_path), other)


def test_training_arguments_survive_a_copy(tmp_path: Path) -> None:
    first = fitting_arguments(tmp_path)
    assert copy.deepcopy(first).to_dict() == first.to_dict()
    assert first.remove_unused_columns is False


def test_one_process_fits_on_one_of_several_gpus(
    pairs: PromptCheckpointDataset,
    make_generator: Callable[..., PromptConditionedLoraGenerator],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = fitting_arguments(tmp_path, max_steps=1)
    assert args.n_gpu == 0  # the devices are set up, and no more will be looked for
    monkeypatch.setattr(args, "_n_gpu", 2)
    assert args.train_batch_size == 8
    with pytest.warns(UserWarning, match=r"sees 2 GPUs.*torchrun --nproc_per_node=2"):
        trainer = DnDTrainer(make_generator(), args, pairs)
    trainer.train()
    assert args.n_gpu == 1 and args.train_batch_size == 4
    assert not isinstance(trainer.model_wrapped, nn.DataParallel)
