# SPDX-License-Identifier: Apache-2.0
"""Names with numbers in them, and the order in which people expect them."""

from __future__ import annotations

import re


_MOST_DIGITS = 18


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key under which numbers inside a name count as numbers.

    >>> sorted(["layers.10.q", "layers.2.q"], key=natural_key)
    ['layers.2.q', 'layers.10.q']
    """
    return tuple((0, int(part)) if is_number(part) else (1, part) for part in re.split(r"(\d+)", name) if part)


def is_number(part: str) -> bool:
    """Whether a part of a name is a number that can be counted by: not `"²"`, nor thousands of digits."""
    return part.isdecimal() and len(part) <= _MOST_DIGITS
