# SPDX-License-Identifier: Apache-2.0
"""What the Hub makes of a card: its metadata, and what it would refuse in it."""

from __future__ import annotations

import re
from typing import Any

import yaml


_LICENSES = ("apache-2.0", "mit", "gemma", "cc-by-4.0", "other", "unknown")
_LISTS = ("tags", "datasets", "language", "metrics")


def card_data(text: str) -> dict[str, Any]:
    """The metadata at a card's head."""
    found = re.match(r"---\n(.*?\n)---(?:\n|$)", text, flags=re.DOTALL)
    return dict(yaml.safe_load(found[1]) or {}) if found else {}


def card_errors(text: str) -> list[dict[str, str]]:
    """What is wrong with a card's metadata, in the form in which the Hub says so.

    After the Hub's "Model cards" page and the specification in its `modelcard.md`: which values are lists, that a
    license is one of a list, and what an entry of `model-index` cannot do without.
    """
    try:
        data = card_data(text)
    except yaml.YAMLError as error:
        return [{"message": f"Invalid YAML: {error}"}]
    errors = [
        f'"{name}" must be a string or a list of strings'
        for name in _LISTS
        if name in data and not all(isinstance(value, str) for value in _listed(data[name]))
    ]
    if "license" in data and data["license"] not in _LICENSES:
        errors.append(f'"license" must be one of {list(_LICENSES)}')
    for model in data.get("model-index") or []:
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append('"model-index[0].name" is required')
        for result in model["results"]:
            errors += [
                f'"model-index[0].results.{part}" is required'
                for part, keys in {"task": ["type"], "dataset": ["type", "name"]}.items()
                if not all(result.get(part, {}).get(key) for key in keys)
            ]
            errors += [
                '"model-index[0].results.metrics" needs a type and a value'
                for metric in result.get("metrics") or [{}]
                if not metric.get("type") or metric.get("value") is None
            ]
    return [{"message": message} for message in errors]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
