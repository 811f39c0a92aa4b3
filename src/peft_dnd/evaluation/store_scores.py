# SPDX-License-Identifier: Apache-2.0
"""How well a generator still writes the adapters of the tasks in its replay store, with no data but the store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..adapters.generated_adapter import GeneratedAdapter
from ..generator.generation import evaluating
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.packed_adapters import AdapterPacking
from ..pairs.replay_store import ReplayStore
from ..storage.progress import with_progress
from ..text.embedding_cache import PromptEmbeddingCache
from ..text.token_states import TokenStates


StoreScorer = Callable[[str, GeneratedAdapter], float]
"""`(task, adapter) -> score`, from 0 to 1, larger is better."""

OWN_MEASURE = "100 for the task's own adapter, 0 for the mean adapter, by the squared distance of normalised weights"
SCORER_MEASURE = "100 times what the given scorer said"
ROWS_MEASURE = "100 exp(-loss), by the base's loss on rows of the store that are not replayed"
_FEWEST_POINTS = -1e6


@torch.no_grad()
def written_tokens(
    generator: PromptConditionedLoraGenerator, texts: Sequence[str], *, seed: int = 0, read: TokenStates | None = None
) -> torch.Tensor:
    """The normalised tokens that a generator writes of texts in the form that it reads.

    Args:
        generator: The generator.
        texts: The texts of one task.
        seed: As for `generate_adapter`.
        read: What the generator's `read_states` gave for these texts, if they have been read already.

    Returns:
        Tensor of the tokenizer's `grid_shape`, float32, on the CPU.
    """
    with evaluating(generator):
        states, mask = generator.encode_prompts(texts, seed=seed, read=read)
        return generator(states[None].to(generator.device), mask[None].to(generator.device))[0].float().cpu()


def score_store(
    generator: PromptConditionedLoraGenerator,
    scorer: StoreScorer | None = None,
    *,
    tasks: Iterable[str] | None = None,
    targets: Mapping[str, torch.Tensor] | None = None,
    store: ReplayStore | None = None,
    embeddings: PromptEmbeddingCache | None = None,
) -> dict[str, float]:
    """Score the adapters that a generator writes for the tasks in a store, from the texts that are kept of them.

    Without a scorer the points of a task are

        100 (1 - |z - t|^2 / |t|^2)

    with z the tokens that were written and t those that should be, both normalised, so that the mean adapter, whose
    tokens are zero, has 0 points and the task's own adapter has 100. An adapter further from it has less than 0, and
    one that is not finite a million less.

    Args:
        generator: A fitted generator.
        scorer: Gives the score of an adapter on a task, from 0 to 1.
        tasks: Which tasks of the store; all by default.
        targets: Task -> tokens that should be written, for tasks of which the store has no adapter; such a task is
            left out otherwise, unless there is a scorer.
        store: The store; by default the generator's.
        embeddings: What its text encoder has read already, if that is frozen.

    Returns:
        Task -> points, 100 being the best.
    """
    kept = generator.replay_store if store is None else store
    if kept is None:
        return {}
    generator.check_store_encoder()
    packing = generator.adapter_packing()
    scores = {}
    for name in with_progress(list(kept.tasks if tasks is None else tasks), "Scoring stored tasks"):
        task = kept.tasks[name]
        target = None if task.adapter is None else packing.unpack_tokens(task.adapter)
        if target is None:
            target = None if scorer is not None or targets is None else targets.get(name)
        if scorer is None and target is None:
            continue
        read = None if embeddings is None else embeddings.states(name, task.texts)
        tokens = written_tokens(generator, task.texts, read=read)
        if scorer is not None:
            scores[name] = _finite(100.0 * float(scorer(name, _adapter(generator, tokens))))
        elif target is not None:
            scores[name] = _finite(_points(tokens, target, packing))
    return scores


def _finite(points: float) -> float:
    """The points, or those of a generator that diverged: they are written to JSON, which has no infinity."""
    return max(points, _FEWEST_POINTS) if math.isfinite(points) else _FEWEST_POINTS


def _adapter(generator: PromptConditionedLoraGenerator, tokens: torch.Tensor) -> GeneratedAdapter:
    normalization = generator.normalization
    grid = normalization.denormalize(tokens.to(normalization.mean.device)).cpu()
    return GeneratedAdapter(generator.config.adapter_layout, generator.weight_tokenizer.decode(grid), {})


def _points(tokens: torch.Tensor, target: torch.Tensor, packing: AdapterPacking) -> float:
    valid = packing.tokenizer.valid_mask()
    error, size = (tokens - target)[valid].square().sum(), target[valid].square().sum()
    return 100.0 * (1.0 - float(error / size)) if size > 0 else 100.0 - float(error)
