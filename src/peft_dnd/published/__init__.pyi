# SPDX-License-Identifier: Apache-2.0

from .files import read_published_prompts as read_published_prompts
from .reader import import_published_adapters as import_published_adapters
from .reader import load_published_generator as load_published_generator
from .reader import published_token_weights as published_token_weights
