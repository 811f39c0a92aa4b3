# SPDX-License-Identifier: Apache-2.0
"""Which texts a generator reads of a task: its prompts, its prompts with their answers, a mix of both, its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import GeneratorConfigError, PromptError
from .prompt_shapes import PromptsLike
from .prompts import ConditionText, check_prompts, select_prompts


CONDITION_TEXTS = ("prompts", "prompts_and_answers", "mixed", "answers")
_IN_WORDS = {
    "prompts_and_answers": "prompts with their answers",
    "mixed": "prompts, some with their answers",
    "answers": "answers",
}


def condition_texts(
    prompts: PromptsLike,
    answers: PromptsLike | None,
    condition_text: str,
    *,
    answer_ratio: float = 0.2,
    seed: int = 0,
    what: str = "prompts",
) -> tuple[str, ...]:
    r"""Form the texts that a generator reads of a task.

    - `"prompts"`: the prompts as they are.
    - `"prompts_and_answers"`: of each pair one text, the prompt, a line break and the answer.
    - `"mixed"`: each prompt, with its answer for `answer_ratio` of them, as near as their number allows, and without
      for the rest; the seed decides for which. The paper's mix of 4:1 (arXiv 2506.16406), four prompts alone to one
      with its answer, is a ratio of 0.2.
    - `"answers"`: the answers alone.

    Args:
        prompts: The prompts.
        answers: Their answers, one each; `None` for `"prompts"`. Prompts that are all [`ConditionText`]s already are
            taken as they are, without answers.
        condition_text: The form, one of `CONDITION_TEXTS`.
        answer_ratio: For `"mixed"`: which share of the texts holds answers, from 0 to 1.
        seed: For `"mixed"`: decides which.
        what: What error messages call the prompts.

    Returns:
        The texts: plain strings for `"prompts"`, otherwise [`ConditionText`]s.

    Raises:
        GeneratorConfigError: If the form or the ratio is impossible.
        PromptError: If answers are missing, or given and not read; there is not one for each prompt; or a text is
            empty.
        PromptTypeError: If prompts or answers are no sequence of strings.

    Example:
        >>> condition_texts(["2 + 2 ?", "3 + 3 ?"], ["4", "6"], "prompts_and_answers")
        ('2 + 2 ?\n4', '3 + 3 ?\n6')
        >>> condition_texts(["2 + 2 ?", "3 + 3 ?"], ["4", "6"], "mixed", answer_ratio=0.5)
        ('2 + 2 ?', '3 + 3 ?\n6')
    """
    check_condition_text(condition_text, answer_ratio)
    checked = check_prompts(prompts, what)
    if condition_text == "prompts":
        if answers is not None:
            raise PromptError(
                f"The generator reads prompts alone, and {what} came with answers. Leave them out, or use a generator "
                "that was fitted with condition_text='prompts_and_answers'."
            )
        return checked
    if answers is None:
        if all(isinstance(text, ConditionText) for text in checked):
            return checked
        raise PromptError(
            f"The generator reads {_IN_WORDS[condition_text]}, and {what} came without answers. Pass answers=[...], "
            "one for each prompt; or, if the texts hold their answers already, mark them as what is to be read: "
            "[peft_dnd.text.ConditionText(text) for text in texts]."
        )
    paired = check_answers(checked, answers, what)
    if condition_text == "answers":
        return tuple(map(ConditionText, paired))
    with_answer = set(range(len(checked)))
    if condition_text == "mixed":
        number = round(answer_ratio * len(checked))
        with_answer = set(select_prompts(len(checked), number, seed).tolist()) if number else set()
    return tuple(
        ConditionText(f"{prompt}\n{answer}" if index in with_answer else prompt)
        for index, (prompt, answer) in enumerate(zip(checked, paired, strict=True))
    )


def check_condition_text(condition_text: Any, answer_ratio: Any) -> None:
    """Check the two settings that say which texts are read.

    Raises:
        GeneratorConfigError: If one of them is impossible.
    """
    if condition_text not in CONDITION_TEXTS:
        raise GeneratorConfigError(f"condition_text must be one of {CONDITION_TEXTS}, got {condition_text!r}.")
    if isinstance(answer_ratio, bool) or not isinstance(answer_ratio, int | float) or not 0 <= answer_ratio <= 1:
        raise GeneratorConfigError(
            f"answer_ratio is the share of the texts that hold answers, from 0 to 1, got {answer_ratio!r}. A mix of "
            "4 prompts alone to 1 with its answer is 0.2."
        )


def check_answers(prompts: Sequence[str], answers: PromptsLike, what: str = "prompts") -> tuple[str, ...]:
    """Check that there is a usable answer for each prompt.

    Raises:
        PromptError: If their numbers differ, or an answer is empty.
        PromptTypeError: If they are no sequence of strings.
    """
    checked = check_prompts(answers, f"the answers to {what}", are_answers=True)
    if len(checked) != len(prompts):
        raise PromptError(
            f"There are {len(checked)} answers to {len(prompts)} {what}. Pass one answer for each, in the same order."
        )
    return checked
