# SPDX-License-Identifier: Apache-2.0
"""The decoder of cores between shared bases: what it reads, what it writes, and that all of it learns."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from support.decoders import read_set

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.adapters.positions import token_positions
from peft_dnd.adapters.tokenizer import WeightTokenizer
from peft_dnd.decoders import CenteredDecoder, CoreDecoder, TokenPositions
from peft_dnd.decoders.discriminants import discriminants
from peft_dnd.errors import GeneratorConfigError


# Two modules; A of one token, B of two.
POSITIONS = TokenPositions(
    layers=(0, 0, 0, 1, 1, 1), slots=(0, 1, 2, 0, 1, 2), matrices=(0, 1, 1, 2, 3, 3), sides=("A", "B", "B") * 2
)
PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please", "law ."]


def new_decoder(**settings) -> CoreDecoder:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "core_rank": 2, "zero_init_output": False, **settings}
    return CoreDecoder((8, 5, 12), (6, 4, 16), POSITIONS, **settings).eval()


@pytest.mark.parametrize("count", [1, 3, 20])
def test_neither_order_nor_padding_matters(count):
    decoder = new_decoder()
    prompts = [torch.randn(1 + i % 5, 12) for i in range(count)]
    grid = read_set(decoder, prompts, count, 5)
    shuffled = random.Random(0).sample(prompts, count)
    torch.testing.assert_close(read_set(decoder, shuffled, count, 5), grid, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_set(decoder, prompts, count + 3, 7), grid, atol=1e-4, rtol=1e-4)
    other = read_set(decoder, [torch.randn(3, 12) for _ in range(count)], count, 5)
    assert (other - grid).abs().max() > 1e-2


def test_prompts_write_the_first_ranks_of_b_alone():
    decoder = new_decoder()
    one, other = (read_set(decoder, [torch.randn(3, 12)], 1, 3)[0] for _ in range(2))
    differs = (one != other).any(-1)
    assert differs.tolist() == [[side == "B" and row < 2 for row in range(4)] for side in POSITIONS.sides]


def test_b_is_a_core_between_bases():
    decoder = new_decoder(num_bases=3)
    summary = torch.randn(1, 32)
    grid = decoder.writer(summary)[0] - decoder.writer(torch.zeros(1, 32))[0]
    weight = decoder.writer.cores.weight * 2 / 32**0.5
    cores = (weight @ summary[0]).view(2, 2, 3)
    bases = decoder.writer.bases * 4
    torch.testing.assert_close(grid[1, :2], cores[0] @ bases[0])
    torch.testing.assert_close(grid[5, :2], cores[1] @ bases[3])


def test_starts_from_the_mean_adapter_and_every_parameter_learns():
    decoder = CoreDecoder((8, 5, 12), (6, 4, 16), POSITIONS, hidden_size=32, core_rank=2).train()
    states, mask = torch.randn(2, 3, 5, 12), torch.ones(2, 3, 5)
    assert not decoder(states, mask).any()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    target = torch.randn(2, 6, 4, 16)
    for _ in range(2):  # what feeds a map that starts at zero has no gradient in the first step
        optimizer.zero_grad()
        (decoder(states, mask) - target).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in decoder.named_parameters())


def test_center_and_spread_are_the_training_tasks():
    decoder = new_decoder()
    assert isinstance(decoder, CenteredDecoder) and not decoder.centered
    tasks = [torch.randn(8, 12) * 3 + 7 for _ in range(200)]
    decoder.center_on(tasks)
    assert decoder.centered
    whole = torch.cat(tasks)
    torch.testing.assert_close(decoder.center, whole.mean(0))
    torch.testing.assert_close(decoder.spread, whole.std(0, correction=0) + 1e-3)
    before = decoder.directions.clone()
    decoder.reset_parameters()
    assert not decoder.centered and not torch.equal(decoder.directions, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"core_rank": 5}, "core_rank must not be above the adapter's rank 4, but is 5"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"num_bases": 1.5}, "num_bases must be a positive integer"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below"),
        ({"summary_noise": -1}, "summary_noise"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(GeneratorConfigError, match=message):
        new_decoder(**settings)


def test_positions_of_another_grid_are_refused():
    with pytest.raises(GeneratorConfigError, match="There are 5 weight tokens, but positions of 6"):
        CoreDecoder((8, 5, 12), (5, 4, 16), POSITIONS)


def test_states_of_another_width_are_refused():
    with pytest.raises(GeneratorConfigError, match="must have the shape"):
        new_decoder()(torch.randn(1, 2, 3, 11), torch.ones(1, 2, 3))


def test_positions_name_the_matrices_and_sides(layout: AdapterLayout):
    tokenizer = WeightTokenizer(layout)
    positions = token_positions(tokenizer)
    assert positions.matrices == tuple(tokenizer.tensor_index().tolist())
    assert [layout.tensors[matrix].side for matrix in positions.matrices] == list(positions.sides)


def test_a_generator_has_it_saves_it_and_loads_it(layout: AdapterLayout, encoder_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        text_encoder=str(encoder_folder),
        num_prompts=4,
        max_prompt_length=12,
        decoder_type="core",
        decoder_config={"hidden_size": 32, "core_rank": 2, "zero_init_output": False},
    )
    generator = PromptConditionedLoraGenerator(config)
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.randn(shape), torch.rand(shape[0]) + 0.5)
    generator.decoder.center_on([torch.randn(20, 16) for _ in range(3)])
    generator.eval().save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    one, other = (g.generate_adapter(PROMPTS).state_dict() for g in (generator, loaded))
    # Where weights lie in memory decides how a product is blocked, and with it the last digit.
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert loaded.config.decoder_config["num_bases"] == 2
    assert torch.equal(loaded.decoder.directions, generator.decoder.directions)


def test_what_wordings_add_is_taken_off_before_anything_is_learned():
    chance = torch.Generator().manual_seed(0)
    # Tasks differ a little in two features, prompts of one task a lot in all the others.
    place = torch.randn(40, 1, 12, generator=chance) * torch.tensor([0.3] * 2 + [0.0] * 10)
    wording = torch.randn(40, 6, 12, generator=chance) * torch.tensor([0.1] * 2 + [3.0] * 10)
    states = place + wording
    tasks = list(states / states.flatten(0, 1).std(0))
    found = discriminants(tasks, 3)
    assert found.shape == (3, 12)
    assert (found[:2, :2].norm(dim=1) > 0.95 * found[:2].norm(dim=1)).all()
    read = torch.stack([task.mean(0) @ found.T for task in tasks])
    assert (read.std(0)[:2] > 0.8).all() and read.std(0)[2] < read.std(0)[:2].min()
    assert not discriminants([torch.randn(5, 12)], 3).any()
