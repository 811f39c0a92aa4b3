# SPDX-License-Identifier: Apache-2.0
"""What a generator does not do, whoever asks: bounds on its adapters, refused prompts, a behaviour gate."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
