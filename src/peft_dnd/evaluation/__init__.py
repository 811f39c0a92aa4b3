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
"""What generated adapters are worth on held-out tasks, always beside what they must be compared with."""

from __future__ import annotations

from .baselines import RidgeBaseline, nearest_tasks
from .bench import AdapterSource, Scorer, score_generated
from .controls import junk_prompts, shuffled_tasks
from .harness import HarnessScorer
from .held_out import AdapterGenerator, HeldOutTask
from .leave_one_out import leave_one_out
from .protocol import evaluate_generator
from .readout import Row
from .report import EvaluationReport
from .rows import PROTOCOL_ROWS
from .scorers import AnswerScorer, LabelScorer
from .statistics import Estimate, Resampling


__all__ = [
    "PROTOCOL_ROWS",
    "AdapterGenerator",
    "AdapterSource",
    "AnswerScorer",
    "Estimate",
    "EvaluationReport",
    "HarnessScorer",
    "HeldOutTask",
    "LabelScorer",
    "Resampling",
    "RidgeBaseline",
    "Row",
    "Scorer",
    "evaluate_generator",
    "junk_prompts",
    "leave_one_out",
    "nearest_tasks",
    "score_generated",
    "shuffled_tasks",
]
