# SPDX-License-Identifier: Apache-2.0
"""Labelled rows of the four tasks for the tiny base, where a fit is taken on what the base does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


ANSWERS = {"law": 31, "med": 32, "geo": 33, "art": 34}


def rows_of(task: str, count: int = 24) -> Iterator[dict[str, Any]]:
    """Whatever stands before it, a task's answer is one word of its own."""
    generator = torch.Generator().manual_seed(len(task) + ANSWERS[task])
    for _ in range(count):
        length = int(torch.randint(2, 5, (), generator=generator))
        question = torch.randint(1, 30, (length,), generator=generator).tolist()
        yield {"input_ids": [*question, ANSWERS[task]], "labels": [-100] * length + [ANSWERS[task]]}
