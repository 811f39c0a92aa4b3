# SPDX-License-Identifier: Apache-2.0
"""The replay store of a generator: read at first need from the folder that the generator was loaded from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.tokenizer import WeightNormalization, WeightTokenizer
from ..errors import CorruptFileError, NotFittedError
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.packed_adapters import AdapterPacking, PackedAdapter
from ..pairs.replay_store import MEND, STORE_NAME, ReplayStore
from ..storage.checksums import Checksums
from .configuration import PromptConditionedLoraGeneratorConfig


@dataclass(frozen=True, eq=False)
class _StoredCheckpoint:
    packing: AdapterPacking
    packed: PackedAdapter

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.packing.unpack(self.packed)


class ReplayStoreMixin:
    """Gives a generator its `replay_store`."""

    config: PromptConditionedLoraGeneratorConfig
    normalization: WeightNormalization
    weight_tokenizer: WeightTokenizer
    _replay_store: ReplayStore | None = None
    _replay_folder: Path | None = None

    @property
    def replay_store(self) -> ReplayStore | None:
        """What the generator keeps of its fitted tasks, so that it can go on with others; `None` if nothing.

        Raises:
            CorruptFileError: If the file in the generator's folder is damaged.
            LayoutError: If it is another generator's.
            GeneratorConfigError: As before.
            FormatVersionError: If a newer version of the library wrote it.
        """
        if self._replay_folder is not None:
            folder = self._replay_folder
            checksums = Checksums.read(folder)
            if checksums is not None and checksums.file_differences(folder, STORE_NAME):
                raise CorruptFileError(f"{str(folder / STORE_NAME)!r} is not what was saved. {MEND}")
            store = ReplayStore.load(folder / STORE_NAME)
            self._check_store(store, repr(str(folder / STORE_NAME)))
            self._replay_store, self._replay_folder = store, None
        return self._replay_store

    @replay_store.setter
    def replay_store(self, store: ReplayStore | None) -> None:
        if store is not None:
            self._check_store(store, "The replay store")
        self._replay_store, self._replay_folder = store, None

    def stored_pairs(self) -> PromptCheckpointDataset:
        """The tasks of the replay store of which it holds an adapter, as pairs: the mean of each one's checkpoints.

        Raises:
            NotFittedError: If there is no store, or no adapter in it.
            CorruptFileError: And the others of `replay_store`.
        """
        store = self.replay_store
        packing = self.adapter_packing()
        held = {
            name: (task.texts, _StoredCheckpoint(packing, task.adapter))
            for name, task in ({} if store is None else store.tasks).items()
            if task.adapter is not None
        }
        if store is None or not held:
            raise NotFittedError(
                "The generator keeps no adapters of its fitted tasks: it has no replay store, or one without room for "
                "them. Give the training pairs themselves."
            )
        return PromptCheckpointDataset([], layout=store.layout).with_replayed(held, store.condition_text)

    def adapter_packing(self) -> AdapterPacking:
        """What packs adapters for the replay store, and unpacks them."""
        return AdapterPacking(self.weight_tokenizer, self.normalization)

    def _find_replay_store(self, folder: Path) -> None:
        """Note where the store lies, if there is one; it is read when it is needed, which in use it never is."""
        self._replay_store = None
        self._replay_folder = folder if (folder / STORE_NAME).is_file() else None

    def _check_store(self, store: ReplayStore, source: str) -> None:
        store.check(self.adapter_packing(), self.config.condition_text, source)
