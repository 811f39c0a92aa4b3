# SPDX-License-Identifier: Apache-2.0
"""Synthetic pairs: from a few seed prompts or a description of a task to a task to be fitted to."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
