# SPDX-License-Identifier: Apache-2.0
"""From prompts to a finished adapter: the half of the generator that writes, and that looks whom it writes for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import NotFittedError, OutOfDistributionError, PromptError, PromptTypeError, WeightValueError
from ..text.embedding_cache import PromptEmbeddingCache
from ..text.out_of_distribution import (
    FEWEST_TASKS,
    REFERENCE_NAME,
    OutOfDistributionWarning,
    PromptReference,
    check_action,
    prompt_points,
    prompts_kept,
    read_points,
    shrinkage,
)
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import check_prompts, prompts_digest, select_prompts
from ..version import __version__
from .conditioning import PromptReadingMixin
from .configuration import PromptedAdapters


# Task name -> its prompts, or their answers.
Pools = Mapping[str, PromptsLike]
THRESHOLD = 0.95
# How many of the fitted tasks that an adapter's prompts are near to its provenance names.
_TASKS_NAMED = 5


class AdapterWritingMixin(PromptReadingMixin):
    """Gives a generator its `generate_adapter`, and the score of how well prompts belong to its fitted tasks."""

    prompt_reference: PromptReference | None
    _commit: str | None

    @overload
    def generate_adapter(
        self,
        prompts: PromptsLike,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: PromptsLike | None = None,
        out_of_distribution: str = "ignore",
        threshold: float = THRESHOLD,
    ) -> GeneratedAdapter: ...

    @overload
    def generate_adapter(
        self,
        prompts: Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Pools | None = None,
        out_of_distribution: str = "ignore",
        threshold: float = THRESHOLD,
    ) -> dict[str, GeneratedAdapter]: ...

    def generate_adapter(
        self,
        prompts: PromptsLike | Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Any = None,
        out_of_distribution: str = "ignore",
        threshold: float = THRESHOLD,
    ) -> GeneratedAdapter | dict[str, GeneratedAdapter]:
        """Write the adapter of a task from its prompts, or those of several tasks.

        The same prompts, seed and generator give the same bytes, alone or among other tasks: each task is read and
        decoded for itself.

        Args:
            prompts: A list of unlabelled prompts of one task, or a dictionary of such lists.
            base: For which base, if the generator has several; see [`for_base`].
            seed: Decides which prompts are read when a decoder of the paper's family gets more or fewer than
                `config.num_prompts`, or one that reads sets more than 1024.
            answers: The prompts' answers, one each, for a generator that reads them (see `config.condition_text`); for
                a dictionary of prompts a dictionary.
            out_of_distribution: What to do where the adapter's `out_of_distribution`, the score of
                [`PromptReference.score`][peft_dnd.text.PromptReference.score], is above the threshold:
                nothing (`"ignore"`); `"warn"`; `"shrink"` the adapter towards the mean training adapter, by
                (1 - score) / (1 - threshold); or `"refuse"` to write one.
            threshold: Of new tasks like the fitted ones, the share 1 - threshold has a score above it.

        Returns:
            A [`GeneratedAdapter`], or for a dictionary one for each of its keys.

        Raises:
            PromptError: If there are no prompts, or empty ones; or answers are missing, or given and not read.
            PromptTypeError: If they are not strings.
            GeneratorConfigError: If the generator does not know the base, or has several and is not told which.
            BaseModelMismatchError: If `base` is a model that fits none of its bases.
            NotFittedError: If the generator has never been fitted, or more than `"ignore"` is asked of one that keeps
                nothing of its fitted tasks' prompts.
            OutOfDistributionError: If the prompts do not belong, and that is to be refused.
            WeightValueError: If NaN or infinity comes out.
        """
        action = (out_of_distribution, threshold)
        if isinstance(prompts, Mapping):
            return self.generate_adapters(
                prompts,
                base=base,
                seed=seed,
                answers=answers,
                out_of_distribution=out_of_distribution,
                threshold=threshold,
            )
        if (one := self.for_base(base)) is not self:
            return one.generate_adapter(
                prompts, seed=seed, answers=answers, out_of_distribution=out_of_distribution, threshold=threshold
            )
        self._check_ready(*action)
        return self._generate_one(self.condition_texts(prompts, answers, seed=seed), seed, action)

    def generate_adapters(
        self,
        prompts: Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Pools | None = None,
        out_of_distribution: str = "ignore",
        threshold: float = THRESHOLD,
    ) -> dict[str, GeneratedAdapter]:
        """Write the adapters of many tasks; see [`generate_adapter`].

        All prompts are checked before the first is read.

        Args:
            prompts: Task name -> its prompts.
            base: As for one task.
            seed: As for one task.
            answers: Task name -> their answers, if the generator reads them.
            out_of_distribution: As for one task.
            threshold: As for one task.
        """
        if (one := self.for_base(base)) is not self:
            return one.generate_adapters(
                prompts, seed=seed, answers=answers, out_of_distribution=out_of_distribution, threshold=threshold
            )
        self._check_ready(out_of_distribution, threshold)
        _check_pools(prompts, answers)
        paired = {task: (lines, None if answers is None else answers.get(task)) for task, lines in prompts.items()}
        checked = {
            task: self.condition_texts(*lines, seed=seed, what=f"the prompts of task {task!r}")
            for task, lines in paired.items()
        }
        action = (out_of_distribution, threshold)
        return {task: self._generate_one(lines, seed, action, f"task {task!r}") for task, lines in checked.items()}

    @torch.no_grad()
    def fit_out_of_distribution(
        self, prompts: PromptedAdapters | Pools, *, embeddings: PromptEmbeddingCache | None = None
    ) -> None:
        """Keep what is needed to tell whether prompts belong with those of the fitted tasks. `DnDTrainer` does it.

        Args:
            prompts: The training pairs, or training task -> its prompts (or the texts that are read in their place).
            embeddings: The tasks' prompts as already read.

        Raises:
            NotFittedError: If there are fewer than three tasks.
        """
        given = prompts if isinstance(prompts, Mapping) else {task: prompts.prompts(task) for task in prompts.tasks}
        pools = {task: check_prompts(lines, f"the prompts of task {task!r}") for task, lines in given.items()}
        with _evaluating(self):
            points = {
                task: self._points(task, check_prompts(lines, f"the prompts of task {task!r}"), len(pools), embeddings)
                for task, lines in pools.items()
            }
        self.prompt_reference = PromptReference.fit(points)
        if self.prompt_reference is None:
            raise NotFittedError(
                f"How tasks differ in their prompts can be told from {FEWEST_TASKS} of them or more, got {len(pools)}."
            )

    def load_prompt_reference(self, folder: Path) -> None:
        """Read what is kept of the fitted tasks' prompts from a generator's folder, if it is there."""
        path = folder / REFERENCE_NAME
        self.prompt_reference = PromptReference.load(path) if path.is_file() else None

    def _points(
        self, task: str, lines: Sequence[str], tasks: int, embeddings: PromptEmbeddingCache | None
    ) -> torch.Tensor:
        drawn = select_prompts(len(lines), min(len(lines), prompts_kept(tasks)), 0)
        if embeddings is not None:
            return prompt_points(embeddings.states(task, lines))[drawn]
        return prompt_points(self.read_states(self.text_encoder, [lines[i] for i in drawn.tolist()]))

    def _check_ready(self, action: str, threshold: float) -> None:
        check_action(action, threshold)
        if not self.normalization.fitted:
            raise NotFittedError(
                "This generator has never been fitted, so its adapters would mean nothing. Fit it with DnDTrainer, or "
                "load a fitted one with from_pretrained."
            )
        if action != "ignore" and self.prompt_reference is None:
            raise NotFittedError(
                f"With out_of_distribution={action!r} the generator must know its fitted tasks' prompts, and this one "
                "does not: it was fitted by an earlier version, or on fewer than three tasks. Call "
                "generator.fit_out_of_distribution(pairs) with the training pairs, and save it."
            )

    @torch.no_grad()
    def _generate_one(
        self, prompts: tuple[str, ...], seed: int, action: tuple[str, float], what: str = "the task"
    ) -> GeneratedAdapter:
        with _evaluating(self):
            states, mask = self.encode_prompts(prompts, seed=seed)
            known = self.prompt_reference
            points = None if known is None else read_points(states, mask)
            score = None if known is None or points is None else known.score(points)
            factor = 1.0 if score is None else _act(score, *action, what=what)
            device = cast(torch.device, self.device)
            tokens = self(states[None].to(device), mask[None].to(device))[0] * factor
            grid = self.normalization.denormalize(tokens.to(self.normalization.mean.device)).cpu()
        if not torch.isfinite(grid).all():
            raise WeightValueError(
                "The generator wrote NaN or infinity. Its weights are damaged, or float16 overflowed: load it in "
                "float32 or bfloat16."
            )
        provenance = self._provenance(prompts, seed)
        if known is not None and points is not None:
            provenance["out_of_distribution"] = score
            provenance["nearest_tasks"] = list(known.nearest_tasks(points).items())[:_TASKS_NAMED]
        if factor < 1:
            provenance["shrunk_by"] = factor
        return GeneratedAdapter(self.config.adapter_layout, self.weight_tokenizer.decode(grid), provenance)

    def _provenance(self, prompts: tuple[str, ...], seed: int) -> dict[str, Any]:
        return {
            "generator": getattr(self, "name_or_path", None) or None,
            "generator_revision": self._commit,
            "num_prompts": len(prompts),
            "prompts_sha256": prompts_digest(prompts),
            "seed": seed,
            "peft_dnd_version": __version__,
        }


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context a module is in evaluation mode; after it in the mode in which it was."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _check_pools(prompts: object, answers: object) -> None:
    for what, pools in (("prompts", prompts), ("answers", answers)):
        if not isinstance(pools, Mapping) and not (what == "answers" and pools is None):
            raise PromptTypeError(
                f"The {what} of many tasks are a dictionary, task name -> list of strings; got a "
                f"{type(pools).__name__}. For a single task call generate_adapter."
            )
    unknown = [task for task in cast(Pools, answers or {}) if task not in cast(Pools, prompts)]
    if unknown:
        raise PromptError(
            f"There are answers for task {unknown[0]!r}, and no prompts. Tasks with prompts: "
            f"{', '.join(map(repr, cast(Pools, prompts))) or 'none'}. Name both alike."
        )


def _act(score: float, action: str, threshold: float, *, what: str) -> float:
    """Do what is to be done about prompts of this score; the factor for the adapter's deviation from the mean."""
    if action == "shrink":
        return shrinkage(score, threshold)
    if action == "ignore" or score <= threshold:
        return 1.0
    message = (
        f"The prompts of {what} are unlike those of the tasks that the generator was fitted on: their "
        f"out-of-distribution score of {score:.3f} is above the threshold of {threshold:g}. The adapter is likely to "
        "be useless. Check the prompts, or fit the generator on tasks like this one."
    )
    if action == "refuse":
        raise OutOfDistributionError(message)
    warnings.warn(message, OutOfDistributionWarning, stacklevel=5)
    return 1.0
