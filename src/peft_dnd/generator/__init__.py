# SPDX-License-Identifier: Apache-2.0
"""The generator: its configuration, how it reads prompts, how it writes adapters, its card."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
