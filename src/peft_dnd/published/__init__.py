# SPDX-License-Identifier: Apache-2.0
"""What others released: the paper's generators, adapters and prompts."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
