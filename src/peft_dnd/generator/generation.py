# SPDX-License-Identifier: Apache-2.0
"""From prompts to a finished adapter: the half of the generator that writes, and that looks whom it writes for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import NotFittedError, PairsFolderError, PromptError, PromptTypeError, WeightValueError
from ..text.embedding_cache import PromptEmbeddingCache
from ..text.out_of_distribution import (
    FEWEST_TASKS,
    REFERENCE_NAME,
    PromptReference,
    check_action,
    prompt_points,
    prompts_kept,
    read_points,
)
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import check_prompts, prompts_digest, select_prompts
from ..version import __version__
from .configuration import PromptedAdapters
from .familiarity import Fallback, judge
from .fingerprint import generator_sha256
from .policing import PolicyMixin


# What is kept of the fitted tasks' prompts may take this share of the decoder's bytes, or so many.
_REFERENCE_SHARE = 0.1
_REFERENCE_BYTES = 2**22

# Task name -> its prompts, or their answers.
Pools = Mapping[str, PromptsLike]


class AdapterWritingMixin(PolicyMixin):
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
        out_of_distribution: str | None = None,
        threshold: float | None = None,
    ) -> GeneratedAdapter: ...

    @overload
    def generate_adapter(
        self,
        prompts: Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Pools | None = None,
        out_of_distribution: str | None = None,
        threshold: float | None = None,
    ) -> dict[str, GeneratedAdapter]: ...

    def generate_adapter(
        self,
        prompts: PromptsLike | Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Any = None,
        out_of_distribution: str | None = None,
        threshold: float | None = None,
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
                (1 - score) / (1 - threshold); write the `"mean"` training adapter; or `"refuse"` to write one. `None`
                warns, and does nothing where the generator keeps nothing of its fitted tasks' prompts.
            threshold: From 0 up to 1; `None` is what
                [`PromptReference.threshold`][peft_dnd.text.PromptReference.threshold] derives from the fitted tasks
                for so many prompts: one in twenty new tasks like them is above it.

        Returns:
            A [`GeneratedAdapter`], or for a dictionary one for each of its keys.

        Raises:
            PromptError: If there are no prompts, or empty ones; or answers are missing, or given and not read.
            PromptTypeError: If they are not strings.
            GeneratorConfigError: If the generator does not know the base, or has several and is not told which.
            BaseModelMismatchError: If `base` is a model that fits none of its bases.
            NotFittedError: If the generator has never been fitted, or more than `"ignore"` or `None` is asked of one
                that keeps nothing of its fitted tasks' prompts.
            OutOfDistributionError: If the prompts do not belong, and that is to be refused.
            WeightValueError: If NaN or infinity comes out.
            PolicyError: If the generator's policy refuses the prompts, or the adapter.
        """
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
        fallback = self._checked(Fallback(out_of_distribution, threshold))
        return self._generate_one(self.condition_texts(prompts, answers, seed=seed), seed, fallback)

    def generate_adapters(
        self,
        prompts: Pools,
        *,
        base: str | nn.Module | None = None,
        seed: int = 0,
        answers: Pools | None = None,
        out_of_distribution: str | None = None,
        threshold: float | None = None,
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
        fallback = self._checked(Fallback(out_of_distribution, threshold))
        _check_pools(prompts, answers)
        paired = {task: (lines, None if answers is None else answers.get(task)) for task, lines in prompts.items()}
        checked = {
            task: self.condition_texts(*lines, seed=seed, what=f"the prompts of task {task!r}")
            for task, lines in paired.items()
        }
        return {task: self._generate_one(lines, seed, fallback, f"task {task!r}") for task, lines in checked.items()}

    @torch.no_grad()
    def fit_out_of_distribution(
        self,
        prompts: PromptedAdapters | Pools,
        *,
        embeddings: PromptEmbeddingCache | None = None,
        most_bytes: int | None = None,
    ) -> None:
        """Keep what is needed to tell whether prompts belong with those of the fitted tasks. `DnDTrainer` does it.

        Args:
            prompts: The training pairs, or training task -> its prompts (or the texts that are read in their place).
            embeddings: The tasks' prompts as already read.
            most_bytes: How many bytes that may take; `None` is a tenth of the decoder's, and 4 MiB at the least. See
                [`PromptReference.fit`][peft_dnd.text.PromptReference.fit].

        Raises:
            NotFittedError: If there are fewer than three tasks.
            PairsFolderError: If the pairs are a name.
        """
        given = _pools_of(prompts)
        pools = {task: check_prompts(lines, f"the prompts of task {task!r}") for task, lines in given.items()}
        with evaluating(self):
            points = {task: self._points(task, lines, len(pools), embeddings) for task, lines in pools.items()}
        if most_bytes is None:
            most_bytes = max(_REFERENCE_BYTES, int(_REFERENCE_SHARE * _bytes_of(self.decoder)))
        self.prompt_reference = PromptReference.fit(points, most_bytes=most_bytes)
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

    def _checked(self, fallback: Fallback) -> Fallback:
        check_action(fallback.action, fallback.threshold)
        if not self.normalization.fitted:
            raise NotFittedError(
                "This generator has never been fitted, so its adapters would mean nothing. Fit it with DnDTrainer, or "
                "load a fitted one with from_pretrained."
            )
        if fallback.action not in (None, "ignore") and self.prompt_reference is None:
            raise NotFittedError(
                f"With out_of_distribution={fallback.action!r} the generator must know its fitted tasks' prompts, and "
                "this one does not: it was fitted by an earlier version, or on fewer than three tasks. Call "
                "generator.fit_out_of_distribution(pairs) with the training pairs, and save it."
            )
        return fallback

    @torch.no_grad()
    def _generate_one(
        self, prompts: tuple[str, ...], seed: int, fallback: Fallback, what: str = "the task"
    ) -> GeneratedAdapter:
        with evaluating(self):
            self._refuse_prompts(prompts, seed, what)
            states, mask = self.encode_prompts(prompts, seed=seed)
            found = judge(self.prompt_reference, read_points(states, mask), fallback, what, stacklevel=4)
            grid = self._decoded(states, mask, found.factor)
        if not torch.isfinite(grid).all():
            raise WeightValueError(
                "The generator wrote NaN or infinity. Its weights are damaged, or float16 overflowed: load it in "
                "float32 or bfloat16."
            )
        provenance = {**self._provenance(prompts, seed), **found.provenance()}
        adapter = GeneratedAdapter(self.config.adapter_layout, self.weight_tokenizer.decode(grid), provenance)
        return self.hold_to_policy(adapter)

    def _decoded(self, states: torch.Tensor, mask: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        device = cast(torch.device, self.device)
        tokens = self(states[None].to(device), mask[None].to(device))[0] * factor
        return self.normalization.denormalize(tokens.to(self.normalization.mean.device)).cpu()

    def fitted_adapters(self, prompts: PromptedAdapters | Pools) -> Mapping[str, GeneratedAdapter]:
        """The adapters that this generator writes for its fitted tasks, no policy in the way: to calibrate one on.

        Each is written when it is asked for, and not kept.

        Args:
            prompts: The training pairs, or training task -> its prompts (or the texts that are read in their place).

        Raises:
            NotFittedError: If the generator was never fitted.
            PairsFolderError: If the pairs are a name.
        """
        self._checked(Fallback())
        return _FittedAdapters(self, _pools_of(prompts))

    def _provenance(self, prompts: tuple[str, ...], seed: int) -> dict[str, Any]:
        return {
            "generator": getattr(self, "name_or_path", None) or None,
            "generator_revision": self._commit,
            "generator_sha256": generator_sha256(self),
            "num_prompts": len(prompts),
            "prompts_sha256": prompts_digest(prompts),
            "seed": seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": cast(torch.device, self.device).type,
            "peft_dnd_version": __version__,
            "torch_version": torch.__version__,
        }


class _FittedAdapters(Mapping[str, GeneratedAdapter]):
    def __init__(self, generator: AdapterWritingMixin, pools: Pools) -> None:
        self._generator, self._pools = generator, pools

    @torch.no_grad()
    def __getitem__(self, task: str) -> GeneratedAdapter:
        generator, texts = self._generator, check_prompts(self._pools[task], f"the prompts of task {task!r}")
        with evaluating(generator):
            grid = generator._decoded(*generator.encode_prompts(texts))
        return GeneratedAdapter(generator.config.adapter_layout, generator.weight_tokenizer.decode(grid))

    def __iter__(self) -> Iterator[str]:
        return iter(self._pools)

    def __len__(self) -> int:
        return len(self._pools)


def _pools_of(prompts: PromptedAdapters | Pools) -> Pools:
    if isinstance(prompts, (str, os.PathLike)):
        raise PairsFolderError(
            f"The training pairs are expected, got the name {os.fspath(prompts)!r}. Read the pairs folder with "
            "PromptCheckpointDataset.from_folder."
        )
    return prompts if isinstance(prompts, Mapping) else {task: prompts.prompts(task) for task in prompts.tasks}


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
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
