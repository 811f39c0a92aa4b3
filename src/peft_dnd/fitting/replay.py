# SPDX-License-Identifier: Apache-2.0
"""Going on without losing the old tasks: what of a generator's replay store is mixed in, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..evaluation.store_scores import OWN_MEASURE, SCORER_MEASURE, StoreScorer, score_store, written_tokens
from ..generator.modeling import PromptConditionedLoraGenerator
from ..generator.revision_history import Revision, add_revision, revisions
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.packed_adapters import AdapterPacking, PackedAdapter
from ..pairs.replay_store import ReplayStore, StoreBounds, updated_store
from ..storage.progress import with_progress
from ..text.embedding_cache import PromptEmbeddingCache
from .arguments import DnDTrainingArguments


logger = logging.getLogger(__name__)

_MOST_SCORED = 64


class _Target:
    """What a replayed task's adapter is to be: that of its store, or what the generator itself wrote before."""

    def __init__(self, packing: AdapterPacking, packed: PackedAdapter | None) -> None:
        self.packing = packing
        self.packed = packed

    def state_dict(self) -> dict[str, torch.Tensor]:
        assert self.packed is not None, "targets are written before the first item is read"
        return self.packing.unpack(self.packed)


class Replay:
    """The tasks of a generator's store that its update replays.

    Args:
        generator: The generator as it was before the update.
        store: Its store.
        names: Which of its tasks.
        args: The training arguments.
        new_pairs: The pairs of the update.

    Attributes:
        pairs: The pairs of the update and those of the store.
        tasks: The names of the tasks that are replayed.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        store: ReplayStore,
        names: Sequence[str],
        args: DnDTrainingArguments,
        new_pairs: PromptCheckpointDataset,
    ) -> None:
        self.tasks = tuple(names)
        self.share = args.replay_share
        self._generator, self._store = generator, store
        packing = generator.adapter_packing()
        own = args.replay_targets == "checkpoints"
        self._targets = {name: _Target(packing, store.tasks[name].adapter if own else None) for name in names}
        replayed = {name: (store.tasks[name].texts, target) for name, target in self._targets.items()}
        self.pairs = new_pairs.with_replayed(replayed, store.condition_text)

    @classmethod
    def of(
        cls, generator: PromptConditionedLoraGenerator, args: DnDTrainingArguments, new_pairs: Any
    ) -> Replay | None:
        """What is to be replayed beside some pairs; `None` if nothing is, which is logged where it might be meant."""
        if not isinstance(new_pairs, PromptCheckpointDataset) or not generator.normalization.fitted:
            return None
        store = generator.replay_store if args.replay_share > 0 else None
        if store is None:
            _warn_of_forgetting(generator, args, new_pairs)
            return None
        names = [name for name in store.tasks if name not in new_pairs.tasks]
        if not names:
            return None
        if args.task_loss_weight > 0 or args.distillation_weight > 0 or not new_pairs.has_checkpoints:
            logger.warning(
                "The %d earlier tasks in the generator's store are not replayed: replay is for fits by weight loss "
                "alone. Pass the pairs of the earlier tasks too, or they will be forgotten.",
                len(names),
            )
            return None
        logger.info("Replaying %d earlier tasks from the generator's store beside the new ones.", len(names))
        return cls(generator, store, names, args, new_pairs)

    def prepare(self) -> None:
        """Have the generator write, before it changes, the adapters of the tasks of which there is none."""
        missing = [name for name, target in self._targets.items() if target.packed is None]
        for name in with_progress(missing, "Writing what is to be kept") if missing else ():
            target, texts = self._targets[name], self._store.tasks[name].texts
            target.packed = target.packing.pack_tokens(written_tokens(self._generator, texts))

    def target_tokens(self) -> dict[str, torch.Tensor]:
        """Task -> the normalised tokens that are replayed."""
        return {
            name: target.packing.unpack_tokens(target.packed)
            for name, target in self._targets.items()
            if target.packed is not None
        }


class StoreKeeper:
    """Measures a fit on the generator's store, and brings the store up to date when it is done.

    Args:
        generator: The generator.
        args: The training arguments.
        pairs: The pairs of the fit, without those that are replayed.
        replay: What is replayed.
        scorer: Scores adapters of the store's tasks; see [`score_store`][peft_dnd.evaluation.score_store].
        embeddings: What the text encoder has read, if that is frozen: it is what takes most of the time.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments,
        pairs: PromptCheckpointDataset | None,
        replay: Replay | None,
        scorer: StoreScorer | None,
        embeddings: PromptEmbeddingCache | None,
    ) -> None:
        self._generator, self._args, self._pairs = generator, args, pairs
        self._replay, self._scorer, self._embeddings = replay, scorer, embeddings
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        """Score the store's tasks as the generator is now."""
        store = self._generator.replay_store if self._generator.normalization.fitted else None
        if store is not None and self._pairs is not None:
            self._before = self._scores(_some(list(store.tasks)))

    def end(self, steps: int) -> None:
        """Keep the new tasks, and write down what became of the old."""
        if self._pairs is None:
            return
        args, generator, new = self._args, self._generator, list(self._pairs.tasks)
        after = self._scores(list(self._before))
        bounds = StoreBounds(args.replay_store_share, args.replay_store_prompts, args.replay_store_bytes)
        store = updated_store(
            generator.replay_store,
            self._pairs,
            new,
            generator.adapter_packing(),
            generator.config.condition_text,
            bounds,
        )
        generator.replay_store = store
        if store is not None and self._before:
            after |= self._scores(_some([name for name in new if name in store.tasks and name not in after]))
        measured = generator.config.measured
        revision = Revision(
            number=len(revisions(measured)) + 1,
            added=tuple(new),
            steps=steps,
            replayed=0 if self._replay is None else len(self._replay.tasks),
            before=_rounded(self._before),
            after=_rounded(after),
            measure=OWN_MEASURE if self._scorer is None else SCORER_MEASURE,
        )
        add_revision(measured, revision)
        if revision.lost:
            worst, points = next(iter(revision.lost.items()))
            logger.info(
                "On %d earlier tasks the update lost %.1f points in the mean, %.1f on %r.",
                len(revision.lost),
                revision.mean_lost,
                points,
                worst,
            )

    def _scores(self, names: list[str]) -> dict[str, float]:
        if not names:
            return {}
        targets = {} if self._replay is None else self._replay.target_tokens()
        return score_store(self._generator, self._scorer, tasks=names, targets=targets, embeddings=self._embeddings)


def _warn_of_forgetting(
    generator: PromptConditionedLoraGenerator, args: DnDTrainingArguments, new_pairs: PromptCheckpointDataset
) -> None:
    known = () if generator.prompt_reference is None else generator.prompt_reference.tasks
    earlier = [name for name in known if name not in new_pairs.tasks]
    if earlier and args.replay_share > 0:
        logger.warning(
            "The generator was fitted to %d tasks that are not in the pairs, %r for one, and keeps nothing of them to "
            "replay: they will be forgotten. Fit with their pairs too, or set replay_share=0 if that is meant.",
            len(earlier),
            earlier[0],
        )


def _some(names: list[str]) -> list[str]:
    """All of a few names, and of many as many, evenly from among them."""
    return (
        names if len(names) <= _MOST_SCORED else [names[i * len(names) // _MOST_SCORED] for i in range(_MOST_SCORED)]
    )


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in scores.items()}
