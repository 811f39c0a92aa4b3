# SPDX-License-Identifier: Apache-2.0
"""The replay store of a generator: read at first need from the folder that the generator was loaded from."""

from __future__ import annotations

from pathlib import Path

from ..adapters.tokenizer import WeightNormalization, WeightTokenizer
from ..errors import CorruptFileError, NotFittedError, TextEncoderError
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.packed_adapters import AdapterPacking, PackedCheckpoint
from ..pairs.replay_store import MEND, STORE_NAME, ReplayStore
from ..storage.checksums import Checksums
from ..text.encoder_probe import EncoderProbe
from .conditioning import PromptReadingMixin
from .configuration import PromptConditionedLoraGeneratorConfig


class ReplayStoreMixin(PromptReadingMixin):
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
            name: PackedCheckpoint(packing, task.adapter)
            for name, task in ({} if store is None else store.tasks).items()
            if task.adapter is not None
        }
        if store is None or not held:
            raise NotFittedError(
                "The generator keeps no adapters of its fitted tasks: it has no replay store, or one without room for "
                "them. Give the training pairs themselves."
            )
        return PromptCheckpointDataset([], layout=store.layout).with_replayed(map(store.pairs_task, held), held)

    def adapter_packing(self) -> AdapterPacking:
        """What packs adapters for the replay store, and unpacks them."""
        return AdapterPacking(self.weight_tokenizer, self.normalization)

    def encoder_probe(self) -> EncoderProbe:
        """What the generator's text encoder gives for two sentences, which loads it."""
        return EncoderProbe.of(self.text_encoder, self.read_states)

    def check_store_encoder(self) -> None:
        """Make sure that the text encoder at hand is the one that read the replay store's texts, if there is a store.

        It is asked by what reads these texts, and not when the store is loaded: that needs no text encoder.

        Raises:
            TextEncoderError: If it is another one, or the same one in another dtype or read at other layers.
        """
        store = self.replay_store
        if store is None or store.encoder is None or not self.config.freeze_text_encoder:
            return  # one that is fitted too is a part of the generator
        difference = store.encoder.difference(self.encoder_probe())
        if difference is not None:
            raise TextEncoderError(
                f"The texts in the generator's {STORE_NAME!r} were read by another text encoder than "
                f"{self.text_encoder.name_or_path!r}, or by this one in another way: {difference}. Load the generator "
                "with the text encoder that it was fitted with, in the same dtype and at the same layers; or, if the "
                "generator is to be fitted anew for this one, set generator.replay_store = None and fit with the "
                "pairs of all tasks, after which there is a new store."
            )

    def _find_replay_store(self, folder: Path) -> None:
        """Note where the store lies, if there is one; it is read when it is needed, which in use it never is."""
        self._replay_store = None
        self._replay_folder = folder if (folder / STORE_NAME).is_file() else None

    def _check_store(self, store: ReplayStore, source: str) -> None:
        store.check(self.adapter_packing(), self.config.condition_text, source)
