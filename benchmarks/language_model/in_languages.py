# SPDX-License-Identifier: Apache-2.0
"""The same tasks asked for in ten languages: how much of what English prompts give do others give.

For some plain training tasks there are instructions in other languages, written by hand; inputs and answers stay as
they are. All are asked in wordings that were never fitted on, in English and in the others, whether or not the
generator was fitted on other wordings of these languages.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from language_model.fitting import ASKED_WORDINGS
from language_model.judging import Contest, Size, generated
from language_model.rows import blocks, example_row, prompt_of, right
from language_model.tasks import Example, Task
from language_model.wordings import languages
from peft_dnd.storage.files import read_json, write_json


ENGLISH = "English"
_ADAPTERS_AT_ONCE = 8


@dataclass(frozen=True)
class Asked:
    """A task, its test rows, and for each language the prompts that an adapter is generated from."""

    task: Task
    rows: tuple[Example, ...]
    prompts: Mapping[str, list[str]]


def draw_in_languages(world: Any, size: Size, seed: int) -> list[Asked]:
    """The training tasks that are known in all languages, with rows and prompts drawn by the seed.

    English stands in wordings that were never fitted on, as many of them as another language has.
    """
    found = []
    for task in world.of("training"):
        told = {language: task.instructions_in(language)[-ASKED_WORDINGS:] for language in languages()}
        if not all(told.values()):
            continue
        chance = random.Random(f"languages {seed} {task.name}")
        english = task.instructions("unseen")
        few = min(map(len, (english, *told.values())))
        told = {ENGLISH: chance.sample(english, few), **told}
        inputs = [one.input for one in chance.sample(task.train, min(size.prompts, len(task.train)))]
        rows = chance.sample(task.test, min(size.rows, len(task.test)))
        prompts = {
            language: [prompt_of(lines[i % few], text) for i, text in enumerate(inputs)]
            for language, lines in told.items()
        }
        found.append(Asked(task, tuple(rows), prompts))
    return found


def score_in_languages(contest: Contest, asked: Sequence[Asked], folder: Path) -> dict[str, Any]:
    """Score the adapters of each language's prompts, or read what an earlier run has left.

    Returns:
        `"tasks"`, and for each language `"accuracy"`, `"share_of_english"` (`None` where English gives nothing) and
        `"by_task"`.
    """
    found: dict[str, Any] = {}
    for language in tqdm([ENGLISH, *languages()] if asked else [], desc="Languages", unit="language"):
        path = folder / f"{language}.json"
        if not path.is_file():
            write_json(path, _scores(contest, asked, language))
        found[language] = read_json(path)
    mean = {language: sum(of.values()) / len(of) for language, of in found.items()}
    return {
        "tasks": len(asked),
        "languages": {
            language: {
                "accuracy": mean[language],
                "share_of_english": mean[language] / mean[ENGLISH] if mean[ENGLISH] else None,
                "by_task": of,
            }
            for language, of in found.items()
        },
    }


def _scores(contest: Contest, asked: Sequence[Asked], language: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for some in blocks(asked, _ADAPTERS_AT_ONCE):
        matrices = generated(contest, [one.prompts[language] for one in some], {})
        rows = [[example_row(contest.tokenizer, row.input, row.output) for row in one.rows] for one in some]
        for one, of in zip(some, right(contest.generated_base, matrices, rows), strict=True):
            scores[one.task.name] = sum(of) / len(of)
    return scores


def language_table(result: Mapping[str, Any]) -> str:
    """The result as a table of Markdown, in percent."""
    lines = ["| prompts in | exact match, % | of English, % |", "| --- | ---: | ---: |"]
    for language, of in result["languages"].items():
        share = of["share_of_english"]
        lines.append(f"| {language} | {100 * of['accuracy']:.1f} | {'–' if share is None else f'{100 * share:.0f}'} |")
    return "\n".join(lines)
