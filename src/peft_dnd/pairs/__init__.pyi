# SPDX-License-Identifier: Apache-2.0

from .collator import PromptCheckpointCollator as PromptCheckpointCollator
from .collector import CheckpointCollector as CheckpointCollector
from .dataset import PromptCheckpointDataset as PromptCheckpointDataset
from .distillation import DistillationRecord as DistillationRecord
from .examples import TaskExamples as TaskExamples
from .examples import write_examples as write_examples
from .folder import Task as Task
from .folder import TaskRecord as TaskRecord
from .initialization import use_common_initialization as use_common_initialization
from .mixtures import MixtureCollator as MixtureCollator
from .replay_store import ReplayStore as ReplayStore
from .spread import TokenSpread as TokenSpread
from .statistics import task_balanced_grids as task_balanced_grids
from .statistics import token_spread as token_spread
from .store_update import StoreBounds as StoreBounds
from .task_slices import tasks_of_slice as tasks_of_slice
from .task_slices import uncollected as uncollected
from .writer import PairWriter as PairWriter
from .writer import write_task_without_checkpoints as write_task_without_checkpoints
