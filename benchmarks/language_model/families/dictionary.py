# SPDX-License-Identifier: Apache-2.0
"""Words and names between English and other languages, and the codes of languages and currencies (CLDR)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from babel.core import UnknownLocaleError, get_global

from .. import lexicon
from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of
from ..words import CATEGORIES, NOUNS, THINGS
from .countries import countries, country_name


PACKAGES = ("Babel", "emoji")
_MOST_LANGUAGES = 95
# Of names that few know, or that are written forms of another.
_VARIETIES = ("nb", "nn", "ii", "rn", "lg", "ff", "za", "ts", "bm")


@cache
def things() -> list[str]:
    """English words that CLDR's names of emoji translate, common ones."""
    kinds = ("country", "city", "weekday", "month", "number")
    words = {*NOUNS, *THINGS, *(word for kind, of in CATEGORIES.items() if kind not in kinds for word in of)}
    words |= set(_MORE_THINGS.split())
    words -= set(_UNLIKE.split())
    known = [word for word in words if lexicon.translate("thing", word, "fr")]
    return sorted(known, key=lambda word: share_of("things", word))


# Emoji that other languages name by another thing: their names are no translations.
_UNLIKE = (
    "camel child cinema cooking dizzy droplet fairy kiss link locomotive memo minus peanuts pill plus receipt "
    "restroom sake seat seedling sparkles superhero"
)
# Further emoji with a name of one common word.
_MORE_THINGS = (
    "airplane alien artist astronaut axe baby bacon bank basketball bat beans boomerang bouquet boy brain burrito "
    "candy chair cherries chestnut child chopsticks cigarette cockroach cook cooking crutch cupcake desert desk "
    "detective dizzy dolphin doughnut dress droplet drum ear elf eye eyes fairy family feather ferry fireworks fog "
    "foot footprints genie ghost girl glasses grapes hamburger hammer handbag headphone herb hole honeybee hook hut "
    "information judge keyboard king kiss ladder link locomotive luggage lungs man mechanic megaphone memo mermaid "
    "meteor microphone microscope minus money mouth multiply ninja nose onion oyster package pancakes paperclip "
    "parachute peanuts person pie pill plus popcorn prince princess printer purse rainbow razor receipt restroom "
    "rock rose sake salt sandwich school scroll seedling shell shower skier sled soap spider sparkles speedboat "
    "stadium strawberry student sunflower sunglasses sunrise sunset superhero syringe telephone tomato tongue tooth "
    "toothbrush tornado trophy tulip unicorn vampire waffle wedding wheel woman wood zombie"
)


@cache
def language_names() -> list[str]:
    """English names of the languages of most speakers, by CLDR's figures."""
    speakers: dict[str, float] = {}
    people = countries()
    for territory, found in get_global("territory_languages").items():
        population = people.get(territory, {}).get("population", 0)
        for code, facts in found.items():
            speakers[code] = speakers.get(code, 0) + population * facts["population_percent"] / 100
    names = lexicon.languages_in_english()
    known = (code for code in speakers if len(code) == 2 and code in names and code not in _VARIETIES)
    order = sorted(known, key=lambda code: (-speakers[code], code))
    return [names[code] for code in order[:_MOST_LANGUAGES]]


@cache
def currency_names() -> dict[str, str]:
    """The currencies in use in the largest countries, by their codes."""
    codes = dict.fromkeys(facts["currencycode"] for facts in countries().values())
    names = lexicon.locale("en").currencies
    return {code: names[code] for code in codes if code in names}


def _language_codes() -> dict[str, str]:
    codes = {name: code for code, name in lexicon.languages_in_english().items() if len(code) == 2}
    return {name: codes[name] for name in language_names()}


def _autonyms() -> list[Pair]:
    codes = _language_codes()
    found = []
    for name, code in codes.items():
        try:
            own = lexicon.locale(code).languages.get(code)
        except UnknownLocaleError:
            continue
        if own and own.lower() != name.lower():
            found.append((name, own))
    return found


_SETS: dict[str, Callable[[], Iterable[str]]] = {
    "thing": things,
    "country": lambda: map(country_name, countries()),
    "language": language_names,
    "currency": lambda: currency_names().values(),
}


def _into(domain: str, code: str) -> list[Pair]:
    """English and the other language, where the two differ and the other is short."""
    pairs = ((name, lexicon.translate(domain, name, code)) for name in _SETS[domain]())
    return [(name, other) for name, other in pairs if other and len(other.split()) <= 3]


def _from(domain: str, code: str) -> list[Pair]:
    pairs = [(other, name) for name, other in _into(domain, code) if other != name]
    return [(text, name) for text, name in pairs if [other for other, _ in pairs].count(text) == 1]


def operations() -> Iterable[Operation]:
    for code, language in lexicon.LANGUAGES.items():
        for domain in _SETS:
            if code not in lexicon.languages_of(domain):
                continue
            yield from _both_ways(domain, code, language)
    codes = _language_codes
    yield _make("language_code", "code", lambda: list(codes().items()))
    yield _make("code_language", "name", lambda: [(c, n) for n, c in codes().items()], domain="language")
    yield _make("autonym", "foreign", _autonyms)
    yield _make("autonym_language", "name", lambda: [(own, name) for name, own in _autonyms()], domain="language")
    yield _make("currency_code", "code", lambda: [(name, code) for code, name in currency_names().items()])
    yield _make("code_currency", "name", lambda: list(currency_names().items()), domain="currency")


def _make(name: str, answer: str, pairs: Callable[[], list[Pair]], **more: Any) -> Operation:
    return Operation(name, "names", answer, wording_of("dictionary", name), pairs, **more)


def _both_ways(domain: str, code: str, language: str) -> Iterable[Operation]:
    word = domain == "thing"
    slots = {"language": language} if word else {"language": language, "thing": domain}
    small = language.lower()
    yield Operation(
        f"{domain}_into_{small}",
        "translation" if word else "names",
        "foreign",
        wording_of("dictionary", "translate" if word else "name_translate", **slots),
        lambda: _into(domain, code),
        languages=(language,),
    )
    if domain == "currency":
        return
    yield Operation(
        f"{domain}_from_{small}",
        "translation" if word else "names",
        "word" if word else "name",
        wording_of("dictionary", "into_english" if word else "name_into_english", **slots),
        lambda: _from(domain, code),
        domain=domain,
        languages=(language,),
    )
