# SPDX-License-Identifier: Apache-2.0
"""The decoder that reads sets, its positions, and a generator that has it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from shapes import qwen_layout
from support.decoders import read_set
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    WeightTokenizer,
)
from peft_dnd.adapters.positions import token_positions
from peft_dnd.decoders import SetTransformerDecoder, TokenPositions
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.text.prompts import draw_prompt_set


POSITIONS = TokenPositions(
    layers=(0, 0, 0, 1, 1, 1), slots=(0, 1, 2, 0, 1, 2), matrices=(0, 1, 1, 2, 3, 3), sides=("A", "B", "B") * 2
)
PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please", "law ."]


def same(first: GeneratedAdapter, second: GeneratedAdapter) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def decoder() -> SetTransformerDecoder:
    torch.manual_seed(0)
    decoder = SetTransformerDecoder(
        (8, 5, 12), (6, 4, 16), POSITIONS, hidden_size=32, num_latents=3, summary_noise=0.0, zero_init_output=False
    )
    nn.init.normal_(decoder.latents_to_summary.weight, std=0.1)  # so that what attention reads counts too
    return decoder.eval()


@pytest.fixture
def set_generator(layout: AdapterLayout, encoder_folder: Path) -> PromptConditionedLoraGenerator:
    torch.manual_seed(0)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        text_encoder=str(encoder_folder),
        num_prompts=4,
        max_prompt_length=12,
        decoder_type="set_transformer",
        decoder_config={"hidden_size": 32, "num_latents": 4, "zero_init_output": False},
    )
    model = PromptConditionedLoraGenerator(config)
    shape = model.weight_tokenizer.grid_shape
    model.normalization.set_statistics(torch.randn(shape), torch.rand(shape[0]) + 0.5)
    return model.eval()


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_neither_order_nor_padding_matters(decoder: SetTransformerDecoder, count: int) -> None:
    torch.manual_seed(count)
    prompts = [torch.randn(1 + i % 5, 12) for i in range(count)]
    grid = read_set(decoder, prompts, count, 5)
    assert grid.isfinite().all() and grid.std() > 0.05
    shuffled = random.Random(0).sample(prompts, count)
    torch.testing.assert_close(read_set(decoder, shuffled, count, 5), grid, atol=1e-5, rtol=0)
    torch.testing.assert_close(read_set(decoder, prompts, count + 9, 11), grid, atol=1e-5, rtol=0)
    other = read_set(decoder, [torch.randn(3, 12) for _ in range(count)], count, 5)
    assert (other - grid).abs().max() > 1e-2


def test_repeating_a_set_changes_nothing(decoder: SetTransformerDecoder) -> None:
    prompts = [torch.randn(3, 12) for _ in range(4)]
    torch.testing.assert_close(read_set(decoder, prompts * 5, 20, 3), read_set(decoder, prompts, 4, 3))


def test_what_all_tasks_share_is_taken_off(decoder: SetTransformerDecoder) -> None:
    tasks = [torch.randn(7, 12) + 3 * torch.linspace(-1, 1, 12) for _ in range(4)]
    decoder.center_on(tasks)
    means = [torch.nn.functional.layer_norm(states, (12,)).mean(0) for states in tasks]
    torch.testing.assert_close(decoder.center, torch.stack(means).mean(0))
    # Tasks whose prompts are nearly alike are told apart all the same.
    nn.init.zeros_(decoder.latents_to_summary.weight)
    near = [torch.randn(5, 12) * 0.05 + 3 * torch.linspace(-1, 1, 12) for _ in range(2)]
    before = (read_set(decoder, near[:1], 1, 5) - read_set(decoder, near[1:], 1, 5)).std()
    decoder.center_on(near)
    after = (read_set(decoder, near[:1], 1, 5) - read_set(decoder, near[1:], 1, 5)).std()
    assert after > 5 * before


def test_every_place_gets_its_own_token(decoder: SetTransformerDecoder) -> None:
    grid = read_set(decoder, [torch.randn(3, 12)], 1, 3)[0]
    distances = torch.cdist(grid.flatten(1), grid.flatten(1))
    assert (distances + torch.eye(6) > 0.05).all()


def test_starts_from_the_mean_adapter_and_every_parameter_learns() -> None:
    decoder = SetTransformerDecoder((8, 5, 12), (6, 4, 16), POSITIONS, hidden_size=32, num_latents=3)
    states, mask = torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)
    assert torch.equal(decoder(states, mask), torch.zeros(2, 6, 4, 16))
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1.0)
    target = torch.randn(2, 6, 4, 16)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    for _ in range(3):  # the heads first, which are at zero; then what stands before them, and again
        optimizer.zero_grad()
        (decoder(states, mask) - target).square().mean().backward()
        optimizer.step()
    still = [name for name, parameter in decoder.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_gradient_checkpointing_gives_the_same_gradients(decoder: SetTransformerDecoder) -> None:
    states, mask = torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)
    gradients = []
    for recompute in (False, True):
        decoder.gradient_checkpointing = recompute
        decoder.zero_grad()
        decoder.train()(states, mask).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters() if parameter.grad is not None])
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30}, "num_heads must divide hidden_size, but 4 does not divide 30"),
        ({"num_layers": 0}, "num_layers must be a positive integer, but is 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, but is 1.0"),
        ({"summary_noise": -1.0}, "summary_noise must be finite and not negative, but is -1.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GeneratorConfigError, match=message):
        SetTransformerDecoder((8, 5, 12), (6, 4, 16), POSITIONS, **settings)  # type: ignore[arg-type]


def test_states_of_another_encoder_are_refused(decoder: SetTransformerDecoder) -> None:
    with pytest.raises(GeneratorConfigError, match=r"\(batch, N, L, 12\).*\(1, 2, 3, 13\)"):
        decoder(torch.randn(1, 2, 3, 13), torch.ones(1, 2, 3))
    with pytest.raises(GeneratorConfigError, match="There are 5 weight tokens, but positions of 6"):
        SetTransformerDecoder((8, 5, 12), (5, 4, 16), POSITIONS)


def test_positions_follow_the_layout(layout: AdapterLayout) -> None:
    tokenizer = WeightTokenizer(layout)
    positions = token_positions(tokenizer)
    tensors = [layout.tensors[i] for i in tokenizer.tensor_index().tolist()]
    places = list(zip(positions.layers, positions.slots, strict=True))
    assert len(set(places)) == len(places) == tokenizer.num_tokens
    for layer, tensor in zip(positions.layers, tensors, strict=True):
        assert f".{layer}." in tensor.module
    slots = {}
    for slot, tensor in zip(positions.slots, tensors, strict=True):
        slots.setdefault(slot, set()).add((re.sub(r"\d+", "*", tensor.module), tensor.side))
    assert all(len(kinds) == 1 for kinds in slots.values())


@pytest.mark.parametrize(("size", "most"), [("0.5b", 20e6), ("7b", 50e6)])
def test_stays_light_at_real_sizes(size: str, most: float) -> None:
    tokenizer = WeightTokenizer(qwen_layout(size))
    with torch.device("meta"):
        decoder = SetTransformerDecoder((16, 64, 384), tokenizer.grid_shape, token_positions(tokenizer))
        states, mask = torch.empty(1, 16, 64, 384), torch.ones(1, 16, 64)
        assert decoder(states, mask).shape == (1, *tokenizer.grid_shape)
    assert sum(parameter.numel() for parameter in decoder.parameters()) < most


def test_size_stays_flat_in_depth() -> None:
    sizes = []
    for layers in (4, 40):
        config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
            lora = LoraConfig(r=4, target_modules="all-linear")
            tokenizer = WeightTokenizer(AdapterLayout.from_lora_config(lora, base))
            decoder = SetTransformerDecoder((16, 64, 384), tokenizer.grid_shape, token_positions(tokenizer))
        sizes.append(sum(parameter.numel() for parameter in decoder.parameters()))
    assert sizes[1] - sizes[0] == 36 * 16  # how much of each template a layer takes


def test_generator_gives_the_same_bytes_in_any_order(set_generator: PromptConditionedLoraGenerator) -> None:
    adapter = set_generator.generate_adapter(PROMPTS)
    assert same(adapter, set_generator.generate_adapter(PROMPTS[::-1], seed=5))
    assert same(adapter, set_generator.generate_adapters({"a": ["river"], "b": PROMPTS})["b"])
    assert not same(adapter, set_generator.generate_adapter(PROMPTS[:1]))
    many = [f"{prompt} {word}" for prompt in PROMPTS for word in ("law", "tax", "court", "river")]
    everything = set_generator.generate_adapter(many)  # more than the four of the configuration: all are read
    assert same(everything, set_generator.generate_adapter(many, seed=1))
    assert not same(everything, set_generator.generate_adapter(many[:-1]))


def test_a_set_beyond_the_limit_is_drawn_from(
    set_generator: PromptConditionedLoraGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dnd.generator.conditioning.SET_LIMIT", 3)
    adapter = set_generator.generate_adapter(PROMPTS)
    assert same(adapter, set_generator.generate_adapter(PROMPTS[::-1]))
    assert any(not same(adapter, set_generator.generate_adapter(PROMPTS, seed=seed)) for seed in range(1, 8))


def test_generator_comes_back_from_its_folder(set_generator: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    set_generator.save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    found, expected = loaded.generate_adapter(PROMPTS), set_generator.generate_adapter(PROMPTS)
    assert same(found, PromptConditionedLoraGenerator.from_pretrained(tmp_path).generate_adapter(PROMPTS))
    # Where weights lie in memory decides on the kernels, so what was never saved may differ in the last bit.
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, atol=1e-5, rtol=1e-5)


def test_fits_like_any_other(
    pairs: PromptCheckpointDataset, set_generator: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        text_encoder=set_generator.text_encoder,
        num_prompts=4,
        max_prompt_length=12,
        decoder_type="set_transformer",
        decoder_config={"hidden_size": 64, "num_latents": 4, "num_templates": 64},
    )
    torch.manual_seed(0)
    model = PromptConditionedLoraGenerator(config, text_encoder=set_generator.text_encoder)
    arguments = DnDTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=100,
        learning_rate=3e-3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = DnDTrainer(model, arguments, train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    assert model.decoder.centered and model.decoder.center.abs().max() > 0.01
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.5 * metrics["eval_mean_adapter_loss"]


def test_draws_any_number_of_prompts() -> None:
    counts = [len(draw_prompt_set(20, 8, seed, smallest=2)) for seed in range(400)]
    assert set(counts) == set(range(2, 9))
    assert max(counts.count(count) for count in set(counts)) < 2 * 400 / 7
    assert all(len(set(draw_prompt_set(20, 8, seed).tolist())) == 8 for seed in range(20))
    assert draw_prompt_set(3, 8, 0, smallest=5).tolist() == [0, 1, 2]
