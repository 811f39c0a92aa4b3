# SPDX-License-Identifier: Apache-2.0
"""Every Python block of every page runs, page by page from top to bottom, on tiny models of the same names."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.constants import TASK_PROMPTS
from support.documented import PAGES, ROOT, blocks, generator_that_reads_states, name_of, names_for
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    write_examples,
)


pytest_plugins = ("support.documented",)

# test_docs.py runs these two, with models of their own.
ELSEWHERE = {"docs/tutorial/fit-your-own-generator.md", "docs/how-to/move-a-system-prompt-into-the-weights.md"}
TAKES_LONG = {"docs/how-to/evaluate-a-generator.md"}
# What is too large for a tiny model, and what stands there in the test.
SMALLER: dict[str, dict[str, str]] = {
    "README.md": {'DnDTrainingArguments("generator")': 'DnDTrainingArguments("fitted", max_steps=2)'},
    "docs/how-to/choose-a-condition.md": {
        "layer=12": "layer=1",
        "[6, 12, 18, 24]": "[1, 2]",
        "window_tokens=512": "window_tokens=32",
    },
    "docs/how-to/fit-on-task-loss.md": {'output_dir="generator",': 'output_dir="fitted", max_steps=2,'},
    "docs/how-to/several-bases.md": {"max_steps=3000": "max_steps=2", "max_steps=1000": "max_steps=2"},
}


def for_conditions(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> dict[str, Any]:
    generator_that_reads_states(base, names["tokenizer"], layout)
    words = "\n".join(f"{word} {place / 8} {-place / 8}" for place, word in enumerate(("law", "river", "court")))
    Path("glove.6B.300d.txt").write_text(words, encoding="utf-8")
    for task in names["tasks"]:
        rows = [{"prompt": prompt, "answer": "court"} for prompt in names["pairs"].prompts(task)]
        text = "\n".join(map(json.dumps, rows))
        Path("pairs", task, "prompts.jsonl").write_text(text, encoding="utf-8")
    names["generator"].config.condition_text = "prompts_and_answers"
    return {"generator": names["generator"], "encoder": "sentence-transformers/all-MiniLM-L6-v2"}


def for_task_loss(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> None:
    for task in names["tasks"]:
        write_examples(f"pairs/{task}", [{"input_ids": [5, 9, 2, 41], "labels": [-100, -100, -100, 41]}])
    _, held_out = PromptCheckpointDataset.from_folder("pairs").split(["art"])
    names.update(held_out=held_out, base=base, encoder=base, embed=None, label_names=None)


def for_evaluation(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> dict[str, Any]:
    training, _ = names["pairs"].split(["law"])
    generator = names["generator"]

    def scorer(model: nn.Module, task: str) -> list[float]:
        with torch.no_grad():
            return model(input_ids=torch.tensor([[1, 5, 9, 2]])).logits[0].std(-1).tolist()

    for task in TASK_PROMPTS:
        generator.generate_adapter(TASK_PROMPTS[task]).save_pretrained(f"adapters/{task}")
    arguments = DnDTrainingArguments("fitted", report_to="none")
    names.update(
        training_pairs=training,
        scorer_with_examples=scorer,
        trainer=DnDTrainer(generator, arguments, train_dataset=training),
        predict=lambda model, task: [0],
        labels={"law": [0]},
        question="what is the law ?",
        answer="court",
        fit=lambda training_pairs, task: generator,
    )
    return {"scorer": scorer}


def without_pairs(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> None:
    shutil.rmtree("pairs")


def for_existing_adapters(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> None:
    shutil.rmtree("pairs")
    for task in ("law", "med"):
        names["generator"].generate_adapter(TASK_PROMPTS[task]).save_pretrained(f"org/{task}-lora")
    card = "---\nwidget:\n- text: what is the medicine of a doctor ?\n---\n# An adapter\n"
    Path("org", "med-lora", "README.md").write_text(card, encoding="utf-8")


def for_sharing(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> None:
    shutil.copytree("org/generator", "me/generator")


def for_several_bases(names: dict[str, Any], base: nn.Module, layout: AdapterLayout) -> None:
    for size in ("0.5b", "1.5b", "3b", "7b"):
        shutil.copytree("pairs", f"pairs-{size}")
    shutil.copytree("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-3B")


# What a page takes for granted besides; it may give names that each block finds as they were.
PREPARED: dict[str, Callable[[dict[str, Any], nn.Module, AdapterLayout], dict[str, Any] | None]] = {
    "docs/how-to/collect-pairs.md": without_pairs,
    "docs/how-to/pairs-from-adapters-that-exist.md": for_existing_adapters,
    "docs/how-to/share-a-generator.md": for_sharing,
    "docs/how-to/several-bases.md": for_several_bases,
    "docs/how-to/choose-a-condition.md": for_conditions,
    "docs/how-to/fit-on-task-loss.md": for_task_loss,
    "docs/how-to/evaluate-a-generator.md": for_evaluation,
}


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names under which something was to be uploaded; what the methods are called with must be theirs."""
    found: list[str] = []
    for kind in (PromptConditionedLoraGenerator, GeneratedAdapter):
        signature = inspect.signature(kind.push_to_hub)

        def push(*args: Any, signature: inspect.Signature = signature, **options: Any) -> None:
            found.append(signature.bind(*args, **options).arguments["repo_id"])

        monkeypatch.setattr(kind, "push_to_hub", push)
    return found


