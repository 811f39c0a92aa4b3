# SPDX-License-Identifier: Apache-2.0
"""What a generator keeps of the tasks it was fitted to, so that it can go on with others: one small file.

Of every task some of its texts and, if it was fitted on the base's own loss or on a teacher's answers, some rows of
those; and of as many tasks as there is room for the mean of their checkpoints, in eight bits a number. Texts and not
their states: a token of a text takes some 4 bytes, its states 384 at the least, and texts are good for a text encoder
that is being fitted as well. How much is kept of what, `store_update` says.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import save

from ..adapters.layout import AdapterLayout
from ..adapters.names import natural_key
from ..errors import CorruptFileError, FormatVersionError, GeneratorConfigError, LayoutError
from ..storage.files import PathLike, read_safetensors, read_safetensors_metadata, write_safetensors
from ..text.encoder_probe import EncoderProbe
from .folder import Task
from .packed_adapters import AdapterPacking, PackedAdapter


STORE_NAME = "replay_store.safetensors"
FORMAT_VERSION = 2
_FORMAT = "peft_dnd_replay_store"
_MOST_TEXT_BYTES = 2**31
MEND = (
    "Fetch or restore the file; or remove it and fit with the pairs of all tasks, old and new, after which there is a "
    "new one."
)


Rows = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, eq=False)
class StoredTask:
    """What is kept of one task.

    Attributes:
        name: Its name.
        texts: Some of the texts that the generator reads of it.
        pairs_bytes: How large the pairs were that the generator was fitted to.
        adapter: The mean of its checkpoints; `None` where there was no room, or no checkpoint.
        examples: Some of its examples, if it was fitted on the base's own loss.
        distillation: Some of what a teacher said, if it was fitted on that.
    """

    name: str
    texts: tuple[str, ...]
    pairs_bytes: int
    adapter: PackedAdapter | None = None
    examples: Rows = ()
    distillation: Rows = ()


@dataclass(frozen=True, eq=False)
class ReplayStore:
    """What a generator keeps of the tasks that it was fitted to.

    Attributes:
        tasks: Task name -> what is kept of it, in natural order.
        layout: The layout of its adapters.
        condition_text: Which texts stand in it, one of `CONDITION_TEXTS`.
        packing_digest: Tells whether its adapters can be unpacked with a generator's normalisation.
        encoder: What the generator's text encoder gave for two sentences, by which it is known again; `None` in one
            that an earlier version wrote.
        base: The digest of the base that its rows are for, if there are any.
    """

    tasks: Mapping[str, StoredTask]
    layout: AdapterLayout
    condition_text: str
    packing_digest: str
    encoder: EncoderProbe | None = None
    base: str | None = None

    @property
    def num_bytes(self) -> int:
        """The size of its file."""
        return len(save(*self._content()))

    @property
    def pairs_bytes(self) -> int:
        """How large the pairs of all its tasks were together."""
        return sum(task.pairs_bytes for task in self.tasks.values())

    def pairs_task(self, name: str) -> Task:
        """A task's texts as a task of a data set, without its adapter and rows."""
        return Task(name, self.tasks[name].texts, (), None, None, condition_text=self.condition_text)

    def check(self, packing: AdapterPacking, condition_text: str, source: str) -> None:
        """Make sure that the store is that of the generator beside which it lies.

        Args:
            packing: How the generator packs adapters.
            condition_text: Which texts it reads.
            source: What error messages call the store.

        Raises:
            LayoutError: If the store holds adapters of another layout.
            GeneratorConfigError: If it is that of another generator: the normalisation, by which adapters are packed,
                or the form of the texts differs.
            CorruptFileError: If its adapters have other sizes than its layout says.
        """
        difference = packing.tokenizer.layout.difference(self.layout)
        if difference is not None:
            raise LayoutError(
                f"{source} holds adapters of another layout than the generator (first) writes: {difference}. It is "
                f"another generator's. {MEND}"
            )
        if self.packing_digest != packing.digest:
            raise GeneratorConfigError(
                f"{source} was packed with another normalisation than the generator has, so it is another "
                f"generator's, or the generator's statistics were changed since. {MEND}"
            )
        if self.condition_text != condition_text:
            raise GeneratorConfigError(
                f"{source} holds texts of the form {self.condition_text!r}, and the generator reads "
                f"{condition_text!r}. {MEND}"
            )
        packed = (task.adapter for task in self.tasks.values() if task.adapter is not None)
        if not all(map(packing.fits, packed)):
            raise CorruptFileError(f"{source} is damaged: its adapters have not the sizes of its layout. {MEND}")

    def save(self, path: PathLike) -> None:
        """Write it to a safetensors file, whole or not at all."""
        tensors, header = self._content()
        ((name, value),) = header.items()
        write_safetensors(path, tensors, (name, value))

    @classmethod
    def load(cls, path: PathLike) -> ReplayStore:
        """Read what `save` wrote.

        Raises:
            CorruptFileError: If the file is unreadable or something else.
            FormatVersionError: If a newer version of the library wrote it.
        """
        found = read_safetensors(path)
        version = read_safetensors_metadata(path).get(_FORMAT, "")
        if version.isdigit() and int(version) > FORMAT_VERSION:
            raise FormatVersionError(
                f"{str(path)!r} is of format {version} of a replay store; this version of peft_dnd reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-dnd"
            )
        try:
            return cls._of_content(found)
        except (KeyError, ValueError, TypeError, AttributeError, zlib.error, RecursionError) as error:
            raise CorruptFileError(
                f"{str(path)!r} is no replay store, or a damaged one ({type(error).__name__}: {error!s:.200}). {MEND}"
            ) from error

    def _content(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        packed = [task.adapter for task in self.tasks.values() if task.adapter is not None]
        about = {
            "layout": self.layout.to_dict(),
            "condition_text": self.condition_text,
            "packing": self.packing_digest,
            "encoder": None if self.encoder is None else asdict(self.encoder),
            "base": self.base,
            "tasks": [
                [task.name, task.pairs_bytes, task.adapter is not None, task.texts, task.examples, task.distillation]
                for task in self.tasks.values()
            ],
        }
        text = zlib.compress(
            json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"), 9
        )
        tensors = {"about": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        if packed:
            tensors["values"] = torch.stack([adapter.values for adapter in packed])
            tensors["sizes"] = torch.stack([adapter.sizes for adapter in packed])
        return tensors, {_FORMAT: str(FORMAT_VERSION)}

    @classmethod
    def _of_content(cls, tensors: Mapping[str, torch.Tensor]) -> ReplayStore:
        unpacked = zlib.decompressobj()
        text = unpacked.decompress(tensors["about"].numpy().tobytes(), _MOST_TEXT_BYTES)
        if not unpacked.eof:
            raise ValueError("its texts are cut short, or larger than any store's")
        about: dict[str, Any] = json.loads(text.decode("utf-8", "surrogatepass"))
        packed = PackedAdapter.from_stacks(tensors.get("values"), tensors.get("sizes"))
        tasks = []
        for name, pairs_bytes, has_adapter, texts, *rows in about["tasks"]:
            if not texts or not all(isinstance(one, str) and one for one in [name, *texts]):
                raise ValueError(f"what is kept of task {name!r:.100} are no texts")
            if len(rows) not in (0, 2) or not all(isinstance(row, dict) and row for of in rows for row in of):
                raise ValueError(f"what is kept of task {name!r:.100} are no rows")
            adapter = packed.pop(0) if has_adapter else None
            tasks.append(StoredTask(name, tuple(texts), int(pairs_bytes), adapter, *map(tuple, rows)))
        if packed or len({task.name for task in tasks}) < len(tasks):
            raise ValueError("its adapters and its tasks do not belong together")
        layout = AdapterLayout.from_dict(about["layout"])
        encoder, base = about.get("encoder"), about.get("base")
        return cls(
            in_order(tasks),
            layout,
            str(about["condition_text"]),
            str(about["packing"]),
            None if encoder is None else EncoderProbe(**encoder),
            None if base is None else str(base),
        )


def in_order(tasks: Iterable[StoredTask]) -> dict[str, StoredTask]:
    """Stored tasks by name, in natural order."""
    return {task.name: task for task in sorted(tasks, key=lambda task: natural_key(task.name))}


def text_bytes(texts: Iterable[str]) -> int:
    """How many bytes texts take in a store, at most."""
    return sum(len(text.encode("utf-8", "surrogatepass")) + 4 for text in texts)
