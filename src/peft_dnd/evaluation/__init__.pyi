# SPDX-License-Identifier: Apache-2.0

from .baselines import RidgeBaseline as RidgeBaseline
from .baselines import nearest_tasks as nearest_tasks
from .bench import AdapterSource as AdapterSource
from .bench import Scorer as Scorer
from .controls import junk_prompts as junk_prompts
from .controls import shuffled_tasks as shuffled_tasks
from .cross_validation import leave_one_out as leave_one_out
from .harness import HarnessScorer as HarnessScorer
from .held_out import AdapterGenerator as AdapterGenerator
from .held_out import HeldOutTask as HeldOutTask
from .intervals import Estimate as Estimate
from .intervals import Resampling as Resampling
from .protocol import evaluate_generator as evaluate_generator
from .readout import Row as Row
from .report import EvaluationReport as EvaluationReport
from .rows import PROTOCOL_ROWS as PROTOCOL_ROWS
from .scorers import AnswerScorer as AnswerScorer
from .scorers import LabelScorer as LabelScorer
from .store_scores import StoreScorer as StoreScorer
from .store_scores import score_store as score_store
from .while_fitting import score_generated as score_generated
