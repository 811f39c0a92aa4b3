# SPDX-License-Identifier: Apache-2.0
"""A world of real knowledge: hundreds of tasks made of data packages, the same for anyone who builds it.

A task is an operation ("the capital of the country") and a form of its answer ("in capital letters"). The tasks and
their examples are always the same; the seed says which of them, and which wordings, are held out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .families import MODULES
from .forms import FORMS, LANGUAGE_FORMS, fitting_forms
from .splits import Split, split_tasks
from .supplied import SuppliedDataError, read_folder
from .tasks import Form, Operation, Task, share_of
from .wordings import Writer, write_in


FEWEST_TRAIN = 30
FEWEST_TEST = 20
# Forms an operation comes in beside the plain one, and of them in other languages.
MOST_FORMS = 4
MOST_LANGUAGES = 3
# One form on top of another.
COMPOSED_SHARE = 0.5


class UnknownTaskError(LookupError):
    """The world has no task of that name; the message says which there are."""


@dataclass(frozen=True)
class World:
    """Tasks by name, and which of them are for what."""

    tasks: dict[str, Task]
    split: Split
    seed: int

    def of(self, kind: str) -> list[Task]:
        """The tasks of a part of the split, such as "training" or "new_combinations"."""
        return [self[name] for name in getattr(self.split, kind)]

    def __getitem__(self, name: str) -> Task:
        if name not in self.tasks:
            near = [known for known in self.tasks if known.startswith(name.partition("/")[0])][:5]
            hint = f" There is: {', '.join(near)}." if near else " `world.tasks` has their names."
            raise UnknownTaskError(f"The world has no task {name!r}.{hint}")
        return self.tasks[name]


def build_world(seed: int = 0, data: Sequence[str | Path] = ()) -> World:
    """The world's tasks and their split; the same for the same seed, anywhere.

    Args:
        seed: Of the split: what is held out. Tasks and examples do not depend on it.
        data: Folders of further tasks (`supplied.read_folder`).
    """
    operations: list[Operation] = []
    given: list[Task] = []
    for folder in data:
        of_words, of_text = read_folder(folder)
        operations += of_words
        given += of_text
    operations = [*(operation for module in MODULES for operation in module.operations()), *operations]
    tasks = [*(task for operation in operations for task in _tasks_of(operation)), *given]
    _refuse_doubles(tasks)
    tasks, split = split_tasks(tasks, seed, _self_contained())
    write = Writer(seed)
    return World({task.name: replace(task, write=write, write_in=write_in) for task in tasks}, split, seed)


def _refuse_doubles(tasks: Sequence[Task]) -> None:
    twice = [name for name, count in Counter(task.name for task in tasks).items() if count > 1]
    if twice:
        raise SuppliedDataError(f"Two folders of data have a task {twice[0]!r}: rename one of them.")


def _self_contained() -> list[str]:
    return [family for module in MODULES for family in getattr(module, "SELF_CONTAINED", ())]


def _tasks_of(operation: Operation) -> list[Task]:
    found = []
    for forms in _forms_of(operation):
        name = "+".join(form.name for form in forms)
        task = Task(f"{operation.name}/{name}", operation, forms)
        if len(task.test) >= FEWEST_TEST and len(task.train) >= FEWEST_TRAIN and _is_no_repetition(task):
            found.append(task)
    return found


def _is_no_repetition(task: Task) -> bool:
    """Whether answers vary, and are no mere copies of the input."""
    outputs = [example.output for example in task.test]
    copies = sum(example.input == example.output for example in task.test)
    return len(set(outputs)) > 1 and copies < len(outputs) / 2


def _forms_of(operation: Operation) -> list[tuple[Form, ...]]:
    """The forms that an operation comes in: plain, a few that fit, and one of them on top of another."""
    if operation.forms is not None:
        return [(FORMS[name],) for name in operation.forms]
    fitting = fitting_forms(operation)
    languages = [form for form in fitting if form in LANGUAGE_FORMS.values()]
    written = [form for form in fitting if form not in languages and form.name != "plain"]

    def drawn(forms: list[Form], count: int) -> list[Form]:
        return sorted(forms, key=lambda form: share_of("form", operation.name, form.name))[:count]

    chosen: list[tuple[Form, ...]] = [(FORMS["plain"],)]
    # An operation that has a language in it comes in a language's place: two forms are enough.
    few = operation.most_forms or (1 if operation.languages else MOST_FORMS)
    chosen += [(form,) for form in drawn(written, few)]
    if not operation.languages and operation.most_forms is None:
        chosen += [(form,) for form in drawn(languages, MOST_LANGUAGES)]
    if share_of("composed", operation.name) < COMPOSED_SHARE and written:
        chosen += _composed(chosen, written, operation)
    return chosen


def _composed(chosen: list[tuple[Form, ...]], written: list[Form], operation: Operation) -> list[tuple[Form, ...]]:
    outer = [
        form for form in written if form.name in ("capitals", "quoted", "brackets", "prefix", "exclaimed", "bold")
    ]
    finished = (*outer, *(FORMS[name] for name in ("plain", "json", "full_sentence", "hashtag")))
    inner = [forms[0] for forms in chosen if forms[0] not in finished]
    if not outer or not inner:
        return []
    key = share_of("composed forms", operation.name)
    return [(inner[int(key * len(inner))], outer[int(key * 97) % len(outer)])]
