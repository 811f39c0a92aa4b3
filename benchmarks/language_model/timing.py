# SPDX-License-Identifier: Apache-2.0
"""How many steps of fitting go into some minutes on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from language_model.base import load_base
from language_model.fitting import FitSettings
from language_model.rivals import lora_layout
from language_model.rows import example_row
from language_model.sampled_head import SampledHeadBase
from language_model.tasks import Task


# What a step takes beside the base's two passes: the decoder's, and the optimiser's.
_BESIDE = 1.3
_FEWEST_STEPS = 20
_TIMED = 3


def steps_in(minutes: float, base: Path, tasks: Sequence[Task], settings: FitSettings) -> int:
    """Time a few passes of as many rows as a step has, after one that does not count."""
    model, tokenizer = load_base(base, torch.bfloat16)
    adapted = SampledHeadBase(model, lora_layout(model, settings.rank))
    some = [tasks[number % len(tasks)] for number in range(settings.tasks_a_step)]
    rows = [
        [example_row(tokenizer, one.input, one.output) for one in task.train[: settings.examples]] for task in some
    ]
    start = adapted.base.initial_adapter()
    matrices = {key: value.expand(len(some), *value.shape).clone().requires_grad_() for key, value in start.items()}
    seconds = []
    for number in range(_TIMED + 1):
        began = time.perf_counter()
        adapted.losses(matrices, rows, number).sum().backward()
        seconds.append(time.perf_counter() - began)
    return max(_FEWEST_STEPS, int(60 * minutes / (_BESIDE * min(seconds[1:]))))
