# SPDX-License-Identifier: Apache-2.0
"""The collector: a callback by which any `Trainer` writes its task's folder, through a `PairWriter`, as it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapters.layouts import layout_from_model
from ..errors import GeneratorConfigError, PairsFolderError
from ..storage.files import PathLike
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import check_prompts
from ..text.prompts_and_answers import check_answers
from .folder import stored_steps
from .initialization import has_common_initialization, use_common_initialization, whole_matrices
from .writer import PairWriter


logger = logging.getLogger(__name__)


class CheckpointCollector(TrainerCallback):
    """Writes a task's folder of prompt-checkpoint pairs while any `Trainer`, TRL's included, trains its adapter.

    Of the last `last * every` steps it keeps every `every`-th, the final one always (arXiv 2506.16406, section 2.2:
    go on from a trained adapter and keep one after each step). What happens to a folder that is there already:

    - a task whose collection is complete is refused, unless `overwrite=True`;
    - what a run left that was cut off is cleared by a run from the start;
    - a run that is resumed from one of its own trainer checkpoints keeps what it wrote up to there, and ends with the
      files that it would have without interruption.

    In a distributed run the main process alone writes. Weights that are sharded (FSDP, DeepSpeed ZeRO-3) are refused.

    Args:
        folder: The task's folder inside the pairs folder, for instance `"pairs/arc_easy"`.
        prompts: The task's pool of unlabelled prompts.
        last: How many checkpoints to keep at most; at least 1.
        every: Steps from one to the next; at least 1. A step is an optimiser step.
        adapter_name: The adapter that is trained, by its name in the model.
        common_initialization: Whether to start the adapter from the pairs folder's common initialisation, which the
            first task to be trained there creates from its own fresh adapter. The two factors of an update are only
            determined up to an invertible matrix between them, so adapters that start apart cannot be compared entry
            by entry. Pass `False` to go on training an adapter.
        task: The task's name; by default that of the folder.
        overwrite: Whether to replace a complete task.
        examples: The task's examples, as for [`write_examples`], for a generator that is fitted on the task's own
            loss. They are gone through once, when training begins.
        answers: The prompts' answers, one each, for a generator that reads them too
            (`PromptConditionedLoraGeneratorConfig.condition_text`).

    Raises:
        PromptError: If there are no prompts, or empty ones, or not one answer for each.
        PromptTypeError: If they are no sequence of strings.
        GeneratorConfigError: If `last` or `every` is not positive.
        PairsFolderError: When training begins, if the folder may not be written to, or the adapter was trained before
            and would lose that to the common initialisation. When it ends, if it did so before the first of the steps
            to keep.
        LayoutError: When training begins, if the adapter is no plain LoRA, is sharded, or has another layout than the
            common initialisation.
        WeightValueError: While training, if the adapter has come to hold NaN or infinity.
        SavingError: While training, if writing fails, on a full disk for instance.

    Example:
        ```python
        trainer = SFTTrainer(..., peft_config=lora, callbacks=[CheckpointCollector("pairs/law", prompts=prompts)])
        trainer.train()
        ```
    """

    def __init__(
        self,
        folder: PathLike,
        prompts: PromptsLike,
        *,
        last: int = 50,
        every: int = 1,
        adapter_name: str = "default",
        common_initialization: bool = True,
        task: str | None = None,
        overwrite: bool = False,
        examples: Iterable[Mapping[str, Any]] | None = None,
        answers: PromptsLike | None = None,
    ) -> None:
        if last < 1 or every < 1:
            raise GeneratorConfigError(f"last and every must be at least 1, got last={last} and every={every}.")
        self.folder = Path(folder)
        self.prompts = check_prompts(prompts)
        self.answers = None if answers is None else check_answers(self.prompts, answers)
        self.last = last
        self.every = every
        self.adapter_name = adapter_name
        self.common_initialization = common_initialization
        self.task = task
        self.overwrite = overwrite
        self.examples = examples
        self._planned: tuple[int, ...] = ()
        self._writer: PairWriter | None = None
        self._begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check all that can be checked, start the adapter from the common initialisation, lay out the folder."""
        model, optimizer = _adapted_part(kwargs["model"]), kwargs.get("optimizer")
        layout = layout_from_model(model, self.adapter_name)
        writer = None
        if state.is_world_process_zero:
            writer = PairWriter(
                self.folder,
                self.prompts,
                layout,
                task=self.task,
                adapter_name=self.adapter_name,
                overwrite=self.overwrite,
                examples=self.examples,
                answers=self.answers,
                resume_from=(model, state.global_step) if state.global_step > 0 else None,
            )
        initialization = None
        if self.common_initialization and state.global_step == 0:
            initialization = self._initialize(model, optimizer, is_main=writer is not None)
        if writer is not None:
            self._planned = planned_steps(state.max_steps, self.last, self.every)
            writer.begin(initialization, self._planned)
            self._writer = writer
            logger.info("Keeping the adapter at %d steps, %s.", len(self._planned), _range_in_words(self._planned))
        self._begun = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the adapter, if this is one of the steps to keep."""
        if self._writer is not None and state.global_step in self._planned:
            self._writer.add(_adapted_part(kwargs["model"]), state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that the run can be resumed from here."""
        if self._writer is not None:
            self._writer.note_resume_point(_adapted_part(kwargs["model"]), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the task as complete."""
        writer, self._writer, self._begun = self._writer, None, False
        if writer is None:
            return
        missing = sorted(set(self._planned) - set(stored_steps(self.folder)))
        if missing:
            logger.warning(
                "Task %r has %d of the %d checkpoints that were to be kept; those of %s are missing, and training "
                "ended at step %d of %d. To have them all, collect again with overwrite=True, without stopping early, "
                "and resume from none but this run's own trainer checkpoints.",
                writer.task,
                len(self._planned) - len(missing),
                len(self._planned),
                _range_in_words(missing),
                state.global_step,
                state.max_steps,
            )
        writer.close()

    def _initialize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, is_main: bool) -> str | None:
        pairs = self.folder.absolute().parent
        digest = None
        if is_main:
            # A Trainer that begins anew within one call (auto_find_batch_size) has the same adapter to start again.
            if not self._begun and not has_common_initialization(model, pairs, self.adapter_name):
                _check_untrained(model, self.adapter_name)
                _check_optimizer_holds_adapter(model, self.adapter_name, optimizer)
            digest = use_common_initialization(model, pairs, self.adapter_name)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for matrix in whole_matrices(model, self.adapter_name).values():
                torch.distributed.broadcast(matrix.data, src=0)
        return digest


def planned_steps(max_steps: int, last: int, every: int) -> tuple[int, ...]:
    """The steps to keep, in rising order.

    >>> planned_steps(max_steps=100, last=3, every=10)
    (80, 90, 100)
    """
    return tuple(range(max_steps, 0, -every))[:last][::-1]


def _adapted_part(model: nn.Module) -> nn.Module:
    """The model itself, or the one part of it that knows of its adapters, as in a `SentenceTransformer`."""
    if getattr(model, "peft_config", None):
        return model
    parts = [part for part in model.modules() if getattr(part, "peft_config", None)]
    return parts[0] if len(parts) == 1 else model


def _check_untrained(model: nn.Module, adapter_name: str) -> None:
    matrices = whole_matrices(model, adapter_name)
    for module in layout_from_model(model, adapter_name).modules:  # of other methods it cannot be told
        if all(bool(matrices[tensor.key].any()) for tensor in module.tensors):
            raise PairsFolderError(
                f"Adapter {adapter_name!r} is not fresh: neither A nor B of {module.name!r} is zero. The common "
                "initialisation would overwrite what it has learned. To go on training it, pass "
                "common_initialization=False (and give it the common start before its first training, with "
                "use_common_initialization). To start afresh all the same, call "
                "use_common_initialization(model, pairs) before you create the Trainer."
            )


def _check_optimizer_holds_adapter(
    model: nn.Module, adapter_name: str, optimizer: torch.optim.Optimizer | None
) -> None:
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(matrix) in held for matrix in whole_matrices(model, adapter_name).values()):
        raise PairsFolderError(
            f"The optimizer works on copies of adapter {adapter_name!r} (DeepSpeed and FSDP do so), which would undo "
            "the common initialisation. Call use_common_initialization(model, pairs) before you create the Trainer."
        )


def _range_in_words(steps: Sequence[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
