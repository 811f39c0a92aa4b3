# SPDX-License-Identifier: Apache-2.0
"""The families of operations, one module a source of data."""

from __future__ import annotations

from . import countries, dictionary, letters, lists, numbers, word_forms


MODULES = (countries, dictionary, letters, lists, numbers, word_forms)
