# SPDX-License-Identifier: Apache-2.0
"""`StoredTokenStates`: a folder that keeps what a text encoder gave, for runs that go on or start again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import CorruptFileError, TextEncoderError
from ..storage.files import PathLike, read_safetensors, write_safetensors
from .token_states import TokenStates


logger = logging.getLogger(__name__)

PROBE = ("The quick brown fox jumps over the lazy dog.", "Name the capital of {country} (one word): ¿?")
"""What an encoder reads to be known again."""

_PROBE_NAME = "probe.safetensors"
# Other numbers of threads and other processors add in another order; another encoder lies at another place altogether.
TOLERANCE = 0.02


class StoredTokenStates:
    """Token states by a key, each in a safetensors file of a folder of its own.

    Names and revisions do not tell whether an encoder is the one that the folder was filled by, since a local folder
    keeps its name when its weights change. So the folder holds what its encoder gave for two sentences of ours, and an
    encoder that gives something else is refused.

    Args:
        folder: The folder, made where it is missing.
        read_probe: What the encoder at hand gives for [`PROBE`].

    Raises:
        TextEncoderError: If the folder was filled by another encoder.
        SavingError: If the folder cannot be written to.
    """

    def __init__(self, folder: PathLike, read_probe: Callable[[], TokenStates]) -> None:
        self.folder = Path(folder)
        given = read_probe()
        probe = TokenStates(given.flat.detach().float().cpu(), given.offsets.cpu())
        kept = self._read(_PROBE_NAME)
        if kept is None and any(path.name != _PROBE_NAME for path in self.folder.glob("*.safetensors")):
            kept = self._read(_PROBE_NAME)  # another process may have begun the folder meanwhile
            if kept is None:
                raise TextEncoderError(f"{os.fspath(folder)!r} holds states of an encoder that is not known. {_MEND}")
        if kept is None:
            self._write(_PROBE_NAME, probe)
        elif not _alike(kept, probe):
            raise TextEncoderError(
                f"{os.fspath(folder)!r} holds what another text encoder gave, or this one read in another way. {_MEND}"
            )

    def get(self, key: str) -> TokenStates | None:
        """What is kept under a key; `None` if nothing is, or not whole."""
        return self._read(f"{key}.safetensors")

    def put(self, key: str, states: TokenStates) -> None:
        """Keep states under a key, whole or not at all.

        Raises:
            SavingError: If writing fails.
        """
        self._write(f"{key}.safetensors", states)

    def _write(self, name: str, states: TokenStates) -> None:
        write_safetensors(self.folder / name, {"flat": states.flat, "offsets": states.offsets})

    def _read(self, name: str) -> TokenStates | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            found = read_safetensors(path)
            return TokenStates(found["flat"], found["offsets"])
        except (CorruptFileError, KeyError, TextEncoderError) as error:
            logger.warning("%s is damaged and made anew: %s", path, error)
            return None


_MEND = "Name another folder, or remove this one: it holds nothing that cannot be made again."


def _alike(kept: TokenStates, found: TokenStates) -> bool:
    if kept.flat.shape != found.flat.shape or not torch.equal(kept.offsets, found.offsets):
        return False
    return bool((kept.flat - found.flat).norm() <= TOLERANCE * kept.flat.norm())
