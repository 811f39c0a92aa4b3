# SPDX-License-Identifier: Apache-2.0
"""The base's own loss with generated matrices in place: its value, its gradient, and what it leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.live_models import assert_untouched, snapshot
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.loading import load_matrices
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import BaseModelMismatchError, GeneratorConfigError, LayoutError
from peft_dnd.fitting.task_loss import TaskLoss


BATCH = {
    "input_ids": torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, -100, 9, 2, 7], [-100, 3, 8, -100, -100]]),
}


def draw(layout: AdapterLayout, seed: int = 0, scale: float = 0.2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.key: (torch.randn(t.shape, generator=generator) * scale).requires_grad_() for t in layout.tensors}


def gradients(loss: torch.Tensor, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(matrices, torch.autograd.grad(loss, list(matrices.values())), strict=True))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).train()  # its dropout must be off all the same


BASES = {
    "all linear layers": (None, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")),
    "embedding": (None, LoraConfig(r=2, lora_alpha=4, target_modules=["embed_tokens", "q_proj"], use_rslora=True)),
    "ranks": (None, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4})),
    "Conv1D": (gpt2, LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("name", BASES)
def test_loss_and_gradient_are_those_of_peft(name: str, fresh_base: Callable[[], nn.Module]) -> None:
    make, config = BASES[name]
    base = (make or fresh_base)()
    layout = AdapterLayout.from_lora_config(config, base)
    matrices = draw(layout)
    before = snapshot(base)
    loss = TaskLoss(base, layout)(matrices, BATCH)
    ours = gradients(loss * 3, matrices)  # whatever comes after it in the graph
    assert_untouched(base, before)

    values = {key: matrix.detach() for key, matrix in matrices.items()}
    live = load_matrices(copy.deepcopy(base), "default", layout, values).eval()
    expected = live(**BATCH).loss
    (expected * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = {key: parameter.grad for key, parameter in live_state_dict(live, "default").items()}
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-4, atol=1e-6)


def test_gradient_against_finite_differences(base_model: nn.Module, layout: AdapterLayout) -> None:
    loss_of = TaskLoss(base_model, layout)
    matrices = draw(layout, scale=0.05)  # near the base: far from it the loss bends within a step's length
    gradient = gradients(loss_of(matrices, BATCH), matrices)
    norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
    step = 3e-3
    ahead, behind = (
        loss_of({key: m.detach() + sign * step * gradient[key] / norm for key, m in matrices.items()}, BATCH)
        for sign in (1, -1)
    )
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(norm.item(), rel=2e-3)


def test_weights_are_shared_and_not_copied(fresh_base: Callable[[], nn.Module], layout: AdapterLayout) -> None:
    base = fresh_base()
    loss_of = TaskLoss(base, layout)
    kept = {tensor.data_ptr() for tensor in [*base.parameters(), *base.buffers()]}
    theirs = [p for name, p in loss_of.model.named_parameters() if "lora_" not in name]
    assert {tensor.data_ptr() for tensor in [*theirs, *loss_of.model.buffers()]} <= kept
    assert not any(parameter.requires_grad for parameter in theirs)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_model_in_training_goes_on_and_is_left_alone(
    trained_like: Callable[[int], PeftModel], layout: AdapterLayout
) -> None:
    model = trained_like(1).train()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = snapshot(model)
    loss_of = TaskLoss(model, layout)
    matrices = draw(layout)
    gradients(loss_of(matrices, BATCH), matrices)
    loss_of(matrices, BATCH)
    assert_untouched(model, before)
    assert model.training and model.active_adapter == "default"
    # And what it brings along is what an unfitted generator starts from.
    initial = loss_of.initial_adapter()
    assert all(torch.equal(initial[key], value) for key, value in live_state_dict(model, "default").items())


def test_without_gradients_there_is_no_backward_pass(base_model: nn.Module, layout: AdapterLayout) -> None:
    loss_of = TaskLoss(base_model, layout)
    matrices = draw(layout)
    expected = loss_of(matrices, BATCH)
    with torch.no_grad():
        plain = loss_of(matrices, BATCH)
    assert plain.grad_fn is None
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)


class Calls:
    """Counts the forward passes of the layers of a model, those computed again included."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        for module in model.modules():
            if type(module).__name__ in ("LlamaMLP", "GPT2MLP"):
                module.register_forward_pre_hook(self._hook)  # recomputing stops as soon as it has what it needs

    def _hook(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("name", ["all linear layers", "Conv1D"])
def test_gradient_checkpointing_gives_the_same_gradient(name: str, fresh_base: Callable[[], nn.Module]) -> None:
    make, config = BASES[name]
    base = (make or fresh_base)()
    layout = AdapterLayout.from_lora_config(config, base)
    first, second = draw(layout, seed=0), draw(layout, seed=1)
    plain, checkpointed = TaskLoss(base, layout), TaskLoss(base, layout, gradient_checkpointing=True)
    calls = [Calls(loss_of.model) for loss_of in (plain, checkpointed)]
    found = []
    for loss_of in (plain, checkpointed):
        # Both losses before either backward pass: the second must not see the matrices of the first, nor none.
        losses = [loss_of(matrices, BATCH) for matrices in (first, second)]
        found.append([gradients(losses[0], first), gradients(losses[1], second)])
    assert calls[1].count == 2 * calls[0].count > 0
    for ours, theirs in zip(*found, strict=True):
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-7)


