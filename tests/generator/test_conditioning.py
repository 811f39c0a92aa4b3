# SPDX-License-Identifier: Apache-2.0
"""Generators with every kind of text encoder: carried, named or passed; and with prompts that are read in windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.constants import LORA_CONFIG
from support.extractor_models import new_model, new_static_embedding, new_tokenizer, save_model, write_word_vectors
from transformers import LlamaForCausalLM

from peft_dnd import (
    AdapterLayout,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointCollator,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.errors import GeneratorConfigError, TextEncoderError
from peft_dnd.text.embedding_cache import PromptEmbeddingCache
from peft_dnd.text.encoder import TextEncoder
from peft_dnd.text.hidden_states_encoder import HiddenStatesTextEncoder
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


PROMPTS = ["what is the capital ?", "law of the river", "what is tax law ? please answer in one word .", "a court ?"]
LONG = ["law of the court " * 20, "what is the river ? " * 15, "a doctor", "tax " * 70]


def new_generator(
    layout: AdapterLayout, encoder: str | TextEncoder, **settings: Any
) -> PromptConditionedLoraGenerator:
    """A generator with random weights that passes for fitted."""
    settings = {"num_prompts": 4, "max_prompt_length": 12, **settings}
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        encoder,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3, "zero_init_output": False},
        **settings,
    )
    torch.manual_seed(0)
    loaded = None if isinstance(encoder, str) else encoder
    generator = PromptConditionedLoraGenerator(config, text_encoder=loaded).eval()
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.randn(shape) * 0.1, torch.full((shape[0],), 0.1))
    return generator


def same(first: GeneratedAdapter, second: GeneratedAdapter) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def make_encoder(kind: str, folder: Path, encoder_folder: Path) -> TextEncoder:
    load = SentenceTransformerTextEncoder.from_pretrained
    if kind == "sentence-transformers":
        return load(encoder_folder)
    if kind == "windows":
        return load(encoder_folder, window_tokens=8)
    if kind == "static":
        return SentenceTransformerTextEncoder(new_static_embedding())
    if kind == "words":
        return SentenceTransformerTextEncoder.from_word_vectors(write_word_vectors(folder / "words.txt"))
    if kind == "T5":
        return load(save_model("t5", folder / "t5"))
    if kind == "language model":
        return load(save_model("llama", folder / "llama"), layer=-2)
    return HiddenStatesTextEncoder(new_model("llama"), new_tokenizer(), 2, window_tokens=16)


KINDS = ("sentence-transformers", "windows", "static", "words", "T5", "language model", "in memory")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("condition", ["token_states", "sentence_embeddings"])
def test_a_generator_carries_every_kind_of_text_encoder(
    layout: AdapterLayout, tmp_path: Path, encoder_folder: Path, kind: str, condition: str
) -> None:
    encoder = make_encoder(kind, tmp_path, encoder_folder)
    generator = new_generator(layout, encoder, text_encoder_in_folder=True, condition=condition)
    generator.save_pretrained(tmp_path / "generator")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
    prompts = [*PROMPTS[:2], *LONG[:2]]
    assert loaded.config.text_encoder_layer == getattr(encoder, "layer", None)
    if kind == "in memory" and condition == "sentence_embeddings":
        # Both are the mean, but the sums are taken in another order.
        states = [g.encode_prompts(prompts)[0] for g in (generator, loaded)]
        torch.testing.assert_close(*states)
        return
    assert same(generator.generate_adapter(prompts), loaded.generate_adapter(prompts))
    assert not same(generator.generate_adapter(prompts), generator.generate_adapter(PROMPTS))


def test_a_text_encoder_that_came_from_nowhere_is_carried(layout: AdapterLayout, tmp_path: Path) -> None:
    generator = new_generator(layout, SentenceTransformerTextEncoder(new_static_embedding()))
    generator.save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert same(generator.generate_adapter(PROMPTS), loaded.generate_adapter(PROMPTS))


class TestNamed:
    def test_layer_and_windows_are_in_the_configuration(self, layout: AdapterLayout, tmp_path: Path) -> None:
        name = str(save_model("llama", tmp_path / "llama"))
        generator = new_generator(layout, name, text_encoder_layer=-2, window_tokens=6)
        assert (generator.config.text_encoder_layer, generator.config.window_tokens) == (3, 6)
        generator.save_pretrained(tmp_path / "generator")
        loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
        assert loaded.config.text_encoder == name
        assert (loaded.text_encoder.layer, loaded.text_encoder.window_tokens) == (3, 6)
        assert same(generator.generate_adapter(LONG), loaded.generate_adapter(LONG))
        other = new_generator(layout, name, text_encoder_layer=-1, window_tokens=6)
        assert not same(generator.generate_adapter(LONG), other.generate_adapter(LONG))

    def test_the_base_model_itself_stands_in_for_its_name(self, layout: AdapterLayout, tmp_path: Path) -> None:
        name = str(save_model("llama", tmp_path / "llama"))
        new_generator(layout, name, text_encoder_layer=2).save_pretrained(tmp_path / "generator")
        by_name = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
        live = HiddenStatesTextEncoder(LlamaForCausalLM.from_pretrained(name), new_tokenizer(), 2)
        by_itself = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator", text_encoder=live)
        assert same(by_name.generate_adapter(PROMPTS), by_itself.generate_adapter(PROMPTS))

    def test_a_base_that_reads_the_prompts_of_its_own_adapter(self, base_model: Any, fresh_base: Any) -> None:
        layout = AdapterLayout.from_lora_config(LORA_CONFIG, base_model)
        base = fresh_base()
        generator = new_generator(layout, HiddenStatesTextEncoder(base, new_tokenizer(), 1))
        expected = generator.generate_adapter(PROMPTS)
        model = get_peft_model(base, DnDConfig(generator=generator, prompts=PROMPTS))
        assert all(
            torch.equal(tensor, dict(model.state_dict())[f"{key.removesuffix('.weight')}.default.weight"])
            for key, tensor in expected.state_dict().items()
        )
        # The adapter that is now in the base has no say in what the prompts are read as.
        assert same(generator.generate_adapter(PROMPTS), expected)

    @pytest.mark.parametrize(("wanted", "found"), [({"layer": 1}, "layer=2"), ({"layer": None}, None)])
    def test_a_passed_text_encoder_must_read_as_the_configuration_says(
        self, layout: AdapterLayout, wanted: dict[str, Any], found: str | None
    ) -> None:
        encoder = HiddenStatesTextEncoder(new_model("llama"), new_tokenizer(), 2)
        generator = new_generator(layout, encoder)
        generator.config.text_encoder_layer = wanted["layer"]
        if found is None:
            generator.load_text_encoder()
            return
        with pytest.raises(GeneratorConfigError, match=rf"layer=1 is asked for, .* has {found}\. Load it with"):
            generator.generate_adapter(PROMPTS)

    def test_what_is_asked_of_a_loaded_text_encoder_it_must_have(
        self, layout: AdapterLayout, encoder_folder: Path
    ) -> None:
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder)
        with pytest.raises(GeneratorConfigError, match=r"window_tokens=8 is asked for, .* has window_tokens=None"):
            new_generator(layout, encoder, window_tokens=8)

    def test_damaged_folder_of_a_language_model(self, layout: AdapterLayout, tmp_path: Path) -> None:
        folder = save_model("llama", tmp_path / "llama")
        (folder / "model.safetensors").unlink()
        with pytest.raises(TextEncoderError, match="cannot be loaded; its files may be incomplete"):
            new_generator(layout, str(folder), text_encoder_layer=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text_encoder_layer": -1}, "text_encoder_layer must be an integer of at least 0, or None, got -1"),
        ({"text_encoder_layer": True}, "text_encoder_layer must be an integer"),
        ({"window_tokens": 0}, "window_tokens must be an integer of at least 1"),
        ({"condition_text": "answer"}, "condition_text must be one of .*'answers'.*, got 'answer'"),
        ({"answer_ratio": 4}, "answer_ratio is the share .* from 0 to 1, got 4. A mix of 4 prompts"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(GeneratorConfigError, match=words):
        PromptConditionedLoraGeneratorConfig(**settings)


WINDOWS = {"window_tokens": 8, "max_prompt_length": 48}


class TestWindows:
    def test_a_generator_reads_long_prompts_up_to_its_length(
        self, layout: AdapterLayout, encoder_folder: Path
    ) -> None:
        generator = new_generator(layout, str(encoder_folder), **WINDOWS)
        states, mask = generator.encode_prompts(LONG)
        alone = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8)
        for number, prompt in enumerate(LONG):
            expected = alone.encode_tokens([prompt])[0][:48]
            assert torch.equal(states[number][mask[number]], expected)
        assert mask.sum(1).tolist() == [48, 48, 4, 48]
        without = new_generator(layout, str(encoder_folder), max_prompt_length=48)
        assert without.encode_prompts(LONG)[1].sum(1).tolist() == [32, 32, 4, 32]

    def test_in_any_company_and_from_the_cache(self, layout: AdapterLayout, encoder_folder: Path) -> None:
        generator = new_generator(layout, str(encoder_folder), **WINDOWS)
        adapters = generator.generate_adapters({"long": LONG, "short": PROMPTS})
        assert same(adapters["long"], generator.generate_adapter(LONG))
        cache = PromptEmbeddingCache(generator.text_encoder, read=generator.read_states)
        collator = PromptCheckpointCollator(cache, generator.weight_tokenizer, num_prompts=4, max_length=48)
        zeros = {tensor.key: torch.zeros(tensor.shape) for tensor in layout.tensors}
        items = [{"task": t, "prompts": p, "state_dict": zeros, "seed": 0} for t, p in (("l", LONG), ("s", PROMPTS))]
        batch = collator(items)
        for number, prompts in enumerate((LONG, PROMPTS)):
            states, mask = generator.encode_prompts(prompts)
            assert torch.equal(batch["condition_states"][number], states)
            assert torch.equal(batch["condition_mask"][number], mask)

    def test_nothing_is_kept_beyond_what_is_read(self, layout: AdapterLayout, encoder_folder: Path) -> None:
        for settings in (WINDOWS, {"max_prompt_length": 10}):
            generator = new_generator(layout, str(encoder_folder), **settings)
            cache = PromptEmbeddingCache(generator.text_encoder, read=generator.read_states)
            kept = cache.states("task", ["law " * 2000, "law"])
            assert kept.lengths.tolist() == [settings["max_prompt_length"], 3]
            assert kept.flat.untyped_storage().nbytes() == kept.flat.nbytes

    def test_length_is_read_off_the_prompts(self, pairs: PromptCheckpointDataset, encoder_folder: Path) -> None:
        long = {task: [prompt * 10 for prompt in pairs.prompts(task)] for task in pairs.tasks}

        class LongPairs:
            layout, tasks = pairs.layout, pairs.tasks

            def prompts(self, task: str) -> tuple[str, ...]:
                return tuple(long[task])

        def length(**settings: Any) -> int:
            build = PromptConditionedLoraGeneratorConfig.from_adapters
            return build(LongPairs(), str(encoder_folder), **settings).max_prompt_length

        assert length() == 32  # as many as the encoder reads at once
        assert 72 <= length(window_tokens=32) <= 104


def test_a_layer_can_be_fitted_too(pairs: PromptCheckpointDataset, tmp_path: Path) -> None:
    name = str(save_model("llama", tmp_path / "llama"))
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        name,
        text_encoder_layer=1,
        window_tokens=4,
        num_prompts=3,
        freeze_text_encoder=False,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3, "zero_init_output": False},
    )
    generator = PromptConditionedLoraGenerator(config)
    arguments = DnDTrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    before = {key: value.clone() for key, value in generator.text_encoder.module.state_dict().items()}
    DnDTrainer(generator, arguments, pairs).train()
    after = generator.text_encoder.module.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    DnDTrainer(generator, arguments, pairs).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    generator.save_pretrained(tmp_path / "generator")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
    assert loaded.config.text_encoder_in_folder
    torch.testing.assert_close(loaded.encode_prompts(PROMPTS)[0], generator.eval().encode_prompts(PROMPTS)[0].detach())