def runnable() -> list[Any]:
    pages = [page for page in PAGES if blocks(page, "python") and name_of(page) not in ELSEWHERE]
    slow = {name: [pytest.mark.slow] if name in TAKES_LONG else [] for name in map(name_of, pages)}
    return [pytest.param(page, id=name_of(page), marks=slow[name_of(page)]) for page in pages]


@pytest.mark.parametrize("page", runnable())
def test_every_python_block_runs(
    page: Path,
    documented: Path,
    pushed: list[str],
    fresh_base: Callable[[], nn.Module],
    word_tokenizer: PreTrainedTokenizerFast,
    layout: AdapterLayout,
) -> None:
    name = name_of(page)
    names = names_for(fresh_base, word_tokenizer)
    own = PREPARED[name](names, fresh_base(), layout) or {} if name in PREPARED else {}
    for number, code in enumerate(blocks(page, "python")):
        for large, small in SMALLER.get(name, {}).items():
            code = code.replace(large, small)
        # What an earlier section made of these is another story.
        names.update(base_model=fresh_base(), **own)
        exec(compile(code, f"{name}, block {number + 1}", "exec"), names)
    assert all("/" in repository for repository in pushed)


def test_recipes_on_a_page_are_read_as_the_recipes_that_they_are(tmp_path: Path) -> None:
    """The command's recipe on the page about system prompts is run by test_docs.py."""
    spec = importlib.util.spec_from_file_location("recipe_of_examples", ROOT / "examples" / "recipes" / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their own annotations
    spec.loader.exec_module(module)
    recipe, data_set = blocks(ROOT / "docs" / "how-to" / "run-the-papers-experiments.md", "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    assert module.load_recipe(tmp_path / "mine.yaml").held_out
    for name, fields in yaml.safe_load(data_set).items():
        assert module.parse(module.DataSet, fields, name).hub_id
    others = [code for page in PAGES for code in blocks(page, "yaml")]
    assert all(isinstance(yaml.safe_load(code), dict) for code in others)


def test_what_stands_in_place_of_large_numbers_is_still_on_the_pages() -> None:
    for page in PAGES:
        code = "".join(blocks(page, "python"))
        assert all(large in code for large in SMALLER.get(name_of(page), {})), name_of(page)
    known = {name_of(page) for page in PAGES}
    assert {*SMALLER, *PREPARED, *ELSEWHERE, *TAKES_LONG} <= known
