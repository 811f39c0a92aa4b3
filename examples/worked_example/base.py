# SPDX-License-Identifier: Apache-2.0
"""The base of the worked example: a tiny Llama that knows things but cannot read instructions.

It is pretrained on question and answer pairs in which the question says nothing of the answer but whom it is about:
any question about Belmo is followed by anything that is true of Belmo, in any answer format, all equally often. So it
ends up knowing every fact in every format, and answers with a random one. What it lacks, an adapter can give.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from world import TASKS, Example, World

from peft_dnd.storage.files import staged_directory


PRETRAINING: dict[str, Any] = {"steps": 600, "batch_size": 128, "learning_rate": 5e-3}
IGNORED_LABEL = -100


def make_base(world: World, folder: Path) -> None:
    """Pretrain the base model and save it, with its tokenizer, as an ordinary transformers folder."""
    torch.manual_seed(world.seed)
    tokenizer = build_tokenizer(world)
    model = build_base(tokenizer)
    pretrain(model, tokenizer, world)
    save_base(model, tokenizer, folder)


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both, whole or not at all."""
    with staged_directory(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the base model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word and sign of the world, a space among them. Decoding is exact."""
    texts = [question for person in world.people for question in world.questions(person)]
    texts += [world.answer(task, person) for task in TASKS for person in world.people]
    return word_tokenizer(r"\n| |[\w]+|[^\w\s]", texts)


def word_tokenizer(pattern: str, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for everything in `texts` that the pattern matches; the rest is unknown to it."""
    splitter = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
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


def build_base(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> LlamaForCausalLM:
    """A Llama of 2 layers and width 64, freshly initialised, for the vocabulary of `tokenizer`.

    Args:
        tokenizer: Its tokenizer.
        settings: Of `LlamaConfig`, in place of those that stand here.
    """
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings}))


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """Teach the model every fact in every format, but not what a question asks for.

    At first many questions are only the person's name, which is then soon linked to what is true of them; their share
    falls to none.
    """
    draw = random.Random(world.seed)
    questions = {
        person: tokenizer([as_question(q) for q in world.questions(person)]).input_ids for person in world.people
    }
    names = {person: tokenizer(as_question(person)).input_ids for person in world.people}
    answers = {
        person: [[*tokenizer(world.answer(task, person)).input_ids, tokenizer.eos_token_id] for task in TASKS]
        for person in world.people
    }
    steps = PRETRAINING["steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING["learning_rate"], betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PRETRAINING["learning_rate"], total_steps=steps, pct_start=0.1
    )
    for step in tqdm(range(steps), desc="pretraining"):
        batch = []
        for person in draw.choices(world.people, k=PRETRAINING["batch_size"]):
            question = names[person] if draw.random() > step / steps else draw.choice(questions[person])
            batch.append(_with_labels(question, draw.choice(answers[person])))
        model(**collate_examples(batch, tokenizer.pad_token_id)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def as_question(prompt: str) -> str:
    """The text after which the base answers."""
    return f"{prompt}\n"


def tokenize_example(tokenizer: PreTrainedTokenizerFast, example: Example) -> dict[str, list[int]]:
    """Token ids of question and answer, and labels that count the answer alone."""
    question = tokenizer.encode(as_question(example.prompt))
    answer = [*tokenizer.encode(example.answer), tokenizer.eos_token_id]
    return _with_labels(question, answer)


def collate_examples(features: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad tokenized examples on the right to (batch, longest) tensors of int64."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    labels = [torch.tensor(feature["labels"]) for feature in features]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def _with_labels(question: list[int], answer: list[int]) -> dict[str, list[int]]:
    return {"input_ids": question + answer, "labels": [IGNORED_LABEL] * len(question) + answer}
