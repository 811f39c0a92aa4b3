# SPDX-License-Identifier: Apache-2.0

from .adapter_files import ExistingAdapter as ExistingAdapter
from .existing import ImportedTask as ImportedTask
from .existing import import_adapters as import_adapters
from .files import read_published_prompts as read_published_prompts
from .importer import import_published_adapters as import_published_adapters
from .importer import load_published_generator as load_published_generator
from .importer import published_token_weights as published_token_weights
from .text_to_lora import load_text_to_lora as load_text_to_lora
