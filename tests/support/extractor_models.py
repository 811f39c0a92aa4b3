# SPDX-License-Identifier: Apache-2.0
"""Tiny models that can read prompts: language models, a T5, a static embedding, word vectors."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from support.constants import WORDS


FAMILIES = ("llama", "cohere2", "gpt2", "t5")
VOCABULARY = ["<unk>", "<s>", "</s>", *WORDS]
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Words, one token each, and </s> at the end; as in many decoder-only models there is no padding token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def new_model(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4, max_position_embeddings=24))
    elif family == "cohere2":
        model = Cohere2ForCausalLM(Cohere2Config(**SIZES, num_hidden_layers=4, num_key_value_heads=1))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=24))
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2, num_decoder_layers=1)
        )
    return model.eval()


def save_model(family: str, folder: Path) -> Path:
    """Save a language model or a T5, head and all, as it lies on the Hub."""
    new_model(family).save_pretrained(folder)
    new_tokenizer().save_pretrained(folder)
    return folder


def new_static_embedding() -> SentenceTransformer:
    """A vector of width 8 for each word."""
    torch.manual_seed(0)
    module = StaticEmbedding(new_tokenizer(), embedding_dim=8)
    return SentenceTransformer(modules=[module], device="cpu")


def write_word_vectors(path: Path) -> Path:
    """Write a file of word vectors of width 8, as GloVe's are."""
    numbers = torch.randn(len(WORDS), 8, generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join([word, *map(str, row)]) for word, row in zip(WORDS, numbers, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
