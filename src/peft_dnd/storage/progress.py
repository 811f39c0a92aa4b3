# SPDX-License-Identifier: Apache-2.0
"""Progress bars, where it may take a while."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from .processes import is_first_process


_WORTH_A_BAR = 8
_Item = TypeVar("_Item")


def with_progress(items: Collection[_Item], what: str) -> Iterable[_Item]:
    """Go through items under a progress bar, if there are so many that it may take a while."""
    hidden = len(items) < _WORTH_A_BAR or not is_first_process()
    progress: Iterable[_Item] = transformers_logging.tqdm(items, desc=what, disable=hidden)
    return progress


@contextmanager
def short_bars_hidden() -> Iterator[None]:
    """Within this context transformers' own bars ("Loading weights") show only where they take more than a second.

    A hook that somebody else has set for them stays in force. Before transformers had such hooks, all bars show.
    """
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return
    previous = set_hook(_delayed)
    if previous is not None:
        set_hook(previous)
    try:
        yield
    finally:
        if previous is None:
            set_hook(None)


def _delayed(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **{"delay": 1.0, **kwargs})
