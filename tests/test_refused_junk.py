# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
