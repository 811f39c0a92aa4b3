# SPDX-License-Identifier: Apache-2.0
"""Long prompts: the projection along their length, as it should be and as it was released."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.decoders import build_decoder
from peft_dnd.decoders.hyper_convolution import HyperConvolutionDecoder
from peft_dnd.decoders.length_projection import LengthProjection
from peft_dnd.errors import GeneratorConfigError


def decoder(**settings: Any) -> HyperConvolutionDecoder:
    torch.manual_seed(0)
    settings = {"cascade": [[2, 4, 6], [5, 3, 4]], "kernel_size": 3, "zero_init_output": False, **settings}
    built = build_decoder("hyper_convolution", (2, 9, 6), (5, 3, 4), settings)
    assert isinstance(built, HyperConvolutionDecoder)
    return built.eval()


def test_mixes_the_positions_of_each_feature() -> None:
    torch.manual_seed(0)
    projection = LengthProjection(9, 4)
    states = torch.randn(3, 2, 9, 6)
    found = projection(states)
    for b, n, c in ((0, 0, 0), (2, 1, 5)):
        low = projection.down.weight @ states[b, n, :, c] + projection.down.bias
        torch.testing.assert_close(found[b, n, :, c], projection.gate.weight @ low + projection.gate.bias)
    assert found.shape == (3, 2, 4, 6)


def test_scrambles_as_released() -> None:
    torch.manual_seed(0)
    projection = LengthProjection(9, 4, scrambled=True)
    states = torch.randn(3, 2, 9, 6)
    # The memory of (L, C), read as (C, L): row i is what stands at the numbers 9 i to 9 i + 8 of 54.
    rows = [states[1, 1].flatten()[9 * i : 9 * i + 9] for i in range(6)]
    low = [projection.down.weight @ row + projection.down.bias for row in rows]
    out = torch.cat([projection.gate.weight @ row + projection.gate.bias for row in low])
    torch.testing.assert_close(projection(states)[1, 1].flatten(), out)


@pytest.mark.parametrize("scrambled", [False, True])
def test_stands_before_the_cascade_and_after_the_mask(scrambled: bool) -> None:
    with_projection = decoder(length_projection={"length": 4, "scrambled": scrambled})
    assert with_projection.length_projection is not None
    states, mask = torch.randn(2, 2, 9, 6), torch.rand(2, 2, 9) > 0.3
    plain = build_decoder(
        "hyper_convolution", (2, 4, 6), (5, 3, 4), {**with_projection.resolved_settings, "length_projection": None}
    )
    plain.load_state_dict(
        {key: value for key, value in with_projection.state_dict().items() if key.startswith("layers.")}
    )
    clean = states * mask[..., None]
    expected = plain(with_projection.length_projection(clean), torch.ones(2, 2, 4))
    torch.testing.assert_close(with_projection(states.masked_fill(~mask[..., None], torch.nan), mask), expected)


def test_its_settings_build_it_again() -> None:
    first = decoder(length_projection={"length": 4}, cascade=None)
    assert first.cascade[0] == (2, 4, 6)
    assert first.resolved_settings["length_projection"] == {"length": 4, "scrambled": False}
    again = build_decoder("hyper_convolution", (2, 9, 6), (5, 3, 4), first.resolved_settings)
    again.load_state_dict(first.state_dict())
    states, mask = torch.randn(1, 2, 9, 6), torch.ones(1, 2, 9)
    assert torch.equal(again.eval()(states, mask), first(states, mask))
    assert "length_projection" not in build_decoder("hyper_convolution", (2, 9, 6), (5, 3, 4), {}).resolved_settings


def test_noise_comes_after_it_and_in_training_only() -> None:
    projection = LengthProjection(9, 400)
    projection.noise = 0.5
    states = torch.zeros(1, 2, 9, 6)
    clean = projection.eval()(states)
    assert torch.equal(clean, projection(states))
    noise = projection.train()(states) - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"length": 0}, {"length": True}, {"length": 4, "scramble": True}, {"length": 4, "scrambled": 1}, 4],
)
def test_impossible_settings_are_refused(settings: Any) -> None:
    with pytest.raises(GeneratorConfigError, match="length_projection must be a dictionary"):
        decoder(length_projection=settings)


def test_fitting_adds_the_condition_noise_after_it_alone(
    generator_config: PromptConditionedLoraGeneratorConfig, pairs: PromptCheckpointDataset, tmp_path: Path
) -> None:
    config = copy.deepcopy(generator_config)
    config.decoder_config = {"kernel_size": 3, "length_projection": {"length": 8}}
    model = PromptConditionedLoraGenerator(config).train()
    args = DnDTrainingArguments(output_dir=str(tmp_path), condition_noise=0.5, report_to=[], use_cpu=True)
    trainer = DnDTrainer(model=model, args=args, train_dataset=pairs)
    projection = model.decoder.length_projection
    assert projection.noise == 0.5
    seen: list[torch.Tensor] = []
    projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = trainer.data_collator([pairs[0]])
    trainer.compute_loss(model, dict(batch))
    assert torch.equal(seen[0], batch["condition_states"])


def test_the_cascade_begins_where_it_ends() -> None:
    with pytest.raises(GeneratorConfigError, match="cascade must begin"):
        decoder(length_projection={"length": 4}, cascade=[[2, 9, 6], [5, 3, 4]])
    with pytest.raises(GeneratorConfigError, match=r"\(2, 9, 6\)"):
        decoder(length_projection={"length": 4})(torch.zeros(1, 2, 4, 6), torch.ones(1, 2, 4))
