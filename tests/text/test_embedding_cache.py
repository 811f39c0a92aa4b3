# SPDX-License-Identifier: Apache-2.0
"""The cache encodes each pool of prompts once and keeps what the encoder gives."""

from __future__ import annotations

import pytest
import torch
from support.encoding import PROMPTS, bytes_of

from peft_dnd.errors import GeneratorConfigError, PromptError, TextEncoderError
from peft_dnd.text.embedding_cache import PromptEmbeddingCache
from peft_dnd.text.encoder import TextEncoder
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
        assert (cache.encoder_calls, len(encoder.pools), len(cache)) == (2, 2, 2)
        assert cache.sentences("law", ["ab", "c"]).tolist() == [[97.5], [99.0]]
        cache.sentences("law", ["ab", "c"])
        assert (cache.encoder_calls, len(cache)) == (3, 3)
        cache.clear()
        assert len(cache) == cache.nbytes == 0
        cache.states("law", ["ab", "c"])
        assert cache.encoder_calls == 4

    def test_holds_what_the_encoder_gives(self, encoder):
        cache = PromptEmbeddingCache(encoder)
        assert bytes_of(cache.states("t", PROMPTS)) == bytes_of(encoder.encode_tokens(PROMPTS))
        assert torch.equal(cache.sentences("t", PROMPTS), encoder.encode_sentences(PROMPTS))

    def test_another_reading(self, encoder):
        cache = PromptEmbeddingCache(encoder, read=lambda e, p: TokenStates.from_vectors(e.encode_sentences(p)))
        assert torch.equal(cache.states("t", PROMPTS).flat, encoder.encode_sentences(PROMPTS))

    def test_half_precision_halves_the_memory(self, encoder):
        whole = PromptEmbeddingCache(encoder)
        half = PromptEmbeddingCache(encoder, dtype=torch.float16)
        exact, stored = whole.states("t", PROMPTS), half.states("t", PROMPTS)
        assert stored.flat.dtype == torch.float16
        assert stored.flat.nbytes * 2 == exact.flat.nbytes
        assert half.nbytes < whole.nbytes
        indices = torch.arange(len(PROMPTS))
        torch.testing.assert_close(stored.select(indices, 20)[0], exact.select(indices, 20)[0], rtol=1e-3, atol=1e-3)

    def test_overflow_is_refused(self):
        cache = PromptEmbeddingCache(CountingEncoder(scale=1e4), dtype=torch.float16)
        with pytest.raises(TextEncoderError, match=r"task 'law' are not all finite as torch\.float16.*9\.7e\+05"):
            cache.states("law", ["a"])
        assert len(cache) == 0

    def test_bad_prompts_name_the_task(self):
        with pytest.raises(PromptError, match=r"the prompts of task 'law'\[1\] is empty"):
            PromptEmbeddingCache(CountingEncoder()).states("law", ["a", ""])

    def test_trainable_encoder_is_refused(self, encoder):
        encoder.trainable = True
        cache = PromptEmbeddingCache(encoder)
        for read in (cache.states, cache.sentences):
            with pytest.raises(GeneratorConfigError, match="trainable"):
                read("law", PROMPTS)
        encoder.trainable = False
        cache.states("law", PROMPTS)

    def test_integers_are_refused(self):
        with pytest.raises(GeneratorConfigError, match=r"torch\.int8"):
            PromptEmbeddingCache(CountingEncoder(), dtype=torch.int8)
