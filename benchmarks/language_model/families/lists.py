# SPDX-License-Identifier: Apache-2.0
"""Lists of words: one chosen by its place, its length, the alphabet or its kind, and lists put in another order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

from ..tasks import Operation, Pair
from ..wordings import with_article, wording_of
from ..words import CATEGORIES, PLURALS, THINGS


PACKAGES = ("words written by hand",)
_LISTS = 5000
_PAIRS = 900
Words = Sequence[str]


@cache
def word_lists() -> list[tuple[tuple[str, str], ...]]:
    """Lists of three to five words of different categories, as (word, category); the same for every operation."""
    draw = random.Random("lists of words")
    pools = {**CATEGORIES, "thing": THINGS}
    found: dict[tuple[tuple[str, str], ...], None] = {}
    while len(found) < _LISTS:
        kinds = draw.sample(sorted(pools), draw.choice((3, 4, 4, 5)))
        found.setdefault(tuple((draw.choice(pools[kind]), kind) for kind in kinds))
    return list(found)


@cache
def odd_lists() -> list[tuple[tuple[str, ...], str]]:
    """Four words, three of one category, and the fourth."""
    draw = random.Random("odd lists")
    kinds = [kind for kind, words in CATEGORIES.items() if len(words) >= 12 and kind not in ("tool", "number")]
    found: dict[tuple[str, ...], str] = {}
    while len(found) < _PAIRS:
        kind, other = draw.sample(kinds, 2)
        odd = draw.choice(CATEGORIES[other])
        words = [*draw.sample(CATEGORIES[kind], 3), odd]
        draw.shuffle(words)
        found.setdefault(tuple(words), odd)
    return list(found.items())


def _pairs(answer: Callable[[Words], str | None], source: Iterable[Words] | None = None) -> list[Pair]:
    lists = source if source is not None else ([word for word, _ in items] for items in word_lists())
    pairs = ((", ".join(words), answer(words)) for words in lists)
    return [(text, wanted) for text, wanted in pairs if wanted][:_PAIRS]


def _at(place: int) -> Callable[[Words], str | None]:
    return lambda words: words[place] if -len(words) <= place < len(words) else None


def _middle(words: Words) -> str | None:
    return words[len(words) // 2] if len(words) % 2 else None


def _by_length(words: Words, longest: bool) -> str | None:
    order = sorted(words, key=len, reverse=longest)
    # Far enough apart that no one need count.
    return order[0] if abs(len(order[0]) - len(order[1])) >= 2 else None


def _in_order(words: Words) -> list[str]:
    return sorted(words, key=str.lower)


def _kind_pairs(kind: str) -> list[Pair]:
    pairs = (
        (", ".join(word for word, _ in items), [word for word, of in items if of == kind]) for items in word_lists()
    )
    return [(text, words[0]) for text, words in pairs if len(words) == 1][:_PAIRS]


@cache
def _doubled_lists() -> list[tuple[str, ...]]:
    draw = random.Random("doubled words")
    found: dict[tuple[str, ...], None] = {}
    for items in word_lists():
        words = [word for word, _ in items][:4]
        words.insert(draw.randrange(len(words) + 1), draw.choice(words))
        found.setdefault(tuple(words))
    return list(found)


def _kind_of(word: str) -> str:
    return next(kind for kind, words in CATEGORIES.items() if word in words)


_CHOICES: dict[str, Callable[[Words], str | None]] = {
    "first": _at(0),
    "second": _at(1),
    "third": _at(2),
    "last": _at(-1),
    "second_last": _at(-2),
    "middle": _middle,
    "longest": lambda words: _by_length(words, True),
    "shortest": lambda words: _by_length(words, False),
    "alphabetically_first": lambda words: _in_order(words)[0],
    "alphabetically_last": lambda words: _in_order(words)[-1],
}
_CHANGES: dict[str, Callable[[Words], str | None]] = {
    "sorted": lambda words: ", ".join(_in_order(words)),
    "reversed": lambda words: ", ".join(reversed(words)),
    "without_first": lambda words: ", ".join(words[1:]),
    "without_last": lambda words: ", ".join(words[:-1]),
    "first_and_last": lambda words: f"{words[0]}, {words[-1]}",
    "ends_swapped": lambda words: ", ".join([words[-1], *words[1:-1], words[0]]),
    "joined_by_and": lambda words: f"{', '.join(words[:-1])} and {words[-1]}",
    "joined_by_or": lambda words: f"{', '.join(words[:-1])} or {words[-1]}",
    "slashes": lambda words: "/".join(words),
    "first_doubled": lambda words: ", ".join([words[0], *words]),
    "initials": lambda words: " ".join(word[0] for word in words),
}


def operations() -> Iterable[Operation]:
    for name, choose in _CHOICES.items():
        yield Operation(
            f"list_{name}", "selections", "word", wording_of("lists", name), partial(_pairs, choose), domain="any"
        )
    for kind in CATEGORIES:
        proper = kind in ("country", "city", "weekday", "month")
        domain = {"country": "country", "weekday": "weekday", "month": "month"}.get(kind, "thing")
        wording = wording_of(
            "lists", "kind", kind=kind, kinds=PLURALS.get(kind, f"{kind}s"), a_kind=with_article(kind)
        )
        yield Operation(
            f"list_{kind.replace(' ', '_')}",
            "kinds",
            "name" if proper else "word",
            wording,
            partial(_kind_pairs, kind),
            domain=None if kind == "city" else domain,
        )
    odd = [words for words, _ in odd_lists()]
    answers = dict(odd_lists())
    yield Operation(
        "list_odd_one_out", "kinds", "word", wording_of("lists", "odd_one_out"),
        lambda: _pairs(lambda words: answers[tuple(words)], odd), domain="any",
    )  # fmt: skip
    yield Operation(
        "list_common_kind", "kinds", "phrase", wording_of("lists", "common_kind"),
        lambda: _pairs(lambda words: _kind_of(words[0]), _same_kind_lists()),
    )  # fmt: skip
    for name, change in _CHANGES.items():
        yield Operation(f"list_{name}", "lists", "list", wording_of("lists", name), partial(_pairs, change))
    yield Operation(
        "list_count", "lists", "number", wording_of("lists", "count"), lambda: _pairs(lambda words: str(len(words))),
        domain="number",
    )  # fmt: skip
    yield Operation(
        "list_repeated", "selections", "word", wording_of("lists", "repeated"),
        lambda: _pairs(lambda words: Counter(words).most_common(1)[0][0], _doubled_lists()), domain="any",
    )  # fmt: skip


@cache
def _same_kind_lists() -> list[tuple[str, ...]]:
    draw = random.Random("lists of one kind")
    kinds = [kind for kind in CATEGORIES if len(CATEGORIES[kind]) >= 7]
    found: dict[tuple[str, ...], None] = {}
    while len(found) < _PAIRS:
        found.setdefault(tuple(draw.sample(CATEGORIES[draw.choice(kinds)], 3)))
    return list(found)
