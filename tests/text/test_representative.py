# SPDX-License-Identifier: Apache-2.0
"""The prompts that stand for a pool: better than random ones, the same every time, whatever the pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from peft_dnd import select_representative
from peft_dnd.errors import GeneratorConfigError, PromptError
from peft_dnd.text.representative import METHODS, representative_indices
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> SentenceTransformerTextEncoder:
    return SentenceTransformerTextEncoder.from_pretrained(str(encoder_folder))


def clusters(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(len(sizes), 12))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return centres[labels] + 0.02 * chance.normal(size=(len(labels), 12)), labels


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_prompt_is_chosen(method: str) -> None:
    points, labels = clusters([200, 40, 10, 3, 80])
    for seed in range(5):
        chosen = representative_indices(points, 5, method=method, seed=seed)
        assert sorted(labels[chosen]) == [0, 1, 2, 3, 4], seed
    chance = np.random.default_rng(0)
    random = [len(set(labels[chance.choice(len(labels), 5, replace=False)])) for _ in range(100)]
    assert np.mean(random) < 4


def test_the_chosen_are_nearest_to_their_centres() -> None:
    points, labels = clusters([50, 50, 50])
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    for i in representative_indices(points, 3):
        own = np.flatnonzero(labels == labels[i])
        distances = np.linalg.norm(units[own] - units[own].mean(0), axis=1)
        assert own[distances.argmin()] == i


@pytest.mark.parametrize("method", METHODS)
def test_pools_of_any_kind(method: str, encoder: SentenceTransformerTextEncoder) -> None:
    pool = ["what is the law ?", "a river please", "what is the law ?", "tax court", "doctor medicine", "colour"]
    assert select_representative(pool, 9, encoder, method=method) == tuple(dict.fromkeys(pool))
    chosen = select_representative(pool, 3, encoder, method=method, seed=4)
    assert len(set(chosen)) == 3 and list(chosen) == [p for p in dict.fromkeys(pool) if p in chosen]
    assert chosen == select_representative(pool, 3, encoder, method=method, seed=4)
    # A tokenizer that makes no difference between them gives all the same embedding.
    same = [f"the law{' ' * i}" for i in range(1, 6)]
    assert len(select_representative(same, 3, encoder, method=method)) == 3
    mixed = [*same, "a river"]
    assert "a river" in select_representative(mixed, 3, encoder, method=method)


def test_impossible_wishes(encoder: SentenceTransformerTextEncoder) -> None:
    with pytest.raises(GeneratorConfigError, match="'kmean'"):
        select_representative(["a", "b"], 1, encoder, method="kmean")
    with pytest.raises(GeneratorConfigError, match="got 0"):
        select_representative(["a", "b"], 0, encoder)
    with pytest.raises(PromptError):
        select_representative([], 1, encoder)
