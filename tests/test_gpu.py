# SPDX-License-Identifier: Apache-2.0
"""Fitting, losses, text encoders and generation on a GPU give what they give on the CPU, but for rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.constants import TASK_PROMPTS
from support.extractor_models import new_model, new_tokenizer
from torch import nn

from peft_dnd import (
    AdapterLayout,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.fitting.task_loss import TaskLoss
from peft_dnd.text.hidden_states_encoder import HiddenStatesTextEncoder


pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PROMPTS = ["what is tax law ?", "a court please"]
DECODERS = ("set_transformer", "hyper_convolution")


def arguments(folder: Path, **changes: Any) -> DnDTrainingArguments:
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_strategy": "no"}
    settings |= {"disable_tqdm": True, "report_to": "none", "use_cpu": DEVICE == "cpu", **changes}
    return DnDTrainingArguments(output_dir=str(folder), **settings)


def new_generator(
    pairs: PromptCheckpointDataset, encoder_folder: Path, decoder: str, **changes: Any
) -> PromptConditionedLoraGenerator:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs, str(encoder_folder), num_prompts=3, decoder_type=decoder, **changes
    )
    torch.manual_seed(0)
    return PromptConditionedLoraGenerator(config)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-4) -> bool:
    return all(torch.allclose(found[key].cpu(), expected[key].cpu(), atol=atol) for key in expected)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("weight_loss", ["factors", "delta_weights"])
def test_a_fit(
    pairs: PromptCheckpointDataset, encoder_folder: Path, decoder: str, freeze: bool, weight_loss: Any, tmp_path: Path
) -> None:
    generator = new_generator(pairs, encoder_folder, decoder, freeze_text_encoder=freeze)
    args = arguments(tmp_path, weight_loss=weight_loss, save_strategy="steps", save_steps=3)
    trainer = DnDTrainer(generator, args, pairs, pairs)
    trainer.train()
    assert generator.device.type == DEVICE
    assert 0 < trainer.evaluate()["eval_loss"] < 10
    on_gpu = generator.generate_adapter(PROMPTS).state_dict()
    assert all(tensor.device.type == "cpu" for tensor in on_gpu.values())
    assert close(generator.to("cpu").generate_adapter(PROMPTS).state_dict(), on_gpu)

    resumed = new_generator(pairs, encoder_folder, decoder, freeze_text_encoder=freeze)
    args = arguments(tmp_path, weight_loss=weight_loss, save_strategy="no")
    DnDTrainer(resumed, args, pairs).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert close(resumed.state_dict(), generator.state_dict(), atol=5e-3)  # kernels may add in another order


def test_a_text_encoder_that_was_moved_reads_the_prompts(
    pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path
) -> None:
    """As DnDTrainer's docstring says how."""
    read = {}
    for device in ("cpu", DEVICE):
        generator = new_generator(pairs, encoder_folder, "set_transformer")
        generator.text_encoder.module.to(device)
        trainer = DnDTrainer(generator, arguments(tmp_path), pairs)
        trainer.train()
        assert trainer.embeddings.encoder_calls == len(pairs.tasks)
        read[device] = trainer.embeddings.states("law", pairs.prompts("law")).flat
        generator.text_encoder.module.to("cpu")
        assert generator.generate_adapter(PROMPTS)
    assert read[DEVICE].device.type == "cpu"
    torch.testing.assert_close(read[DEVICE], read["cpu"], rtol=0, atol=1e-4)


def test_task_loss_and_its_gradient(fresh_base: Callable[[], nn.Module], layout: AdapterLayout) -> None:
    batch = {"input_ids": torch.tensor([[1, 5, 9, 2, 7]]), "labels": torch.tensor([[-100, -100, 9, 2, 7]])}
    generator = torch.Generator().manual_seed(0)
    matrices = {t.key: torch.randn(t.shape, generator=generator) * 0.2 for t in layout.tensors}
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        own = {key: matrix.to(device).requires_grad_() for key, matrix in matrices.items()}
        loss = TaskLoss(fresh_base(), layout, device=device)(own, batch)
        assert loss.device.type == device
        losses.append(loss.detach().cpu())
        found = torch.autograd.grad(loss, list(own.values()))
        gradients.append({key: gradient.cpu() for key, gradient in zip(own, found, strict=True)})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert close(gradients[1], gradients[0])


def test_a_fit_on_task_loss(pairs_folder: Path, encoder_folder: Path, base_model: nn.Module, tmp_path: Path) -> None:
    folder = shutil.copytree(pairs_folder, tmp_path / "pairs")
    for task in TASK_PROMPTS:
        write_examples(folder / task, [{"input_ids": [1, 2, n], "labels": [-100, -100, n]} for n in range(5, 15)])
    pairs = PromptCheckpointDataset.from_folder(folder)
    generator = new_generator(pairs, encoder_folder, "set_transformer")
    args = arguments(tmp_path / "out", task_loss_weight=1.0, rebuild_weight=1.0, task_examples=4)
    trainer = DnDTrainer(generator, args, pairs, pairs, base_model=base_model)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_task_loss"] > 0 and metrics["eval_weight_loss"] > 0


def test_the_base_itself_reads_the_prompts(pairs: PromptCheckpointDataset, tmp_path: Path) -> None:
    states, adapters = [], []
    for device in ("cpu", DEVICE):
        encoder = HiddenStatesTextEncoder(new_model("llama").to(device), new_tokenizer(), 2)
        states.append(encoder.encode_tokens(PROMPTS).flat)
        assert states[-1].device.type == device
        config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, encoder, num_prompts=3)
        torch.manual_seed(0)
        generator = PromptConditionedLoraGenerator(config, text_encoder=encoder)
        DnDTrainer(generator, arguments(tmp_path, use_cpu=device == "cpu", max_steps=2), pairs, pairs).train()
        adapters.append(generator.generate_adapter(PROMPTS).state_dict())
    torch.testing.assert_close(states[1].cpu(), states[0], rtol=0, atol=1e-4)
    assert close(adapters[1], adapters[0], atol=1e-2)


def test_generation_into_a_model_on_a_gpu(
    generator_folder: Path, fresh_base: Callable[[], nn.Module], layout: AdapterLayout
) -> None:
    generator = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    expected = generator.generate_adapter(PROMPTS).state_dict()
    generator.to(DEVICE)
    assert close(generator.generate_adapter(PROMPTS).state_dict(), expected)
    model = get_peft_model(fresh_base().to(DEVICE), DnDConfig(generator=generator, prompts=PROMPTS))
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(lora) == len(layout.tensors) and all(p.device.type == DEVICE for p in lora)
    assert model(input_ids=torch.tensor([[1, 2, 3]], device=DEVICE)).logits.isfinite().all()
