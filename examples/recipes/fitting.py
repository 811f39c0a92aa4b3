# SPDX-License-Identifier: Apache-2.0
"""Fitting a generator on a recipe's pairs, with the paper's settings and the recipe's changes to them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from recipe import Recipe, RecipeError, Variation
from rows import archived_file

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.generator import PaperSettings
from peft_dnd.generator.configuration import condition_size
from peft_dnd.text import SentenceTransformerTextEncoder


MAX_WORDS = 50_000


def fit_generator(
    recipe: Recipe, variation: Variation, pairs: PromptCheckpointDataset, folder: Path
) -> PromptConditionedLoraGenerator:
    """Fit a generator, unless it is there; an interrupted fit goes on where it was saved last.

    Args:
        recipe: The recipe.
        variation: What differs from it.
        pairs: The training sets' pairs.
        folder: Where the generator goes; what is needed on the way goes beside it.
    """
    if not (folder / "config.json").is_file():
        torch.manual_seed(recipe.seed)
        encoder = load_encoder(recipe, variation, folder.parent)
        config = generator_config(recipe, variation, pairs, encoder)
        generator = PromptConditionedLoraGenerator(config, text_encoder=encoder)
        arguments = training_arguments(recipe, variation, folder.parent / "fitting")
        trainer = DnDTrainer(generator, arguments, train_dataset=pairs)
        trainer.train(resume_from_checkpoint=any(Path(arguments.output_dir).glob("checkpoint-*")))
        generator.save_pretrained(folder)
    generator = PromptConditionedLoraGenerator.from_pretrained(folder)
    return generator.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_encoder(recipe: Recipe, variation: Variation, folder: Path) -> SentenceTransformerTextEncoder:
    """Load the text encoder that a variation reads prompts with."""
    if variation.word_vectors is not None:
        vectors = archived_file(variation.word_vectors, folder)
        return SentenceTransformerTextEncoder.from_word_vectors(vectors, max_words=MAX_WORDS)
    asked = _generator_settings(recipe, variation)
    return SentenceTransformerTextEncoder.from_pretrained(
        asked["text_encoder"], layer=asked.get("text_encoder_layer"), window_tokens=asked.get("window_tokens")
    )


def generator_config(
    recipe: Recipe,
    variation: Variation,
    pairs: PromptCheckpointDataset,
    encoder: SentenceTransformerTextEncoder,
) -> PromptConditionedLoraGeneratorConfig:
    """The settings' configuration with the recipe's changes.

    Where these change what is read (how many prompts, how long, states of which width), the cascade's first shape
    follows.
    """
    asked = _generator_settings(recipe, variation)
    asked["text_encoder"] = encoder.name_or_path
    asked["text_encoder_in_folder"] = encoder.name_or_path is None
    asked["text_encoder_layer"] = encoder.layer
    asked["window_tokens"] = encoder.window_tokens
    asked["condition_size"] = condition_size(encoder, asked["condition"])
    decoder = asked["decoder_config"]
    if decoder.get("cascade"):
        length = decoder.get("length_projection", {}).get("length", asked["max_prompt_length"])
        decoder["cascade"][0] = [asked["num_prompts"], length, asked["condition_size"]]
    return PromptConditionedLoraGeneratorConfig.from_settings(recipe.settings, layout=pairs.layout, **asked)


def training_arguments(recipe: Recipe, variation: Variation, folder: Path) -> DnDTrainingArguments:
    """The settings' training arguments with the recipe's changes, for one process on one device."""
    settings = PaperSettings.load(recipe.settings)
    asked = {"save_steps": 500, "save_total_limit": 1, "logging_steps": 50, "report_to": "none", "seed": recipe.seed}
    asked |= {**settings.training, **recipe.fitting, **variation.fitting}
    at_once = int(asked.setdefault("per_device_train_batch_size", 8))
    if settings.batch_size % at_once and "gradient_accumulation_steps" not in asked:
        raise RecipeError(
            f"The settings {settings.name!r} want {settings.batch_size} pairs a step, which is no multiple of "
            f"per_device_train_batch_size={at_once}. Set that, or gradient_accumulation_steps, under 'fitting'."
        )
    asked.setdefault("gradient_accumulation_steps", settings.batch_size // at_once)
    return DnDTrainingArguments(output_dir=str(folder), **asked)


def _generator_settings(recipe: Recipe, variation: Variation) -> dict[str, Any]:
    asked = copy.deepcopy(dict(PaperSettings.load(recipe.settings).generator))
    for changes in (recipe.generator, variation.generator):
        asked = _merge(asked, changes)
    return asked


def _merge(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Put changes over settings, key by key and inside dictionaries as well; `None` takes a key out of these."""
    merged = dict(settings)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            inner = _merge(merged[key], value)
            merged[key] = {name: item for name, item in inner.items() if item is not None}
        else:
            merged[key] = copy.deepcopy(value)
    return merged
