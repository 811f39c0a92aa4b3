# SPDX-License-Identifier: Apache-2.0
"""Numbers: in words of many languages (num2words), as ordinals (inflect), formatted (Babel), and small sums."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache, partial

import inflect
import num2words
from babel.numbers import format_decimal

from .. import lexicon
from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of


PACKAGES = ("num2words", "inflect", "Babel")
_WITH_SEPARATORS = ("fr", "de", "es", "pt", "it", "ru", "pl", "sv", "hi", "nl", "da")


@cache
def small_numbers() -> tuple[int, ...]:
    """Numbers under a thousand, those under 200 all, the others thinned out."""
    chosen = [*range(2, 200), *(n for n in range(200, 1000) if share_of("numbers", n) < 0.5)]
    return tuple(sorted(chosen, key=lambda n: share_of("number order", n)))


@cache
def large_numbers() -> tuple[int, ...]:
    draw = random.Random("large numbers")
    return tuple(dict.fromkeys(draw.randrange(10 ** (d - 1), 10**d) for d in (5, 5, 6, 7, 8) for _ in range(150)))


@cache
def number_pairs() -> tuple[tuple[int, int], ...]:
    draw = random.Random("pairs of numbers")
    pairs = dict.fromkeys((draw.randrange(2, 60), draw.randrange(2, 60)) for _ in range(1200))
    return tuple(pair for pair in pairs if pair[0] != pair[1])


@cache
def factor_pairs() -> tuple[tuple[int, int], ...]:
    draw = random.Random("factors")
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 13) if a != b]
    return tuple(draw.sample(pairs, len(pairs)))


def _each(answer: Callable[[int], str | None], numbers: Iterable[int] | None = None) -> list[Pair]:
    pairs = ((str(number), answer(number)) for number in (numbers or small_numbers()))
    return [(text, wanted) for text, wanted in pairs if wanted]


def _both(answer: Callable[[int, int], int], pairs: Iterable[tuple[int, int]] | None = None) -> list[Pair]:
    return [(f"{a}, {b}", str(answer(a, b))) for a, b in pairs or number_pairs()]


def _words(language: str) -> list[Pair]:
    # Long number words are beyond a small model: whole hundreds and what lies below two hundred.
    numbers = [n for n in small_numbers() if n < 200 or n % 50 == 0]
    return _each(lambda n: lexicon.translate("number", str(n), language), numbers)


def _digits(language: str) -> list[Pair]:
    pairs = [(words, number) for number, words in _words(language)]
    return [(words, number) for words, number in pairs if [w for w, _ in pairs].count(words) == 1]


def _grouped(number: int, language: str) -> str:
    return format_decimal(number, locale=language).replace("\u202f", " ").replace("\xa0", " ")


_ENGLISH = inflect.engine()
_UNARY: dict[str, tuple[str, Callable[[int], str | None]]] = {
    "ordinal_words": ("phrase", lambda n: num2words.num2words(n, to="ordinal") if n < 200 else None),
    "ordinal_digits": ("code", lambda n: str(_ENGLISH.ordinal(str(n)))),
    "next": ("number", lambda n: str(n + 1)),
    "previous": ("number", lambda n: str(n - 1)),
    "plus_ten": ("number", lambda n: str(n + 10)),
    "double": ("number", lambda n: str(2 * n) if n <= 300 else None),
    "half": ("number", lambda n: str(n // 2) if n % 2 == 0 else None),
    "tens": ("number", lambda n: str(n // 10 * 10) if n >= 10 else None),
    "last_digit": ("number", lambda n: str(n % 10) if n >= 10 else None),
    "first_digit": ("number", lambda n: str(n)[0] if n >= 10 else None),
    "parity": ("word", lambda n: "odd" if n % 2 else "even"),
}
_BINARY: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
}


def operations() -> Iterable[Operation]:
    for name, (answer, change) in _UNARY.items():
        domain = "number" if answer == "number" else None
        wording = wording_of("numbers", name)
        yield Operation(f"number_{name}", "arithmetic", answer, wording, partial(_each, change), domain=domain)
    for name, join in _BINARY.items():
        wording = wording_of("numbers", name)
        yield Operation(f"numbers_{name}", "arithmetic", "number", wording, partial(_both, join), domain="number")
    yield Operation(
        "numbers_product", "arithmetic", "number", wording_of("numbers", "product"),
        lambda: _both(lambda a, b: a * b, factor_pairs()), domain="number",
    )  # fmt: skip
    yield Operation("number_words", "number words", "phrase", wording_of("numbers", "words"), lambda: _words("en"))
    yield _from_words("en", "English", ())
    for code in lexicon.NUMBER_LANGUAGES:
        language = lexicon.LANGUAGES[code]
        wording = wording_of("numbers", "words_in", language=language)
        name = f"number_words_{language.lower()}"
        yield Operation(name, "number words", "foreign", wording, partial(_words, code), languages=(language,))
        yield _from_words(code, language, (language,))
    yield Operation(
        "number_separated", "number formats", "code", wording_of("numbers", "separated"),
        lambda: _each(lambda n: f"{n:,}", large_numbers()),
    )  # fmt: skip
    for code in _WITH_SEPARATORS:
        language = lexicon.LANGUAGES[code]
        yield Operation(
            f"number_separated_{language.lower()}", "number formats", "code",
            wording_of("numbers", "separated_in", language=language),
            partial(_each, partial(_grouped, language=code), large_numbers()),
            languages=(language,),
        )  # fmt: skip


def _from_words(code: str, language: str, languages: tuple[str, ...]) -> Operation:
    name = f"digits_from_{language.lower()}"
    wording = wording_of("numbers", "digits_from", language=language)
    return Operation(
        name, "number words", "number", wording, lambda: _digits(code), domain="number", languages=languages
    )
