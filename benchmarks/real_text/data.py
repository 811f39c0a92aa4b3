# SPDX-License-Identifier: Apache-2.0
"""Labelled text: from a folder, or from the Hub.

A folder holds `tasks/<name>/` with `task.json` (`"instruction"`, `"labels"`) and `train.jsonl` and `test.jsonl`, whose
rows are `{"text": ..., "label": ...}` with one of the label names.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hub import HUB_TASKS, HubTask


# The tasks whose answer is one of a fixed set of label names that mean something. Left out of the folder's 21: arc_c,
# arc_e and obqa, whose choices differ from row to row, so that no label names describe the task and a step costs
# four times as much; and boolq, whose questions come without the passage that answers them.
DEVELOPMENT_TASKS = ("clinc_travel", "sst2", "trec")
HELD_OUT_TASKS = (
    "banking77",
    "clinc_auto_and_commute",
    "clinc_banking",
    "clinc_credit_cards",
    "clinc_home",
    "clinc_kitchen_and_dining",
    "clinc_meta",
    "clinc_small_talk",
    "clinc_utility",
    "clinc_work",
    "snips",
    "subj",
    "tweet_emotion",
    "tweet_irony",
)
TASKS = tuple(sorted((*DEVELOPMENT_TASKS, *HELD_OUT_TASKS)))

_TRAINING_ROWS = 1500
_TEST_ROWS = 300


@dataclass(frozen=True)
class TextTask:
    """A task: texts, each with one of a few label names.

    Args:
        name: Its name.
        instruction: What is asked, in a sentence.
        labels: The label names.
        train: (text, number of its label) of the training rows.
        test: The same of the test rows.
    """

    name: str
    instruction: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def add_source(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Let a command be told where the tasks come from; `options.data or options.hub` says whether it was."""
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--data", type=Path, help="a folder in the format that real_text/data.py describes")
    source.add_argument("--hub", action="store_true", help="read the data sets from the Hub instead")


def source_given(options: argparse.Namespace) -> str:
    """The options that name the source, for the command that stands in a result; no path of the machine."""
    return " --hub" if options.hub else " --data FOLDER" if options.data else ""


def load_tasks(folder: Path | None, names: Sequence[str] = TASKS) -> dict[str, TextTask]:
    """Read tasks from a folder, or from the Hub.

    Args:
        folder: The folder; `None` for the Hub, which `hub.py` says where to look in.
        names: Their names.

    Returns:
        Name -> task, with at most 1500 training and 300 test rows, drawn by a fixed seed.
    """
    return {name: _from_hub(name, HUB_TASKS[name]) if folder is None else _from_folder(name, folder) for name in names}


def _from_folder(name: str, folder: Path) -> TextTask:
    path = folder / "tasks" / name
    if not (path / "task.json").is_file():
        raise SystemExit(
            f"There is no {path / 'task.json'}. --data takes a folder as described at the top of data.py."
        )
    about = json.loads((path / "task.json").read_text(encoding="utf-8"))
    splits = {}
    for split in ("train", "test"):
        lines = (path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        splits[split] = [(row["text"], row["label"]) for row in map(json.loads, lines)]
    return _task(name, about["instruction"], about["labels"], splits["train"], splits["test"])


def _from_hub(name: str, source: HubTask) -> TextTask:
    from datasets import load_dataset

    splits = {}
    for split, its_name in (("train", "train"), ("test", source.test_split)):
        loaded = load_dataset(source.repo_id, source.config, revision=source.revision, split=its_name)
        classes = getattr(loaded.features[source.label], "names", None)
        rows = []
        for text, label in zip(loaded[source.text], loaded[source.label], strict=True):
            found = source.label_name(label if classes is None else classes[label])
            if found is not None:
                rows.append((text, found))
        splits[split] = rows
    labels = sorted({label for _, label in splits["train"]})
    return _task(name, source.instruction, labels, splits["train"], splits["test"])


def _task(
    name: str,
    instruction: str,
    labels: Sequence[str],
    train: list[tuple[str, str]],
    test: list[tuple[str, str]],
) -> TextTask:
    number = {label: i for i, label in enumerate(labels)}

    def some(rows: list[tuple[str, str]], most: int) -> tuple[tuple[str, int], ...]:
        kept = random.Random(f"rows of {name}").sample(rows, min(most, len(rows)))
        return tuple((text, number[label]) for text, label in kept)

    return TextTask(name, instruction, tuple(labels), some(train, _TRAINING_ROWS), some(test, _TEST_ROWS))
