# SPDX-License-Identifier: Apache-2.0
"""What the world is made of: operations, forms of answer, and the tasks that put the two together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property


# This share of all inputs is for testing, in every task: an input never stands on both sides anywhere in the world.
TEST_SHARE = 1 / 3
LONGEST_ANSWER = 60
MOST_TRAIN = 300
MOST_TEST = 120

Pair = tuple[str, str]


@cache
def share_of(*names: object) -> float:
    """A number in [0, 1) that depends on the names alone, the same on every machine and in every process."""
    text = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@dataclass(frozen=True)
class Example:
    """One solved example: the raw input, and the one right output."""

    input: str
    output: str


@dataclass(frozen=True)
class OperationWording:
    """How people ask for an operation.

    `nouns` name the answer ("the capital of the country") and fit into the shapes of `wordings`; `sentences` are whole
    instructions. `{a|b}` stands for either. `input` is what the input is called ("country").
    `inner` are nouns to stand for `{it}` in the others, where an operation has two steps.
    """

    input: str
    nouns: tuple[str, ...]
    sentences: tuple[str, ...]
    plural: bool = False
    inner: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Operation:
    """What to do to the input.

    Attributes:
        name: Unique in the world.
        family: The data it comes from; families are held out as a whole.
        answer: The kind of answer, which says what forms fit: word, name, number, letter, list, phrase, sentence,
            code, yesno or foreign.
        wording: How people ask for it.
        pairs: Gives the inputs with their plain answers.
        domain: In which `lexicon` answers are translated, if any.
        languages: The languages that it has to do with in itself (it reads or writes them).
        forms: Names of the forms that it comes in; None: drawn from those that fit.
        parts: Where it is made of several steps, their names; else empty.
        senses: Names of the operations that do the same, in full or in one of its steps; empty: it is like no other.
        most_forms: At most so many forms beside the plain one; None: as many as others have.
    """

    name: str
    family: str
    answer: str
    wording: OperationWording
    pairs: Callable[[], Sequence[Pair]]
    domain: str | None = None
    languages: tuple[str, ...] = ()
    forms: tuple[str, ...] | None = None
    parts: tuple[str, ...] = ()
    senses: tuple[str, ...] = ()
    most_forms: int | None = None


@dataclass(frozen=True)
class Form:
    """The form that an answer is given in.

    `apply(answer, operation)` is None where the form does not suit this answer. `tails` follow a noun or a sentence
    ("in capital letters"), `wraps` stand around a noun ("the first letter of {np}"), `notes` are sentences of their
    own that may stand before or after the request, `after` those that must follow it. `sense` names the operation that
    does the same to the input itself, if there is one.
    """

    name: str
    kinds: frozenset[str]
    apply: Callable[[str, Operation], str | None]
    tails: tuple[str, ...] = ()
    wraps: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    sense: str | None = None


Writer = Callable[["Task", str, int], list[str]]


@dataclass(frozen=True, eq=False)
class Task:
    """One task of the world: an operation, and the forms its answer takes, inner one first.

    Attributes:
        name: `operation/form` or `operation/form+form`.
        kind: "training", "new_combinations", "new_operations", "new_languages", "new_families" or "real_text".
    """

    name: str
    operation: Operation
    forms: tuple[Form, ...]
    kind: str = "training"
    given: tuple[tuple[Example, ...], tuple[Example, ...]] | None = field(default=None, repr=False)
    write: Writer | None = field(default=None, repr=False)
    write_in: Callable[[Task, str], list[str]] | None = field(default=None, repr=False)

    @property
    def family(self) -> str:
        return self.operation.family

    @property
    def form(self) -> str:
        return "+".join(form.name for form in self.forms)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it is made of: its operation, then its forms."""
        return (*(self.operation.parts or (self.operation.name,)), *(form.name for form in self.forms))

    @property
    def languages(self) -> frozenset[str]:
        return frozenset(self.operation.languages).union(*(form.languages for form in self.forms))

    @cached_property
    def train(self) -> list[Example]:
        """Examples for fitting; no input of theirs is in any task's test."""
        return list(self.given[0]) if self.given else self._examples(MOST_TRAIN, test=False)

    @cached_property
    def test(self) -> list[Example]:
        return list(self.given[1]) if self.given else self._examples(MOST_TEST, test=True)

    def _examples(self, most: int, *, test: bool) -> list[Example]:
        found: list[Example] = []
        for text, answer in pairs_of(self.operation)[test]:
            output = apply_forms(answer, self.operation, self.forms)
            if output is not None and 0 < len(output) <= LONGEST_ANSWER:
                found.append(Example(text, output))
            if len(found) == most:
                break
        return found

    def examples(self, split: str) -> list[Example]:
        """`train` or `test`, by name."""
        return {"train": self.train, "test": self.test}[split]

    def instructions(self, split: str = "seen", limit: int = 200) -> list[str]:
        """Instructions for this task in many wordings, none twice, the same each time.

        Args:
            split: "seen", or "unseen": made of wordings and shapes that "seen" never uses.
            limit: At most so many.
        """
        if split not in ("seen", "unseen"):
            raise ValueError(f"split must be 'seen' or 'unseen', not {split!r}.")
        assert self.write is not None, "The world gives each task its writer."
        return self.write(self, split, limit)

    def instructions_in(self, language: str) -> list[str]:
        """Whole instructions in another language, written by hand; empty where there are none."""
        return self.write_in(self, language) if self.write_in else []


@cache
def pairs_of(operation: Operation) -> dict[bool, list[Pair]]:
    """An operation's inputs with their plain answers, each input once, by whether they are for testing.

    They are in no order of the alphabet or of size: the first of them are a fair draw.
    """
    pairs = dict(reversed(operation.pairs()))
    order = sorted(pairs.items(), key=lambda pair: share_of("order", pair[0]))
    return {test: [pair for pair in order if is_test(pair[0]) == test] for test in (False, True)}


def is_test(text: str) -> bool:
    """Whether an input is for testing, in every task that has it."""
    return share_of("input", text) < TEST_SHARE


def apply_forms(answer: str, operation: Operation, forms: Iterable[Form]) -> str | None:
    """The answer in the given forms, the first applied first, or None where one does not suit it."""
    output: str | None = answer
    for form in forms:
        if output is None:
            return None
        output = form.apply(output, operation)
    return output
