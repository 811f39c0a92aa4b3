# SPDX-License-Identifier: Apache-2.0
"""Instructions in many wordings: the phrases of each part, put together in sentences of many shapes.

The phrases stand in `phrases/*.txt`, a section a part:

    == country_capital | country
    = the capital of {the|this} country
    Name the capital of {this|the} country.

A line with `=` names the answer, any other is a whole instruction, `{a|b}` is either. `shapes.txt` has the sentences
that a noun is put into and what may stand around a whole instruction. A fixed share of the phrases of every part,
and of the shapes, is "unseen": never used for fitting.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

from .tasks import Form, OperationWording, Task, share_of


UNSEEN_SHARE = 0.25
# So many seen instructions are looked through before one is called unseen.
_SEEN = 300
PHRASES = Path(__file__).parent / "phrases"


class Phrase(str):
    """A phrase that knows its template, so that it is seen or unseen in all languages alike."""

    template: str

    def __new__(cls, text: str, template: str) -> Phrase:
        phrase = super().__new__(cls, text)
        phrase.template = template
        return phrase


@cache
def sections(file: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The sections of a phrase file: what follows the name, and the lines."""
    found: dict[str, tuple[str, list[str]]] = {}
    lines: list[str] = []
    for line in (PHRASES / f"{file}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            name, _, rest = line[3:].partition("|")
            lines = []
            if name.strip() in found:
                raise ValueError(f"{file}.txt has two sections named {name.strip()!r}: give one another name.")
            found[name.strip()] = (rest.strip(), lines)
        elif line.strip() and not line.startswith("# "):
            lines.append(line.strip())
    return {name: (rest, tuple(lines)) for name, (rest, lines) in found.items()}


def wording_of(file: str, section: str, **slots: str) -> OperationWording:
    """An operation's phrases, with `{slot}` filled in."""
    rest, lines = sections(file)[section]
    filled = [(line.startswith("= "), fill(line.removeprefix("= "), slots)) for line in lines]
    name, _, number = rest.partition(",")
    return OperationWording(
        input=str(fill(name.strip(), slots)),
        nouns=tuple(phrase for is_noun, phrase in filled if is_noun),
        sentences=tuple(phrase for is_noun, phrase in filled if not is_noun),
        plural=number.strip() == "plural",
    )


def fill(text: str, slots: dict[str, str]) -> Phrase:
    """The text with its `{slot}`s filled in, and "a" before one changed to "an" where need be."""
    filled = text
    for slot, value in slots.items():
        filled = filled.replace("{" + slot + "}", value)
        if value[:1].lower() in "aeiou":
            filled = re.sub(rf"\b([Aa]) (?={re.escape(value)}\b)", r"\1n ", filled)
    return Phrase(filled, text)


def held_apart(phrases: tuple[str, ...], split: str, seed: int) -> list[str]:
    """The phrases of a split: a quarter of them, drawn by the seed, are unseen."""
    ranks = {phrase: share_of("wording", seed, getattr(phrase, "template", phrase)) for phrase in phrases}
    order = sorted(phrases, key=ranks.__getitem__)
    unseen = max(1, round(UNSEEN_SHARE * len(phrases))) if len(phrases) > 1 else 0
    chosen = set(order[:unseen] if split == "unseen" else order[unseen:])
    return [phrase for phrase in phrases if phrase in chosen]


def _vary(text: str, draw: random.Random) -> str:
    """One of the readings of `{a|b}`."""
    return re.sub(r"\{([^{}]*\|[^{}]*)\}", lambda found: draw.choice(found[1].split("|")), text)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ended(text: str) -> str:
    """The text, ready for another sentence."""
    text = text.removesuffix(":")
    return text if text[-1] in ".?!" else f"{text}."


def _with_tail(text: str, tail: str) -> str:
    # Not "the country that the city lies in in Greek".
    return f"{text},{tail}" if text.endswith(" in") and tail.startswith(" in") else text + tail


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


# "What friends call the person", "how old the person is": such a noun does not fit everywhere.
_CLAUSE = r"(how|what|which|who|whose|where|whether|when)\b"


def languages() -> list[str]:
    """The languages that whole instructions are there in, beside English."""
    return sorted(path.stem.capitalize() for path in (PHRASES / "languages").glob("*.txt"))


def write_in(task: Task, language: str) -> list[str]:
    """A plain task's instructions in another language, written by hand; none for most tasks."""
    if language.capitalize() not in languages():
        raise ValueError(f"There are no instructions in {language!r}; there are in {', '.join(languages())}.")
    known = sections(f"languages/{language.lower()}")
    return list(known[task.operation.name][1]) if task.form == "plain" and task.operation.name in known else []


class Writer:
    """Writes a task's instructions for one seed of the split."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._held: dict[tuple[tuple[str, ...], str], list[str]] = {}

    def __call__(self, task: Task, split: str, limit: int) -> list[str]:
        draw = random.Random(f"instructions {self.seed} {split} {task.name}")
        # A noun in an unseen shape may happen to give a sentence that has been seen.
        seen = set(self(task, "seen", _SEEN)) if split == "unseen" else set()
        found: dict[str, None] = {}
        # The grammar of some tasks is small: give up when nothing new comes any more.
        for _ in range(limit * 6):
            text = self._write(task, split, draw)
            if text not in seen:
                found.setdefault(text)
            if len(found) == limit:
                break
        return list(found)

    def _some(self, phrases: tuple[str, ...], split: str) -> list[str]:
        key = (phrases, split)
        if key not in self._held:
            self._held[key] = held_apart(phrases, split, self.seed)
        return self._held[key]

    def _shapes(self, section: str, split: str) -> list[str]:
        return self._some(sections("shapes")[section][1], split)

    def _write(self, task: Task, split: str, draw: random.Random) -> str:
        wording = task.operation.wording
        forms = [form for form in task.forms if form.name != "plain"]
        sentences, nouns = self._some(wording.sentences, split), self._some(wording.nouns, split)
        if wording.inner:
            found = draw.choice(self._some(wording.inner, split))
            sentences, nouns = ([text.replace("{it}", found) for text in texts] for texts in (sentences, nouns))
        # A noun can stand in many shapes, a sentence in few.
        if nouns and (not sentences or draw.random() < 0.5):
            text = self._around_noun(draw.choice(nouns), wording, forms, split, draw)
        else:
            text = self._around_sentence(draw.choice(sentences), forms, split, draw)
        return _vary(text, draw)

    def _around_noun(
        self, noun: str, wording: OperationWording, forms: list[Form], split: str, draw: random.Random
    ) -> str:
        noted: list[Form] = []
        tailed = False
        for form in forms:
            ways = [way for way in ("tails", "wraps", "notes") if getattr(form, way)]
            way = draw.choice(ways)
            # What stands around a noun must not follow a tail or a note: the forms go on from the inside.
            if noted or (tailed and way == "wraps"):
                way = "notes"
            if way == "notes":
                noted.append(form)
                continue
            phrase = draw.choice(self._some(getattr(form, way), split))
            noun = phrase.replace("{np}", noun) if way == "wraps" else _with_tail(noun, phrase)
            tailed = tailed or way == "tails"
        shapes = self._shapes("clause" if re.match(_CLAUSE, noun) else "noun", split)
        text = draw.choice(shapes).replace("{np}", noun).replace("{Np}", _capitalized(noun))
        text = text.replace("{is}", "are" if wording.plural else "is")
        text = text.replace("{a_input}", with_article(wording.input)).replace("{input}", wording.input)
        if text in wording.sentences:
            text = f"Task: {text}"
        return self._with_notes(text, noted, split, draw)

    def _around_sentence(self, sentence: str, forms: list[Form], split: str, draw: random.Random) -> str:
        noted = list(forms)
        one = sentence[-1] in ".?" and not re.search(r"[.?!:;] ", sentence) and len(sentence) < 70
        while one and noted and noted[0].tails and draw.random() < 0.4:
            phrase = draw.choice(self._some(noted.pop(0).tails, split))
            sentence = _with_tail(sentence[:-1], phrase) + sentence[-1]
        frames = self._shapes("frame", split)
        if sentence.partition(" ")[0] not in sections("shapes")["imperative verbs"][1] or sentence.endswith("?"):
            frames = [frame for frame in frames if "{s}" not in frame and not frame.startswith("Do ")]
        frame = draw.choice(frames) if frames and draw.random() < 0.35 else "{S}"
        small = sentence if re.match(r"I\b|[A-Z]{2}", sentence) else sentence[:1].lower() + sentence[1:]
        sentence = frame.replace("{S}", _capitalized(sentence)).replace("{s}", small)
        return self._with_notes(sentence, noted, split, draw)

    def _with_notes(self, text: str, forms: list[Form], split: str, draw: random.Random) -> str:
        for form in forms:
            notes = self._some(form.notes, split)
            after = self._some(form.after, split)
            note = draw.choice(notes + after)
            text = _ended(text)
            # A note about the first form must not be read before that of an inner one.
            before = note not in after and len(forms) == 1 and draw.random() < 0.35
            text = f"{note} {_capitalized(text)}" if before else f"{text} {note}"
        if draw.random() < 0.15:
            text = f"{_ended(text)} {draw.choice(self._shapes('ending', split))}"
        return text
