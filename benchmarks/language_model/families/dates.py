# SPDX-License-Identifier: Apache-2.0
"""Dates and times of day: their parts, the next and the last, and the notations of many languages (Babel)."""

from __future__ import annotations

import calendar
import random
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from functools import cache, partial

import num2words
from babel.dates import format_date

from .. import lexicon
from ..tasks import Operation, Pair
from ..wordings import wording_of


PACKAGES = ("datetime", "Babel", "num2words")
_LONG_IN = ("fr", "es", "de", "pt", "it", "ru", "zh", "ja", "nl", "sv", "pl", "tr", "id", "ko", "vi")
_FROM = ("fr", "es", "de", "pt", "it", "ru", "zh", "nl", "pl", "tr", "id", "da")


@cache
def dates() -> tuple[date, ...]:
    draw = random.Random("dates")
    start = date(1950, 1, 1)
    return tuple(dict.fromkeys(start + timedelta(days=draw.randrange(31000)) for _ in range(620)))


@cache
def times() -> tuple[tuple[int, int], ...]:
    draw = random.Random("times")
    return tuple(draw.sample([(hour, minute) for hour in range(24) for minute in range(60)], 620))


def english(day: date) -> str:
    return f"{calendar.day_name[day.weekday()]}, {without_weekday(day)}"


def without_weekday(day: date) -> str:
    return f"{calendar.month_name[day.month]} {day.day}, {day.year}"


def _month(number: int) -> str:
    return calendar.month_name[(number - 1) % 12 + 1]


def _weekday(number: int) -> str:
    return calendar.day_name[number % 7]


def following_weekday(weekday: str) -> str:
    return _weekday(list(calendar.day_name).index(weekday) + 1)


def following_month(month: str) -> str:
    return _month(list(calendar.month_name).index(month) + 1)


def month_number(month: str) -> str:
    return str(list(calendar.month_name).index(month))


_OF_DATE: dict[str, tuple[str, str | None, Callable[[date], str]]] = {
    "weekday": ("name", "weekday", lambda day: _weekday(day.weekday())),
    "weekday_next": ("name", "weekday", lambda day: _weekday(day.weekday() + 1)),
    "weekday_previous": ("name", "weekday", lambda day: _weekday(day.weekday() - 1)),
    "month": ("name", "month", lambda day: _month(day.month)),
    "month_next": ("name", "month", lambda day: _month(day.month + 1)),
    "month_previous": ("name", "month", lambda day: _month(day.month - 1)),
    "month_number": ("number", "number", lambda day: str(day.month)),
    "month_short": ("name", None, lambda day: calendar.month_abbr[day.month]),
    "day": ("number", "number", lambda day: str(day.day)),
    "year": ("code", None, lambda day: str(day.year)),
    "year_next": ("code", None, lambda day: str(day.year + 1)),
    "iso": ("code", None, date.isoformat),
    "dotted": ("code", None, lambda day: f"{day:%d.%m.%Y}"),
    "slashes": ("code", None, lambda day: f"{day:%m/%d/%Y}"),
    "weekend": ("yesno", None, lambda day: "yes" if day.weekday() >= 5 else "no"),
    "quarter": ("code", None, lambda day: f"Q{(day.month + 2) // 3}"),
    "tomorrow": ("phrase", None, lambda day: without_weekday(day + timedelta(days=1))),
}


def _clock(hour: int, minute: int) -> str:
    return f"{hour % 24:02}:{minute:02}"


def _twelve(hour: int, minute: int) -> str:
    return f"{(hour - 1) % 12 + 1}:{minute:02} {'AM' if hour < 12 else 'PM'}"


def _spoken(hour: int, minute: int) -> str:
    past = minute <= 30
    hour_word = num2words.num2words(((hour if past else hour + 1) - 1) % 12 + 1)
    number = minute if past else 60 - minute
    if number == 0:
        return f"{hour_word} o'clock"
    words = {15: "quarter", 30: "half"}.get(number, num2words.num2words(number))
    return f"{words} {'past' if past else 'to'} {hour_word}"


_OF_TIME: dict[str, tuple[str, Callable[[int, int], str | None]]] = {
    "twelve": ("code", _twelve),
    "hour": ("number", lambda hour, _: str(hour) if hour >= 10 else None),
    "minute": ("code", lambda _, minute: f"{minute:02}"),
    "half_day": ("code", lambda hour, _: "AM" if hour < 12 else "PM"),
    "plus_hour": ("code", lambda hour, minute: _clock(hour + 1, minute)),
    "minus_hour": ("code", lambda hour, minute: _clock(hour - 1, minute)),
    "full_hour": ("code", lambda hour, _: _clock(hour, 0)),
    "to_full": ("number", lambda _, minute: str(60 - minute) if minute else None),
    "with_h": ("code", lambda hour, minute: f"{hour}h{minute:02}"),
    "seconds": ("code", lambda hour, minute: f"{_clock(hour, minute)}:00"),
    # Of the odd minutes ("seventeen to four") people say little.
    "spoken": ("phrase", lambda hour, minute: _spoken(hour, minute) if minute % 5 == 0 else None),
}


def _date_pairs(answer: Callable[[date], str]) -> list[Pair]:
    return [(english(day), answer(day)) for day in dates()]


def _time_pairs(name: str, answer: Callable[[int, int], str | None]) -> list[Pair]:
    every = [(hour, minute) for hour in range(24) for minute in range(0, 60, 5)]
    chosen = every if name == "spoken" else times()
    pairs = ((_clock(hour, minute), answer(hour, minute)) for hour, minute in chosen)
    return [(text, wanted) for text, wanted in pairs if wanted]


def _tidy(text: str) -> str:
    return text.replace("\u202f", " ").replace("\xa0", " ")


def operations() -> Iterable[Operation]:
    for name, (answer, domain, of) in _OF_DATE.items():
        wording = wording_of("dates", name)
        yield Operation(f"date_{name}", "dates", answer, wording, partial(_date_pairs, of), domain=domain)
    for name, (answer, at) in _OF_TIME.items():
        domain = "number" if answer == "number" else None
        wording = wording_of("times", name)
        yield Operation(f"time_{name}", "times", answer, wording, partial(_time_pairs, name, at), domain=domain)
    for code in dict.fromkeys((*_LONG_IN, *_FROM)):
        yield from _in_other_languages(code, lexicon.LANGUAGES[code])


def _in_other_languages(code: str, language: str) -> Iterable[Operation]:
    def written(day: date, length: str) -> str:
        return _tidy(format_date(day, length, locale=code))

    if code in _LONG_IN:
        yield Operation(
            f"date_in_{language.lower()}", "dates", "foreign", wording_of("dates", "long_in", language=language),
            lambda: _date_pairs(lambda day: written(day, "full")), languages=(language,),
        )  # fmt: skip
    if code in _FROM:
        yield Operation(
            f"date_from_{language.lower()}", "dates", "phrase", wording_of("dates", "english_from", language=language),
            lambda: [(written(day, "long"), without_weekday(day)) for day in dates()], languages=(language,),
        )  # fmt: skip
