# SPDX-License-Identifier: Apache-2.0
"""Forms of English words: tenses, plurals, comparison (lemminflect), articles (inflect), and opposites."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import inflect
import lemminflect

from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of
from ..words import ADJECTIVES, NOUNS, OPPOSITES, VERBS


PACKAGES = ("lemminflect", "inflect")
# "Hardly" is not what one does in a hard manner.
_OTHER_SENSE = ("hard", "late", "high", "near", "short", "dry", "large", "fair", "dear")


def _inflected(word: str, tag: str) -> str | None:
    """The one form of the word; None where dictionaries have several or none."""
    forms = lemminflect.getInflection(word, tag, inflect_oov=False)
    return forms[0] if len(set(forms)) == 1 else None


@cache
def _pairs(words: Sequence[str], tag: str) -> list[Pair]:
    pairs = ((word, _inflected(word, tag)) for word in dict.fromkeys(words))
    kept = [(word, form) for word, form in pairs if form]
    return sorted(kept, key=lambda pair: share_of("word forms", pair[0]))


def _back(words: Sequence[str], tag: str) -> list[Pair]:
    pairs = [(form, word) for word, form in _pairs(words, tag) if form != word]
    forms = [form for form, _ in pairs]
    return [(form, word) for form, word in pairs if forms.count(form) == 1]


def _adverb(word: str) -> str:
    if word.endswith("le") and len(word) > 4:
        return word[:-1] + "y"
    if word.endswith("y") and len(word) > 3:
        return word[:-1] + "ily"
    if word.endswith("ll"):
        return word + "y"
    return word + ("ally" if word.endswith("ic") else "ly")


def _adverbs() -> list[Pair]:
    return [
        (word, _adverb(word))
        for word in ADJECTIVES
        if word not in _OTHER_SENSE and lemminflect.getAllLemmas(_adverb(word), "ADV").get("ADV")
    ]


def _opposites() -> list[Pair]:
    pairs = [*OPPOSITES, *((second, first) for first, second in OPPOSITES)]
    given = [first for first, _ in pairs]
    return [(first, second) for first, second in pairs if given.count(first) == 1]


def _articles() -> list[Pair]:
    engine = inflect.engine()
    nouns = sorted(NOUNS, key=lambda word: share_of("articles", word))
    vowels = [noun for noun in nouns if engine.a(noun).startswith("an ")]
    # Twice as many of the one as of the other: else "a" would nearly always be right.
    kept = [*vowels, *[noun for noun in nouns if noun not in vowels][: 4 * len(vowels)]]
    random.Random("articles").shuffle(kept)
    return [(noun, engine.a(noun)) for noun in kept]


def operations() -> Iterable[Operation]:
    sources: dict[str, tuple[str, Callable[[], list[Pair]]]] = {
        "plural": ("word", lambda: _pairs(NOUNS, "NNS")),
        "past": ("word", lambda: _pairs(VERBS, "VBD")),
        "participle": ("word", lambda: _pairs(VERBS, "VBN")),
        "ing": ("word", lambda: _pairs(VERBS, "VBG")),
        "third_person": ("word", lambda: _pairs(VERBS, "VBZ")),
        "comparative": ("word", lambda: _pairs(ADJECTIVES, "JJR")),
        "superlative": ("word", lambda: _pairs(ADJECTIVES, "JJS")),
        "adverb": ("word", _adverbs),
        "base_of_past": ("word", lambda: _back(VERBS, "VBD")),
        "base_of_ing": ("word", lambda: _back(VERBS, "VBG")),
        "singular": ("word", lambda: _back(NOUNS, "NNS")),
        "opposite": ("word", _opposites),
        "article": ("phrase", _articles),
    }
    for name, (answer, pairs) in sources.items():
        yield Operation(f"{name}_form", "word forms", answer, wording_of("word_forms", name), pairs)
