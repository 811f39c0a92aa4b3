# SPDX-License-Identifier: Apache-2.0
"""A generator that cannot read junk is evaluated all the same, and the row that is missing is named."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.errors import PromptError
from peft_dnd.evaluation import HeldOutTask, evaluate_generator


PROMPTS = ["what is the law ?", "tax law please", "a court ?"]


def test_junk_is_left_out_where_the_generator_refuses_it(
    generator: PromptConditionedLoraGenerator, fresh_base: Callable[[], nn.Module]
) -> None:
    class Refusing:
        def generate_adapter(self, prompts: list[str], *, seed: int = 0) -> GeneratedAdapter:
            if not all(prompt in PROMPTS for prompt in prompts):
                raise PromptError("no token is known")
            return generator.generate_adapter(prompts, seed=seed)

    task = {"new law": HeldOutTask(PROMPTS)}
    report = evaluate_generator(
        Refusing(), fresh_base(), None, task, lambda model, task: [1.0], constant_prompt_set=PROMPTS
    )
    assert list(report.rows) == ["base", "generated", "constant"]
    assert report.not_measured["junk"] == "the generator refuses junk (no token is known)"
