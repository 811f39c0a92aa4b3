# SPDX-License-Identifier: Apache-2.0
"""The cache encodes each pool of prompts once and keeps what the encoder gives."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from support.encoding import PROMPTS, bytes_of

from peft_dnd.errors import GeneratorConfigError, PromptError, TextEncoderError
from peft_dnd.text.embedding_cache import PromptEmbeddingCache
from peft_dnd.text.encoder import TextEncoder
from peft_dnd.text.encoder_probe import PROBE
from peft_dnd.text.token_states import TokenStates


class CountingEncoder:
    """The smallest encoder that the library takes: a state is a character's code point."""

    name_or_path = None
    embedding_size = sentence_embedding_size = 1
    max_length = None
    trainable = False
    module = torch.nn.Identity()

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.pools = []

    def count_tokens(self, prompts):
        return [len(prompt) for prompt in prompts]

    def encode_tokens(self, prompts):
        self.pools.append(prompts)
        return TokenStates.from_list([torch.tensor([[self.scale * ord(c)] for c in prompt]) for prompt in prompts])

    def encode_sentences(self, prompts):
        return self.encode_tokens(prompts).mean()

    def save_pretrained(self, folder):
        raise NotImplementedError


class TestCache:
    def test_encodes_each_pool_once(self):
        encoder: TextEncoder = CountingEncoder()
        cache = PromptEmbeddingCache(encoder)
        first = cache.states("law", ["ab", "c"])
        assert first.flat.flatten().tolist() == [97, 98, 99]
        assert cache.states("law", ("ab", "c")) is first
        assert cache.states("the same again", ["ab", "c"]) is first
        assert cache.states("law", ["c", "ab"]) is not first
        assert (cache.encoder_calls, len(encoder.pools)) == (2, 2)

    def test_holds_what_the_encoder_gives(self, encoder):
        cache = PromptEmbeddingCache(encoder)
        assert bytes_of(cache.states("t", PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))

    def test_another_reading(self, encoder):
        cache = PromptEmbeddingCache(encoder, read=lambda e, p: TokenStates.from_vectors(e.encode_sentences(p)))
        assert torch.equal(cache.states("t", PROMPTS).flat, encoder.encode_sentences(PROMPTS))

    def test_what_is_not_finite_is_refused(self):
        with pytest.raises(TextEncoderError, match="task 'law' are not all finite"):
            PromptEmbeddingCache(CountingEncoder(scale=float("inf"))).states("law", ["a"])

    def test_other_encoders_may_give_another_type(self):
        encoder = CountingEncoder()
        cache = PromptEmbeddingCache(
            encoder, read=lambda e, p: TokenStates.from_vectors(e.encode_sentences(p).to(torch.bfloat16))
        )
        assert cache.states("law", ["a"]).flat.dtype == torch.float32

    def test_bad_prompts_name_the_task(self):
        with pytest.raises(PromptError, match=r"the prompts of task 'law'\[1\] is empty"):
            PromptEmbeddingCache(CountingEncoder()).states("law", ["a", ""])

    def test_trainable_encoder_is_refused(self, encoder):
        encoder.trainable = True
        cache = PromptEmbeddingCache(encoder)
        with pytest.raises(GeneratorConfigError, match="trainable"):
            cache.states("law", PROMPTS)
        encoder.trainable = False
        cache.states("law", PROMPTS)


class TestFolder:
    def test_another_run_reads_no_prompt_again(self, tmp_path: Path) -> None:
        first, second = CountingEncoder(), CountingEncoder()
        states = PromptEmbeddingCache(first, folder=tmp_path / "states").states("law", ["ab", "c"])
        again = PromptEmbeddingCache(second, folder=tmp_path / "states")
        found = again.states("law", ["ab", "c"])
        assert torch.equal(found.flat, states.flat) and torch.equal(found.offsets, states.offsets)
        assert second.pools == [PROBE] and again.encoder_calls == 0
        again.states("law", ["c", "ab"])  # another pool
        assert again.encoder_calls == 1

    def test_nothing_is_written_before_something_is_read(self, tmp_path: Path) -> None:
        PromptEmbeddingCache(CountingEncoder(), folder=tmp_path / "states")
        assert not (tmp_path / "states").exists()

    @pytest.mark.parametrize("change", ["other weights", "another reading", "unknown", "damaged"])
    def test_what_another_encoder_gave_is_refused(self, tmp_path: Path, change: str) -> None:
        PromptEmbeddingCache(CountingEncoder(), folder=tmp_path).states("law", ["ab"])
        read = None
        if change == "another reading":
            read = lambda e, p: TokenStates.from_vectors(e.encode_sentences(p))  # noqa: E731
        elif change == "unknown":
            (tmp_path / "encoder.json").unlink()
        elif change == "damaged":
            (tmp_path / "encoder.json").write_text('{"dtype": "float32", "numbers": [1', encoding="utf-8")
        encoder = CountingEncoder(1.1 if change == "other weights" else 1.0)
        with pytest.raises(TextEncoderError, match="Name another folder, or remove this one"):
            PromptEmbeddingCache(encoder, read=read, folder=tmp_path).states("law", ["ab"])

    def test_rounding_is_no_other_encoder(self, tmp_path: Path) -> None:
        PromptEmbeddingCache(CountingEncoder(), folder=tmp_path).states("law", ["ab"])
        PromptEmbeddingCache(CountingEncoder(1.001), folder=tmp_path).states("law", ["ab"])

    def test_a_damaged_file_is_made_anew(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        first = PromptEmbeddingCache(CountingEncoder(), folder=tmp_path).states("law", ["ab"])
        (path,) = (path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
        path.write_bytes(path.read_bytes()[:-3])
        with caplog.at_level(logging.WARNING):
            found = PromptEmbeddingCache(CountingEncoder(), folder=tmp_path).states("law", ["ab"])
        assert torch.equal(found.flat, first.flat) and "damaged" in caplog.text
        assert PromptEmbeddingCache(CountingEncoder(), folder=tmp_path).states("law", ["ab"]).flat.equal(first.flat)

    def test_a_trainable_encoder_leaves_nothing(self, encoder, tmp_path: Path) -> None:
        encoder.trainable = True
        with pytest.raises(GeneratorConfigError, match="trainable"):
            PromptEmbeddingCache(encoder, folder=tmp_path / "states").states("law", PROMPTS)
        encoder.trainable = False
        assert not (tmp_path / "states").exists()
