# SPDX-License-Identifier: Apache-2.0
"""A language model's states where the answer would begin, as a text encoder and in a generator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.extractor_models import new_model, new_tokenizer, save_model
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.errors import GeneratorConfigError, TextEncoderError
from peft_dnd.text import AnswerStatesTextEncoder


PROMPTS = ["what is the law ?", "a court please", "what is the capital of a river ?"]


def expected(model, tokenizer, prompt: str, layers: tuple[int, ...]) -> torch.Tensor:
    """As the class describes it, a prompt and a position at a time."""
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    parts = []
    for layer in layers:
        unit = [state / state.square().mean().sqrt() for state in states[layer][0]]
        said = [state for state, token in zip(unit, ids, strict=True) if token not in tokenizer.all_special_ids]
        parts += [unit[-1], torch.stack(said).mean(0)]
    return torch.cat(parts)


def test_a_prompt_is_the_states_at_its_end_and_their_mean():
    model, tokenizer = new_model("llama"), new_tokenizer()
    encoder = AnswerStatesTextEncoder(model, tokenizer, [1, -1])
    states = encoder.encode_tokens(PROMPTS)
    assert encoder.embedding_size == states.flat.shape[1] == 4 * model.config.hidden_size
    assert encoder.count_tokens(PROMPTS) == states.lengths.tolist() == [1, 1, 1]
    layers = (1, model.config.num_hidden_layers)
    wanted = torch.stack([expected(model.eval(), tokenizer, prompt, layers) for prompt in PROMPTS])
    torch.testing.assert_close(states.flat, wanted)
    torch.testing.assert_close(encoder.encode_sentences(PROMPTS), wanted)


def test_blocks_say_the_same():
    model, tokenizer = new_model("llama"), new_tokenizer()
    alone = AnswerStatesTextEncoder(model, tokenizer, [1]).encode_tokens(PROMPTS * 3)
    blocks = AnswerStatesTextEncoder(model, tokenizer, [1], block_tokens=64).encode_tokens(PROMPTS * 3)
    torch.testing.assert_close(alone.flat, blocks.flat)


def test_it_is_loaded_by_name_without_the_layers_beyond(tmp_path: Path):
    name = save_model("llama", tmp_path)
    whole = AnswerStatesTextEncoder(LlamaForCausalLM.from_pretrained(name), new_tokenizer(), [0, 1])
    loaded = AnswerStatesTextEncoder.from_pretrained(name, [0, 1])
    assert loaded.name_or_path == str(name)
    torch.testing.assert_close(loaded.encode_tokens(PROMPTS).flat, whole.encode_tokens(PROMPTS).flat)
    count = sum(parameter.numel() for parameter in loaded.module.parameters())
    assert count < sum(parameter.numel() for parameter in whole.module.model.parameters())


def test_a_generator_names_it_and_reads_by_it(layout: AdapterLayout, tmp_path: Path):
    name = save_model("llama", tmp_path / "base")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout, str(name), text_encoder_layers=[1, -1], decoder_type="core", decoder_config={"core_rank": 2}
    )
    assert config.text_encoder_layer is None and len(config.text_encoder_layers) == 2
    generator = PromptConditionedLoraGenerator(config)
    torch.nn.init.normal_(generator.decoder.writer.cores.weight)
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.zeros(shape), torch.ones(shape[0]))
    generator.save_pretrained(tmp_path / "generator")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
    assert isinstance(loaded.text_encoder, AnswerStatesTextEncoder)
    one, other = (g.generate_adapter(PROMPTS).state_dict() for g in (generator, loaded))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    live = AnswerStatesTextEncoder(LlamaForCausalLM.from_pretrained(name), new_tokenizer(), [1, -1])
    given = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator", text_encoder=live)
    torch.testing.assert_close(given.generate_adapter(PROMPTS).state_dict(), one, rtol=1e-5, atol=1e-5)
    fewer = AnswerStatesTextEncoder(LlamaForCausalLM.from_pretrained(name), new_tokenizer(), [1])
    with pytest.raises(GeneratorConfigError, match=r"layers=\(1, \d\) is asked for"):
        PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator", text_encoder=fewer).text_encoder  # noqa: B018


def test_impossible_ones_are_refused(tmp_path: Path):
    model, tokenizer = new_model("llama"), new_tokenizer()
    with pytest.raises(GeneratorConfigError, match="at least one layer"):
        AnswerStatesTextEncoder(model, tokenizer, [])
    with pytest.raises(GeneratorConfigError, match="There is no layer 9"):
        AnswerStatesTextEncoder(model, tokenizer, [9])
    with pytest.raises(TextEncoderError, match="as a language model with its tokenizer"):
        AnswerStatesTextEncoder.from_pretrained(tmp_path / "nowhere", [1])


def test_loading_shows_no_bars_and_reads_no_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    name = save_model("llama", tmp_path)
    capsys.readouterr()
    AnswerStatesTextEncoder.from_pretrained(name, [1])
    if hasattr(transformers_logging, "set_tqdm_hook"):  # older transformers always show theirs
        assert capsys.readouterr().err == ""
    weights = load_file(name / "model.safetensors")
    (name / "model.safetensors").unlink()
    torch.save(weights, name / "pytorch_model.bin")  # noqa: TID251
    with pytest.raises(TextEncoderError, match="as a language model with its tokenizer"):
        AnswerStatesTextEncoder.from_pretrained(name, [1])
