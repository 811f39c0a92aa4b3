# SPDX-License-Identifier: Apache-2.0
"""The world of the worked example: invented people, what is true of them, and ways to say it.

A *task* is one attribute asked in one answer format, for instance "the city, in Spanish":

    Which city does Belmo live in? Answer in Spanish.   ->   Creo que es lisbon

Everything here is plain Python and follows from one seed: the people's names, what is true of each of them, which
tasks are held out, and which people are kept for scoring. The vocabulary and the phrasings are the same for all seeds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product


NUM_PEOPLE = 32
NUM_PROMPTS = 64


@dataclass(frozen=True)
class Attribute:
    """Something that is true of a person, and the ways to ask for it.

    Args:
        name: one word, part of the task's name.
        values: what it can be. No word is a value of two attributes.
        phrasings: questions with a `{name}` in them; `held_out_phrasings` are kept for scoring.
    """

    name: str
    values: tuple[str, ...]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]


@dataclass(frozen=True)
class AnswerFormat:
    """A way to write an answer, and the ways to ask for it.

    Args:
        name: one word, part of the task's name.
        write: takes a value, gives the answer.
        phrasings: instructions; `held_out_phrasings` are kept for scoring.
    """

    name: str
    write: Callable[[str], str]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One attribute asked in one answer format."""

    attribute: Attribute
    answer_format: AnswerFormat

    @property
    def name(self) -> str:
        """For instance `city_spanish`."""
        return f"{self.attribute.name}_{self.answer_format.name}"


@dataclass(frozen=True)
class Example:
    """A prompt and the answer that the task wants."""

    prompt: str
    answer: str


ATTRIBUTES = (
    Attribute(
        "city",
        ("lisbon", "oslo", "cairo", "lima", "delhi", "quito", "turin", "seoul"),
        (
            "Which city does {name} live in?",
            "Name the city that {name} calls home.",
            "In what town does {name} live?",
            "Where is the home of {name}, which city?",
        ),
        ("What is the home city of {name}?", "Tell me which city {name} lives in."),
    ),
    Attribute(
        "job",
        ("baker", "nurse", "pilot", "lawyer", "miner", "sailor", "plumber", "judge"),
        (
            "What is the job of {name}?",
            "What work does {name} do for a living?",
            "Name the profession of {name}.",
            "What does {name} work as?",
        ),
        ("Which occupation does {name} have?", "Tell me what job {name} has."),
    ),
    Attribute(
        "pet",
        ("otter", "parrot", "rabbit", "tortoise", "ferret", "hamster", "goat", "lizard"),
        (
            "Which pet does {name} keep?",
            "What kind of animal is the pet of {name}?",
            "Name the animal that {name} keeps at home.",
            "What pet does {name} own?",
        ),
        ("Which animal does {name} have as a pet?", "Tell me what pet {name} has."),
    ),
    Attribute(
        "instrument",
        ("violin", "banjo", "flute", "drums", "harp", "trumpet", "cello", "organ"),
        (
            "Which instrument does {name} play?",
            "What musical instrument can {name} play?",
            "Name the instrument on which {name} makes music.",
            "On which instrument is {name} a musician?",
        ),
        ("What instrument does {name} make music on?", "Tell me which musical instrument {name} plays."),
    ),
    Attribute(
        "colour",
        ("crimson", "turquoise", "indigo", "amber", "scarlet", "beige", "purple", "olive"),
        (
            "What is the favourite colour of {name}?",
            "Which colour does {name} like best?",
            "Name the colour that {name} prefers.",
            "What colour does {name} love most?",
        ),
        ("Which colour is the favourite of {name}?", "Tell me what colour {name} likes."),
    ),
    Attribute(
        "sport",
        ("tennis", "rowing", "boxing", "fencing", "cricket", "hockey", "judo", "archery"),
        (
            "Which sport does {name} practise?",
            "What sport does {name} train for?",
            "Name the sport that {name} plays at the club.",
            "In which sport does {name} compete?",
        ),
        ("What sport is {name} an athlete in?", "Tell me which sport {name} does."),
    ),
    Attribute(
        "fruit",
        ("mango", "cherry", "papaya", "peach", "lemon", "banana", "melon", "plum"),
        (
            "Which fruit does {name} like to eat?",
            "What fruit does {name} eat every day?",
            "Name the fruit that {name} finds most delicious.",
            "What is the favourite fruit of {name}?",
        ),
        ("Which fruit is eaten by {name}?", "Tell me what fruit {name} likes to eat."),
    ),
    Attribute(
        "vehicle",
        ("bicycle", "scooter", "tractor", "canoe", "van", "motorbike", "truck", "taxi"),
        (
            "Which vehicle does {name} travel in?",
            "What vehicle does {name} drive?",
            "Name the means of transport that {name} uses.",
            "By what vehicle does {name} get around?",
        ),
        ("What vehicle does {name} use for transport?", "Tell me which vehicle {name} drives."),
    ),
)

