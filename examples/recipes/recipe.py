# SPDX-License-Identifier: Apache-2.0
"""Recipes: one experiment each, as a YAML file, read and checked before anything is computed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from peft_dnd.evaluation import PROTOCOL_ROWS
from peft_dnd.generator import PaperSettings


DATA_FOLDER = Path(__file__).parent / "data"


class RecipeError(ValueError):
    """A recipe that cannot be run as it is written."""


@dataclass(frozen=True)
class Scoring:
    """How answers on a held-out set are scored: by a task of the lm-evaluation-harness.

    Attributes:
        task: The harness' task: its name, or its whole configuration.
        split: The split that the task scores on. It is stated so that it can be checked; the task decides.
        metric: Which of the task's metrics.
        filter: Which of the task's filters, where it has several: how an answer is found in what was written.
        num_fewshot: How many solved examples stand before each question, in every row but in-context ones.
        runs_code: Whether the task executes what the model writes.
        hub_id: The data set on the Hub that the task takes its questions from, if another than the prompts'.
    """

    task: str | dict[str, Any]
    split: str
    metric: str
    filter: str | None = None
    num_fewshot: int = 0
    runs_code: bool = False
    hub_id: str | None = None


@dataclass(frozen=True)
class HubArchive:
    """A file inside a zip archive in a repository on the Hub; or, without `file`, whatever the rows name.

    Attributes:
        hub_id: The repository.
        archive: The archive's path in it.
        file: The file's path in the archive.
        repo_type: `"dataset"` or `"model"`.
    """

    hub_id: str
    archive: str
    file: str | None = None
    repo_type: str = "dataset"


@dataclass(frozen=True)
class DataSet:
    """A public data set and how its rows become prompts and answers.

    Templates are Jinja and see a row's columns by their names. A column that is not there is an error.

    Attributes:
        hub_id: The data set on the Hub.
        prompt: Template of the prompt, the user's message.
        sample: A few rows of the data set's columns, made up, from which local data is made for a smoke run. `<n>` in
            a text becomes the row's number, and `<image>` alone a picture.
        answer: Template of the answer, the assistant's message; none for a set that is only scored.
        config: The data set's configuration, or several.
        split: The split that prompts and answers are taken from.
        revision: Branch, tag or commit.
        data_files: Files, for a data set without configurations.
        keep: Template; rows for which it gives nothing, "False" or "0" are left out.
        image: The column of the picture that goes before the prompt: the picture itself, or its path in
            `image_archive`.
        image_archive: Where pictures are, if the rows only name them.
        scoring: How answers are scored, for a set that may be held out.
        note: What else there is to know.
    """

    hub_id: str
    prompt: str
    sample: list[dict[str, Any]]
    answer: str | None = None
    config: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    keep: str | None = None
    image: str | None = None
    image_archive: HubArchive | None = None
    scoring: Scoring | None = None
    note: str = ""


@dataclass(frozen=True)
class Tuning:
    """How a LoRA is tuned on one data set: first until it is good, then some more steps, of which each is kept.

    Attributes:
        examples: At most how many examples of a data set.
        max_length: At most how many tokens of an example.
        batch_size: Examples in one optimiser step.
        steps: Optimiser steps of the first part.
        learning_rate: Of the first part, with a cosine schedule.
        last_steps: Optimiser steps of the second part.
        last_learning_rate: Of the second part, constant.
        per_device_batch_size: Examples that are computed at once; the rest of a batch is accumulated.
        multi_task_steps: Steps of the one LoRA on all training sets together; by default those of a data set times
            their number; 0 leaves that row out.
        bf16: Whether to compute in bfloat16.
    """

    examples: int
    max_length: int
    batch_size: int
    steps: int
    learning_rate: float
    last_steps: int
    last_learning_rate: float
    per_device_batch_size: int = 8
    multi_task_steps: int | None = None
    bf16: bool = True


@dataclass(frozen=True)
class Evaluating:
    """How a fitted generator is evaluated.

    Attributes:
        prompts: How many prompts of a held-out set there are to draw from.
        in_context_examples: Solved examples in the in-context row; 0 leaves it out.
        limit: At most how many questions of each held-out set.
        batch_size: Sequences at once.
        max_answer_tokens: How long a written answer may get; by default as the harness' tasks say.
        skip: Rows of the protocol to leave out.
    """

    prompts: int = 512
    in_context_examples: int = 5
    limit: int | None = None
    batch_size: int = 16
    max_answer_tokens: int | None = None
    skip: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shots:
    """Few-shot tuning and in-context learning at several numbers of examples.

    Attributes:
        numbers: How many examples.
        epochs: How often a few-shot LoRA goes through its examples, one at a time.
        learning_rate: Of few-shot tuning.
    """

    numbers: list[int]
    epochs: int = 3
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Variation:
    """One of several ways in which an experiment is run.

    Attributes:
        name: A word for it, the name of its folder.
        training: Its training sets, if others than the recipe's.
        held_out: Its held-out sets, if others than the recipe's.
        generator: Overrides of the recipe's `generator`.
        fitting: Overrides of the recipe's `fitting`.
        word_vectors: A file of word vectors to read prompts with, in place of a text encoder.
    """

    name: str
    training: list[str] | None = None
    held_out: list[str] | None = None
    generator: dict[str, Any] = field(default_factory=dict)
    fitting: dict[str, Any] = field(default_factory=dict)
    word_vectors: HubArchive | None = None


@dataclass(frozen=True)
class NotCovered:
    """Something of the paper's experiment that a recipe leaves out, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        title: What it is.
        paper: Where it is in the paper (arXiv 2506.16406).
        settings: The settings of the generator: one of `peft_dnd.available_settings()`.
        data: Files of data sets, in `data/`.
        training: Names of the training sets.
        tuning: How their LoRAs are tuned.
        held_out: Names of the held-out sets. With `leave_one_out` some of the training sets.
        leave_one_out: Whether each of `held_out` is held out in turn, and a generator fitted on all others.
        base: Hub id of the base model; by default the settings'.
        generator: Overrides of the settings' `generator`.
        fitting: Overrides of the settings' `training`; keywords of `DnDTrainingArguments`.
        evaluation: How the generator is evaluated.
        shots: Few-shot tuning and in-context learning, to compare with.
        overhead: Whether to write a table of what it takes to get an adapter.
        vary: Variations that are run one after another; with none the recipe itself is run.
        not_covered: What of the paper's experiment is left out.
        seed: Of everything.
        note: What else there is to know.
        sets: The data sets by name, from `data`.
    """

    title: str
    paper: str
    settings: str
    data: list[str]
    training: list[str]
    tuning: Tuning
    held_out: list[str]
    leave_one_out: bool = False
    base: str | None = None
    generator: dict[str, Any] = field(default_factory=dict)
    fitting: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluating = field(default_factory=Evaluating)
    shots: Shots | None = None
    overhead: bool = False
    vary: list[Variation] = field(default_factory=list)
    not_covered: list[NotCovered] = field(default_factory=list)
    seed: int = 0
    note: str = ""
    sets: dict[str, DataSet] = field(default_factory=dict)

    @property
    def base_model(self) -> str:
        """The base model's Hub id or folder."""
        return self.base or PaperSettings.load(self.settings).base_model

    @property
    def variations(self) -> list[Variation]:
        """What is run: the variations, each with its training and held-out sets."""
        return [
            replace(v, training=v.training or self.training, held_out=v.held_out or self.held_out)
            for v in self.vary or [Variation("run")]
        ]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe and the data sets that it names.

    Raises:
        RecipeError: If something in it is misspelt, missing, of the wrong kind, or does not fit the rest.
    """
    content = _read(path)
    if "sets" in content:
        raise RecipeError(f"{path}: 'sets' is not for recipes: name a file of data sets under 'data'.")
    recipe: Recipe = parse(Recipe, content, str(path))
    sets: dict[str, DataSet] = {}
    for name in recipe.data:
        sets.update(load_data_sets(name))
    recipe = replace(recipe, sets=sets)
    _check(recipe, str(path))
    return recipe


def load_data_sets(name: str) -> dict[str, DataSet]:
    """Read one of the files of data sets.

    Raises:
        RecipeError: As for a recipe.
    """
    path = DATA_FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            _unknown(name, [p.stem for p in DATA_FOLDER.glob("*.yaml")], "There is no file of data sets")
        )
    return {key: parse(DataSet, value, f"{path.name}, {key}") for key, value in _read(path).items()}


def parse(kind: Any, value: Any, where: str) -> Any:
    """Make a value of a dataclass, or of a simple type, of what was read from YAML.

    Raises:
        RecipeError: With the key's place, what is wrong with it, and a suggestion where there is a likely one.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _parse_one_of(get_args(kind), value, where)
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}.")
        return [parse(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise RecipeError(f"{where}: expected keys and values, got {value!r}.")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        hint = " YAML reads 1e-4 as a text; write 1.0e-4." if kind is float and isinstance(value, str) else ""
        raise RecipeError(f"{where}: expected {kind.__name__}, got {value!r}.{hint}")
    return value


def _parse_one_of(kinds: Sequence[Any], value: Any, where: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return parse(kind, value, where)
            except RecipeError as error:
                errors.append(error)
    raise errors[0] if len(errors) == 1 else RecipeError(f"{where}: {value!r} is of none of the kinds {kinds}.")


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected keys and values, got {value!r}.")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise RecipeError(f"{where}: " + _unknown(str(key), list(hints), "unknown key"))
    parsed = {key: parse(hints[key], item, f"{where}, {key}") for key, item in value.items()}
    for own in fields(kind):
        if own.default is MISSING and own.default_factory is MISSING and own.name not in value:
            raise RecipeError(f"{where}: the key {own.name!r} is missing.")
    return kind(**parsed)


def _check(recipe: Recipe, where: str) -> None:
    PaperSettings.load(recipe.settings)
    for variation in recipe.variations:
        training, held_out = variation.training or [], variation.held_out or []
        for name in [*training, *held_out]:
            if name not in recipe.sets:
                raise RecipeError(f"{where}: " + _unknown(name, list(recipe.sets), "unknown data set"))
        for name in training:
            if recipe.sets[name].answer is None:
                raise RecipeError(f"{where}: {name!r} is a training set, and has no template of an answer.")
        for name in held_out:
            if recipe.sets[name].scoring is None:
                raise RecipeError(f"{where}: {name!r} is held out, and nothing says how it is scored.")
            if recipe.leave_one_out != (name in training):
                what = "not a training set, as leave_one_out needs" if recipe.leave_one_out else "a training set too"
                raise RecipeError(f"{where}: the held-out set {name!r} is {what}.")
    names = [variation.name for variation in recipe.variations]
    if len(set(names)) < len(names):
        raise RecipeError(f"{where}: two variations have the same name: {names}.")
    for row in recipe.evaluation.skip:
        if row not in PROTOCOL_ROWS:
            raise RecipeError(f"{where}, evaluation, skip: " + _unknown(row, list(PROTOCOL_ROWS), "unknown row"))


def _unknown(name: str, known: Sequence[str], what: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{what} {name!r}. " + (f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(_unknown(path.name, known, "There is no recipe")) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected keys and values.")
    return content
