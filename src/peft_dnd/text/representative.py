# SPDX-License-Identifier: Apache-2.0
"""Choosing, from a large pool of raw prompts, the few that stand for it best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import GeneratorConfigError
from .encoder import TextEncoder, check_text_encoder
from .prompts import check_prompts


METHODS = ("kmeans", "diverse")
# Beyond this many prompts a cluster, k-means looks at batches of the pool.
_LARGE_POOL = 20_000


def select_representative(
    prompts: Sequence[str], number: int, text_encoder: TextEncoder, *, method: str = "kmeans", seed: int = 0
) -> tuple[str, ...]:
    """Choose the prompts of a pool that stand for it best.

    Prompts are told apart by their sentence embeddings, of length 1.

    - `"kmeans"`: the pool is clustered (scikit-learn's `KMeans`), and the prompt nearest to each centre is taken.
    - `"diverse"`: prompts far from one another (scikit-learn's `kmeans_plusplus`): each is drawn in proportion to its
      squared distance to those taken before. Rare kinds of prompts are likelier to be among them, and outliers too.

    Args:
        prompts: The pool, at least one prompt. Repeated ones count as one.
        number: How many to choose, at least 1. A pool of no more different prompts is returned whole.
        text_encoder: A text encoder, a generator's for one. It reads a large pool several times faster with its
            `block_tokens` set to 256.
        method: How; one of `METHODS`.
        seed: The same pool, seed and encoder give the same choice.

    Returns:
        The chosen prompts, in the pool's order.

    Raises:
        PromptTypeError: If the prompts are no sequence of strings.
        PromptError: If there are none, or one is empty.
        GeneratorConfigError: If the number or the method is impossible.
    """
    distinct = list(dict.fromkeys(check_prompts(prompts)))
    if not isinstance(number, int) or number < 1 or method not in METHODS:
        raise GeneratorConfigError(
            f"At least 1 prompt is chosen, by one of the methods {METHODS}; got {number} and {method!r}."
        )
    if number >= len(distinct):
        return tuple(distinct)
    check_text_encoder(text_encoder)
    embeddings = text_encoder.encode_sentences(distinct).detach().cpu().double().numpy()
    return tuple(distinct[i] for i in representative_indices(embeddings, number, method=method, seed=seed))


def representative_indices(embeddings: np.ndarray, number: int, *, method: str = "kmeans", seed: int = 0) -> list[int]:
    """The same choice among embeddings.

    Args:
        embeddings: (pool, width).
        number: How many, at least 1 and fewer than there are.
        method: See [`select_representative`].
        seed: See there.

    Returns:
        Rising indices into the pool.
    """
    points = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    # Different texts may have the same embedding, to the last digits that mean anything.
    _, first = np.unique(points.round(6), axis=0, return_index=True)
    first.sort()
    chosen = [int(i) for i in (first if number >= len(first) else first[_choose(points[first], number, method, seed)])]
    alike = [i for i in range(len(points)) if i not in set(chosen)][: number - len(chosen)]
    return sorted(chosen + alike)


def _choose(points: np.ndarray, number: int, method: str, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus

    if method == "diverse":
        return np.asarray(kmeans_plusplus(points, number, random_state=seed)[1])
    settings: dict[str, Any] = {"n_clusters": number, "n_init": 3, "random_state": seed}
    clusters = (KMeans if len(points) <= _LARGE_POOL else MiniBatchKMeans)(**settings).fit(points)
    return _nearest_of_each(points, clusters.cluster_centers_)


def _nearest_of_each(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The point nearest to each centre, never one twice: the closest pairs choose first."""
    distances = (points**2).sum(1) + (centres**2).sum(1)[:, None] - 2 * centres @ points.T
    taken: list[int] = []
    for centre in np.argsort(distances.min(1)):
        order = np.argsort(distances[centre])
        taken.append(int(next(i for i in order if i not in taken)))
    return np.asarray(taken)
