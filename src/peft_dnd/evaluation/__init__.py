# SPDX-License-Identifier: Apache-2.0
"""What generated adapters are worth on held-out tasks, always beside what they must be compared with."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
