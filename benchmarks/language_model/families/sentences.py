# SPDX-License-Identifier: Apache-2.0
"""Simple sentences: their parts, and the same in another tense, person, voice or order (lemminflect)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import lemminflect

from ..tasks import Operation, Pair
from ..wordings import wording_of
from ..words import listed


PACKAGES = ("lemminflect",)
_PEOPLE = listed(
    "teacher doctor nurse farmer girl boy woman man student child uncle aunt queen king baker singer sailor soldier "
    "artist lawyer neighbour friend visitor waiter driver"
)
_ACTIONS = {
    "read": "book letter newspaper poem map", "write": "letter book story poem",
    "eat": "apple sandwich banana cake egg", "paint": "picture house door wall",
    "buy": "car hat ticket lamp dress", "sell": "car ring clock carpet",
    "find": "key coin ring letter", "carry": "bag box basket bottle", "open": "door window box letter",
    "close": "door window book gate", "clean": "car table kettle mirror", "wash": "car shirt plate dog",
    "break": "glass plate mirror cup", "repair": "clock bicycle radio roof", "drive": "bus car tractor truck",
    "play": "guitar piano drum violin", "watch": "film game bird parade", "cook": "soup fish potato egg",
    "draw": "horse tree map circle", "build": "tower boat house wall", "see": "cat bird star ship",
    "hear": "song bell bird train", "hide": "key box present letter", "take": "photo coat coin book",
    "throw": "ball stone stick", "count": "coin sheep spoon", "feed": "dog cat horse duck", "steal": "car ring coin",
}  # fmt: skip
_PLACES = (
    "in the garden", "in the kitchen", "at the station", "in the park", "at school", "in the street", "on the beach",
    "near the river", "behind the house", "in the library", "at home", "on the bridge", "in the village",
    "near the church", "at the market", "in the forest",
)  # fmt: skip


def _form(verb: str, tag: str) -> str:
    return lemminflect.getInflection(verb, tag)[0]


@dataclass(frozen=True)
class Sentence:
    subject: str
    verb: str
    thing: str
    place: str

    def with_verb(self, verb: str, subject: str | None = None, end: str = ".") -> str:
        return f"{subject or 'The ' + self.subject} {verb} the {self.thing} {self.place}{end}"

    def __str__(self) -> str:
        return self.with_verb(_form(self.verb, "VBZ"))


@cache
def sentences() -> tuple[Sentence, ...]:
    draw = random.Random("sentences")
    found: dict[Sentence, None] = {}
    while len(found) < 650:
        verb = draw.choice(sorted(_ACTIONS))
        found.setdefault(
            Sentence(draw.choice(_PEOPLE), verb, draw.choice(_ACTIONS[verb].split()), draw.choice(_PLACES))
        )
    return tuple(found)


_WRITES: dict[str, tuple[str, Callable[[Sentence], str]]] = {
    "subject": ("phrase", lambda s: f"the {s.subject}"),
    "object": ("phrase", lambda s: f"the {s.thing}"),
    "verb": ("word", lambda s: _form(s.verb, "VBZ")),
    "place": ("phrase", lambda s: s.place),
    "past": ("sentence", lambda s: s.with_verb(_form(s.verb, "VBD"))),
    "future": ("sentence", lambda s: s.with_verb(f"will {s.verb}")),
    "negative": ("sentence", lambda s: s.with_verb(f"does not {s.verb}")),
    "question": ("sentence", lambda s: s.with_verb(s.verb, f"Does the {s.subject}", "?")),
    "passive": (
        "sentence", lambda s: f"The {s.thing} is {_form(s.verb, 'VBN')} by the {s.subject} {s.place}."
    ),
    "plural_subject": ("sentence", lambda s: s.with_verb(s.verb, f"The {_form(s.subject, 'NNS')}")),
    "they": ("sentence", lambda s: s.with_verb(s.verb, "They")),
    "i": ("sentence", lambda s: s.with_verb(s.verb, "I")),
    "without_place": ("sentence", lambda s: f"The {s.subject} {_form(s.verb, 'VBZ')} the {s.thing}."),
    "place_first": (
        "sentence",
        lambda s: f"{s.place.capitalize()}, the {s.subject} {_form(s.verb, 'VBZ')} the {s.thing}.",
    ),
}  # fmt: skip


def _pairs(write: Callable[[Sentence], str]) -> list[Pair]:
    return [(str(sentence), write(sentence)) for sentence in sentences()]


def operations() -> Iterable[Operation]:
    for name, (answer, write) in _WRITES.items():
        wording = wording_of("sentences", name)
        yield Operation(f"sentence_{name}", "sentences", answer, wording, partial(_pairs, write))
