# SPDX-License-Identifier: Apache-2.0
"""Roman numerals (roman)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache

from roman import toRoman

from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of


PACKAGES = ("roman",)
SELF_CONTAINED = ("Roman numerals",)
_MOST = 200


@cache
def numerals() -> tuple[tuple[int, str], ...]:
    numbers = sorted(range(1, _MOST + 1), key=lambda number: share_of("Roman", number))
    return tuple((number, toRoman(number)) for number in numbers)


@cache
def pairs_of_numerals() -> tuple[tuple[int, int], ...]:
    draw = random.Random("pairs of Roman numerals")
    pairs = dict.fromkeys((draw.randrange(1, 40), draw.randrange(1, 40)) for _ in range(800))
    return tuple(pair for pair in pairs if pair[0] != pair[1])


def _two(answer: Callable[[int, int], str]) -> list[Pair]:
    return [(f"{toRoman(a)}, {toRoman(b)}", answer(a, b)) for a, b in pairs_of_numerals()]


def operations() -> Iterable[Operation]:
    sources: dict[str, tuple[str, Callable[[], list[Pair]]]] = {
        "to_roman": ("code", lambda: [(str(number), numeral) for number, numeral in numerals()]),
        "from_roman": ("number", lambda: [(numeral, str(number)) for number, numeral in numerals()]),
        "next_roman": ("code", lambda: [(numeral, toRoman(number + 1)) for number, numeral in numerals()]),
        "parity_roman": ("word", lambda: [(numeral, "odd" if n % 2 else "even") for n, numeral in numerals()]),
        "larger_roman": ("code", lambda: _two(lambda a, b: toRoman(max(a, b)))),
        "sum_roman": ("number", lambda: _two(lambda a, b: str(a + b))),
    }
    for name, (answer, pairs) in sources.items():
        domain = "number" if answer == "number" else None
        yield Operation(f"number_{name}", "Roman numerals", answer, wording_of("roman", name), pairs, domain=domain)
