# SPDX-License-Identifier: Apache-2.0
"""Names and words in other languages, from CLDR (Babel and emoji) and num2words."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import emoji
import num2words
from babel import Locale


# Languages that answers are given in, by their codes; those of most speakers and readers first.
LANGUAGES: dict[str, str] = {
    "fr": "French", "es": "Spanish", "de": "German", "pt": "Portuguese", "it": "Italian", "ru": "Russian",
    "zh": "Chinese", "ja": "Japanese", "ar": "Arabic", "hi": "Hindi", "bn": "Bengali", "ko": "Korean",
    "tr": "Turkish", "id": "Indonesian", "nl": "Dutch", "pl": "Polish", "sv": "Swedish", "vi": "Vietnamese",
    "fa": "Persian", "cs": "Czech", "da": "Danish", "fi": "Finnish", "el": "Greek", "he": "Hebrew",
    "hu": "Hungarian", "no": "Norwegian", "ro": "Romanian", "th": "Thai", "uk": "Ukrainian", "ca": "Catalan",
}  # fmt: skip
EMOJI_LANGUAGES = ("fr", "es", "de", "pt", "it", "ru", "zh", "ja", "ar", "ko", "tr", "id", "fa")
NUMBER_LANGUAGES = (
    "fr", "es", "de", "pt", "it", "ru", "ja", "ar", "bn", "ko", "tr", "id", "nl", "pl", "sv", "vi", "fa", "cs", "da",
    "fi", "he", "hu", "no", "ro", "th", "uk", "ca",
)  # fmt: skip

# English names as people write them, where CLDR's differ.
_COMMON = {
    "MM": "Myanmar", "CD": "DR Congo", "CG": "Republic of the Congo", "TR": "Turkey", "CI": "Ivory Coast",
    "HK": "Hong Kong", "BA": "Bosnia and Herzegovina", "CZ": "Czech Republic", "PS": "Palestine",
}  # fmt: skip


@cache
def locale(language: str) -> Locale:
    return Locale.parse(language)


@cache
def territories() -> dict[str, str]:
    """English names of territories by their codes."""
    return {code: _COMMON.get(code, name) for code, name in locale("en").territories.items() if len(code) == 2}


@cache
def languages_in_english() -> dict[str, str]:
    """English names of languages by their codes."""
    return {**locale("en").languages, "bn": "Bengali"}


@cache
def _codes(domain: str) -> dict[str, str]:
    """The code of an English name."""
    if domain == "country":
        return {name: code for code, name in territories().items()}
    names = languages_in_english() if domain == "language" else locale("en").currencies
    return {name: code for code, name in reversed(list(names.items()))}


@cache
def _emoji_words() -> dict[str, str]:
    """The emoji that has a single English word for its name."""
    emoji.config.load_language()
    names = ((data["en"].strip(":"), picture, data) for picture, data in emoji.EMOJI_DATA.items())
    return {
        name: picture for name, picture, data in names if data["status"] == 2 and "fr" in data and name[0].islower()
    }


def picture(word: str) -> str:
    """The emoji of that name."""
    return _emoji_words()[word]


def _cldr_name(domain: str, name: str, language: str) -> str | None:
    code = _codes(domain).get(name)
    table = {"country": "territories", "language": "languages", "currency": "currencies"}[domain]
    return getattr(locale(language), table).get(code) if code else None


def _calendar_name(domain: str, name: str, language: str) -> str | None:
    table = {"month": "months", "weekday": "days"}[domain]
    english = getattr(locale("en"), table)["format"]["wide"]
    place = next((place for place, word in english.items() if word == name), None)
    return None if place is None else getattr(locale(language), table)["stand-alone"]["wide"][place]


def _emoji_word(_: str, name: str, language: str) -> str | None:
    picture = _emoji_words().get(name)
    if picture is None or language not in EMOJI_LANGUAGES:
        return None
    word = emoji.EMOJI_DATA[picture][language].strip(":").replace("_", " ").strip()
    # What has no one word there is described ("pencil and paper", "man or woman"): no translation of the word.
    if len(word.split()) > (1 if language == "de" else 2) or "(" in word:
        return None
    # The package writes all names small; German nouns are not.
    return word.capitalize() if language == "de" else word


def _number_word(_: str, name: str, language: str) -> str | None:
    if not name.isdigit() or language not in (*NUMBER_LANGUAGES, "en"):
        return None
    # Brazil's, as CLDR's Portuguese is.
    return num2words.num2words(int(name), lang={"pt": "pt_BR"}.get(language, language)).strip()


def _any_word(_: str, name: str, language: str) -> str | None:
    """Of a word that may be anything in a list."""
    domains = ("thing",) if name[0].islower() else ("weekday", "month", "country")
    return next((found for domain in domains if (found := translate(domain, name, language))), None)


_DOMAINS: dict[str, Callable[[str, str, str], str | None]] = {
    "country": _cldr_name,
    "language": _cldr_name,
    "currency": _cldr_name,
    "month": _calendar_name,
    "weekday": _calendar_name,
    "thing": _emoji_word,
    "any": _any_word,
    "number": _number_word,
}


@cache
def translate(domain: str, name: str, language: str) -> str | None:
    """An English name in another language, or None where the data have none."""
    return _DOMAINS[domain](domain, name, language)


def languages_of(domain: str) -> tuple[str, ...]:
    """The languages that a domain's names are translated to."""
    return {"thing": EMOJI_LANGUAGES, "any": EMOJI_LANGUAGES, "number": NUMBER_LANGUAGES}.get(domain, tuple(LANGUAGES))
