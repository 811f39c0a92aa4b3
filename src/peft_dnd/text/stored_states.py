# SPDX-License-Identifier: Apache-2.0
"""`StoredTokenStates`: a folder that keeps what a text encoder gave, for runs that go on or start again."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path

from ..errors import CorruptFileError, TextEncoderError
from ..storage.files import PathLike, read_json, read_safetensors, write_json, write_safetensors
from .encoder_probe import EncoderProbe
from .token_states import TokenStates


logger = logging.getLogger(__name__)

_PROBE_NAME = "encoder.json"
_MEND = "Name another folder, or remove this one: it holds nothing that cannot be made again."


class StoredTokenStates:
    """Token states by a key, each in a safetensors file of a folder of its own.

    The folder also holds the probe of the encoder that filled it, and any other encoder is refused.

    Args:
        folder: The folder, made where it is missing.
        probe: That of the encoder at hand.

    Raises:
        TextEncoderError: If the folder was filled by another encoder, by this one in another dtype or read in another
            way, or by one that is not known.
        SavingError: If the folder cannot be written to.
    """

    def __init__(self, folder: PathLike, probe: EncoderProbe) -> None:
        self.folder = Path(folder)
        kept = self._kept_probe()
        if kept is None and any(self.folder.glob("*.safetensors")):
            kept = self._kept_probe()  # another process may have begun the folder meanwhile
            if kept is None:
                raise TextEncoderError(f"{os.fspath(folder)!r} holds states of an encoder that is not known. {_MEND}")
        if kept is None:
            write_json(self.folder / _PROBE_NAME, asdict(probe))
        elif (difference := kept.difference(probe)) is not None:
            raise TextEncoderError(
                f"{os.fspath(folder)!r} holds what another text encoder gave, or this one read in another way: "
                f"{difference}. {_MEND}"
            )

    def get(self, key: str) -> TokenStates | None:
        """What is kept under a key; `None` if nothing is, or not whole."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            found = read_safetensors(path)
            return TokenStates(found["flat"], found["offsets"])
        except (CorruptFileError, KeyError, TextEncoderError) as error:
            logger.warning("%s is damaged and made anew: %s", path, error)
            return None

    def put(self, key: str, states: TokenStates) -> None:
        """Keep states under a key, whole or not at all.

        Raises:
            SavingError: If writing fails.
        """
        write_safetensors(self._path(key), {"flat": states.flat, "offsets": states.offsets})

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _kept_probe(self) -> EncoderProbe | None:
        path = self.folder / _PROBE_NAME
        if not path.is_file():
            return None
        try:
            return EncoderProbe(**read_json(path))
        except (CorruptFileError, TypeError, ValueError) as error:
            logger.warning("%s is damaged: %s", path, error)
            return None
