# SPDX-License-Identifier: Apache-2.0
"""The wordings of the hard world's prompts: English, Spanish, German and French, for fitting and for scoring.

What a task wants is said by a question and an instruction. Questions in English are those of the worked example.
Wordings `HELD_OUT` are used for held-out tasks and for scoring alone; no adapter and no generator is fitted on them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from world import ATTRIBUTES


Pair = tuple[str, str]


@dataclass(frozen=True)
class Wordings:
    """One language's ways to say what a task wants.

    Args:
        questions: with a `{person}`, for each kind of fact.
        instructions: to answer in a manner, and not to; `{tone}`, `{length}` and `{voice}` are filled in.
        tones: politely, rudely.
        lengths: briefly, at length.
        voices: quietly, loudly.
    """

    questions: dict[str, tuple[str, ...]]
    instructions: tuple[Pair, ...]
    tones: tuple[Pair, ...]
    lengths: tuple[Pair, ...]
    voices: tuple[Pair, ...]


def _of_each_kind(*questions: str, kinds: str) -> dict[str, tuple[str, ...]]:
    """The same questions for all kinds of fact, whose names stand in `kinds`, in the order of `ATTRIBUTES`."""
    return {
        attribute.name: tuple(question.replace("{kind}", kind.strip()) for question in questions)
        for attribute, kind in zip(ATTRIBUTES, kinds.split(","), strict=True)
    }


_SPANISH = "la ciudad, el trabajo, la mascota, el instrumento, el color, el deporte, la fruta, el vehículo"
_GERMAN = "die Stadt, der Beruf, das Haustier, das Instrument, die Farbe, der Sport, das Obst, das Fahrzeug"
_FRENCH = "la ville, le métier, l'animal, l'instrument, la couleur, le sport, le fruit, le véhicule"

TRAINING = {
    "english": Wordings(
        questions={
            each.name: tuple(question.replace("{name}", "{person}") for question in each.phrasings)
            for each in ATTRIBUTES
        },
        instructions=(
            ("Answer {tone}, {length} and {voice}.", "Do not answer {tone}, {length} or {voice}."),
            ("Please write {tone}, {length} and {voice}.", "Please do not write {tone}, {length} or {voice}."),
            ("You should reply {tone}, {length} and {voice}.", "You should not reply {tone}, {length} or {voice}."),
        ),
        tones=(("politely", "rudely"), ("kindly", "meanly"), ("courteously", "insolently")),
        lengths=(
            ("briefly", "at length"),
            ("in few words", "in many words"),
            ("with a short text", "with a long text"),
        ),
        voices=(("quietly", "loudly"), ("with a whisper", "with a shout"), ("softly", "noisily")),
    ),
    "spanish": Wordings(
        questions=_of_each_kind("¿Cuál es {kind} de {person}?", "Dime {kind} de {person}.", kinds=_SPANISH),
        instructions=(
            ("Responde {tone}, {length} y {voice}.", "No respondas ni {tone} ni {length} ni {voice}."),
            ("Escribe {tone}, {length} y {voice}.", "No escribas ni {tone} ni {length} ni {voice}."),
        ),
        tones=(("con cortesía", "con grosería"), ("amablemente", "groseramente")),
        lengths=(("en pocas palabras", "en muchas palabras"), ("con un texto corto", "con un texto largo")),
        voices=(("en voz baja", "en voz alta"), ("susurrando", "gritando")),
    ),
    "german": Wordings(
        questions=_of_each_kind(
            "Was ist {kind} von {person}?", "Sag mir, was {kind} von {person} ist.", kinds=_GERMAN
        ),
        instructions=(
            ("Antworte {tone}, {length} und {voice}.", "Antworte weder {tone} noch {length} noch {voice}."),
            ("Schreibe {tone}, {length} und {voice}.", "Schreibe nicht {tone}, nicht {length} und nicht {voice}."),
        ),
        tones=(("höflich", "unhöflich"), ("freundlich", "gemein")),
        lengths=(("mit wenigen Worten", "mit vielen Worten"), ("mit kurzem Text", "mit langem Text")),
        voices=(("leise", "laut"), ("mit einem Flüstern", "mit einem Schrei")),
    ),
    "french": Wordings(
        questions=_of_each_kind("Dis-moi {kind} de {person}.", "Nomme {kind} de {person}.", kinds=_FRENCH),
        instructions=(
            ("Réponds {tone}, {length} et {voice}.", "Ne réponds ni {tone} ni {length} ni {voice}."),
            ("Écris {tone}, {length} et {voice}.", "N'écris ni {tone} ni {length} ni {voice}."),
        ),
        tones=(("poliment", "insolemment"), ("avec politesse", "avec méchanceté")),
        lengths=(("en peu de mots", "en beaucoup de mots"), ("avec un texte court", "avec un texte long")),
        voices=(("à voix basse", "à voix haute"), ("en chuchotant", "en criant")),
    ),
}

HELD_OUT = {
    "english": Wordings(
        questions={
            each.name: tuple(question.replace("{name}", "{person}") for question in each.held_out_phrasings)
            for each in ATTRIBUTES
        },
        instructions=(
            ("Give the answer {tone}, {length} and {voice}.", "Don't give the answer {tone}, {length} or {voice}."),
            ("You must talk {tone}, {length} and {voice}.", "You must not talk {tone}, {length} or {voice}."),
        ),
        tones=(
            ("in a polite way", "in a rude way"),
            ("in a kind tone", "in a mean tone"),
            ("with courtesy", "with insolence"),
        ),
        lengths=(
            ("in a brief reply", "in a lengthy reply"),
            ("using few words", "using many words"),
            ("in a short text", "in a long text"),
        ),
        voices=(
            ("in a quiet voice", "in a loud voice"),
            ("in a whisper", "in a shout"),
            ("in a soft way", "in a noisy way"),
        ),
    ),
    "spanish": Wordings(
        questions=_of_each_kind("Quisiera saber {kind} de {person}.", kinds=_SPANISH),
        instructions=(("Contesta {tone}, {length} y {voice}.", "No contestes ni {tone} ni {length} ni {voice}."),),
        tones=(("con amabilidad", "de forma grosera"),),
        lengths=(("con pocas palabras", "con muchas palabras"),),
        voices=(("muy bajo", "muy alto"),),
    ),
    "german": Wordings(
        questions=_of_each_kind("Ich frage, was {kind} von {person} ist.", kinds=_GERMAN),
        instructions=(
            ("Erwidere {tone}, {length} und {voice}.", "Erwidere weder {tone} noch {length} noch {voice}."),
        ),
        tones=(("sehr höflich", "sehr unhöflich"),),
        lengths=(("in einem kurzen Text", "in einem langen Text"),),
        voices=(("ganz leise", "ganz laut"),),
    ),
    "french": Wordings(
        questions=_of_each_kind("Je veux savoir {kind} de {person}.", kinds=_FRENCH),
        instructions=(("Parle {tone}, {length} et {voice}.", "Ne parle ni {tone} ni {length} ni {voice}."),),
        tones=(("avec courtoisie", "avec insolence"),),
        lengths=(("en un texte court", "en un texte long"),),
        voices=(("tout bas", "tout haut"),),
    ),
}


def with_typos(text: str, person: str, draw: random.Random) -> str:
    """The text with a slip of the keyboard in each of three words: letters swapped, left out or doubled.

    The person's name stays as it is.
    """
    words = text.split(" ")
    long_enough = [i for i, word in enumerate(words) if person not in word and len(word) > 3]
    for i in draw.sample(long_enough, min(3, len(long_enough))):
        word, at = words[i], draw.randrange(1, len(words[i]) - 2)
        slips = (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
        )
        words[i] = draw.choice(slips)
    return " ".join(words)
