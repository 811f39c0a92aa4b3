# SPDX-License-Identifier: Apache-2.0
"""Colours: names and hex codes, and the parts of a code (webcolors)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache, partial

import webcolors

from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of


PACKAGES = ("webcolors",)
SELF_CONTAINED = ("colours",)


@cache
def named() -> list[Pair]:
    """Names and hex codes; of two names for one code, neither."""
    pairs = [(name, webcolors.name_to_hex(name)) for name in webcolors.names("css3")]
    codes = [code for _, code in pairs]
    once = [(name, code) for name, code in pairs if codes.count(code) == 1]
    return sorted(once, key=lambda pair: share_of("colours", pair[0]))


@cache
def codes() -> tuple[str, ...]:
    draw = random.Random("hex codes")
    return tuple(dict.fromkeys(webcolors.rgb_to_hex([draw.randrange(256) for _ in range(3)]) for _ in range(620)))


def _strongest(code: str) -> str | None:
    values = webcolors.hex_to_rgb(code)
    first, second = sorted(values, reverse=True)[:2]
    # So far apart that it shows in the leading digit.
    return ("red", "green", "blue")[list(values).index(first)] if first // 16 > second // 16 else None


_OF_CODE: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "hex_red": ("code", lambda code: code[1:3]),
    "hex_green": ("code", lambda code: code[3:5]),
    "hex_blue": ("code", lambda code: code[5:7]),
    "strongest": ("word", _strongest),
    "without_hash": ("code", lambda code: code[1:]),
    "uppercase": ("code", lambda code: code.upper() if code.upper() != code else None),
}


def _pairs(of: Callable[[str], str | None]) -> list[Pair]:
    pairs = ((code, of(code)) for code in codes())
    return [(code, found) for code, found in pairs if found]


def operations() -> Iterable[Operation]:
    yield Operation("colour_name_hex", "colours", "code", wording_of("colours", "name_hex"), named)
    yield Operation(
        "colour_hex_name", "colours", "word", wording_of("colours", "hex_name"),
        lambda: [(code, name) for name, code in named()],
    )  # fmt: skip
    for name, (answer, of) in _OF_CODE.items():
        yield Operation(f"colour_{name}", "colours", answer, wording_of("colours", name), partial(_pairs, of))
