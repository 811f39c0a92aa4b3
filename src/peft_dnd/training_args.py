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
"""The arguments of `DnDTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from .errors import GeneratorConfigError


LOSS_WEIGHTINGS = ("between_task", "within_task", "none")


@dataclass
class DnDTrainingArguments(TrainingArguments):
    """Arguments for fitting a generator: those of `transformers.TrainingArguments`, and a few of the method's own.

    These defaults differ from `TrainingArguments`, after the paper's published settings (arXiv 2506.16406):
    `learning_rate` 3e-5 rather than 5e-5 (for decoders of a billion parameters; decoders of a few million want about
    1e-3), `weight_decay` 0.1 rather than 0, `lr_scheduler_type` cosine rather than linear. `remove_unused_columns` is
    False and `label_names` is `["target_tokens"]`, as the pairs need.

    Args:
        loss_weighting: What weighs the tokens in the mean squared error. `"between_task"`: how far a token's weights
            lie apart between tasks, which is what prompts can tell; `"within_task"`: how far they scatter among one
            task's checkpoints, which is the paper's rule; `"none"`: all alike.
        condition_noise: Standard deviation of the noise added to the condition states while fitting.
        target_noise: Standard deviation of the noise added to the normalised target tokens while fitting.

    Raises:
        GeneratorConfigError: If one of these values is impossible.
    """

    learning_rate: float = field(default=3e-5, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, off for norms and biases."})
    lr_scheduler_type: Any = field(default="cosine", metadata={"help": "The learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: pairs have no columns."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["target_tokens"], metadata={"help": "Must stay as it is."}
    )
    loss_weighting: Literal["between_task", "within_task", "none"] = field(
        default="between_task", metadata={"help": f"What weighs the tokens in the loss, one of {LOSS_WEIGHTINGS}."}
    )
    condition_noise: float = field(default=1e-4, metadata={"help": "Noise on the condition states."})
    target_noise: float = field(default=1e-5, metadata={"help": "Noise on the normalised target tokens."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise GeneratorConfigError(
                f"loss_weighting must be one of {LOSS_WEIGHTINGS}, got {self.loss_weighting!r}."
            )
        for name in ("condition_noise", "target_noise"):
            if getattr(self, name) < 0:
                raise GeneratorConfigError(
                    f"{name} is a standard deviation, so at least 0; got {getattr(self, name)}."
                )
        if self.remove_unused_columns:
            raise GeneratorConfigError("remove_unused_columns must be False: a pair has no columns to remove.")
