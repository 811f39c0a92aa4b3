# SPDX-License-Identifier: Apache-2.0
"""The hard world: people and facts as in the worked example, and tasks whose properties interact.

A prompt asks for a fact, and wants the answer polite or rude, brief or long, quiet or loud, or wants it not so:

    Which city does Belmo live in? Do not answer rudely, briefly or loudly.   ->   I gladly tell you: lisbon.

So the manner in which to answer depends on tone, length, voice and the negation together; none of them says anything
by itself. What an adapter must do is therefore no sum of what the words of the prompt say, and neither are its
weights. Every task differs from the one that wants the reverse by nothing but a "not".

Everything here is plain Python and follows from one seed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from phrases import HELD_OUT, TRAINING, with_typos
from world import ATTRIBUTES, Example


# With fewer people a LoRA adapter learns them by heart, and does worse on people it has not met.
NUM_PEOPLE = 96
NUM_SCORED_PEOPLE = 16
NUM_PROMPTS = 64
NUM_TRAINING_EXAMPLES = 512
NUM_HELD_OUT_BEHAVIOURS = 4
# This share of the tasks with a negation is trained, and all others. Most instructions are plain, as in life; where
# both are equally many no word of an instruction tells anything by itself, and what it does tell is hard to find.
NEGATED_SHARE = 0.5

VALUES = {attribute.name: attribute.values for attribute in ATTRIBUTES}
KINDS = tuple(VALUES)

# The other sorts of prompt stand beside English ones with these shares.
TYPOS, LANGUAGES = "typos", ("spanish", "german", "french")
TRAINING_MIX = {"english": 0.79, TYPOS: 0.12, "spanish": 0.03, "german": 0.03, "french": 0.03}
HELD_OUT_MIX = {"english": 0.50, TYPOS: 0.25, "spanish": 0.09, "german": 0.08, "french": 0.08}


@dataclass(frozen=True)
class Behaviour:
    """What an adapter has to do.

    Args:
        kind: the kind of fact to name.
        rude: whether to be rude.
        long: whether to answer at length.
        loud: whether to shout.
    """

    kind: str
    rude: bool
    long: bool
    loud: bool

    def write(self, value: str) -> str:
        """The answer. The token before the value is the same in all, so that adapters can be put together."""
        openings = {
            (False, False): "Gladly",
            (False, True): "I gladly tell you",
            (True, False): "Pff",
            (True, True): "Any fool knows it",
        }
        return f"{openings[self.rude, self.long]}: {value}{'!' if self.loud else '.'}"


@dataclass(frozen=True)
class Task:
    """What a prompt says.

    Args:
        kind: the kind of fact that is asked for.
        unwanted: whether the instruction says how not to answer.
        rude: whether it says "rudely".
        long: whether it says "at length".
        loud: whether it says "loudly".
    """

    kind: str
    unwanted: bool
    rude: bool
    long: bool
    loud: bool

    @property
    def behaviour(self) -> Behaviour:
        """What is meant by it."""
        return Behaviour(self.kind, self.rude != self.unwanted, self.long != self.unwanted, self.loud != self.unwanted)

    @property
    def name(self) -> str:
        """For instance `city_not_rude_brief_loud`."""
        manner = f"{'rude' if self.rude else 'polite'}_{'long' if self.long else 'brief'}"
        manner += "_loud" if self.loud else "_quiet"
        return f"{self.kind}_{'not_' if self.unwanted else ''}{manner}"


BEHAVIOURS = tuple(Behaviour(kind, *flags) for kind, *flags in product(KINDS, *[(False, True)] * 3))
TASKS = tuple(Task(kind, *flags) for kind, *flags in product(KINDS, *[(False, True)] * 4))


@dataclass(frozen=True)
class World:
    """All that one seed decides.

    Args:
        seed: what the rest was drawn with.
        training_people: their questions train the LoRAs and are the prompts of a task.
        scored_people: their questions are asked when an adapter is scored, and never before.
        facts: person -> kind -> value.
        training_tasks: 90 tasks that the generator is fitted on.
        held_out_tasks: the 8 tasks of four behaviours that no training task has: no training adapter answers as they
            want.
    """

    seed: int
    training_people: tuple[str, ...]
    scored_people: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    training_tasks: tuple[Task, ...]
    held_out_tasks: tuple[Task, ...]

    @property
    def people(self) -> tuple[str, ...]:
        """Everyone the base knows."""
        return self.training_people + self.scored_people

    def answer(self, behaviour: Behaviour, person: str) -> str:
        """What is wanted about `person`, for instance `Pff: lisbon!`."""
        return behaviour.write(self.facts[person][behaviour.kind])

    def training_examples(self, task: Task) -> list[Example]:
        """Questions about the training people in the training wordings, with answers, to train a LoRA adapter on."""
        draw = self._draw("examples", task)
        sorts = _mixed(TRAINING_MIX, NUM_TRAINING_EXAMPLES)
        people = [draw.choice(self.training_people) for _ in sorts]
        return [
            Example(write_prompt(task, person, sort, draw, held_out=False), self.answer(task.behaviour, person))
            for person, sort in zip(people, sorts, strict=True)
        ]

    def scored_examples(self, task: Task) -> list[Example]:
        """Four questions about each person that no adapter was trained on, in wordings that none has met."""
        draw = self._draw("questions", task)
        return [
            Example(write_prompt(task, person, sort, draw, held_out=True), self.answer(task.behaviour, person))
            for person in self.scored_people
            for sort in ("english", "english", TYPOS, draw.choice(LANGUAGES))
        ]

    def prompts(self, task: Task, sort: str | None = None, count: int = NUM_PROMPTS) -> list[str]:
        """Unlabelled prompts of a task about the training people.

        Those of a training task are in the training wordings, those of a held-out task in the others.

        Args:
            task: The task.
            sort: `"english"`, `"typos"` or another language, for prompts of one sort alone; all mixed by default.
            count: How many.
        """
        draw = self._draw(f"prompts {sort}", task)
        held_out = task in self.held_out_tasks
        mix = {sort: 1.0} if sort else HELD_OUT_MIX if held_out else TRAINING_MIX
        return [
            write_prompt(task, draw.choice(self.training_people), each, draw, held_out=held_out)
            for each in _mixed(mix, count)
        ]

    def _draw(self, what: str, task: Task) -> random.Random:
        return random.Random(f"{what} {self.seed} {task.name}")


def write_prompt(task: Task, person: str, sort: str, draw: random.Random, *, held_out: bool) -> str:
    """One prompt of a task about a person.

    Args:
        task: The task.
        person: The person's name.
        sort: `"english"`, `"typos"` or another language.
        draw: Chooses the wordings.
        held_out: Whether to use the wordings that nothing is fitted on.
    """
    language = "english" if sort == TYPOS else sort
    words = (HELD_OUT if held_out else TRAINING)[language]
    question = draw.choice(words.questions[task.kind]).format(person=person)
    instruction = draw.choice(words.instructions)[task.unwanted].format(
        tone=draw.choice(words.tones)[task.rude],
        length=draw.choice(words.lengths)[task.long],
        voice=draw.choice(words.voices)[task.loud],
    )
    text = f"{question} {instruction}"
    return with_typos(text, person, draw) if sort == TYPOS else text


def build_world(seed: int) -> World:
    """Draw a world: names, facts, tasks, and who is scored. The same seed gives the same world."""
    draw = random.Random(f"peft_dnd hard world {seed}")
    people = _draw_names(draw, NUM_PEOPLE)
    facts = {person: {kind: draw.choice(values) for kind, values in VALUES.items()} for person in people}
    held_out = _draw_held_out_behaviours(draw)
    return World(
        seed=seed,
        training_people=people[NUM_SCORED_PEOPLE:],
        scored_people=people[:NUM_SCORED_PEOPLE],
        facts=facts,
        training_tasks=_draw_training_tasks(draw, held_out),
        held_out_tasks=tuple(task for task in TASKS if task.behaviour in held_out),
    )


def _draw_names(draw: random.Random, count: int) -> tuple[str, ...]:
    """Invented names of two or three syllables, all different."""
    starts = ["".join(parts) for parts in product("BDFGKLMNPRSTVZ", "aeiou", ("l", "n", "r", ""))]
    ends = ["".join(parts) for parts in product("bdfgkmptvz", ("a", "o", "e", "ina", "elo", "iko"))]
    return tuple(first + last for first, last in draw.sample(list(product(starts, ends)), count))


def _draw_held_out_behaviours(draw: random.Random) -> set[Behaviour]:
    """Behaviours of different kinds and different manners.

    There are few: where a kind lacks many manners, a generator may learn to guess the manner from what is lacking.
    """
    kinds = draw.sample(KINDS, NUM_HELD_OUT_BEHAVIOURS)
    manners = draw.sample(list(product((False, True), repeat=3)), NUM_HELD_OUT_BEHAVIOURS)
    return {Behaviour(kind, *manner) for kind, manner in zip(kinds, manners, strict=True)}


def _draw_training_tasks(draw: random.Random, held_out: set[Behaviour]) -> tuple[Task, ...]:
    tasks = [task for task in TASKS if task.behaviour not in held_out]
    negated = [task for task in tasks if task.unwanted]
    kept = set(draw.sample(negated, round(NEGATED_SHARE * len(negated))))
    return tuple(task for task in tasks if not task.unwanted or task in kept)


def _mixed(shares: dict[str, float], count: int) -> list[str]:
    """Each sort as often as its share says, in turn; the first sort fills up."""
    counts = {sort: round(share * count) for sort, share in shares.items()}
    first = next(iter(counts))
    counts[first] += count - sum(counts.values())
    return [sort for sort, times in counts.items() for _ in range(times)]
