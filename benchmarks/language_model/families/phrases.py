# SPDX-License-Identifier: Apache-2.0
"""Short phrases of adjectives and a noun: in the notations of programs and titles, and taken apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache, partial

import inflect
import lemminflect

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import listed


PACKAGES = ("lemminflect", "inflect")
_SIZES = listed("big small tiny huge large long short tall wide narrow")
_QUALITIES = listed(
    "old new clean dirty cheap expensive beautiful ugly heavy light empty broken strange simple modern"
)
_COLOURS = listed("red blue green yellow white black brown grey orange purple")
_THINGS = listed(
    "apple bag ball basket bed bell bench bicycle boat book bottle bowl box bridge brush bucket car castle chair "
    "clock coat cup desk door dress drum flag flower garden glove guitar hat house jacket kettle kite ladder lamp "
    "letter mirror oven pencil piano picture pillow plate river road ship shirt shoe spoon table tent ticket towel "
    "tower toy tractor train tree truck umbrella van violin wall window egg envelope island office airplane"
)


@cache
def phrases() -> tuple[tuple[str, ...], ...]:
    draw = random.Random("phrases")
    found: dict[tuple[str, ...], None] = {}
    while len(found) < 650:
        pools = [_SIZES, _QUALITIES, _COLOURS]
        kept = sorted(draw.sample(range(3), draw.choice((1, 2, 2, 3))))
        words = [draw.choice(pools[place]) for place in kept]
        found.setdefault((*words, draw.choice(_THINGS)))
    return tuple(found)


_ENGLISH = inflect.engine()


def _plural(words: tuple[str, ...]) -> str:
    return " ".join([*words[:-1], lemminflect.getInflection(words[-1], "NNS")[0]])


_WRITES: dict[str, tuple[str, str | None, Callable[[tuple[str, ...]], str]]] = {
    "snake": ("code", None, "_".join),
    "kebab": ("code", None, "-".join),
    "camel": ("code", None, lambda words: words[0] + "".join(word.capitalize() for word in words[1:])),
    "pascal": ("code", None, lambda words: "".join(word.capitalize() for word in words)),
    "constant": ("code", None, lambda words: "_".join(words).upper()),
    "title": ("code", None, lambda words: " ".join(words).title()),
    "joined": ("code", None, "".join),
    "acronym": ("code", None, lambda words: "".join(word[0] for word in words).upper()),
    "first_word": ("word", None, lambda words: words[0]),
    "last_word": ("word", "thing", lambda words: words[-1]),
    "word_count": ("number", "number", lambda words: str(len(words))),
    "reversed": ("phrase", None, lambda words: " ".join(reversed(words))),
    "without_first": ("phrase", None, lambda words: " ".join(words[1:])),
    "plural": ("phrase", None, _plural),
    "with_article": ("phrase", None, lambda words: _ENGLISH.a(" ".join(words))),
    "adjective": ("word", None, lambda words: words[-2]),
}


def _pairs(write: Callable[[tuple[str, ...]], str]) -> list[Pair]:
    return [(" ".join(words), write(words)) for words in phrases()]


def operations() -> Iterable[Operation]:
    for name, (answer, domain, write) in _WRITES.items():
        yield Operation(
            f"phrase_{name}", "phrases", answer, wording_of("phrases", name), partial(_pairs, write), domain=domain
        )
