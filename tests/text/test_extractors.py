# SPDX-License-Identifier: Apache-2.0
"""The other extractors (T5, hidden states of a language model, static and word vectors) and prompts in windows."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from support.encoding import PROMPTS, bytes_of
from support.extractor_models import FAMILIES, new_model, new_static_embedding, new_tokenizer, save_model
from torch import nn
from transformers import AutoModel, T5EncoderModel

from peft_dnd.errors import GeneratorConfigError, PromptError, TextEncoderError
from peft_dnd.text.hidden_states_encoder import HiddenStatesTextEncoder
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny language models and a T5."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(family, root / family) for family in FAMILIES}


@functools.cache
def hidden_states(family: str, prompt: str) -> list[torch.Tensor]:
    """All hidden states of one prompt by plain transformers."""
    model = new_model(family)
    reader = model.get_encoder() if family == "t5" else model.base_model
    with torch.no_grad():
        output = reader(**tokens_of(prompt), output_hidden_states=True)
    return [states[0] for states in output.hidden_states]


def tokens_of(prompt: str) -> dict[str, torch.Tensor]:
    tokens = new_tokenizer()(prompt, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


class TestLayers:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_states_are_the_output_by_default(self, model_folders, family):
        encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders[family])
        assert encoder.layer is None
        assert isinstance(encoder.module.transformers_model, T5EncoderModel) == (family == "t5")
        states = encoder.encode_tokens(PROMPTS)
        for number, prompt in enumerate(PROMPTS):
            assert torch.equal(states[number], hidden_states(family, prompt)[-1])
        whole = encoder.module.encode(PROMPTS, convert_to_tensor=True, batch_size=1)
        torch.testing.assert_close(encoder.encode_sentences(PROMPTS), whole)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layer", [0, 2, -1])
    def test_a_chosen_layer_is_that_of_transformers(self, model_folders, tmp_path, family, layer):
        encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders[family], layer=layer)
        assert encoder.layer == layer % 5
        states = encoder.encode_tokens(PROMPTS)
        for number, prompt in enumerate(PROMPTS):
            assert torch.equal(states[number], hidden_states(family, prompt)[layer])
        encoder.save_pretrained(tmp_path / "saved")
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path / "saved")
        assert loaded.layer == encoder.layer
        torch.testing.assert_close(loaded.encode_sentences(PROMPTS), states.mean())
        assert bytes_of(loaded.encode_tokens(PROMPTS)) == bytes_of(states)

    @pytest.mark.parametrize("family", ["cohere2", "t5"])
    def test_layers_beyond_are_neither_kept_nor_saved(self, model_folders, tmp_path, family):
        encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders[family], layer=1)
        encoder.save_pretrained(tmp_path)
        assert encoder.module.transformers_model.config.num_hidden_layers == 2
        assert AutoModel.from_pretrained(tmp_path).config.num_hidden_layers == 2
        whole = SentenceTransformerTextEncoder.from_pretrained(model_folders[family])
        count = [sum(p.numel() for p in e.module.parameters()) for e in (encoder, whole)]
        assert count[0] < count[1]

    @pytest.mark.parametrize("layer", [5, -6])
    def test_no_such_layer(self, model_folders, layer):
        with pytest.raises(
            GeneratorConfigError, match=rf"no layer {layer}: .* has 4, .* from 0 .* to 4 .* back to -5"
        ):
            SentenceTransformerTextEncoder.from_pretrained(model_folders["llama"], layer=layer)

    def test_layers_of_what_has_none(self, static):
        with pytest.raises(GeneratorConfigError, match=r"layer=1 cannot be chosen.*StaticEmbedding.*has no layers"):
            SentenceTransformerTextEncoder(static.module, layer=1)

    def test_texts_are_read_without_a_chat_template(self, tmp_path):
        save_model("llama", tmp_path)
        tokenizer = new_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}law {{ message['content'] }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path)
        encoder = SentenceTransformerTextEncoder.from_pretrained(tmp_path, layer=2)
        for number, states in enumerate(hidden_states("llama", PROMPTS[0])):
            assert torch.equal(encoder.encode_tokens(PROMPTS)[0], states) == (number == 2)
        encoder.save_pretrained(tmp_path / "saved")
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path / "saved")
        assert bytes_of(loaded.encode_tokens(PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))

    def test_same_bytes_in_any_company(self, model_folders):
        encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders["cohere2"], layer=3)
        expected = bytes_of(encoder.encode_tokens(PROMPTS))
        assert bytes_of(encoder.encode_tokens(PROMPTS[::-1])) == expected[::-1]
        assert bytes_of(encoder.encode_tokens(PROMPTS[2:4])) == expected[2:4]

    def test_can_be_fitted(self, model_folders):
        encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders["llama"], layer=2, trainable=True)
        encoder.encode_tokens(PROMPTS).flat.square().sum().backward()
        parameters = dict(encoder.module.transformers_model.named_parameters())
        assert parameters["layers.1.mlp.up_proj.weight"].grad.abs().sum() > 0


class TestModelInMemory:
    @pytest.fixture
    def base(self) -> nn.Module:
        return new_model("llama")

    @pytest.fixture
    def adapted(self, base: nn.Module) -> nn.Module:
        """The base with an adapter that changes what it says, in training."""
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["embed_tokens"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.normal_()
        return model.train()

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("layer", [2, -1])
    def test_states_are_those_of_the_model_loaded(self, model_folders, family, layer):
        live = HiddenStatesTextEncoder(new_model(family), new_tokenizer(), layer)
        loaded = SentenceTransformerTextEncoder.from_pretrained(model_folders[family], layer=layer)
        assert (live.layer, live.embedding_size) == (loaded.layer, loaded.embedding_size)
        assert live.count_tokens(PROMPTS) == loaded.count_tokens(PROMPTS)
        assert bytes_of(live.encode_tokens(PROMPTS)) == bytes_of(loaded.encode_tokens(PROMPTS))
        torch.testing.assert_close(live.encode_sentences(PROMPTS), loaded.encode_sentences(PROMPTS))

    def test_adapters_have_no_say_and_the_model_is_left_as_it_was(self, base, adapted):
        base.lm_head.eval()
        before = [(p.requires_grad, p._version) for p in adapted.parameters()]
        modes = [part.training for part in adapted.modules()]
        expected = HiddenStatesTextEncoder(new_model("llama"), new_tokenizer(), 2).encode_tokens(PROMPTS)
        ids = tokens_of(PROMPTS[0])
        with torch.no_grad():
            said = adapted(**ids).logits
        for model in (adapted, adapted.get_base_model()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                states = HiddenStatesTextEncoder(model, new_tokenizer(), 2).encode_tokens(PROMPTS)
            assert bytes_of(states) == bytes_of(expected)
            assert not states.flat.requires_grad
        assert [(p.requires_grad, p._version) for p in adapted.parameters()] == before
        assert [part.training for part in adapted.modules()] == modes
        with torch.no_grad():
            assert torch.equal(adapted(**ids).logits, said)

    def test_adapters_that_were_off_stay_off(self, adapted):
        with adapted.disable_adapter():
            HiddenStatesTextEncoder(adapted, new_tokenizer()).encode_tokens(PROMPTS)
            assert all(p.disable_adapters for p in adapted.modules() if hasattr(p, "lora_A"))

    def test_merged_adapters_are_refused(self, adapted):
        adapted.merge_adapter()
        with pytest.raises(TextEncoderError, match=r"merged into the text encoder.*unmerge_adapter"):
            HiddenStatesTextEncoder(adapted, new_tokenizer()).encode_tokens(PROMPTS)

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_saved_and_loaded_is_equal(self, tmp_path, family):
        encoder = HiddenStatesTextEncoder(new_model(family), new_tokenizer(), 1)
        encoder.save_pretrained(tmp_path)
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path, layer=1)
        assert bytes_of(loaded.encode_tokens(PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))

    def test_with_adapters_it_is_not_saved(self, adapted, tmp_path):
        with pytest.raises(TextEncoderError, match="cannot be saved as the base"):
            HiddenStatesTextEncoder(adapted, new_tokenizer()).save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()

    def test_is_never_fitted(self, base):
        encoder = HiddenStatesTextEncoder(base, new_tokenizer())
        encoder.trainable = False
        with pytest.raises(GeneratorConfigError, match="cannot be fitted"):
            encoder.trainable = True

    def test_long_prompts_are_cut_with_one_warning(self, base, caplog):
        encoder = HiddenStatesTextEncoder(base, new_tokenizer())
        assert encoder.max_length == 24
        with caplog.at_level(logging.INFO, logger="peft_dnd"):
            assert encoder.encode_tokens(["law " * 50, "law"]).lengths.tolist() == [24, 2]
            encoder.encode_tokens(["law " * 50])
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
        with pytest.raises(GeneratorConfigError, match=r"max_length of the text encoder must be from 2 .* to 24"):
            HiddenStatesTextEncoder(base, new_tokenizer(), max_length=25)

    def test_another_kind_of_model(self):
        with pytest.raises(GeneratorConfigError, match="a transformers model or a PeftModel around one, not Linear"):
            HiddenStatesTextEncoder(nn.Linear(2, 2), new_tokenizer())


@pytest.fixture
def static() -> SentenceTransformerTextEncoder:
    return SentenceTransformerTextEncoder(new_static_embedding())


class TestStaticEmbedding:
    def test_states_are_the_rows_of_the_tokens(self, static):
        states = static.encode_tokens(PROMPTS)
        table, tokenizer = static.module[0].embedding.weight, static.module[0].tokenizer
        for number, prompt in enumerate(PROMPTS):
            ids = tokenizer.encode(prompt, add_special_tokens=False).ids
            assert torch.equal(states[number], table[torch.tensor(ids)])
        assert static.count_tokens(PROMPTS) == states.lengths.tolist()
        assert static.embedding_size == 8

    def test_company_changes_nothing_and_their_mean_is_the_sentence(self, static):
        states = static.encode_tokens(PROMPTS)
        assert bytes_of(static.encode_tokens(PROMPTS[::-1])) == bytes_of(states)[::-1]
        torch.testing.assert_close(states.mean(), static.encode_sentences(PROMPTS))
        static.block_tokens = 64
        assert bytes_of(static.encode_tokens(PROMPTS)) == bytes_of(states)

    def test_can_be_fitted(self, static):
        static.trainable = True
        static.encode_tokens(["law of law"]).flat.sum().backward()
        (law,) = static.module[0].tokenizer.encode("law", add_special_tokens=False).ids
        assert static.module[0].embedding.weight.grad[law].tolist() == [2.0] * 8

    def test_saved_and_loaded_is_equal(self, static, tmp_path):
        static.save_pretrained(tmp_path)
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path)
        assert bytes_of(loaded.encode_tokens(PROMPTS)) == bytes_of(static.encode_tokens(PROMPTS))


class TestWordVectors:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "vectors.txt"
        path.write_text("the 1 2\nwhat 3 4\nlaw 5 6\nis 7 8\n", encoding="utf-8")
        return path

    def test_states_are_the_vectors_of_the_words_stop_words_too(self, file):
        encoder = SentenceTransformerTextEncoder.from_word_vectors(file)
        states = encoder.encode_tokens(["What is the LAW ?", "unknown law."])
        assert states[0].tolist() == [[3, 4], [7, 8], [1, 2], [5, 6]]
        assert states[1].tolist() == [[5, 6]]
        assert encoder.count_tokens(["What is the LAW ?"]) == [4]
        assert encoder.encode_sentences(["the law"]).tolist() == [[3, 4]]
        assert (encoder.name_or_path, encoder.max_length, encoder.embedding_size) == (None, 1_000_000, 2)

    def test_fewer_words(self, file):
        encoder = SentenceTransformerTextEncoder.from_word_vectors(file, max_words=2)
        assert encoder.encode_tokens(["what is the law"])[0].tolist() == [[3, 4], [1, 2]]

    def test_prompt_of_unknown_words(self, file):
        with pytest.raises(PromptError, match=r"prompts\[1\] \('tax'\) has no token in the vocabulary"):
            SentenceTransformerTextEncoder.from_word_vectors(file).encode_tokens(["law", "tax"])

    def test_saved_and_loaded_is_equal(self, file, tmp_path):
        encoder = SentenceTransformerTextEncoder.from_word_vectors(file)
        encoder.save_pretrained(tmp_path / "saved")
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path / "saved")
        prompts = ["What is the LAW ?", "law"]
        assert bytes_of(loaded.encode_tokens(prompts)) == bytes_of(encoder.encode_tokens(prompts))

    def test_no_such_file_and_no_such_content(self, tmp_path):
        with pytest.raises(TextEncoderError, match=r"no file 'glove\.txt'.*one word and its numbers a line"):
            SentenceTransformerTextEncoder.from_word_vectors("glove.txt")
        for text in ("", "law is law\n"):
            (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
            with pytest.raises(TextEncoderError, match=r"is no file of word vectors.*The cause: "):
                SentenceTransformerTextEncoder.from_word_vectors(tmp_path / "bad.txt")


LONG = "what is the law of the court ? please answer in one word . what is tax law ?"


class TestWindows:
    def by_hand(self, encoder: SentenceTransformerTextEncoder, prompt: str, size: int) -> torch.Tensor:
        """The token sequence cut every `size`, each piece alone through the bare transformer."""
        tokens = encoder.module.tokenizer(prompt, return_tensors="pt", truncation=False, verbose=False)["input_ids"]
        model = encoder.module.transformers_model
        with torch.no_grad():
            parts = [
                model(input_ids=part, attention_mask=torch.ones_like(part)).last_hidden_state[0]
                for part in tokens.split(size, dim=1)
            ]
        return torch.cat(parts)

    @pytest.mark.parametrize("window", [5, 8, 16])
    def test_states_are_those_of_the_pieces_joined(self, encoder_folder, window):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=window)
        longer = "law " * 100
        states = encoder.encode_tokens([LONG, longer, "law"])
        assert states.lengths.tolist() == encoder.count_tokens([LONG, longer, "law"]) == [21, 102, 3]
        for number, prompt in enumerate([LONG, longer, "law"]):
            assert torch.equal(states[number], self.by_hand(encoder, prompt, window))

    def test_short_prompts_have_the_states_that_they_have_without(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=16)
        without = SentenceTransformerTextEncoder.from_pretrained(encoder_folder)
        assert bytes_of(encoder.encode_tokens(PROMPTS)) == bytes_of(without.encode_tokens(PROMPTS))

    def test_company_changes_nothing(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8)
        prompts = [LONG, "law", "law " * 50, LONG[::-1]]
        expected = bytes_of(encoder.encode_tokens(prompts))
        assert bytes_of(encoder.encode_tokens(prompts[::-1])) == expected[::-1]
        assert bytes_of(encoder.encode_tokens(prompts[2:3])) == expected[2:3]
        encoder.block_tokens = 200
        blocks = encoder.encode_tokens([LONG, LONG])
        torch.testing.assert_close(blocks[1], encoder.encode_tokens([LONG])[0], rtol=0, atol=1e-5)

    def test_no_pass_is_longer_than_a_window(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8)
        lengths = []
        table = encoder.module.transformers_model.embeddings.word_embeddings
        table.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        encoder.encode_tokens(["law " * 1000])
        assert max(lengths) == 8
        assert len(lengths) == 126

    @pytest.mark.parametrize("kind", ["loaded", "in memory"])
    def test_what_is_not_asked_for_is_not_read(self, model_folders, kind):
        if kind == "loaded":
            encoder = SentenceTransformerTextEncoder.from_pretrained(model_folders["llama"], window_tokens=8)
            table = encoder.module.transformers_model.embed_tokens
        else:
            encoder = HiddenStatesTextEncoder(new_model("llama"), new_tokenizer(), window_tokens=8)
            table = encoder.module.model.embed_tokens
        prompts = ["law " * 200, LONG, "law"]
        whole = encoder.encode_tokens(prompts)
        passes = []
        table.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
        states = encoder.encode_tokens(prompts, max_length=12)
        assert len(passes) == 5
        assert states.lengths.tolist() == [12, 12, 2]
        assert bytes_of(states) == bytes_of(whole.cut(12))

    def test_limit_of_the_whole_text(self, encoder_folder, caplog):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8, max_length=50)
        with caplog.at_level(logging.WARNING, logger="peft_dnd"):
            assert encoder.encode_tokens(["law " * 1000, "law"]).lengths.tolist() == [50, 3]
        assert "1 of 2 prompts are longer than the text encoder's limit of 50 tokens" in caplog.text

    def test_sentence_embedding_is_the_mean_of_the_windows(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8)
        torch.testing.assert_close(
            encoder.encode_sentences([LONG, "law"]), encoder.encode_tokens([LONG, "law"]).mean()
        )

    def test_gradients_flow_through_all_windows(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8, trainable=True)
        states = encoder.encode_tokens([LONG])
        assert torch.equal(states.flat.detach(), self.by_hand(encoder, LONG, 8))
        states.flat.sum().backward()
        assert encoder.module.transformers_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("window", [2, 41])
    def test_impossible_windows(self, encoder_folder, window):
        with pytest.raises(GeneratorConfigError, match=r"window_tokens of the text encoder must be from 3 .* to 40"):
            SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=window)

    def test_static_embedding_needs_none(self, static):
        with pytest.raises(GeneratorConfigError, match=r"window_tokens=8 cannot be set.*does not limit"):
            SentenceTransformerTextEncoder(static.module, window_tokens=8)

    def test_saved_model_knows_its_own_limit_only(self, encoder_folder, tmp_path):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, window_tokens=8, max_length=50)
        encoder.save_pretrained(tmp_path)
        assert encoder.max_length == 50
        assert SentenceTransformer(str(tmp_path), device="cpu").max_seq_length == 8
        loaded = SentenceTransformerTextEncoder.from_pretrained(tmp_path, window_tokens=8, max_length=50)
        assert bytes_of(loaded.encode_tokens([LONG])) == bytes_of(encoder.encode_tokens([LONG]))

    @pytest.mark.parametrize("family", ["llama", "t5"])
    def test_of_a_model_in_memory_are_those_of_it_loaded(self, model_folders, family):
        live = HiddenStatesTextEncoder(new_model(family), new_tokenizer(), 2, window_tokens=8)
        loaded = SentenceTransformerTextEncoder.from_pretrained(model_folders[family], layer=2, window_tokens=8)
        prompts = [LONG, "law", "law " * 50]
        assert live.max_length is None
        assert bytes_of(live.encode_tokens(prompts)) == bytes_of(loaded.encode_tokens(prompts))


def test_models_given_are_adopted_and_those_in_memory_are_not_changed() -> None:
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())
    HiddenStatesTextEncoder(model, new_tokenizer(), 1).encode_tokens(PROMPTS)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.num_hidden_layers == 4