def test_a_half_precision_base_keeps_its_dtype_under_autocast(
    fresh_base: Callable[[], nn.Module], layout: AdapterLayout
) -> None:
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        loss_of = TaskLoss(fresh_base().to(dtype), layout)
        loss_of.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        matrices = draw(layout)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(matrices, BATCH)
        assert loss.dtype == torch.float32
        assert all(g.dtype == torch.float32 and g.any() for g in gradients(loss, matrices).values())
    assert seen == [torch.float32, torch.bfloat16]


def test_a_base_without_a_loss_of_its_own(layout: AdapterLayout) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes), add_pooling_layer=False)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=2, target_modules=["query", "value", "dense"]), encoder)
    batch = {"input_ids": BATCH["input_ids"], "labels": torch.tensor([0, 1]), "names": BATCH["input_ids"][:, :2]}

    def similarity(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        texts, names = (model(input_ids=batch[key]).last_hidden_state.mean(1) for key in ("input_ids", "names"))
        scores = nn.functional.normalize(texts, dim=-1) @ nn.functional.normalize(names, dim=-1).mT
        return nn.functional.cross_entropy(scores, batch["labels"])

    matrices = draw(layout)
    assert all(g.any() for g in gradients(TaskLoss(encoder, layout, similarity)(matrices, batch), matrices).values())
    with pytest.raises(GeneratorConfigError, match=r"BertModel gives no loss.*task_loss_function"):
        TaskLoss(encoder, layout)(matrices, {"input_ids": BATCH["input_ids"]})
    with pytest.raises(GeneratorConfigError, match="scalar tensor and is float"):
        TaskLoss(encoder, layout, lambda model, batch: 1.0)(matrices, batch)
    with pytest.raises(GeneratorConfigError, match="does not depend on the adapter"):
        TaskLoss(encoder, layout, lambda model, batch: torch.ones(()))(matrices, batch)


def test_what_does_not_fit_is_refused(
    base_model: nn.Module, fresh_base: Callable[[], nn.Module], layout: AdapterLayout
) -> None:
    matrices = draw(layout)
    key = layout.tensors[3].key
    with pytest.raises(LayoutError, match=key):
        TaskLoss(base_model, layout)({k: m for k, m in matrices.items() if k != key}, BATCH)
    with pytest.raises(BaseModelMismatchError):
        TaskLoss(gpt2(), layout)
    with pytest.raises(LayoutError, match=r"has no matrices at .*down_proj"):
        TaskLoss(get_peft_model(fresh_base(), LoraConfig(r=3, target_modules=["q_proj"])), layout)
    linear = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(GeneratorConfigError, match="base_gradient_checkpointing"):
        TaskLoss(
            linear,
            AdapterLayout.from_lora_config(LoraConfig(r=1, target_modules=["0"]), linear),
            gradient_checkpointing=True,
        )
