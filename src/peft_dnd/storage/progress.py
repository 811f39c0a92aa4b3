# SPDX-License-Identifier: Apache-2.0
"""Progress bars, where it may take a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from transformers.utils import logging as transformers_logging

from .processes import is_first_process


_WORTH_A_BAR = 8
_hiding: list[int] = []  # threads within `short_bars_hidden`, one as often as it is nested
_lock = threading.Lock()
_Item = TypeVar("_Item")


def with_progress(items: Collection[_Item], what: str) -> Iterable[_Item]:
    """Go through items under a progress bar, if there are so many that it may take a while."""
    hidden = len(items) < _WORTH_A_BAR or not is_first_process()
    progress: Iterable[_Item] = transformers_logging.tqdm(items, desc=what, disable=hidden)
    return progress


@contextmanager
def short_bars_hidden() -> Iterator[None]:
    """Within this context transformers' own bars ("Loading weights") show only where they take more than a second.

    Bars of other threads are left as they are, and a hook that somebody else has set for bars stays in force. Before
    transformers had such hooks, all bars show.
    """
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return
    thread = threading.get_ident()
    with _lock:
        _hiding.append(thread)
        _replace_hook(set_hook, None, _delayed)
    try:
        yield
    finally:
        with _lock:
            _hiding.remove(thread)
            if not _hiding:
                _replace_hook(set_hook, _delayed, None)


def _replace_hook(set_hook: Callable[[Any], Any], old: Any, new: Any) -> None:
    found = set_hook(new)
    if found is not old:
        set_hook(found)


def _delayed(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return factory(*args, **({"delay": 1.0, **kwargs} if threading.get_ident() in _hiding else kwargs))
