# SPDX-License-Identifier: Apache-2.0

from .arguments import DnDTrainingArguments as DnDTrainingArguments
from .distillation import top_token_divergence as top_token_divergence
from .losses import add_noise as add_noise
from .losses import masked_mse as masked_mse
from .task_loss import TaskLoss as TaskLoss
from .teacher import distil_task as distil_task
from .trainer import DnDTrainer as DnDTrainer
from .transfer import distil_generator as distil_generator
