# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a generator's configuration can be meant: it may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import GeneratorConfigError, did_you_mean
from ..text.prompts_and_answers import check_condition_text


CONDITIONS = ("token_states", "sentence_embeddings", "padded_token_states")
NORMALIZATIONS = ("per_tensor", "none")
TOKEN_FORMATS = ("chunks", "published")
# Beyond all sense, and what sizes of tensors can be: a file that says so is damaged, or lies.
_TOO_LARGE = 2**31


def check_values(config: Any) -> None:
    """Refuse values that are none of a generator's configuration.

    Raises:
        GeneratorConfigError: If there is one.
    """
    if config.layout is not None and not isinstance(config.layout, Mapping):
        raise GeneratorConfigError(f"layout must be an AdapterLayout or its dictionary, got {config.layout!r:.80}.")
    for name in ("text_encoder", "text_encoder_revision"):
        if not isinstance(getattr(config, name), str | None):
            raise GeneratorConfigError(f"{name} must be a text or None, got {getattr(config, name)!r:.80}.")
    for name in ("text_encoder_in_folder", "freeze_text_encoder"):
        if not isinstance(getattr(config, name), bool):
            raise GeneratorConfigError(f"{name} must be True or False, got {getattr(config, name)!r:.80}.")
    for name in ("num_prompts", "max_prompt_length", "condition_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < _TOO_LARGE:
            raise GeneratorConfigError(f"{name} must be a positive integer, got {value!r:.80}.")
    layers = config.text_encoder_layers or []
    named = [("text_encoder_layers", layer, -_TOO_LARGE) for layer in layers]
    for name, least in (("text_encoder_layer", 0), ("window_tokens", 1), ("chunk_width", 1)):
        named.append((name, getattr(config, name), least))
    for name, value, least in named:
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or not least <= value < _TOO_LARGE
        ):
            raise GeneratorConfigError(
                f"{name} must be an integer of at least {least}, or None, got {value!r:.80}. "
                "PromptConditionedLoraGeneratorConfig.from_adapters takes a layer counted from the end."
            )
    check_condition_text(config.condition_text, config.answer_ratio)
    choices_of = {"condition": CONDITIONS, "normalization": NORMALIZATIONS, "token_format": TOKEN_FORMATS}
    for name, choices in choices_of.items():
        if getattr(config, name) not in choices:
            raise GeneratorConfigError(f"{name} must be one of {choices}, got {getattr(config, name)!r}.")
    if config.condition == "sentence_embeddings" and config.max_prompt_length != 1:
        raise GeneratorConfigError(
            f"With condition='sentence_embeddings' each prompt is one vector, so max_prompt_length must be 1, got "
            f"{config.max_prompt_length}."
        )
    if config.token_format == "published" and config.normalization != "none":
        raise GeneratorConfigError(
            "Tokens of the format 'published' carry their own scales: set normalization='none', not "
            f"{config.normalization!r}, or use token_format='chunks'."
        )


def as_list(layers: Sequence[int]) -> list[int]:
    """The layers of a text encoder, as JSON has them; refuses what is no list."""
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise GeneratorConfigError(f"text_encoder_layers must be a list of integers, or None, got {layers!r:.80}.")
    return list(layers)


def as_dict(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """A setting that is a dictionary, empty for `None`; refuses what is none."""
    if value is not None and not isinstance(value, Mapping):
        raise GeneratorConfigError(f"{name} must be a dictionary, got {value!r}.")
    return dict(value or {})


def refuse_misspelt(kwargs: Mapping[str, Any], own: list[str]) -> None:
    """Refuse a keyword that is nearly one of a configuration's own."""
    # transformers keeps unknown keywords as attributes, so that configurations of other versions load; a near miss of
    # one of our own names is a typo, though, and would silently leave the default in force.
    for name in kwargs:
        meant = did_you_mean(name, own, cutoff=0.85)
        if meant:
            raise GeneratorConfigError(f"Unknown setting {name!r}.{meant}")
