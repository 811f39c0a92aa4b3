# SPDX-License-Identifier: Apache-2.0
"""Text-to-LoRA's decoder: what it reads, what it writes, and that all of it learns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import read_set

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.adapters.layout import LoraModule
from peft_dnd.adapters.positions import token_positions
from peft_dnd.adapters.tokenizer import WeightTokenizer
from peft_dnd.decoders import TextToLoraDecoder, TokenPositions
from peft_dnd.decoders.text_to_lora import module_kinds
from peft_dnd.errors import GeneratorConfigError


PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please", "law ."]
FORMS: list[dict[str, Any]] = [
    {"shared_head": shared, "rank_positions": positions}
    for shared in (False, True)
    for positions in (None, "learned", "rotary")
]


def uneven_layout() -> AdapterLayout:
    """Two kinds of modules, of which one is wider in the second layer, and one has a smaller rank there."""
    return AdapterLayout(
        (
            LoraModule("layers.0.q", "linear", (4, 16), (32, 4), 8),
            LoraModule("layers.1.q", "linear", (4, 40), (16, 4), 8),
            LoraModule("layers.0.v", "linear", (4, 16), (24, 4), 8),
            LoraModule("layers.1.v", "linear", (2, 16), (24, 2), 8),
        )
    )


TOKENIZER = WeightTokenizer(uneven_layout(), 16)


def new_decoder(**settings: Any) -> TextToLoraDecoder:
    torch.manual_seed(0)
    settings = {"latent_size": 16, "head_in_size": 8, "zero_init_output": False, **settings}
    return TextToLoraDecoder((8, 5, 12), TOKENIZER.grid_shape, token_positions(TOKENIZER), **settings).eval()


def test_kinds_are_read_off_the_positions() -> None:
    layers, kinds = module_kinds(token_positions(TOKENIZER))
    # In the layout's order: layers.0.q, layers.0.v, layers.1.q, layers.1.v.
    assert layers == (0, 0, 1, 1)
    assert [kind.modules for kind in kinds] == [(0, 2), (1, 3)]
    assert [(kind.num_a, kind.num_b) for kind in kinds] == [(3, 2), (1, 2)]
    assert [len(kind.picks) for kind in kinds] == [(1 + 2) + (3 + 1), (1 + 2) * 2]
    assert sorted(token for kind in kinds for token in kind.tokens) == list(range(TOKENIZER.num_tokens))


@pytest.mark.parametrize("form", FORMS)
def test_neither_order_nor_padding_matters(form: dict[str, Any]) -> None:
    decoder = new_decoder(**form)
    prompts = [torch.randn(1 + i % 5, 12) for i in range(6)]
    grid = read_set(decoder, prompts, 6, 5)
    assert grid.shape == (1, *TOKENIZER.grid_shape)
    shuffled = random.Random(0).sample(prompts, 6)
    torch.testing.assert_close(read_set(decoder, shuffled, 9, 7), grid, atol=1e-5, rtol=1e-4)
    assert (read_set(decoder, [torch.randn(3, 12)], 6, 5) - grid).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_say_in_what_is_written(form: dict[str, Any]) -> None:
    decoder = new_decoder(head_bias=True, elementwise_scale=True, **form).train()
    valid = TOKENIZER.valid_mask()
    written = decoder(torch.randn(3, 2, 4, 12), torch.ones(3, 2, 4))[:, valid]
    (written * torch.randn_like(written)).sum().backward()
    still = [name for name, parameter in decoder.named_parameters() if not (parameter.grad.abs() > 0).any()]  # type: ignore[union-attr]
    assert still == []


def test_modules_and_ranks_differ_and_a_batch_is_its_items() -> None:
    for form in FORMS:
        decoder = new_decoder(**form)
        states, mask = torch.randn(3, 2, 4, 12), torch.ones(3, 2, 4)
        with torch.no_grad():
            grid = decoder(states, mask)
            for item in range(3):
                torch.testing.assert_close(decoder(states[item : item + 1], mask[:1])[0], grid[item])
        tokens = grid[0].flatten(1)
        assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 1e-4
        assert (grid[0, :, 0] - grid[0, :, 1]).abs().max() > 1e-3


def test_unfitted_it_writes_the_mean_adapter_and_its_scale_is_entry_by_entry() -> None:
    decoder = TextToLoraDecoder((8, 5, 12), TOKENIZER.grid_shape, token_positions(TOKENIZER)).eval()
    assert not read_set(decoder, [torch.randn(3, 12)], 1, 3).any()
    scaled = new_decoder(elementwise_scale=True)
    plain = read_set(scaled, [torch.ones(3, 12)], 1, 3)
    scaled.get_buffer("scale").copy_(torch.arange(plain.numel()).view(plain.shape[1:]))
    torch.testing.assert_close(read_set(scaled, [torch.ones(3, 12)], 1, 3), plain * scaled.get_buffer("scale"))


def test_its_size_does_not_grow_with_the_depth() -> None:
    def parameters(depth: int) -> int:
        modules = [LoraModule(f"layers.{i}.q", "linear", (4, 16), (32, 4), 8) for i in range(depth)]
        tokenizer = WeightTokenizer(AdapterLayout(tuple(modules)), 16)
        decoder = TextToLoraDecoder((8, 5, 12), tokenizer.grid_shape, token_positions(tokenizer))
        return sum(parameter.numel() for parameter in decoder.parameters())

    assert parameters(24) - parameters(4) == 20 * 128 // 4


def test_it_learns_what_tasks_want() -> None:
    decoder = new_decoder(dropout=0.0, zero_init_output=True).train()
    states, mask = torch.randn(4, 3, 5, 12), torch.ones(4, 3, 5)
    wanted = torch.randn(4, *TOKENIZER.grid_shape)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    for _ in range(150):
        loss = (decoder(states, mask) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_size": 18}, "multiple of 4, but is 18"),
        ({"latent_size": 0}, "latent_size must be a positive integer"),
        ({"head_in_size": 2.5}, "head_in_size must be a positive integer"),
        ({"rank_positions": "sine"}, "rank_positions must be one of"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GeneratorConfigError, match=message):
        new_decoder(**settings)


def test_positions_of_another_grid_are_refused() -> None:
    with pytest.raises(GeneratorConfigError, match="Both must come from the same weight tokenizer"):
        TextToLoraDecoder((8, 5, 12), (3, 4, 16), TokenPositions((0,), (0,), (0,), ("A",)))


def test_a_generator_of_it_is_saved_and_loaded(layout: AdapterLayout, encoder_folder: Path, tmp_path: Path) -> None:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        str(encoder_folder),
        decoder_type="text_to_lora",
        decoder_config={"latent_size": 16, "zero_init_output": False, "elementwise_scale": True},
    )
    model = PromptConditionedLoraGenerator(config).eval()
    shape = model.weight_tokenizer.grid_shape
    model.normalization.set_statistics(torch.randn(shape), torch.full((shape[0],), 0.1))
    model.decoder.get_buffer("scale").fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert loaded.config.decoder_config["head_in_size"] == 512
    expected = model.generate_adapter(PROMPTS).state_dict()
    found = loaded.generate_adapter(PROMPTS[::-1]).state_dict()
    for key, tensor in expected.items():  # weights that lie elsewhere in memory round the last bit anew
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=1e-5)
