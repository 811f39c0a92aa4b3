# SPDX-License-Identifier: Apache-2.0
"""Further tasks from folders of the user's own: short tasks on words, and real text with its labels.

A folder of word tasks has a `<name>.jsonl` a task, rows `{"input", "output"}`, and may have `instructions.json`,
lists of instructions by name. A folder of real text has a folder a task with `task.json` (`instruction`, `labels`),
`train.jsonl` and `test.jsonl`, rows `{"text", "label"}` and, for multiple choice, `"choices"`. Nothing is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .supplied_wordings import LEFT_OUT, WORD_TASKS, KindOfTask, text_wording
from .tasks import LONGEST_ANSWER, MOST_TEST, MOST_TRAIN, Example, Form, Operation, OperationWording, Task, share_of
from .wordings import fill, sections


LONGEST_TEXT = 60
# More label names than this make an instruction nobody would write.
MOST_LABELS = 20


class SuppliedDataError(ValueError):
    """A folder or file given as data is not what it should be; the message says where and what to do."""


def read_folder(folder: str | Path) -> tuple[list[Operation], list[Task]]:
    """The operations on words, or the tasks of real text, that a folder holds.

    Raises:
        SuppliedDataError: There is no such folder, it holds neither sort of task, or a file of it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SuppliedDataError(f"There is no folder {folder}: give --data a folder of tasks, or leave it out.")
    described = sorted(path.parent for path in folder.glob("*/task.json"))
    if (folder / "task.json").is_file():
        described = [folder]
    if described:
        return [], [task for path in described if (task := _text_task(path))]
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SuppliedDataError(
            f"{folder} holds neither word tasks (*.jsonl) nor tasks of real text (<name>/task.json): "
            "give --data a folder of either sort."
        )
    instructions = _read_json(folder / "instructions.json") if (folder / "instructions.json").is_file() else {}
    kept = [file for file in files if file.stem not in LEFT_OUT]
    return [_word_operation(file, instructions.get(file.stem, [])) for file in kept], []


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SuppliedDataError(f"{path} is no JSON ({error}): mend it or take it out of the folder.") from error


def read_rows(path: Path, *fields: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, each with the given fields."""
    if not path.is_file():
        raise SuppliedDataError(
            f"{path} is missing: the task in {path.parent} needs it. Add it, or take the task out."
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SuppliedDataError(f"{path}, line {number} is no JSON ({error}): mend or delete it.") from error
            missing = [field for field in fields if not isinstance(row, dict) or not isinstance(row.get(field), str)]
            if missing:
                raise SuppliedDataError(
                    f"{path}, line {number} has no text for {', '.join(missing)} (found: {line.strip()[:80]}): "
                    f"each row must be an object with {', '.join(fields)}."
                )
            yield row


def _word_operation(file: Path, instructions: list[str]) -> Operation:
    known = WORD_TASKS.get(file.stem)
    people = tuple(text for text in map(_as_sentence, instructions) if text)
    if known is None and not people:
        raise SuppliedDataError(
            f"Nothing says how to ask for {file.name}: add a list of instructions under {file.stem!r} to "
            f"{file.parent / 'instructions.json'}."
        )
    kind = known or KindOfTask("phrase", OperationWording("input", (), ()))
    wording = kind.wording
    wording = OperationWording(wording.input, wording.nouns, (*wording.sentences, *people), wording.plural)

    rows = ((row["input"].strip(), row["output"].strip()) for row in read_rows(file, "input", "output"))
    pairs = [(text, answer) for text, answer in rows if _is_short(text) and answer]
    return Operation(
        f"words_{file.stem}", "supplied words", kind.answer, wording, lambda: pairs, domain=kind.domain, most_forms=2,
        languages=kind.languages, senses=(kind.sense,) if kind.sense else (), forms=None if known else ("plain",),
    )  # fmt: skip


def _as_sentence(instruction: str) -> str | None:
    """An instruction as a sentence; None for one that breaks off."""
    text = instruction.strip()
    if not text or text.endswith((" of", ":")) or text.startswith("what the"):
        return None
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else f"{text}."


def _is_short(text: str) -> bool:
    return 0 < len(text.split()) <= LONGEST_TEXT and "\n" not in text


def _text_task(folder: Path) -> Task | None:
    """A task of real text with its labels in the instruction; None where they are too many to name."""
    described = _read_json(folder / "task.json")
    labels = described.get("labels") or []
    if len(labels) > MOST_LABELS:
        return None
    if not isinstance(described.get("instruction"), str):
        raise SuppliedDataError(f"{folder / 'task.json'} has no instruction: add one, a sentence.")
    form = _labels_form(labels) if labels else _choice_form()
    name = folder.name
    wording = text_wording(name, described["instruction"])
    operation = Operation(f"text_{name}", "real text", "phrase", wording, lambda: (), forms=())
    train = _text_examples(read_rows(folder / "train.jsonl", "text", "label"), MOST_TRAIN)
    test = _text_examples(read_rows(folder / "test.jsonl", "text", "label"), MOST_TEST)
    return Task(f"{operation.name}/{form.name}", operation, (form,), kind="real_text", given=(train, test))


def _text_examples(rows: Iterable[dict[str, Any]], most: int) -> tuple[Example, ...]:
    found: dict[str, str] = {}
    for row in rows:
        text, answer = " ".join(row["text"].split()), _clean(row["label"])
        if row.get("choices"):
            text = f"{text} Options: {'; '.join(_clean(choice) for choice in row['choices'])}"
        if _is_short(text) and len(answer) <= LONGEST_ANSWER:
            found.setdefault(text, answer)
    chosen = sorted(found, key=lambda text: share_of("order", text))[:most]
    return tuple(Example(text, found[text]) for text in chosen)


def _clean(choice: str) -> str:
    # Some published choices drag the start of the next instruction behind them.
    return choice.partition("\n")[0].strip()


def _labels_form(labels: list[str]) -> Form:
    _, lines = sections("real_text")["labels"]
    notes = tuple(fill(line, {"labels": ", ".join(labels)}) for line in lines)
    return Form("labels", frozenset(), lambda answer, _: answer, notes=notes)


def _choice_form() -> Form:
    return Form("choice", frozenset(), lambda answer, _: answer, notes=sections("real_text")["choice"][1])
