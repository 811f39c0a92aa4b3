# SPDX-License-Identifier: Apache-2.0
"""Scores from EleutherAI's lm-evaluation-harness, an optional dependency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import EvaluationError
from ..text.prompts import uses_chat_template


@dataclass
class HarnessScorer:
    """Scores a causal or sequence-to-sequence language model on tasks of the lm-evaluation-harness.

    It is a scorer for [`evaluate_generator`]: each example's score is the harness' own metric of it. With the same
    settings, `with_examples(k)` is the `in_context_scorer`.

    Args:
        tokenizer: The base model's tokenizer.
        tasks: Held-out task -> the harness' task: its name, or its configuration as a dictionary.
        metric: Which of the task's metrics, `"acc"` or `"exact_match"` for example; by default its first. It must be
            a number for each example, larger is better.
        filter_name: Which of the task's filters, where it has several; by default its first.
        num_fewshot: How many examples stand before each question. A task whose own configuration says 0 keeps 0.
        limit: At most how many examples of each task; all by default.
        batch_size: How many sequences are computed at once.
        apply_chat_template: Whether questions are put into the tokenizer's chat template; by default if it has one.
        task_manager: The harness' `TaskManager`, to find tasks of your own: `TaskManager(include_path=folder)`.
        seed: Of the choice of examples before the question.
        images: Whether the model reads images, as the task's `doc_to_image` gives them. Its processor is then loaded
            from where the model was, and `tokenizer` is not used but to see whether there is a chat template.
        run_code: Whether a task may execute what the model writes, as HumanEval's do. Allow it where nothing can be
            harmed; the metric asks for the environment variable `HF_ALLOW_CODE_EVAL=1` as well.
        max_new_tokens: How long a written answer may get; by default as the task says.
    """

    tokenizer: Any
    tasks: Mapping[str, str | Mapping[str, Any]]
    metric: str | None = None
    filter_name: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    apply_chat_template: bool | None = None
    task_manager: Any = None
    seed: int = 0
    images: bool = False
    run_code: bool = False
    max_new_tokens: int | None = None

    def with_examples(self, number: int) -> HarnessScorer:
        """The same scorer with so many in-context examples."""
        return replace(self, num_fewshot=number)

    def __call__(self, model: nn.Module, task: str) -> list[float]:
        """Score a model on a held-out task.

        Raises:
            ImportError: If the harness is not installed; it says how.
            EvaluationError: If the task or its metric is not known.
        """
        if task not in self.tasks:
            raise EvaluationError(f"There is no harness task for {task!r}; there are those for {sorted(self.tasks)}.")
        asked = self.tasks[task]
        results = self._run(model, asked if isinstance(asked, str) else dict(asked))
        by_task = results["samples"]
        if len(by_task) != 1:
            raise EvaluationError(f"{asked!r} is a group of the tasks {sorted(by_task)}. Name one task.")
        (samples,) = by_task.values()
        return self._values(task, samples)

    def _run(self, model: nn.Module, task: str | dict[str, Any]) -> Any:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.hf_vlms import HFMultimodalLM
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                "HarnessScorer needs the lm-evaluation-harness. Install it: pip install 'peft-dnd[evaluation]'"
            ) from error
        if self.task_manager is None:
            self.task_manager = TaskManager()  # indexes thousands of tasks, so it is kept
        if self.images:
            wrapped = HFMultimodalLM(pretrained=model, batch_size=self.batch_size)
        else:
            wrapped = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        return simple_evaluate(
            model=wrapped,
            tasks=[task],
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=uses_chat_template(self.tokenizer, self.apply_chat_template),
            task_manager=self.task_manager,
            fewshot_random_seed=self.seed,
            confirm_run_unsafe_code=self.run_code,
            gen_kwargs=None if self.max_new_tokens is None else {"max_gen_toks": self.max_new_tokens},
        )

    def _values(self, task: str, samples: list[dict[str, Any]]) -> list[float]:
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        metrics = list(samples[0]["metrics"])
        filter_name = self.filter_name or filters[0]
        metric = self.metric or metrics[0]
        if filter_name not in filters or metric not in metrics:
            raise EvaluationError(
                f"The harness gives the metrics {metrics} under the filters {filters} for {task!r}; asked for were "
                f"{metric!r} under {filter_name!r}."
            )
        chosen = sorted((s for s in samples if s["filter"] == filter_name), key=lambda sample: sample["doc_id"])
        values = [sample[metric] for sample in chosen]
        if not all(isinstance(value, int | float) for value in values):
            raise EvaluationError(
                f"The metric {metric!r} of {task!r} is no number for each example, but {values[0]!r}: the harness "
                f"computes it over all examples together. Choose another of {metrics}."
            )
        return [float(value) for value in values]
