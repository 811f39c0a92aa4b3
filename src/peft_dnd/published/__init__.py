# SPDX-License-Identifier: Apache-2.0
"""What others released: the files of the paper's generators, adapters and prompts, and making them ours."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
