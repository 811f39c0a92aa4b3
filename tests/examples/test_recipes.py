# SPDX-License-Identifier: Apache-2.0
"""The recipes of the paper's experiments: each is well-formed, asks rightly, and runs."""

from __future__ import annotations

import copy
import gc
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.utils import validate_repo_id

from peft_dnd import AdapterLayout, GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.evaluation import PROTOCOL_ROWS, EvaluationReport
from peft_dnd.generator.paper_settings import PaperSettings, available_settings


FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# One of each kind in the tests that always run: the plain form, and pictures. The others are slow together.
QUICK = {"common-sense-to-science"}
NEEDS_HARNESS = "the lm-evaluation-harness is not installed"


@pytest.fixture(scope="module")
def code() -> Iterator[SimpleNamespace]:
    """The recipes' modules, which find one another by their bare names."""
    for package in ("trl", "datasets", "jinja2", "PIL"):
        pytest.importorskip(package)
    names = [path.stem for path in FOLDER.glob("*.py")]
    sys.path.insert(0, str(FOLDER))
    try:
        modules = SimpleNamespace(**{name: __import__(name) for name in names})
        gc.freeze()  # trainers collect garbage at every turn, and would go through all that was imported
        yield modules
    finally:
        gc.unfreeze()
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def recipe_of(code: SimpleNamespace) -> Any:
    return lambda name: code.recipe.load_recipe(FOLDER / f"{name}.yaml")


@pytest.fixture
def all_sets(code: SimpleNamespace) -> dict[str, Any]:
    files = sorted((FOLDER / "data").glob("*.yaml"))
    return {name: of for path in files for name, of in code.recipe.load_data_sets(path.stem).items()}


