# SPDX-License-Identifier: Apache-2.0
"""Progress bars, where it may take a while."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

from transformers.utils import logging as transformers_logging

from .processes import is_first_process


_WORTH_A_BAR = 8
_Item = TypeVar("_Item")


def with_progress(items: Collection[_Item], what: str) -> Iterable[_Item]:
    """Go through items under a progress bar, if there are so many that it may take a while."""
    hidden = len(items) < _WORTH_A_BAR or not is_first_process()
    progress: Iterable[_Item] = transformers_logging.tqdm(items, desc=what, disable=hidden)
    return progress
