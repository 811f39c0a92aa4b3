# SPDX-License-Identifier: Apache-2.0
"""The door of the vLLM plugin, beside the library rather than in it.

vLLM runs the plugins of every installed package in each of its processes. Importing anything of `peft_dnd` imports
PEFT too, and changes it: a server that was not told to load adapters from here must notice nothing of either.
"""

from __future__ import annotations

import os
from importlib import import_module


# Either says where adapters come from: a service, or a generator in this process.
SWITCHES = ("PEFT_DND_SERVICE_URL", "PEFT_DND_GENERATOR")


def register() -> None:
    """Register the resolver with vLLM if the environment says where adapters come from, otherwise do nothing.

    See [`peft_dnd.engines.vllm`].

    Raises:
        EngineError: If what the environment says cannot be meant, so that vLLM does not start.
    """
    if any(os.environ.get(name) for name in SWITCHES):
        import_module("peft_dnd.engines.vllm").register(os.environ)
