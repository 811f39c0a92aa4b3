# SPDX-License-Identifier: Apache-2.0
"""The hard world's base: a tiny Llama that knows every fact, but cannot read what is asked.

It is pretrained on questions and answers in which the question says nothing of the answer but whom it is about, like
the base of the worked example.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from base import as_question, build_base, collate_examples, save_base, word_tokenizer
from hard_world import BEHAVIOURS, KINDS, LANGUAGES, TASKS, TYPOS, Behaviour, World, write_prompt
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


PRETRAINING: dict[str, Any] = {"steps": 600, "batch_size": 128, "learning_rate": 1e-2}
_PROMPTS_READ_FOR_WORDS = 40


def make_base(world: World, folder: Path) -> None:
    """Pretrain the base model and save it, with its tokenizer, as an ordinary transformers folder."""
    torch.manual_seed(world.seed)
    tokenizer = build_tokenizer(world)
    # Questions are longer than in the worked example; small weights take many steps to tell one person from another.
    model = build_base(tokenizer, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False)
    pretrain(model, tokenizer, world)
    save_base(model, tokenizer, folder)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word of the world, the space before it included; none for typos."""
    draw = random.Random(world.seed)
    texts = [world.answer(behaviour, person) for behaviour in BEHAVIOURS for person in world.people]
    texts += [f" {person}" for person in world.people]
    for task in TASKS:
        for sort in ("english", *LANGUAGES):
            for held_out in (False, True):
                texts += [
                    write_prompt(task, world.people[0], sort, draw, held_out=held_out)
                    for _ in range(_PROMPTS_READ_FOR_WORDS)
                ]
    return word_tokenizer(r"\n| ?[\w-]+| ?[^\w\s]", texts)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> None:
    """Teach the model every fact in every manner of answering, but not what a question asks for.

    A text is a question and two answers: the first is any fact of the person in any manner, the second is the next
    kind of fact in the same manner. It teaches that cities are one kind of thing and jobs another, which
    is what an adapter can then build on. For the first third of the steps a question is just the person's name, which
    is soon linked to what is true of them; after that the share of such texts falls to none.
    """
    draw = random.Random(world.seed)
    names = {person: tokenizer.encode(f" {person}\n") for person in world.people}
    answers = {
        (person, behaviour): [*tokenizer.encode(world.answer(behaviour, person)), tokenizer.eos_token_id]
        for person in world.people
        for behaviour in BEHAVIOURS
    }
    steps, peak = PRETRAINING["steps"], PRETRAINING["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    for step in tqdm(range(steps), desc="pretraining"):
        batch = []
        for person in draw.choices(world.people, k=PRETRAINING["batch_size"]):
            name_only = draw.random() < 1.5 * (1 - step / steps)
            question = names[person] if name_only else tokenizer.encode(as_question(_any_prompt(person, draw)))
            answer = [token for behaviour in _draw_successive(draw) for token in answers[person, behaviour]]
            batch.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
        model(**collate_examples(batch, tokenizer.pad_token_id)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _any_prompt(person: str, draw: random.Random) -> str:
    sort = draw.choice(("english", "english", TYPOS, draw.choice(LANGUAGES)))
    return write_prompt(draw.choice(TASKS), person, sort, draw, held_out=draw.random() < 0.5)


def _draw_successive(draw: random.Random) -> tuple[Behaviour, Behaviour]:
    """Two behaviours that ask for successive kinds of fact in one manner; after the last kind comes the first."""
    first = draw.randrange(len(KINDS))
    manner = draw.choices((False, True), k=3)
    return Behaviour(KINDS[first], *manner), Behaviour(KINDS[(first + 1) % len(KINDS)], *manner)
