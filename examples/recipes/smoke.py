# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for all that a recipe takes from the Hub, so that it runs in seconds, offline: models and rows.

The recipe's own lines are what runs: its templates, its harness tasks, its variations. Only sizes and numbers of steps
are made small, and what would be downloaded is made here.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import scoring
import torch
from PIL import Image
from recipe import DATA_FOLDER, Recipe, RecipeError, Shots, Variation, load_data_sets
from rows import to_example
from tiny_models import make_base, make_encoder, make_t5, make_tokenizer, make_word_vectors, register_processor
from tuning import load_base

from peft_dnd import AdapterLayout
from peft_dnd.adapters import PublishedTokenizer
from peft_dnd.generator import PaperSettings


ROWS = 12
QUESTIONS = 2
PROMPTS, PROMPT_LENGTH, CHUNK_WIDTH = 4, 12, 8
SPLITS = ("train", "validation", "test", "testmini")


@contextmanager
def stand_ins(recipe: Recipe, folder: Path) -> Iterator[Recipe]:
    """Within this context nothing is taken from the Hub.

    Args:
        recipe: A recipe.
        folder: The folder of tuned adapters; tiny models go into `smoke/` there.

    Yields:
        The same recipe with tiny models and few steps.
    """
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    models = folder / "smoke"
    images = _reads_images(recipe)
    if not (models / "base").is_dir():
        texts = [text for name in recipe.sets for text in _texts(recipe, name)]
        tokenizer = make_tokenizer(texts)
        make_base(models / "base", tokenizer, images=images, seed=recipe.seed)
        make_encoder(models / "encoder", tokenizer)
        make_t5(models / "t5", tokenizer)
        make_word_vectors(models / "words.zip", texts)
    register_processor()
    hub = StandInHub(recipe, models)
    with (
        mock.patch.object(datasets, "load_dataset", hub.load_dataset),
        mock.patch.object(huggingface_hub, "hf_hub_download", hub.download),
        mock.patch.object(scoring, "task_manager", few_tasks),
        _local_code_metric(),
    ):
        yield shrunk(recipe, models)


def shrunk(recipe: Recipe, models: Path) -> Recipe:
    """The recipe with tiny models and few steps."""
    base = str(models / "base")
    fitting = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "optim": "adamw_torch",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 1,
    }
    variations = [
        replace(v, generator=_small_generator(recipe, v, base), fitting={**v.fitting, **_small(v.fitting, fitting)})
        for v in recipe.vary or [Variation("run")]
    ]
    tuning = replace(
        recipe.tuning,
        examples=ROWS // 2,
        batch_size=2,
        steps=1,
        last_steps=2,
        multi_task_steps=0 if recipe.tuning.multi_task_steps == 0 else 1,
        bf16=False,
    )
    # Each fold of a leave-one-out is a whole experiment: two of them go through every line.
    held_out = recipe.held_out[:2] if recipe.leave_one_out else recipe.held_out
    shots = recipe.shots and Shots([1, 2], epochs=1, learning_rate=recipe.shots.learning_rate)
    few = min(recipe.evaluation.in_context_examples, 1)
    evaluation = replace(recipe.evaluation, limit=QUESTIONS, in_context_examples=few, max_answer_tokens=4)
    return replace(
        recipe,
        base=base,
        vary=variations,
        tuning=tuning,
        held_out=held_out,
        shots=shots,
        evaluation=evaluation,
    )


class StandInHub:
    """Data sets and files, made from the sample rows of a recipe's data sets.

    Args:
        recipe: The recipe.
        folder: Where files are made.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self._made: dict[tuple[str, str | None], Any] = {}

    def load_dataset(self, path: str, name: str | None = None, *, split: str | None = None, **options: Any) -> Any:
        """What `datasets.load_dataset` would give, with few rows, the same in all splits."""
        del options
        if (path, name) not in self._made:
            self._made[path, name] = datasets.Dataset.from_list(local_rows(self._sample(path, name), ROWS))
        rows = self._made[path, name]
        return datasets.DatasetDict(dict.fromkeys(SPLITS, rows)) if split is None else rows

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        """What `huggingface_hub.hf_hub_download` would give."""
        del options
        if any(v.word_vectors is not None and v.word_vectors.hub_id == repo_id for v in self.recipe.vary):
            return str(self.folder / "words.zip")
        target = self.folder / Path(filename).name
        found = next(s for s in self.recipe.sets.values() if s.image_archive and s.image_archive.hub_id == repo_id)
        with zipfile.ZipFile(target, "w") as archive:
            for index, row in enumerate(local_rows(found.sample, ROWS)):
                with archive.open(f"some/folder/{row[str(found.image)]}", "w") as file:
                    picture(index).save(file, format="PNG")
        return str(target)

    def _sample(self, path: str, name: str | None) -> list[dict[str, Any]]:
        for data_set in self.recipe.sets.values():
            configs = data_set.config if isinstance(data_set.config, list) else [data_set.config]
            own = data_set.hub_id == path and name in configs
            if own or (data_set.scoring is not None and data_set.scoring.hub_id == path):
                return data_set.sample
        raise RecipeError(f"The recipe names no data set {path!r} with the configuration {name!r}.")


def local_rows(sample: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """So many rows from a few: with the row's number in place of `<n>`, and pictures in place of `<image>`."""
    return [_filled(copy.deepcopy(sample[index % len(sample)]), index) for index in range(number)]


