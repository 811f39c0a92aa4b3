# SPDX-License-Identifier: Apache-2.0
"""What a generator knows of tasks, handed on to another base: one of its own answers, with the adapters it writes.

A base that is added to a generator needs pairs, and training adapters for all tasks again is what they cost. But how
the tasks are to be answered is known already: the old base answers unlabelled inputs with the adapters that the
generator writes for it, and the new base's head is fitted to do the same (knowledge distillation, arXiv 1503.02531;
Trans-LoRA, arXiv 2405.17258, hands single adapters from base to base so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import GeneratorConfigError, PromptError, PromptTypeError
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.writer import task_record
from ..storage.files import PathLike
from ..storage.progress import with_progress
from ..text.prompts import check_prompts
from .teacher import distil_task


def distil_generator(
    folder: PathLike,
    inputs: Mapping[str, Sequence[str]],
    *,
    prompts: Mapping[str, Sequence[str]],
    generator: PromptConditionedLoraGenerator,
    teacher: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
    student_tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    **options: Any,
) -> None:
    """Make task folders for a new base: a base that the generator knows answers, with the adapters written for it.

    For each task the generator writes the teacher's adapter from the task's prompts, the teacher answers the task's
    inputs with it, and [`distil_task`][peft_dnd.fitting.distil_task] keeps what it said. A task that is there already
    with checkpoints of the new base, prompts and examples keeps them. A pass that was killed goes on where it stopped
    when the call is made again.

    Args:
        folder: The new base's pairs folder.
        inputs: Task's name -> the inputs that are answered, as for `distil_task`.
        prompts: Task's name, the same ones -> what the generator reads, unlabelled. Tasks need not be among those it
            was fitted to.
        generator: The fitted generator.
        teacher: A base that it writes adapters for, plain. It is given back as it was.
        tokenizer: The teacher's tokenizer.
        student: The new base, plain.
        student_tokenizer: Its tokenizer. If it has other tokens, give `top_tokens=0`.
        seed: Which prompts are read where there are more than the generator takes.
        options: Of [`distil_task`][peft_dnd.fitting.distil_task]: `apply_chat_template`, `max_new_tokens`,
            `top_tokens`, `stop`, `rows_at_once`, `overwrite`.

    Raises:
        PromptError: If the tasks of prompts and inputs differ, there are none, or one has no text or an empty one.
        PromptTypeError: If either is no dictionary, or the texts of a task are no sequence of strings.
        BaseModelMismatchError: If the generator writes no adapters for the teacher.
        GeneratorConfigError: If the teacher carries an adapter, or could be more than one of the generator's bases; if
            the tokens differ and `top_tokens` is not 0.
        PairsFolderError: And the others of `distil_task`.
    """
    for what, pools in (("inputs", inputs), ("prompts", prompts)):
        if not isinstance(pools, Mapping):
            raise PromptTypeError(
                f"The {what} of many tasks are a dictionary, task name -> list of strings; got a "
                f"{type(pools).__name__}. For a single task call distil_task."
            )
    if set(prompts) != set(inputs) or not prompts:
        apart = sorted(map(str, set(prompts) ^ set(inputs)))
        raise PromptError(
            f"prompts and inputs must be of the same tasks, at least one; of one alone are {apart[:3] or 'none'}."
        )
    for task in prompts:
        if not isinstance(task, str) or Path(task).name != task:
            raise PromptError(f"A task's folder is called as the task, which cannot be {task!r:.80}. Rename it.")
        check_prompts(prompts[task], f"the prompts of task {task!r}")
        check_prompts(inputs[task], f"the inputs of task {task!r}")
    if isinstance(teacher, PeftModel):
        raise GeneratorConfigError(
            "The teacher has an adapter, beside which the generator's would be put. Pass the plain base: "
            "model.unload()."
        )
    one = generator.for_base(teacher)
    for task in with_progress(list(prompts), "Tasks handed on"):
        found = task_record(Path(folder, task))
        adapted = one.generate_adapter(prompts[task], seed=seed).load_into(teacher)
        try:
            distil_task(
                Path(folder, task),
                inputs[task],
                teacher=adapted,
                tokenizer=tokenizer,
                context="",
                prompts=None if found is not None and found.complete else prompts[task],
                student=student,
                student_tokenizer=student_tokenizer,
                **options,
            )
        finally:
            adapted.unload()
