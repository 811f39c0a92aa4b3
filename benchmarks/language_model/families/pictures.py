# SPDX-License-Identifier: Apache-2.0
"""Emoji and what they show (emoji), one by one and in rows."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache

from .. import lexicon
from ..tasks import Operation, Pair
from ..wordings import wording_of
from .dictionary import things


PACKAGES = ("emoji",)


def _named() -> list[Pair]:
    return [(lexicon.picture(word), word) for word in things()]


@cache
def _rows() -> tuple[tuple[Pair, ...], ...]:
    draw = random.Random("rows of emoji")
    return tuple(tuple(draw.sample(_named(), draw.choice((2, 3, 3, 4)))) for _ in range(620))


def _row_pairs(place: int) -> list[Pair]:
    return [("".join(picture for picture, _ in row), row[place][1]) for row in _rows()]


def operations() -> Iterable[Operation]:
    rows = {
        "first": ("word", "thing", lambda: _row_pairs(0)),
        "last": ("word", "thing", lambda: _row_pairs(-1)),
        "count": ("number", "number", lambda: [("".join(p for p, _ in row), str(len(row))) for row in _rows()]),
        "words": (
            "list", None, lambda: [("".join(p for p, _ in row), ", ".join(w for _, w in row)) for row in _rows()],
        ),
    }  # fmt: skip
    yield Operation("emoji_name", "emoji", "word", wording_of("emoji", "name"), _named, domain="thing")
    yield Operation(
        "emoji_picture", "emoji", "code", wording_of("emoji", "picture"), lambda: [(w, p) for p, w in _named()]
    )
    for name, (answer, domain, pairs) in rows.items():
        yield Operation(f"emoji_{name}", "emoji", answer, wording_of("emoji", name), pairs, domain=domain)