def picture(index: int) -> Image.Image:
    """A picture of 56 x 56 coloured points."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def _filled(value: Any, index: int) -> Any:
    if value == "<image>":
        return picture(index)
    if isinstance(value, str):
        return value.replace("<n>", str(index + 1))
    if isinstance(value, Mapping):
        return {key: _filled(item, index) for key, item in value.items()}
    return [_filled(item, index) for item in value] if isinstance(value, list) else value


def _texts(recipe: Recipe, name: str) -> list[str]:
    data_set = replace(recipe.sets[name], image=None)
    examples = [to_example(data_set, row, name) for row in local_rows(data_set.sample, ROWS)]
    return [text for e in examples if e is not None for text in (e.prompt, e.answer) if text]


def _reads_images(recipe: Recipe) -> bool:
    return "vision_config" in PaperSettings.load(recipe.settings).base_config


def _small(own: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    pool = own.get("prompt_pool_size")
    return dict(small) if pool is None else {**small, "prompt_pool_size": max(1, pool // 128)}


def _small_generator(recipe: Recipe, variation: Variation, base: str) -> dict[str, Any]:
    """A variation's overrides, then the recipe's and the settings' sizes made small."""
    settings = PaperSettings.load(recipe.settings)
    asked = {**settings.generator, **recipe.generator, **variation.generator}
    prompts = max(1, PROMPTS * int(asked["num_prompts"]) // int(settings.generator["num_prompts"]))
    small: dict[str, Any] = {
        "num_prompts": min(prompts, ROWS // 2),
        "max_prompt_length": PROMPT_LENGTH,
        "window_tokens": 8,
        "chunk_width": CHUNK_WIDTH,
        "text_encoder": str(_stand_in_encoder(asked["text_encoder"], base)),
    }
    if asked.get("text_encoder_layer") is not None:
        small |= {"text_encoder_layer": 1, "window_tokens": None}
    layout = AdapterLayout.from_lora_config(settings.lora_config(), load_base(base, bf16=False))
    grid = list(PublishedTokenizer(layout, chunk_width=CHUNK_WIDTH).grid_shape)
    decoder: dict[str, Any] = {"cascade": [[0, 0, 0], [8, 6, 8], grid], "kernel_size": 3}
    if settings.generator["decoder_config"].get("length_projection"):
        decoder["length_projection"] = {"length": 8}
    return {**variation.generator, **small, "decoder_config": decoder}


def _stand_in_encoder(name: str, base: str) -> Path:
    models = Path(base).parent
    if re.search("t5", name):
        return models / "t5"
    return Path(base) if re.search("Qwen", name) else models / "encoder"


@lru_cache(maxsize=1)
def few_tasks() -> Any:
    """The harness' index of those of its tasks alone that data sets here name; the whole takes long to make."""
    import lm_eval.tasks

    files = (file for path in DATA_FOLDER.glob("*.yaml") for file in load_data_sets(path.stem).values())
    scored = [file.scoring.task for file in files if file.scoring is not None]
    names = {task for task in scored if isinstance(task, str)}
    folders = {
        file.parent
        for file in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
        if (found := re.search(r"^task: *(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE))
        and found[1] in names
    }
    return lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)


@contextmanager
def _local_code_metric() -> Iterator[None]:
    """The metric `code_eval` comes from the Hub; here a function of the same form stands for it."""
    try:
        import evaluate
    except ImportError:
        yield
        return
    real = evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return LocalCodeMetric() if path == "code_eval" else real(path, *args, **kwargs)

    with mock.patch.object(evaluate, "load", load):
        yield


class LocalCodeMetric:
    """The share of candidates that pass their tests, each in a process of its own."""

    def compute(self, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        """As the metric of that name: pass@1 alone."""
        assert k == [1]
        passed = [
            _passes(c, test) for test, candidates in zip(references, predictions, strict=True) for c in candidates
        ]
        return {"pass@1": sum(passed) / len(passed)}, {}


def _passes(candidate: str, test: str) -> bool:
    try:
        compile(candidate, "candidate", "exec")
    except (SyntaxError, ValueError):
        return False
    command = [sys.executable, "-I", "-S", "-c", f"{candidate}\n{test}"]
    return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
