# SPDX-License-Identifier: Apache-2.0
"""Which tasks are held out, and in what way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from .tasks import Operation, Task, share_of


# The kinds of held-out task that never take part in fitting, each for a reason of its own.
HELD_OUT = ("new_combinations", "new_operations", "new_languages", "new_families")
NEW_FAMILIES = 3
NEW_LANGUAGES = 3
NEW_OPERATIONS_SHARE = 0.1
NEW_COMBINATIONS_SHARE = 0.12


@dataclass(frozen=True)
class Split:
    """Names of tasks by what they serve for.

    `new_wordings` are training tasks, to be asked for in unseen wordings. `real_text` are tasks of real text that were
    given as data; they are held out.
    """

    training: tuple[str, ...]
    new_wordings: tuple[str, ...]
    new_combinations: tuple[str, ...]
    new_operations: tuple[str, ...]
    new_languages: tuple[str, ...]
    new_families: tuple[str, ...]
    real_text: tuple[str, ...] = ()
    held_families: tuple[str, ...] = field(default=())
    held_languages: tuple[str, ...] = field(default=())
    held_operations: tuple[str, ...] = field(default=())


def _drawn(names: Iterable[str], count: int, *salt: object) -> list[str]:
    return sorted(sorted(set(names), key=lambda name: share_of(*salt, name))[:count])


def split_tasks(tasks: Sequence[Task], seed: int, self_contained: Sequence[str]) -> tuple[list[Task], Split]:
    """The tasks with their kinds, and the split of a seed.

    Args:
        tasks: All tasks.
        seed: Another seed holds out other families, languages, operations and combinations.
        self_contained: Families whose data package serves no other family: `NEW_FAMILIES` of them are held out.
    """
    families = _drawn(self_contained, NEW_FAMILIES, "family", seed)
    languages = _drawn({of for task in tasks for of in task.languages}, NEW_LANGUAGES, "language", seed)
    operations = _held_operations(tasks, seed, families, languages)
    kinds: dict[str, str] = {}
    for task in tasks:
        if task.kind != "training":
            kinds[task.name] = task.kind
        elif task.family in families:
            kinds[task.name] = "new_families"
        elif task.languages & set(languages):
            kinds[task.name] = "new_languages"
        elif task.operation.name in operations:
            kinds[task.name] = "new_operations"
    rest = [task for task in tasks if task.name not in kinds]
    for name in _held_combinations(rest, seed):
        kinds[name] = "new_combinations"
    kept = [replace(task, kind=kinds.get(task.name, "training")) for task in tasks]
    by_kind: dict[str, list[str]] = defaultdict(list)
    for task in kept:
        by_kind[task.kind].append(task.name)
    training = tuple(by_kind["training"])
    held = {kind: tuple(by_kind[kind]) for kind in (*HELD_OUT, "real_text")}
    return kept, Split(
        training=training, new_wordings=training, **held,
        held_families=tuple(families), held_languages=tuple(languages), held_operations=tuple(operations),
    )  # fmt: skip


def _held_operations(tasks: Sequence[Task], seed: int, families: list[str], languages: list[str]) -> list[str]:
    """A tenth of the operations of each family, one at least where it has five.

    What is also a step of another operation, or a form of answer, stays in fitting: it would be new by name alone. And
    operations that do the same, such as those of data of the user's own, are held out together.
    """
    by_family: dict[str, set[str]] = defaultdict(set)
    elsewhere = {form.sense for task in tasks for form in task.forms}
    elsewhere |= {sense for task in tasks if task.operation.parts for sense in task.operation.senses}
    for task in tasks:
        # Languages are held out as such, operations of several steps as combinations.
        whole = not (task.operation.languages or task.operation.parts) and not elsewhere & senses_of(task.operation)
        if task.kind == "training" and task.family not in families and whole:
            by_family[task.family].add(task.operation.name)
    held: list[str] = []
    for family, names in sorted(by_family.items()):
        count = max(round(NEW_OPERATIONS_SHARE * len(names)), int(len(names) >= 5))
        held += _drawn(names, count, "operation", seed, family)
    senses = {sense for task in tasks if task.operation.name in held for sense in senses_of(task.operation)}
    return sorted({task.operation.name for task in tasks if senses & senses_of(task.operation)})


def senses_of(operation: Operation) -> set[str]:
    return {operation.name, *operation.senses}


def _held_combinations(tasks: Sequence[Task], seed: int) -> list[str]:
    """Tasks of which every part stays in fitting, in at least two other tasks.

    Of operations of several steps, such as "the capital of" and "the last country in the list", some are held out in
    all their forms: their steps stay, with other steps.
    """
    uses = Counter(part for task in tasks for part in task.parts)
    held: list[str] = []
    several = sorted({task.operation.name for task in tasks if task.operation.parts})
    for name in _drawn(several, round(NEW_COMBINATIONS_SHARE * len(several)), "steps", seed):
        theirs = [task for task in tasks if task.operation.name == name]
        lost = Counter(part for task in theirs for part in task.parts)
        if all(uses[part] - lost[part] >= 2 for part in lost):
            held += [task.name for task in theirs]
            uses -= lost
    wanted = len(held) + round(NEW_COMBINATIONS_SHARE * (len(tasks) - len(held)))
    for task in sorted(tasks, key=lambda task: share_of("combination", seed, task.name)):
        if len(held) == wanted:
            break
        if task.name not in held and task.form != "plain" and all(uses[part] > 2 for part in task.parts):
            held.append(task.name)
            for part in task.parts:
                uses[part] -= 1
    return held
