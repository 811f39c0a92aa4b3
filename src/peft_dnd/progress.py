# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
