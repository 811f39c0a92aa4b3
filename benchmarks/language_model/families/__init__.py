# SPDX-License-Identifier: Apache-2.0
"""The families of operations, one module a source of data.

Each module has `PACKAGES`, the sources it reads, and `operations()`. Those that read what no other reads name their
families in `SELF_CONTAINED`: whole families are held out from among them.
"""

from __future__ import annotations

from . import (
    addresses,
    chains,
    colours,
    countries,
    dates,
    dictionary,
    elements,
    files,
    letters,
    lists,
    numbers,
    people,
    phrases,
    pictures,
    quantities,
    roman,
    sentences,
    sounds,
    word_forms,
)


MODULES = (
    addresses,
    chains,
    colours,
    countries,
    dates,
    dictionary,
    elements,
    files,
    letters,
    lists,
    numbers,
    people,
    phrases,
    pictures,
    quantities,
    roman,
    sentences,
    sounds,
    word_forms,
)
