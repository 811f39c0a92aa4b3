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
"""LoRA adapters from prompts: Drag-and-Drop LLMs (arXiv 2506.16406) for the Hugging Face PEFT ecosystem.

Importing the package teaches PEFT's own `get_peft_model` and its kin to take a `DnDConfig`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .adapter import GeneratedAdapter
from .configuration import PromptConditionedLoraGeneratorConfig
from .dnd_config import DnDConfig
from .integration import install, release_generator
from .layout import AdapterLayout
from .modeling import PromptConditionedLoraGenerator
from .published_tokenizer import PublishedTokenizer
from .settings import PaperSettings, available_settings
from .streaming import StreamedLoraGenerator
from .tokenizer import WeightTokenizer
from .version import __version__


if TYPE_CHECKING:
    from .collator import PromptCheckpointCollator
    from .collection import CheckpointCollector
    from .data import PromptCheckpointDataset
    from .examples import write_examples
    from .pair_writer import write_task_without_checkpoints
    from .published import import_published_adapters, load_published_generator, published_token_weights
    from .representative import select_representative
    from .task_loss import TaskLoss
    from .trainer import DnDTrainer
    from .training_args import DnDTrainingArguments

# Fitting needs transformers' Trainer, which takes seconds to import; whoever only generates does not wait for it.
_LAZY = {
    "CheckpointCollector": "collection",
    "PromptCheckpointCollator": "collator",
    "PromptCheckpointDataset": "data",
    "DnDTrainer": "trainer",
    "DnDTrainingArguments": "training_args",
    "TaskLoss": "task_loss",
    "import_published_adapters": "published",
    "load_published_generator": "published",
    "published_token_weights": "published",
    "select_representative": "representative",
    "write_examples": "examples",
    "write_task_without_checkpoints": "pair_writer",
}

__all__ = [
    "AdapterLayout",
    "CheckpointCollector",
    "DnDConfig",
    "DnDTrainer",
    "DnDTrainingArguments",
    "GeneratedAdapter",
    "PaperSettings",
    "PromptCheckpointCollator",
    "PromptCheckpointDataset",
    "PromptConditionedLoraGenerator",
    "PromptConditionedLoraGeneratorConfig",
    "PublishedTokenizer",
    "StreamedLoraGenerator",
    "TaskLoss",
    "WeightTokenizer",
    "__version__",
    "available_settings",
    "import_published_adapters",
    "load_published_generator",
    "published_token_weights",
    "release_generator",
    "select_representative",
    "write_examples",
    "write_task_without_checkpoints",
]

install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
