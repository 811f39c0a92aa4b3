# SPDX-License-Identifier: Apache-2.0
"""Chemical elements: names, symbols and numbers (periodictable)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise

import periodictable

from ..tasks import Operation, Pair
from ..wordings import wording_of


PACKAGES = ("periodictable",)
SELF_CONTAINED = ("elements",)
_MOST = 103


@cache
def elements() -> tuple[tuple[int, str, str], ...]:
    """Number, symbol and name of the elements up to lawrencium."""
    table = periodictable.elements
    return tuple((number, table[number].symbol, table[number].name) for number in range(1, _MOST + 1))


def _next() -> list[Pair]:
    names = [name for _, _, name in elements()]
    return list(pairwise(names))


def operations() -> Iterable[Operation]:
    sources: dict[str, tuple[str, Callable[[], list[Pair]]]] = {
        "symbol": ("code", lambda: [(name, symbol) for _, symbol, name in elements()]),
        "from_symbol": ("word", lambda: [(symbol, name) for _, symbol, name in elements()]),
        "number": ("number", lambda: [(name, str(number)) for number, _, name in elements()]),
        "from_number": ("word", lambda: [(str(number), name) for number, _, name in elements()]),
        "next": ("word", _next),
    }
    for name, (answer, pairs) in sources.items():
        domain = "number" if answer == "number" else None
        yield Operation(f"element_{name}", "elements", answer, wording_of("elements", name), pairs, domain=domain)
