# SPDX-License-Identifier: Apache-2.0
"""Draws without replacement that are the same on every platform and in every version of Python."""

from __future__ import annotations

import random


def draw(size: int, count: int, chance: random.Random) -> list[int]:
    """Draw `count` of `size` places without replacement, in the order drawn.

    These are the first steps of a Fisher-Yates shuffle, of which only the places that it touches are kept. It asks
    `chance` for nothing but `random()`, the one sequence that Python promises never to change; it does not promise
    that of `sample` or `shuffle`.

    Args:
        size: How many places there are.
        count: How many are drawn, at most `size`.
        chance: The source of chance.

    Example:
        >>> draw(100, 4, random.Random(0))
        [84, 76, 43, 28]
    """
    moved: dict[int, int] = {}
    drawn = []
    for place in range(count):
        other = place + int(chance.random() * (size - place))
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return drawn
