# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a verb is to do, from a YAML file and from options, with every name checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer

from .console import CommandError, existing_file, one_paragraph, suggestion


_Made = TypeVar("_Made")
# YAML 1.1, which PyYAML reads, takes 1e-3 for a text; nobody who writes it means one.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


def read_recipe(
    path: Path | None, known: Iterable[str], settings: Sequence[str] | None, **options: Any
) -> dict[str, Any]:
    """Put a recipe together: the file's, over it `--set NAME=VALUE`, over these the options that were given.

    Args:
        path: The YAML file, if there is one.
        known: The names that a recipe may have.
        settings: `NAME=VALUE`, where a name may have dots for what lies deeper, and a value is YAML.
        options: Name in the recipe -> the option's value; `None` and empty lists were not given. A double underscore
            stands for a dot.

    Raises:
        CommandError: If the file is missing or no YAML mapping, or a name in it is unknown.
        BadParameter: If a setting is not of its form.
    """
    recipe: dict[str, Any] = {}
    if path is not None:
        text = existing_file(path, "The recipe").read_text(encoding="utf-8", errors="replace")
        found = read_yaml(text, str(path))
        if not isinstance(found, dict):
            raise CommandError(f"The recipe {str(path)!r} must hold names and values, found {found!r:.60}.")
        recipe = found
    for given in settings or ():
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set {given!r} is not of the form NAME=VALUE.")
        _put(recipe, name, read_yaml(value, f"--set {name}"))
    for name, value in options.items():
        if value not in (None, [], {}):
            _put(recipe, name.replace("__", "."), value)
    check_names(recipe, known, "The recipe")
    return recipe


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Make sure that every name is known.

    Raises:
        CommandError: Otherwise; it suggests the nearest.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise CommandError(f"{what} has an unknown setting {name!r}.{suggestion(str(name), known)}")


def wanted(recipe: Mapping[str, Any], name: str, option: str) -> Any:
    """A value that a recipe must have.

    Raises:
        BadParameter: If it does not.
    """
    if recipe.get(name) in (None, "", {}, []):
        raise typer.BadParameter(f"There is no {name!r}: give {option}, or write it into the recipe.")
    return recipe[name]


def section(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a recipe that has names and values of its own; empty where it is not there.

    Raises:
        CommandError: If it is something else.
    """
    found = recipe.get(name) or {}
    if not isinstance(found, dict):
        raise CommandError(f"{name!r} of the recipe must hold names and values, found {found!r:.60}.")
    return dict(found)


def names(recipe: Mapping[str, Any], name: str) -> list[str]:
    """A list of names in a recipe, which may be a single one; empty where it is not there.

    Raises:
        CommandError: If it is something else.
    """
    found = recipe.get(name) or []
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise CommandError(f"{name!r} of the recipe must be a list of names, found {found!r:.60}.")
    return found


def built(make: Callable[..., _Made], what: str, values: Mapping[str, Any], known: Iterable[str], **own: Any) -> _Made:
    """Call a library's class with a part of a recipe, so that what it refuses is told as an error of the recipe.

    Args:
        make: The class or function.
        what: The part's name.
        values: What stands in it.
        known: The names that it may have.
        own: What the verb itself gives; the recipe's goes first.

    Raises:
        CommandError: If a name is unknown, or the library refuses a value.
    """
    check_names(values, known, f"{what!r} of the recipe")
    from peft_dnd.errors import PeftDndError

    for field in fields(make) if is_dataclass(make) else ():
        # Their own classes compare them without looking at what they are.
        is_number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if is_number and not isinstance(values.get(field.name, 0), int | float | None):
            raise CommandError(f"{what!r} of the recipe: {field.name} is a number, found {values[field.name]!r:.60}.")
    try:
        return make(**{**own, **values})
    except PeftDndError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise CommandError(f"{what!r} of the recipe: {one_paragraph(error)}") from error


def _put(recipe: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        deeper = recipe.setdefault(part, {})
        if deeper is None:
            deeper = recipe[part] = {}
        if not isinstance(deeper, dict):
            raise CommandError(f"{part!r} of the recipe holds {deeper!r:.60}, so {name!r} cannot be set in it.")
        recipe = deeper
    recipe[last] = value


def read_yaml(text: str, what: str) -> Any:
    """Read YAML, with the numbers of YAML 1.2.

    Raises:
        CommandError: If it is none; `what` says what was read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, with the numbers of YAML 1.2."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CommandError(f"{what} is no YAML ({one_paragraph(error)}).") from error
