# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: their layout, their weights as tokens, fitting them to a model, and the generated one."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
