# SPDX-License-Identifier: Apache-2.0
"""Going on without losing the old tasks: what of a generator's replay store is mixed in, and what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from ..errors import RegressionError
from ..evaluation.store_scores import (
    OWN_MEASURE,
    ROWS_MEASURE,
    SCORER_MEASURE,
    StoreScorer,
    score_store,
    written_tokens,
)
from ..generator.modeling import PromptConditionedLoraGenerator
from ..generator.revision_history import Revision, add_revision, check_regression, points_below_best, revisions
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.folder import Task
from ..pairs.packed_adapters import PackedCheckpoint
from ..pairs.replay_store import ReplayStore, StoredTask
from ..pairs.store_update import StoreBounds, updated_store
from ..storage.progress import with_progress
from ..text.embedding_cache import PromptEmbeddingCache
from .arguments import DnDTrainingArguments
from .former_self import FormerSelf
from .objective import Supervision
from .stored_rows import StoredRows


logger = logging.getLogger(__name__)

_MOST_SCORED = 64


class Replay:
    """The tasks of a generator's store that its update replays.

    A fit to weights holds them against weights as well: the mean checkpoint in the store, or what the generator wrote
    before. A fit on what the base does with the adapters takes the rows in the store and, beside them, what the
    generator wrote before for just the prompts that are drawn, which needs nothing but texts.

    Args:
        generator: The generator as it was before the update.
        store: Its store.
        names: Which of its tasks.
        args: The training arguments.
        new_pairs: The pairs of the update.
        rows: The store's rows, in a fit on what the base does.
        embeddings: What the text encoder has read, if that is frozen.

    Attributes:
        pairs: The pairs of the update and those of the store.
        tasks: The names of the tasks that are replayed.
        former: What the generator wrote before, in a fit on what the base does that needs it.
        spread: How far that lies apart from task to task.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        store: ReplayStore,
        names: Sequence[str],
        args: DnDTrainingArguments,
        new_pairs: PromptCheckpointDataset,
        rows: StoredRows | None = None,
        embeddings: PromptEmbeddingCache | None = None,
    ) -> None:
        self.tasks = tuple(names)
        self.share = args.replay_share
        self.former: FormerSelf | None = None
        self.spread = 1.0
        self._generator, self._store, self._rows, self._embeddings = generator, store, rows, embeddings
        self._by_rows = rows is not None and args.replay_targets in ("auto", "rows")
        self._own = args.replay_targets == "checkpoints" or (args.replay_targets == "auto" and rows is None)
        self._targets: dict[str, PackedCheckpoint] = {}
        tasks = [self._task(name) for name in names]
        if rows is None:
            self._against_weights: list[str] = []  # they are as all others are
        elif args.replay_targets == "rows":
            self._against_weights = [
                task.name for task in tasks if task.examples is None and task.distillation is None
            ]
        else:
            self._against_weights = list(names)
        self.pairs = new_pairs.with_replayed(tasks, self._targets, self._against_weights)

    @classmethod
    def of(
        cls,
        generator: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments,
        new_pairs: Any,
        rows: StoredRows | None = None,
        embeddings: PromptEmbeddingCache | None = None,
    ) -> Replay | None:
        """What is to be replayed beside some pairs; `None` if nothing is, which is logged where it might be meant.

        Raises:
            TextEncoderError: If the store is of texts that another text encoder read.
        """
        if not isinstance(new_pairs, PromptCheckpointDataset) or not generator.normalization.fitted:
            return None
        store = generator.replay_store if args.replay_share > 0 else None
        if store is None:
            _warn_of_forgetting(generator, args, new_pairs)
            return None
        generator.check_store_encoder()
        names = [name for name in store.tasks if name not in new_pairs.tasks]
        if not names:
            return None
        logger.info("Replaying %d earlier tasks from the generator's store beside the new ones.", len(names))
        return cls(generator, store, names, args, new_pairs, rows, embeddings)

    def prepare(self) -> None:
        """Have the generator, before it changes, write or be ready to write what is to be kept."""
        if self._rows is None:
            missing = [name for name, target in self._targets.items() if target.packed is None]
            for name in with_progress(missing, "Writing what is to be kept") if missing else ():
                target, texts = self._targets[name], self._store.tasks[name].texts
                target.packed = target.packing.pack_tokens(written_tokens(self._generator, texts))
        elif self.former is None and self._against_weights:
            read = {name: self._store.tasks[name].texts for name in self.tasks}
            self.former = FormerSelf(self._generator, read, self._embeddings)
            self.spread = self.former.spread()

    def supervised(self, supervision: Supervision, condition: Mapping[str, Any]) -> Supervision:
        """What a batch is held against, with what the generator wrote before for items that have nothing else."""
        if supervision.replayed is None or self.former is None:
            return supervision
        known = supervision.known(len(supervision.replayed), supervision.replayed.device)[:, 0]
        missing = supervision.replayed & ~known
        if not missing.any():
            return supervision
        grids = self._generator.normalization.denormalize(self.former.written(condition, missing))
        targets = supervision.targets
        if targets is None:
            targets = grids.new_zeros((len(known), *grids.shape[1:]))
        targets = targets.to(grids.dtype).index_put((missing,), grids)
        return replace(supervision, targets=targets, has_target=known | missing)

    def target_tokens(self) -> Mapping[str, torch.Tensor]:
        """Task -> the normalised tokens that are replayed, of tasks whose checkpoint is not in the store."""
        if self.former is not None:
            return self.former
        return {
            name: target.packing.unpack_tokens(target.packed)
            for name, target in self._targets.items()
            if target.packed is not None
        }

    def _task(self, name: str) -> Task:
        """A task of the store as one of the data set; its adapter, if it is held against that, among the targets."""
        kept, task = self._store.tasks[name], self._store.pairs_task(name)
        with_rows = self._rows.of(self._store, name) if self._rows is not None and self._by_rows else None
        if with_rows is not None and self._rows is not None:
            rows = self._rows.replayed(with_rows)
            return replace(task, examples=rows.get("examples"), distillation=rows.get("distillation"))
        adapter = kept.adapter if self._own else None
        if adapter is not None or self._rows is None:
            self._targets[name] = PackedCheckpoint(self._generator.adapter_packing(), adapter)
        return task


