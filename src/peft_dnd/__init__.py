# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters from prompts: Drag-and-Drop LLMs (arXiv 2506.16406) for the Hugging Face PEFT ecosystem.

Importing the package teaches PEFT's own `get_peft_model` and its kin to take a `DnDConfig`.
"""

from __future__ import annotations

import lazy_loader

from .peft_integration.injection import install
from .version import __version__ as __version__


# Fitting needs transformers' Trainer, which takes seconds to import; whoever only generates does not wait for it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

install()
