# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The base of the worked example: a tiny Llama that knows things but cannot read instructions.

It is pretrained on question and answer pairs in which the instruction says nothing about the answer: a question about
Belmo is followed by anything that is true of Belmo, in any of the answer formats, all equally often. So it ends up
knowing every fact in every format, and answers with a random one. What it lacks, an adapter can give.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import TASKS, Example, World

PRETRAINING_STEPS = 600
PRETRAINING_BATCH_SIZE = 256
PRETRAINING_LEARNING_RATE = 4e-3
IGNORED_LABEL = -100


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word of the world, a space before it included. Decoding is exact."""
    splitter = pre_tokenizers.Split(Regex(r"\n| ?[\w-]+| ?[^\w\s]"), behavior="isolated")
    words = {word for text in world.texts() for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = ["<pad>", "</s>", "<unk>", "\n", *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def as_question(prompt: str) -> str:
    """The text after which the base answers."""
    return f"{prompt}\n"


def tokenize_example(tokenizer: PreTrainedTokenizerFast, example: Example) -> dict[str, list[int]]:
    """Token ids of question and answer, and labels that count the answer alone."""
    question = tokenizer.encode(as_question(example.prompt))
    answer = [*tokenizer.encode(example.answer), tokenizer.eos_token_id]
    return {"input_ids": question + answer, "labels": [IGNORED_LABEL] * len(question) + answer}


def collate_examples(features: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad tokenized examples on the right to (batch, longest) tensors of int64."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    labels = [torch.tensor(feature["labels"]) for feature in features]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def build_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 3 layers and width 64, freshly initialised, for the vocabulary of `tokenizer`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
