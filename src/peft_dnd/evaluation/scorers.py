# SPDX-License-Identifier: Apache-2.0
"""Ready scorers: labels that a model predicts, and answers that it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import nn

from ..errors import EvaluationError
from ..text.drawing import draw
from ..text.prompts import uses_chat_template


@dataclass(frozen=True)
class LabelScorer:
    """Accuracy, or balanced accuracy, of predicted labels.

    Args:
        predict: `(model, task) -> a label for each example`.
        labels: Task -> the right labels, in the same order.
        balanced: Whether all classes of a task count alike: an example's score is then weighted by
            `sklearn.utils.class_weight.compute_sample_weight("balanced", labels)`, so that their mean is
            `sklearn.metrics.balanced_accuracy_score`.
    """

    predict: Callable[[nn.Module, str], Sequence[Any]]
    labels: Mapping[str, Sequence[Any]]
    balanced: bool = False

    def __call__(self, model: nn.Module, task: str) -> list[float]:
        """Score a model on a task.

        Raises:
            EvaluationError: If there are not as many predictions as labels.
        """
        labels, found = list(self.labels[task]), list(self.predict(model, task))
        if len(found) != len(labels):
            raise EvaluationError(f"{len(found)} predictions were made for the {len(labels)} examples of {task!r}.")
        right = [float(a == b) for a, b in zip(found, labels, strict=True)]
        if not self.balanced:
            return right
        from sklearn.utils.class_weight import compute_sample_weight

        weights = compute_sample_weight("balanced", labels)
        return [score * float(weight) for score, weight in zip(right, weights, strict=True)]


@dataclass(frozen=True)
class AnswerScorer:
    """Whether a causal language model's written answer is exactly the right one, decoding greedily.

    A question is put into the tokenizer's chat template where it has one, as a user's message; otherwise it is read as
    it stands. With `with_examples(...)` the same scorer puts solved examples before each question.

    Args:
        tokenizer: The base model's tokenizer.
        examples: Task -> pairs (question, answer) to be scored on.
        max_new_tokens: How long an answer may get.
        batch_size: How many questions are answered at once.
        normalize: Applied to both answers before they are compared; by default surrounding white space is dropped.
        shots: Task -> solved examples that stand before each question.
        separator: Between a question and its answer, and between examples, where there is no chat template.
    """

    tokenizer: Any
    examples: Mapping[str, Sequence[tuple[str, str]]]
    max_new_tokens: int = 32
    batch_size: int = 32
    normalize: Callable[[str], str] = str.strip
    shots: Mapping[str, Sequence[tuple[str, str]]] | None = None
    separator: str = "\n"

    def with_examples(
        self, training: Mapping[str, Sequence[tuple[str, str]]], number: int, *, seed: int = 0
    ) -> AnswerScorer:
        """The scorer of the in-context row.

        Args:
            training: Task -> solved examples, from its training split.
            number: How many of them stand before each question.
            seed: Which ones.
        """
        shots = {task: _draw(pool, number, f"{seed} {task}") for task, pool in training.items()}
        return replace(self, shots=shots)

    def __call__(self, model: nn.Module, task: str) -> list[float]:
        """Score a model on a task."""
        pairs = list(self.examples[task])
        answers: list[str] = []
        for start in range(0, len(pairs), self.batch_size):
            answers += self._answer(model, [self.text(task, q) for q, _ in pairs[start : start + self.batch_size]])
        return [
            float(self.normalize(written) == self.normalize(right))
            for written, (_, right) in zip(answers, pairs, strict=True)
        ]

    def text(self, task: str, question: str) -> str:
        """What the model reads for a question: solved examples before it, if any, and all in the chat template."""
        shots = (self.shots or {}).get(task, ())
        if not uses_chat_template(self.tokenizer):
            solved = "".join(f"{q}{self.separator}{a}{self.separator}" for q, a in shots)
            return f"{solved}{question}{self.separator}"
        turns = [("user", question)]
        for asked, answer in reversed(shots):
            turns = [("user", asked), ("assistant", answer), *turns]
        messages = [{"role": role, "content": text} for role, text in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _answer(self, model: nn.Module, texts: list[str]) -> list[str]:
        tokenizer = self.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            special = not uses_chat_template(tokenizer)  # a template brings its own special tokens
            inputs = tokenizer(
                texts, padding=True, return_tensors="pt", return_token_type_ids=False, add_special_tokens=special
            )
        finally:
            tokenizer.padding_side = side
        device = next(model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
        written = generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(new, skip_special_tokens=True))


def _draw(pool: Sequence[tuple[str, str]], number: int, seed: str) -> list[tuple[str, str]]:
    if len(pool) < number:
        raise EvaluationError(f"{number} in-context examples were asked for, and there are {len(pool)}.")
    return [pool[place] for place in draw(len(pool), number, Random(f"shots {seed}"))]
