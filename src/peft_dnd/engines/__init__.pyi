# SPDX-License-Identifier: Apache-2.0

from .gguf import SUPPORTED_ARCHITECTURES as SUPPORTED_ARCHITECTURES
from .gguf import write_gguf as write_gguf
from .mending import names_in_served_class as names_in_served_class
from .mending import recorded_base as recorded_base
from .mending import renamed_modules as renamed_modules
from .mending import with_one_rank as with_one_rank
from .problems import vllm_problems as vllm_problems
from .served_adapters import ServedAdapters as ServedAdapters
from .sglang import load_into_sglang as load_into_sglang
from .sglang import unload_from_sglang as unload_from_sglang
from .task_folder import TaskFolder as TaskFolder
from .vllm import AdapterResolver as AdapterResolver
