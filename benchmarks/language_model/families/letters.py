# SPDX-License-Identifier: Apache-2.0
"""Single words: their letters, and the kind of thing that they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial

from ..tasks import Operation, Pair, share_of
from ..wordings import with_article, wording_of
from ..words import ADJECTIVES, CATEGORIES, NOUNS, PLURALS, THINGS, VERBS, listed


PACKAGES = ("words written by hand",)
_NATO = listed(
    "Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar Papa Quebec Romeo "
    "Sierra Tango Uniform Victor Whiskey X-ray Yankee Zulu"
)
# Kinds that a yes or no is asked about: the large ones.
_YES_NO = ("animal", "country", "profession", "fruit", "part of the body", "vehicle", "sport", "city")


@cache
def common_words() -> tuple[str, ...]:
    """Common words of all kinds, each once, in an order of no meaning."""
    proper = {word for kind in ("country", "city", "month", "weekday") for word in CATEGORIES[kind]}
    words = {*NOUNS, *VERBS, *ADJECTIVES, *THINGS, *(word for kind in CATEGORIES.values() for word in kind)} - proper
    return tuple(sorted((word for word in words if 3 <= len(word) <= 9), key=lambda word: share_of("words", word)))


def _only(word: str, letters: str) -> str:
    return "".join(letter for letter in word if letter in letters)


_WRITES: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "first_letter": ("letter", lambda word: word[0]),
    "last_letter": ("letter", lambda word: word[-1]),
    "second_letter": ("letter", lambda word: word[1]),
    "uppercase": ("code", str.upper),
    "title": ("code", str.capitalize),
    "spell_hyphens": ("code", "-".join),
    "spell_spaces": ("code", " ".join),
    "backwards": ("code", lambda word: word[::-1] if len(word) <= 5 else None),
    "length": ("number", lambda word: str(len(word))),
    "vowels": ("code", lambda word: _only(word, "aeiou") or None if "y" not in word else None),
    "consonants": ("code", lambda word: "".join(c for c in word if c not in "aeiou") if "y" not in word else None),
    "without_first": ("code", lambda word: word[1:]),
    "without_last": ("code", lambda word: word[:-1]),
    "first_three": ("code", lambda word: word[:3] if len(word) > 4 else None),
    "next_letter": ("letter", lambda word: chr(ord(word[0]) + 1) if word[0] != "z" else None),
    "code_word": ("name", lambda word: _NATO[ord(word[0]) - ord("a")]),
    "word_in_quotes": ("code", lambda word: f'"{word}"'),
    "twice": ("phrase", lambda word: f"{word} {word}"),
    "starts_with_vowel": ("yesno", lambda word: "yes" if word[0] in "aeiou" else "no"),
}


def _pairs(write: Callable[[str], str | None]) -> list[Pair]:
    pairs = ((word, write(word)) for word in common_words())
    return [(word, answer) for word, answer in pairs if answer]


@cache
def _kinds() -> list[Pair]:
    pairs = [(word, kind) for kind, words in CATEGORIES.items() for word in words]
    return sorted(pairs, key=lambda pair: share_of("kinds", pair[0]))


def _is_kind(kind: str) -> list[Pair]:
    """As many words of the kind as others."""
    yes = [(word, "yes") for word, of in _kinds() if of == kind]
    no = [(word, "no") for word, of in _kinds() if of != kind][: len(yes)]
    return [pair for both in zip(yes, no, strict=True) for pair in both]


def operations() -> Iterable[Operation]:
    for name, (answer, write) in _WRITES.items():
        domain = "number" if answer == "number" else None
        yield Operation(
            f"word_{name}", "letters", answer, wording_of("words", name), partial(_pairs, write), domain=domain
        )
    yield Operation("word_kind", "kinds", "phrase", wording_of("words", "kind"), _kinds)
    for kind in _YES_NO:
        wording = wording_of(
            "words", "is_kind", kind=kind, a_kind=with_article(kind), kinds=PLURALS.get(kind, f"{kind}s")
        )
        name = f"word_is_{kind.replace(' ', '_')}"
        yield Operation(name, "kinds", "yesno", wording, partial(_is_kind, kind), forms=("plain", "prefix"))
