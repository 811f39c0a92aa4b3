# SPDX-License-Identifier: Apache-2.0

from .gguf import SUPPORTED_ARCHITECTURES as SUPPORTED_ARCHITECTURES
from .gguf import write_gguf as write_gguf
from .mending import renamed_modules as renamed_modules
from .mending import with_one_rank as with_one_rank
from .problems import vllm_problems as vllm_problems
from .service import AdapterService as AdapterService
from .task_folder import TaskFolder as TaskFolder
from .vllm import AdapterResolver as AdapterResolver
