# SPDX-License-Identifier: Apache-2.0
"""A generator's SHA-256: the same for the same weights and settings, and another after any change."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from peft_dnd import PromptConditionedLoraGenerator, StreamedLoraGenerator
from peft_dnd.generator.fingerprint import generator_sha256


def test_it_follows_the_weights_and_the_settings(
    generator: PromptConditionedLoraGenerator, generator_folder: Path
) -> None:
    expected = generator_sha256(generator)
    loaded = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    # On disk and in memory, elsewhere in memory, left on disk: one generator.
    assert {generator_sha256(one) for one in (loaded, copy.deepcopy(generator))} == {expected}
    assert generator_sha256(StreamedLoraGenerator.from_pretrained(generator_folder)) == expected

    weight = next(loaded.decoder.parameters())
    with torch.no_grad():
        weight.view(-1)[-1] += 1e-6
    changed = generator_sha256(loaded)
    assert changed != expected
    with torch.no_grad():
        weight.copy_(next(generator.decoder.parameters()))
    assert generator_sha256(loaded) == expected
    loaded.normalization.mean.add_(1e-6)
    assert generator_sha256(loaded) not in (expected, changed)

    other = copy.deepcopy(generator)
    assert generator_sha256(other) == expected
    other.config.max_prompt_length += 1
    assert generator_sha256(other) != expected
    other = copy.deepcopy(generator)
    other.config.base_model_name_or_path = "another/name"  # names differ from machine to machine
    assert generator_sha256(other) == expected
    half = PromptConditionedLoraGenerator.from_pretrained(generator_folder, dtype=torch.bfloat16)
    streamed = StreamedLoraGenerator.from_pretrained(generator_folder, dtype=torch.bfloat16)
    assert generator_sha256(half) == generator_sha256(streamed) != expected


def test_adapters_keep_it(generator: PromptConditionedLoraGenerator) -> None:
    kept = generator.generate_adapter(["tax law ."]).provenance
    assert kept["generator_sha256"] == generator_sha256(generator)
    assert (kept["dtype"], kept["device"], kept["torch_version"]) == ("float32", "cpu", torch.__version__)
