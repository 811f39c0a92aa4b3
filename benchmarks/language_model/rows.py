# SPDX-License-Identifier: Apache-2.0
"""What the base reads: an input and its answer, with or without an instruction and solved examples; and scoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from peft_dnd.fitting.adapted_base import AdaptedBase


Row = dict[str, list[int]]
IGNORED = -100


def example_row(tokenizer: Any, text: str, answer: str) -> Row:
    """`text` and a line end, then the answer and a line end, which are labelled."""
    read = tokenizer(text + "\n")["input_ids"]
    written = tokenizer(answer + "\n", add_special_tokens=False)["input_ids"]
    return {"input_ids": [*read, *written], "labels": [*([IGNORED] * len(read)), *written]}


def prompt_of(instruction: str, text: str) -> str:
    """What the generator reads: the instruction and an input, up to where the answer would begin."""
    return told_as(INSTRUCTION, instruction, [], text)


# What a prompt may say of its task: an instruction, solved examples, or both.
INSTRUCTION, EXAMPLES, BOTH = "instruction", "examples", "both"


def told_as(way: str, instruction: str, shots: Sequence[tuple[str, str]], text: str) -> str:
    """What the generator reads where the task is told in one of the ways above, up to where the answer would begin."""
    return in_context(None if way == EXAMPLES else instruction, [] if way == INSTRUCTION else shots, text) + "\n"


def in_context(instruction: str | None, shots: Sequence[tuple[str, str]], text: str) -> str:
    """What the base reads where it is told in its window what to do: an instruction, solved examples, or both."""
    told = [] if instruction is None else [instruction]
    return "\n".join([*told, *(f"{asked}\n{answer}" for asked, answer in shots), text])


def batch_of(rows: Sequence[Row], padding: int = 0) -> dict[str, torch.Tensor]:
    """Rows filled up on the right to one length."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, filling: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filling] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {
        "input_ids": filled("input_ids", padding),
        "attention_mask": mask,
        "labels": filled("labels", IGNORED),
    }


def right(
    base: AdaptedBase, matrices: Mapping[str, torch.Tensor] | None, rows: Sequence[Sequence[Row]]
) -> list[list[bool]]:
    """Whether the base would write each row's answer, line end included, word for word by greedy decoding.

    It does just where the likeliest token at every place of the answer is the answer's own.

    Args:
        base: The base.
        matrices: PEFT on-disk key -> (B, *shape), an adapter for each item; `None`: without adapters.
        rows: For each item its rows.
    """
    batches = [batch_of(item) for item in rows]
    wanted = [torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED) for batch in batches]
    at = [labels != IGNORED for labels in wanted]
    found = [torch.ones(len(item), dtype=torch.bool) for item in rows]
    for places, logits in base.logits_at(matrices, batches, at):
        for item, row, column, token in zip(
            places.item.tolist(), places.row.tolist(), places.column.tolist(), logits.argmax(-1).tolist(), strict=True
        ):
            found[item][row] &= token == int(wanted[item][row, column])
    return [item.tolist() for item in found]


def blocks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Items in blocks of a size, the last one smaller."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
