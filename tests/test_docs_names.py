# SPDX-License-Identifier: Apache-2.0
"""Every public name is documented, and of its parameters all or none; test_house_rules.py has the pages."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_origin

import pytest
from test_house_rules import faces, module_of


# Their parameters are those of the class that they build on, where they are described.
BUILT_ON = {"DnDConfig", "DnDTrainingArguments"}


def public() -> Iterator[tuple[str, Any]]:
    """Public classes, their public methods and public functions, each once, and what they are called."""
    seen: set[int] = set()
    for package in map(module_of, faces()):
        module = importlib.import_module(f"peft_dnd.{package}".rstrip("."))
        for name in module.__all__:
            thing = getattr(module, name)
            documented = inspect.isclass(thing) or inspect.isfunction(thing)
            if id(thing) in seen or not documented or get_origin(thing):  # Python 3.10 calls an alias a class
                continue
            seen.add(id(thing))
            yield name, thing
            methods = vars(thing).items() if inspect.isclass(thing) else ()
            for method, value in methods:
                function = getattr(value, "__func__", value)
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{name}.{method}", function


def undocumented(name: str, thing: Any) -> list[str]:
    """Parameters that a docstring passes over although it describes others."""
    _, begun, described = (inspect.getdoc(thing) or "").partition("\nArgs:\n")
    if not begun or name in BUILT_ON:
        return []
    described = re.split(r"\n(?=\S)", described)[0]
    parameters = inspect.signature(inspect.unwrap(thing)).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [parameter.name for parameter in parameters if parameter.kind not in variadic]
    return [each for each in names if each not in ("self", "cls") and not re.search(rf"^ +{each}\b", described, re.M)]


FOUND = dict(public())


@pytest.mark.parametrize("name", FOUND)
def test_a_public_name_says_what_it_is_and_takes(name: str) -> None:
    thing = FOUND[name]
    assert thing.__doc__, "no docstring"
    assert undocumented(name, thing) == []


def test_a_parameter_that_is_passed_over_is_found() -> None:
    def example(one: int, other: int) -> None:
        """Do something.

        Args:
            one: This.

        Raises:
            other: Not an argument's description.
        """

    assert undocumented("example", example) == ["other"]
    assert len(FOUND) > 150