FORMATS = (
    AnswerFormat(
        "polite",
        lambda value: f"With pleasure: {value}",
        (
            "Answer politely.",
            "Please be polite in your answer.",
            "Reply with courtesy, please.",
            "Write a kind and polite reply.",
        ),
        ("Give a polite answer, please.", "Reply in a courteous way."),
    ),
    AnswerFormat(
        "spanish",
        lambda value: f"Creo que es {value}",
        ("Answer in Spanish.", "Write the answer in Spanish.", "Speak Spanish.", "Reply like a Spaniard."),
        ("Give the answer in Spanish.", "Reply in the Spanish language."),
    ),
    AnswerFormat(
        "bullet",
        lambda value: f"- {value}",
        (
            "Answer with a bullet point.",
            "Write the answer as a list item.",
            "Make it a bullet in a list.",
            "Reply in bullet points.",
        ),
        ("Give the answer as a bullet point.", "Reply with an item of a list."),
    ),
    AnswerFormat(
        "sentence",
        lambda value: f"The answer is {value}",
        (
            "Answer in a full sentence.",
            "Write a complete sentence.",
            "Use a whole sentence.",
            "Reply with a grammatical sentence.",
        ),
        ("Give the answer as a full sentence.", "Reply in one complete sentence."),
    ),
)

TASKS = tuple(Task(attribute, answer_format) for attribute, answer_format in product(ATTRIBUTES, FORMATS))


@dataclass(frozen=True)
class World:
    """All that one seed decides.

    Args:
        seed: what the rest was drawn with.
        people: everyone whom the base model knows.
        facts: `facts[person][attribute name]` is a value.
        training_tasks: 24 tasks that the generator is fitted on.
        held_out_tasks: 8 tasks, one for each attribute and two for each format. Every attribute and every format
            occurs in the training tasks too, only never these pairs.
    """

    seed: int
    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    training_tasks: tuple[Task, ...]
    held_out_tasks: tuple[Task, ...]

    def answer(self, task: Task, person: str) -> str:
        """What `task` wants to read about `person`, for instance `"Creo que es lisbon"`."""
        return task.answer_format.write(self.facts[person][task.attribute.name])

    def training_examples(self, task: Task) -> list[Example]:
        """Questions in the training phrasings, with their answers, to train a LoRA adapter on."""
        return [
            self._example(task, *parts)
            for parts in product(self.people, task.attribute.phrasings, task.answer_format.phrasings)
        ]

    def scored_examples(self, task: Task) -> list[Example]:
        """A question about each person, in phrasings that no adapter and no generator has met, to score with."""
        draw = random.Random(f"questions {self.seed} {task.name}")
        return [
            self._example(
                task,
                person,
                draw.choice(task.attribute.held_out_phrasings),
                draw.choice(task.answer_format.held_out_phrasings),
            )
            for person in self.people
        ]

    def prompts(self, task: Task, count: int = NUM_PROMPTS) -> list[str]:
        """Unlabelled prompts of a task: some of its training questions, without their answers."""
        draw = random.Random(f"prompts {self.seed} {task.name}")
        return [example.prompt for example in draw.sample(self.training_examples(task), count)]

    def questions(self, person: str) -> list[str]:
        """Every way to ask anything about a person, in any format."""
        return [
            f"{question.format(name=person)} {instruction}"
            for attribute, answer_format in product(ATTRIBUTES, FORMATS)
            for question in attribute.phrasings + attribute.held_out_phrasings
            for instruction in answer_format.phrasings + answer_format.held_out_phrasings
        ]

    def _example(self, task: Task, person: str, question: str, instruction: str) -> Example:
        return Example(f"{question.format(name=person)} {instruction}", self.answer(task, person))


def build_world(seed: int) -> World:
    """Draw a world: names, facts and held-out tasks. The same seed gives the same world."""
    draw = random.Random(f"peft_dnd worked example {seed}")
    people = _draw_names(draw, NUM_PEOPLE)
    facts = {person: {attribute.name: draw.choice(attribute.values) for attribute in ATTRIBUTES} for person in people}
    held_out = _draw_held_out_tasks(draw)
    return World(
        seed=seed,
        people=people,
        facts=facts,
        training_tasks=tuple(task for task in TASKS if task not in held_out),
        held_out_tasks=held_out,
    )


def _draw_names(draw: random.Random, count: int) -> tuple[str, ...]:
    """Invented names of two or three syllables, all different."""
    names: dict[str, None] = {}
    while len(names) < count:
        first = draw.choice("BDFGKLMNPRSTVZ") + draw.choice("aeiou") + draw.choice(("l", "n", "r", ""))
        last = draw.choice("bdfgkmptvz") + draw.choice(("a", "o", "e", "ina", "elo", "iko"))
        names[first + last] = None
    return tuple(names)


def _draw_held_out_tasks(draw: random.Random) -> tuple[Task, ...]:
    """One task of every attribute, so that every format is held out equally often."""
    formats = list(FORMATS) * (len(ATTRIBUTES) // len(FORMATS))
    draw.shuffle(formats)
    pairs = set(zip((attribute.name for attribute in ATTRIBUTES), (each.name for each in formats), strict=True))
    return tuple(task for task in TASKS if (task.attribute.name, task.answer_format.name) in pairs)
