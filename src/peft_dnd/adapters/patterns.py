# SPDX-License-Identifier: Apache-2.0
"""Regular expressions that name modules in an adapter's files, checked before anything is matched with them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any


# Where Python has the parser of its regular expressions.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_MOST_REPETITIONS, _MOST_TIMES = 3, 100


def check_targets(targets: Any) -> None:
    """Make sure that these can be the modules that LoRA targets: a pattern, or names.

    Raises:
        TypeError: Otherwise.
        ValueError: If it is a pattern which could take for ever to match.
    """
    if isinstance(targets, str):
        check_pattern(targets)
    elif targets is not None and not all(isinstance(name, str) for name in list(targets)):
        raise TypeError(f"target_modules must be a pattern or a list of names, found {targets!r:.80}")


def check_pattern(pattern: Any) -> None:
    """Make sure that a regular expression from a file is one, and cannot take for ever to match.

    Python's engine tries all the ways in which repetitions can share a text: one repetition in another has
    exponentially many. Names of modules need none of that.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is no regular expression, or repeats what repeats, or more than three things without bound.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a text, found {pattern!r:.80}")
    try:
        parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r:.80} is no regular expression: {error}") from error
    if _repetitions(parsed) > _MOST_REPETITIONS:
        raise ValueError(f"{pattern!r:.80} could take for ever to match")


def _repetitions(parsed: Any) -> int:
    """How many unbounded repetitions a parsed expression has; one within another counts as too many."""
    count = 0
    for operator, argument in parsed:
        inside = sum(_repetitions(part) for part in _parts(argument))
        if str(operator) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[1] > _MOST_TIMES:
            count += 1 + (_MOST_REPETITIONS if inside else 0)
        count += inside
    return count


def _parts(argument: Any) -> Iterator[Any]:
    """The expressions within what an operator of one is applied to."""
    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _parts(part)
