# SPDX-License-Identifier: Apache-2.0
"""Serving engines: how vLLM, SGLang, llama.cpp and Ollama get at adapters, and what they would get wrong."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
