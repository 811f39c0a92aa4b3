# SPDX-License-Identifier: Apache-2.0
"""Adapters over HTTP: the service behind `peft-dnd serve`, its cache folder, its queue and its bounds."""

from __future__ import annotations

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
