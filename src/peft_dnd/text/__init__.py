# SPDX-License-Identifier: Apache-2.0
"""Prompts, what is made of them, and the text encoders that read them."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