class StoreKeeper:
    """Measures a fit on the generator's store, and brings the store up to date when it is done.

    Args:
        generator: The generator.
        args: The training arguments.
        pairs: The pairs of the fit, without those that are replayed.
        replay: What is replayed.
        scorer: Scores adapters of the store's tasks; see [`score_store`][peft_dnd.evaluation.score_store]. By default
            the rows in the store, in a fit on what the base does, or else the distance of weights.
        rows: The store's rows, in such a fit.
        embeddings: What the text encoder has read, if that is frozen: it is what takes most of the time.
    """

    def __init__(
        self,
        generator: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments,
        pairs: PromptCheckpointDataset | None,
        replay: Replay | None,
        scorer: StoreScorer | None,
        rows: StoredRows | None,
        embeddings: PromptEmbeddingCache | None,
    ) -> None:
        self._generator, self._args, self._pairs = generator, args, pairs
        self._replay, self._scorer, self._rows, self._embeddings = replay, scorer, rows, embeddings
        self._before: dict[str, float] = {}
        self._measure = OWN_MEASURE if scorer is None else SCORER_MEASURE

    @property
    def judging(self) -> bool:
        """Whether the generator knows earlier tasks, by which the fit is judged when it is done."""
        if self._pairs is None or not self._generator.normalization.fitted:
            return False
        return self._generator.replay_store is not None

    def begin(self) -> None:
        """Score the store's tasks as the generator is now."""
        store, rows = self._generator.replay_store if self.judging else None, self._rows
        if store is None:
            return
        if rows is not None and store.base not in (None, rows.base):
            logger.warning(
                "The rows that the generator keeps of its earlier tasks were for another base than this one: they are "
                "not replayed, the tasks are not judged by them, and the store drops them. Unless that is meant, give "
                "the base that the generator was fitted for, %r.",
                self._generator.config.base_model_name_or_path,
            )
        if rows is not None and self._scorer is None and any(rows.of(store, name) for name in store.tasks):
            self._measure = ROWS_MEASURE
            self._scorer = lambda name, adapter: rows.score(self._judged([name])[name], adapter)
        self._before = self._scores(_some(list(self._judged(store.tasks))))

    def _judged(self, names: Iterable[str]) -> dict[str, StoredTask]:
        """Those of some tasks of the store by which the generator can be judged."""
        store = self._generator.replay_store
        if store is None:
            return {}
        by_rows = self._rows if self._measure == ROWS_MEASURE else None
        found = {name: store.tasks[name] for name in names if name in store.tasks}
        return {name: task for name, task in found.items() if by_rows is None or by_rows.of(store, name)}

    def end(self, steps: int) -> None:
        """Keep the new tasks, and write down what became of the old."""
        if self._pairs is None:
            return
        args, generator, new = self._args, self._generator, list(self._pairs.tasks)
        after = self._scores(list(self._before))
        store = updated_store(
            generator.replay_store,
            self._pairs,
            new,
            generator.adapter_packing(),
            generator.config.condition_text,
            StoreBounds(args.replay_store_share, args.replay_store_prompts, args.replay_store_bytes),
            encoder=generator.encoder_probe() if args.replay_store_share > 0 else None,
            rows=() if self._rows is None else self._rows.kinds,
            base=None if self._rows is None else self._rows.base,
        )
        generator.replay_store = store
        if self._before:
            after |= self._scores(_some([name for name in self._judged(new) if name not in after]))
        measured = generator.config.measured
        revision = Revision(
            number=len(revisions(measured)) + 1,
            added=tuple(new),
            steps=steps,
            replayed=0 if self._replay is None else len(self._replay.tasks),
            before=_rounded(self._before),
            after=_rounded(after),
            measure=self._measure,
        )
        add_revision(measured, revision)
        self._tell(revision)

    def _tell(self, revision: Revision) -> None:
        most, measured = self._args.most_points_lost, self._generator.config.measured
        try:
            if most is not None:
                check_regression(measured, most)
        except RegressionError as error:  # nothing is published here; who saves the generator should know
            logger.warning("%s", error)
            return
        below = list(points_below_best(revisions(measured)).values())
        if below and most is not None and fmean(below) > most:
            logger.warning(
                "No update has lost more than %g points, but together they have: the earlier tasks are %.1f points "
                "below the best that they had. Fit anew with the pairs of all tasks, or go on with a larger "
                "replay_share or replay_store_share.",
                most,
                fmean(below),
            )
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
