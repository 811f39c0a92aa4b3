# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: layouts, weights as tokens, the maths of factors, putting them into models, `GeneratedAdapter`."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
