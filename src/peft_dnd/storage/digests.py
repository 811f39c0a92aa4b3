# SPDX-License-Identifier: Apache-2.0
"""A hash of texts, by which they can be known again without being written down."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def texts_digest(texts: Iterable[str]) -> str:
    """SHA-256 over each text's length in bytes (8 bytes, little-endian) followed by its UTF-8, in hexadecimal.

    The lengths make it depend on where one text ends and the next begins.
    """
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
