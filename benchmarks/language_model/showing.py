# SPDX-License-Identifier: Apache-2.0
"""A few questions answered side by side: by the base, by the base told what to do, and with a generated adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from language_model.judging import Questions
from language_model.rows import in_context
from peft_dnd import PromptConditionedLoraGenerator


LONGEST_ANSWER = 24
_WIDTH = 24
_INPUT_WIDTH = 48


def answer(model: Any, tokenizer: Any, text: str) -> str:
    """What the model writes after a text, up to the line end, by greedy decoding."""
    ids = tokenizer(text + "\n", return_tensors="pt").to(model.device)
    with torch.no_grad():
        written = model.generate(
            **ids, max_new_tokens=LONGEST_ANSWER, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer
        )
    found = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(found).partition("\n")[0].strip()


def side_by_side(
    model: nn.Module,
    tokenizer: Any,
    generator: PromptConditionedLoraGenerator,
    questions: Sequence[Questions],
    rows: int = 3,
) -> str:
    """Answers to a few rows of tasks, as text.

    Args:
        model: The base; it has no adapter afterwards either.
        tokenizer: Its tokenizer.
        generator: Reads each task's prompts. Base and adapter then see the input alone.
        questions: The tasks.
        rows: How many rows of each.
    """
    lines: list[str] = []
    for asked in questions:
        told = asked.instructions[asked.wording]
        examples = asked.asked[:rows]
        bare = [answer(model, tokenizer, one.input) for one in examples]
        instructed = [answer(model, tokenizer, in_context(told, [], one.input)) for one in examples]
        adapted: Any = generator.generate_adapter(asked.prompts[asked.wording]).load_into(model)
        try:
            generated = [answer(adapted, tokenizer, one.input) for one in examples]
        finally:
            adapted.unload()
        lines += ["", f"{told}", _line("input", "right", "base", "base, told", "generated")]
        for one, *found in zip(examples, bare, instructed, generated, strict=True):
            marked = [f"{text} ✓" if text == one.output else text for text in found]
            lines.append(_line(one.input, one.output, *marked))
    return "\n".join(lines)


def _line(text: str, *answers: str) -> str:
    cells = [_cut(text, _INPUT_WIDTH), *(_cut(one, _WIDTH) for one in answers)]
    return f"  {' | '.join(cells)}".rstrip()


def _cut(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 3] + "..."