def test_every_family_of_the_paper_has_a_recipe() -> None:
    assert set(RECIPES) == {
        "common-sense-leave-one-out",
        "common-sense-to-science",
        "coding",
        "math",
        "multimodal",
        "ablation-condition",
        "ablation-extractor",
        "ablation-number-of-prompts",
        "ablation-training-sets",
        "shots",
        "overhead",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_what_there_is(recipe_of: Any, name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.settings in available_settings()
    validate_repo_id(recipe.base_model)
    for data_set in recipe.sets.values():
        validate_repo_id(data_set.hub_id)
        assert "/" in data_set.hub_id  # data sets without an owner have moved
    for variation in recipe.variations:
        encoder = variation.generator.get(
            "text_encoder", PaperSettings.load(recipe.settings).generator["text_encoder"]
        )
        validate_repo_id(encoder)


@lru_cache
def layout_of(settings: str) -> AdapterLayout:
    return PaperSettings.load(settings).layout()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_at_its_real_size(code: SimpleNamespace, recipe_of: Any, tmp_path: Path, name: str) -> None:
    """Smoke runs are small. Here each variation's generator is built as large as it is, on the meta device."""
    recipe = recipe_of(name)
    settings = PaperSettings.load(recipe.settings)
    here = replace(recipe, fitting={**recipe.fitting, "bf16": False, "optim": "adamw_torch", "use_cpu": True})
    pairs = SimpleNamespace(layout=layout_of(recipe.settings))
    widths = {"google-t5/t5-base": 768, "Qwen/Qwen2.5-7B-Instruct": 3584, "Qwen/Qwen2.5-0.5B-Instruct": 896}
    for variation in recipe.variations:
        asked = variation.generator
        name_of_encoder = asked.get("text_encoder", settings.generator["text_encoder"])
        width = 300 if variation.word_vectors else widths.get(name_of_encoder, 384)
        encoder = SimpleNamespace(
            name_or_path=None if variation.word_vectors else name_of_encoder,
            layer=asked.get("text_encoder_layer"),
            window_tokens=asked.get("window_tokens"),
            embedding_size=width,
        )
        config = code.fitting.generator_config(recipe, variation, pairs, encoder)
        assert config.condition_shape == (config.num_prompts, config.max_prompt_length, width)
        with torch.device("meta"):
            generator = PromptConditionedLoraGenerator(config)
        assert sum(parameter.numel() for parameter in generator.parameters()) > 1e9
        arguments = code.fitting.training_arguments(here, variation, tmp_path)
        at_once = arguments.per_device_train_batch_size
        assert at_once * arguments.gradient_accumulation_steps == settings.batch_size
        assert variation.fitting.get("prompt_pool_size", 1e9) >= config.num_prompts


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path


def neighbours(row: Any, path: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """The row with one value replaced by another of its kind, in turn by several."""
    *above, last = path
    for value in ("A", "B", "1", "2", "0", 0, 1, "something else"):
        other = copy.deepcopy(row)
        holder = other
        for key in above:
            holder = holder[key]
        if type(value) is type(holder[last]):
            holder[last] = value
            yield other


def test_prompts_do_not_hold_their_answers(code: SimpleNamespace, all_sets: dict[str, Any]) -> None:
    for name, data_set in all_sets.items():
        if data_set.answer is None:
            continue
        for row in code.smoke.local_rows(data_set.sample, len(data_set.sample)):
            prompt, answer = (code.rows.render(t, row, name) for t in (data_set.prompt, data_set.answer))
            unseen = False
            for other in (other for path in leaves(row) for other in neighbours(row, path)):
                try:
                    texts = [code.rows.render(t, other, name) for t in (data_set.prompt, data_set.answer)]
                except code.rows.RecipeError:  # no such choice
                    continue
                unseen |= texts[0] == prompt and texts[1] != answer
            # Something decides the answer and leaves the prompt as it is; and but for a prompt that offers all
            # choices, the answer does not stand there.
            assert unseen, name
            if name != "winogrande":
                assert answer.strip() not in prompt, name


def test_a_prompt_with_choices_offers_them_all(code: SimpleNamespace, all_sets: Any) -> None:
    data_set = all_sets["winogrande"]
    row = code.smoke.local_rows(data_set.sample, 1)[0]
    prompt = code.rows.render(data_set.prompt, row, "")
    assert row["option1"] in prompt and row["option2"] in prompt
    assert code.rows.render(data_set.prompt, {**row, "answer": "2"}, "") == prompt
    assert code.rows.render(data_set.answer, {**row, "answer": "2"}, "") == row["option2"]


def test_piqa_is_not_scored_where_its_labels_are_not_true(all_sets: dict[str, Any]) -> None:
    assert all_sets["piqa"].scoring.split == "validation"
    assert all_sets["winogrande"].scoring.split == all_sets["hellaswag"].scoring.split == "validation"


def test_prompts_come_from_another_split_than_questions_or_it_is_said(all_sets: dict[str, Any]) -> None:
    for name, data_set in all_sets.items():
        scoring = data_set.scoring
        if scoring is not None and data_set.split != "train":
            assert data_set.answer is None and re.search("no training split", data_set.note), name


@pytest.fixture(scope="module")
def harness(code: SimpleNamespace) -> Any:
    pytest.importorskip("lm_eval", reason=NEEDS_HARNESS)
    pytest.importorskip("math_verify", reason=NEEDS_HARNESS)
    return code.smoke.few_tasks()


def test_the_harness_asks_as_adapters_are_tuned(
    code: SimpleNamespace, harness: Any, all_sets: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each set's question and right answer are worded alike in tuning and in scoring, and the splits are as stated."""
    import datasets

    recipe = SimpleNamespace(sets=all_sets, vary=[])
    monkeypatch.setattr(datasets, "load_dataset", code.smoke.StandInHub(recipe, tmp_path).load_dataset)
    with code.smoke._local_code_metric():
        for name, data_set in all_sets.items():
            scoring = data_set.scoring
            if scoring is None:
                continue
            (task,) = harness.load([scoring.task])["tasks"].values()
            split = task.config.test_split or task.config.validation_split
            assert split == scoring.split, name
            doc = next(iter(task.test_docs() if task.has_test_docs() else task.validation_docs()))
            row = code.smoke.local_rows(data_set.sample, 1)[0]
            example = code.rows.to_example(data_set, row, name)
            asked = task.doc_to_text(doc)
            if name == "math":  # the harness' line breaks differ
                asked = asked.replace("Problem:\n", "Problem:\n")
            assert asked.replace("<image>", "").split() == example.prompt.split(), name
            if task.OUTPUT_TYPE == "multiple_choice":
                assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == example.answer, name
            if scoring.filter is not None:
                assert scoring.filter in [f.name for f in task._filters], name


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("Two and two.\nAnswer: 4", "4"),
        ("Answer: 4.", "4"),
        ("answer: 4.5 ", "4.5"),
        ("It is A.\nAnswer: (B) four", "B"),
        ("Answer: **C**", "C"),
        ("Answer: D.\n", "D"),
        ("Answer: A dog", "A dog"),
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("four", "[invalid]"),
    ],
)
def test_the_last_answer_is_found(all_sets: dict[str, Any], written: str, found: str) -> None:
    filters = pytest.importorskip("lm_eval.filters.extraction", reason=NEEDS_HARNESS)
    options = all_sets["math_vista"].scoring.task["filter_list"][0]["filter"][0]
    options = {key: value for key, value in options.items() if key != "function"}
    assert [*filters.RegexFilter(**options).apply([[written]], [{}])] == [[found]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"settings": "common-sense-0.5"}, "Did you mean 'common-sense-0.5b'"),
        ({"heldout": ["sciq"]}, "unknown key 'heldout'. Did you mean 'held_out'"),
        ({"held_out": ["scq"]}, "unknown data set 'scq'. Did you mean 'sciq'"),
        ({"held_out": ["arc_easy"]}, "'arc_easy' is a training set too"),
        ({"leave_one_out": True}, "not a training set, as leave_one_out needs"),
        ({"tuning": {"examples": 5}}, "tuning: the key 'max_length' is missing"),
        ({"tuning": {"learning_rate": "1e-4"}}, "write 1.0e-4"),
        ({"evaluation": {"skip": ["rigde"]}}, "unknown row 'rigde'. Did you mean 'ridge'"),
        ({"vary": [{"name": "a"}, {"name": "a"}]}, "two variations have the same name"),
        ({"training": "arc_easy"}, "training: expected a list"),
    ],
)
def test_a_faulty_recipe_is_refused(code: SimpleNamespace, tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    content = yaml.safe_load((FOLDER / "common-sense-to-science.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump({**content, **edit}), encoding="utf-8")
    with pytest.raises(Exception, match=re.escape(message)):
        code.recipe.load_recipe(path)


def test_a_column_that_is_not_there_is_named(code: SimpleNamespace, all_sets: dict[str, Any]) -> None:
    with pytest.raises(code.recipe.RecipeError, match=r"'goal' is undefined. The columns are question"):
        code.rows.to_example(all_sets["piqa"], {"question": "what ?"}, "piqa")


@pytest.fixture(scope="module")
def tuned_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes on common sense share their tuned adapters."""
    return tmp_path_factory.mktemp("tuned")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_runs(
    code: SimpleNamespace,
    harness: Any,
    recipe_of: Any,
    tuned_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    arguments = [str(FOLDER / f"{name}.yaml"), "--output", str(tmp_path / "run"), "--smoke"]
    recipe = recipe_of(name)
    if "common-sense" in recipe.data:
        arguments += ["--tuned", str(tuned_folder)]
    code.run.main(arguments)
    for variation in recipe.variations:
        folder = tmp_path / "run" / "runs" / variation.name
        report = EvaluationReport.load(folder)
        expected = recipe.held_out[:2] if recipe.leave_one_out else variation.held_out
        assert list(report.tasks) == expected
        assert not set(report.rows) & set(report.not_measured)
        assert set(report.rows) | set(report.not_measured) == set(PROTOCOL_ROWS)
        assert {"base", "average_weights", "nearest", "generated", "constant"} <= set(report.rows)
        assert ("junk" in report.rows) == (variation.word_vectors is None)  # of junk, word vectors know nothing
        if all(recipe.sets[task].answer for task in expected):
            assert "trained" in report.rows
        for task in expected:
            of = folder / f"without-{task}" if recipe.leave_one_out else folder
            assert GeneratedAdapter.from_pretrained(of / "adapters" / task).num_parameters > 0
        assert json.loads((tmp_path / "run" / "recipe.json").read_text())["title"] == recipe.title
    text = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert all(left.what in text for left in recipe.not_covered)
    assert ("few-shot tuning, 2" in text) == (recipe.shots is not None)
    assert ("Generating pays" in text) == recipe.overhead

    # A second run finds everything done.
    seconds = (tmp_path / "run" / "seconds.json").read_text()
    code.run.main(arguments)
    assert (tmp_path / "run" / "seconds.json").read_text() == seconds
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == text
