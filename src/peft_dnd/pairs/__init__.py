# SPDX-License-Identifier: Apache-2.0
"""Pairs of prompts and checkpoints: the folder that holds them, collecting into it, and the data set."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
