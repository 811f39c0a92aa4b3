# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, saved as the Hub's are: a base, text encoders, word vectors."""

from __future__ import annotations

import copy
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLImageProcessor,
    T5Config,
    T5ForConditionalGeneration,
)


SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Turns as Qwen2.5 writes them, with a picture's place in a turn of parts.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}"
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MOST_WORDS = 600


class PicturesOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for films, which would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def register_processor() -> None:
    """Have `AutoProcessor` find that processor."""
    AutoProcessor.register(Qwen2_5_VLConfig, PicturesOnlyProcessor, exist_ok=True)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, trained on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_WORDS,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def make_base(folder: Path, tokenizer: PreTrainedTokenizerFast, *, images: bool, seed: int) -> None:
    """A Qwen2, or with pictures a Qwen2.5-VL, of 2 layers and width 16."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "max_position_embeddings": 2048}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if not images:
        Qwen2ForCausalLM(Qwen2Config(**sizes, **ends)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes,
            **ends,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    pictures = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    # Saving a processor marks its tokenizer as part of it, which the text encoders' is not.
    own = copy.deepcopy(tokenizer)
    PicturesOnlyProcessor(pictures, own, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def make_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A sentence-transformers model of width 12."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    bert = folder.with_name("bert")
    BertModel(config).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=64)
    SentenceTransformer(modules=[transformer, Pooling(12)], device="cpu").save(str(folder))


def make_t5(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A T5 of width 16."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_decoder_layers": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_word_vectors(path: Path, texts: list[str]) -> None:
    """An archive of word vectors of width 12, in files of the names that GloVe's archive has."""
    words = sorted({word.lower() for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})[:MOST_WORDS]
    vectors = np.random.default_rng(0).normal(size=(len(words), 12))
    lines = [" ".join([word, *(f"{x:.4f}" for x in row)]) for word, row in zip(words, vectors, strict=True)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("glove.6B.300d.txt", "\n".join(lines) + "\n")
