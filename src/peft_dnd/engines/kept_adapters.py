# SPDX-License-Identifier: Apache-2.0
"""The folder that engines load adapters from: each under its id, whole or not there; and the names that lead to it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..adapters.lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..storage.files import PathLike
from .mending import with_one_rank


PREFIX = "dnd:"
_ID = re.compile(r"[0-9a-f]{64}")
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ParsedName(NamedTuple):
    """What a model's name asks for.

    Attributes:
        task: The name of a task, or the id again.
        adapter_id: The id of an adapter, if it is one.
        ours: Whether the name has our prefix, so that nobody else could mean it.
    """

    task: str
    adapter_id: str | None
    ours: bool


def parse_name(name: str) -> ParsedName | None:
    """Read the name of a model: `dnd:<id>`, `dnd:<task>` or `<task>`; `None` if it is none of these.

    What comes out has no character with which a path could be left.

    >>> parse_name("dnd:law")
    ParsedName(task='law', adapter_id=None, ours=True)
    >>> parse_name("../law"), parse_name("dnd:..")
    (None, None)
    """
    bare = name.removeprefix(PREFIX)
    ours = bare != name
    if not _TASK.fullmatch(bare):
        return None
    return ParsedName(bare, bare if ours and _ID.fullmatch(bare) else None, ours)


class KeptAdapters:
    """Adapters on disk by id.

    Args:
        folder: Where they lie; it is made when the first comes.
    """

    def __init__(self, folder: PathLike) -> None:
        self._folder = Path(folder).expanduser().absolute()

    def place_of(self, adapter_id: str) -> Path:
        """Where the adapter of an id lies, or would."""
        if not _ID.fullmatch(adapter_id):
            raise ValueError(f"An adapter's id has 64 hexadecimal digits, got {adapter_id!r:.80}.")
        return self._folder / adapter_id

    def folder_of(self, adapter_id: str) -> Path | None:
        """Where the adapter of an id lies, if it is there."""
        place = self.place_of(adapter_id)
        whole = all((place / name).is_file() for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME))
        return place if whole else None

    def keep(self, adapter: GeneratedAdapter) -> Path:
        """Store an adapter, with one rank for all modules, under the hash of all that engines read of it.

        Returns:
            Its folder.
        """
        adapter = with_one_rank(adapter)
        digest = hashlib.sha256(json.dumps(adapter.layout.to_dict(), sort_keys=True).encode())
        for tensor in adapter.state_dict().values():
            digest.update(tensor.cpu().view(torch.uint8).numpy().tobytes())
        place = self.place_of(digest.hexdigest())
        if self.folder_of(place.name) is None:
            adapter.save_pretrained(place)
        return place

    def make_servable(self, folder: Path) -> None:
        """Make sure that a folder holds an adapter, and write it anew with one rank if it has several.

        Raises:
            FileNotFoundError: If a file is missing.
            CorruptFileError: If one of them is unreadable.
            LayoutError: If it is no plain LoRA adapter.
        """
        layout = AdapterLayout.from_folder(folder)
        config = layout.lora_config()
        if config.rank_pattern or config.alpha_pattern:
            with_one_rank(GeneratedAdapter.from_pretrained(folder)).save_pretrained(folder)


def default_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where adapters are kept if nobody says otherwise: in the user's cache, as the XDG base directories have it."""
    return Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "peft_dnd" / "engines"
