# SPDX-License-Identifier: Apache-2.0
"""Quantities with units and prices with currencies: their parts, notations and languages (Babel)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache, partial

from babel.numbers import format_currency
from babel.units import format_unit

from .. import lexicon
from ..tasks import Operation, Pair
from ..wordings import wording_of


PACKAGES = ("Babel",)
_UNITS = {
    "length-kilometer": 90, "length-meter": 90, "length-centimeter": 90, "mass-kilogram": 90, "mass-gram": 90,
    "duration-hour": 48, "duration-minute": 90, "duration-second": 90, "duration-day": 90, "duration-week": 50,
    "duration-year": 90, "volume-liter": 90, "volume-milliliter": 90, "temperature-celsius": 40,
}  # fmt: skip
_NEXT_SMALLER = {
    "length-kilometer": ("length-meter", 1000), "length-meter": ("length-centimeter", 100),
    "mass-kilogram": ("mass-gram", 1000), "volume-liter": ("volume-milliliter", 1000),
    "duration-hour": ("duration-minute", 60), "duration-minute": ("duration-second", 60),
    "duration-day": ("duration-hour", 24), "duration-week": ("duration-day", 7),
}  # fmt: skip
_LANGUAGES = ("fr", "es", "de", "pt", "it", "ru", "nl", "sv", "tr", "pl", "zh", "ja")
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "INR", "CNY", "BRL", "MXN", "CAD", "AUD", "KRW", "VND", "ILS", "NZD", "PHP")

Quantity = tuple[int, str]


@cache
def quantities() -> tuple[Quantity, ...]:
    draw = random.Random("quantities")
    every = [(number, unit) for unit, most in _UNITS.items() for number in range(2, most + 1)]
    return tuple(draw.sample(every, 620))


@cache
def prices() -> tuple[tuple[str, str], ...]:
    draw = random.Random("prices")
    # No cents in yen, won and dong.
    coded = [code for code in _CURRENCIES if code not in ("JPY", "KRW", "VND")]
    drawn = ((f"{draw.randrange(2, 100)}.{draw.randrange(1, 100):02}", draw.choice(coded)) for _ in range(620))
    return tuple(dict.fromkeys(drawn))


def written(quantity: Quantity, length: str = "long", language: str = "en") -> str:
    # Where a language lacks the unit, Babel writes its identifier.
    text = format_unit(quantity[0], quantity[1], length, locale=language)  # type: ignore[arg-type]
    return text.replace("\u202f", " ").replace("\xa0", " ")


def _smaller(quantity: Quantity) -> str | None:
    number, unit = quantity
    if unit not in _NEXT_SMALLER:
        return None
    smaller, times = _NEXT_SMALLER[unit]
    if unit.startswith("duration") and number > 20:
        return None
    return written((number * times, smaller)).replace(",", "")


def _translated(quantity: Quantity, language: str) -> str | None:
    text = written(quantity, language=language)
    return None if "-" in text else text


def _in_words(quantity: Quantity) -> str:
    words = lexicon.translate("number", str(quantity[0]), "en")
    return f"{words} {written(quantity).split(maxsplit=1)[1]}"


_OF_QUANTITY: dict[str, tuple[str, str | None, Callable[[Quantity], str | None]]] = {
    "number": ("number", "number", lambda quantity: str(quantity[0])),
    "unit": ("phrase", None, lambda quantity: written(quantity).split(maxsplit=1)[1]),
    "short": ("code", None, lambda quantity: written(quantity, "short")),
    "kind": ("word", None, lambda quantity: quantity[1].partition("-")[0]),
    "double": ("phrase", None, lambda quantity: written((2 * quantity[0], quantity[1]))),
    "in_words": ("phrase", None, _in_words),
    "smaller": ("phrase", None, _smaller),
}
_OF_PRICE: dict[str, tuple[str, str | None, Callable[[str, str], str]]] = {
    "price_currency": ("name", "currency", lambda _, code: lexicon.locale("en").currencies[code]),
    "price_code": ("code", None, lambda _, code: code),
    "price_amount": ("code", None, lambda amount, _: amount),
    "price_whole": ("number", "number", lambda amount, _: amount.partition(".")[0]),
    "price_cents": ("code", None, lambda amount, _: amount.partition(".")[2]),
    "price_symbol": ("code", None, lambda amount, code: format_currency(amount, code, locale="en_US")),
}


def _quantity_pairs(answer: Callable[[Quantity], str | None]) -> list[Pair]:
    pairs = ((written(quantity), answer(quantity)) for quantity in quantities())
    return [(text, wanted) for text, wanted in pairs if wanted]


def _price_pairs(answer: Callable[[str, str], str]) -> list[Pair]:
    return [(f"{amount} {code}", answer(amount, code)) for amount, code in prices()]


def operations() -> Iterable[Operation]:
    for name, (answer, domain, of) in _OF_QUANTITY.items():
        wording = wording_of("quantities", name)
        yield Operation(f"quantity_{name}", "quantities", answer, wording, partial(_quantity_pairs, of), domain=domain)
    for name, (answer, domain, at) in _OF_PRICE.items():
        wording = wording_of("quantities", name)
        yield Operation(name, "quantities", answer, wording, partial(_price_pairs, at), domain=domain)
    for code in _LANGUAGES:
        language = lexicon.LANGUAGES[code]
        yield Operation(
            f"quantity_in_{language.lower()}", "quantities", "foreign",
            wording_of("quantities", "unit_in", language=language),
            partial(_quantity_pairs, partial(_translated, language=code)), languages=(language,),
        )  # fmt: skip
