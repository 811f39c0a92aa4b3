# SPDX-License-Identifier: Apache-2.0
"""Bearer tokens: which there are, and whose a request's is."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from ..errors import GeneratorConfigError


SHORTEST_TOKEN = 16
# As RFC 6750 writes a token; a colon can therefore divide it from its owner's name.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tokens:
    """The bearer tokens that the service takes, kept as their SHA-256 alone.

    Args:
        lines: Each `TOKEN` or `OWNER:TOKEN`; empty lines and those that begin with `#` say nothing. The owner's name
            stands in logs, and whose requests wait is by owner.

    Raises:
        GeneratorConfigError: If a line is none of these, or a token has fewer than 16 characters.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._digests: list[tuple[bytes, str]] = []
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text and not text.startswith("#"):
                owner, colon, token = text.rpartition(":")
                self._add(owner if colon else f"token-{len(self._digests) + 1}", token, number)

    @classmethod
    def from_file(cls, path: Path) -> Tokens:
        """Read a file with one token a line.

        Raises:
            OSError: If it cannot be read.
            GeneratorConfigError: As above, or if there is no token in it.
        """
        tokens = cls(path.read_text(encoding="utf-8", errors="replace").splitlines())
        if not tokens:
            raise GeneratorConfigError(f"The file of tokens {str(path)!r} holds none. Write one a line.")
        return tokens

    def __len__(self) -> int:
        return len(self._digests)

    def owner_of(self, authorization: str | None) -> str | None:
        """Whose token stands in an `Authorization` header; `None` if nobody's does.

        It takes as long whichever token it is, or none.
        """
        scheme, _, token = (authorization or "").partition(" ")
        given = sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, owner in self._digests:
            if hmac.compare_digest(given, digest):
                found = owner
        return found if scheme.lower() == "bearer" else None

    def _add(self, owner: str, token: str, number: int) -> None:
        if not _OWNER.fullmatch(owner) or not _TOKEN.fullmatch(token):
            raise GeneratorConfigError(
                f"Line {number} of the tokens is neither TOKEN nor OWNER:TOKEN. An owner has letters, digits and ._- "
                "alone, a token those and ~+/="
            )
        if len(token) < SHORTEST_TOKEN:
            raise GeneratorConfigError(
                f"The token in line {number} has {len(token)} characters, and must have {SHORTEST_TOKEN} or more. "
                'Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        self._digests.append((sha256(token.encode()).digest(), owner))
