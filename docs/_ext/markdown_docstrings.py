# SPDX-License-Identifier: Apache-2.0
"""Lets autodoc read docstrings whose inline markup is Markdown, as is the custom of transformers and PEFT.

It runs before napoleon, which then turns the Google-style sections into fields. What is turned into reStructuredText:
code in backticks, references in brackets ([`name`], [`name`][target]), links, fenced blocks, and indented blocks.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


_REFERENCE = re.compile(r"\[(`[^`]+`)\](?:\[[^\]]*\])?(?!\()")
_LINK = re.compile(r"\[([^\]`]+)\]\((https?://[^)\s]+)\)")
_CODE = re.compile(r"(?<![`:\w])`([^`\n]+)`(?![`_])")
_FENCE = re.compile(r"\s*```\s*(\w*)\s*$")
_SECTION = re.compile(r"\s*[A-Z][A-Za-z ]+:$")
_ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")


def _inline(line: str) -> str:
    line = _REFERENCE.sub(r"\1", line)
    line = _LINK.sub(r"`\1 <\2>`__", line)
    # Literal text must be followed by no letter, as in `name`s; an escaped blank is shown as nothing.
    return _CODE.sub(r"``\1``\\ ", line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def to_restructured_text(lines: list[str]) -> list[str]:
    """Turns a docstring's Markdown into reStructuredText, line by line; Google-style sections stay as they are."""
    result: list[str] = []
    literal: int | None = None  # indentation at which the literal block that we are in began
    fence: int | None = None
    previous = ""  # the last line that was not blank
    for line in lines:
        match = _FENCE.match(line)
        if match:
            if fence is None:
                fence = _indent(line)
                result += ["", " " * fence + f".. code-block:: {match[1] or 'text'}", ""]
            else:
                fence = None
                result.append("")
            continue
        if fence is not None:
            result.append("   " + line)
            continue
        if literal is not None and line.strip() and _indent(line) < literal:
            literal = None
        starts_block = (
            literal is None
            and bool(line.strip())
            and bool(result)
            and not result[-1].strip()
            and _indent(line) >= _indent(previous) + 4
            and not _SECTION.match(previous)
            and not _ITEM.match(previous)
        )
        if starts_block:
            literal = _indent(line)
            result += [" " * _indent(previous) + "::", ""]
        is_example = line.lstrip().startswith((">>>", "..."))
        result.append(line if literal is not None or is_example else _inline(line))
        previous = line if line.strip() else previous
    return result


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # napoleon takes an attribute's first line "this: that" as "type: description"; an empty comment it leaves alone.
    head = ["..", ""] if what in ("attribute", "data", "property") else []
    lines[:] = head + to_restructured_text(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connects the conversion, ahead of napoleon's (which has the default priority of 500)."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "version": "1"}
