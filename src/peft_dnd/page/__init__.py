# SPDX-License-Identifier: Apache-2.0
"""A page in the browser to drop prompts on: an adapter is made of them, tried beside its base, and taken away."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
