# SPDX-License-Identifier: Apache-2.0
"""What a generator keeps of the tasks it was fitted to, so that it can go on with others: one small file, bounded.

Of every task some of its texts, and of as many tasks as there is room for the mean of their checkpoints, in eight bits
a number. Texts and not their states: a token of a text takes some 4 bytes, its states 384 at the least, and texts are
good for a text encoder that is being fitted as well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save

from ..adapters.layout import AdapterLayout
from ..adapters.names import natural_key
from ..errors import CorruptFileError, FormatVersionError, GeneratorConfigError, LayoutError
from ..storage.files import PathLike, read_safetensors, read_safetensors_metadata, write_safetensors
from ..text.prompts import select_prompts
from .dataset import PromptCheckpointDataset
from .packed_adapters import AdapterPacking, PackedAdapter


logger = logging.getLogger(__name__)

STORE_NAME = "replay_store.safetensors"
FORMAT_VERSION = 1
_FORMAT = "peft_dnd_replay_store"
_MOST_TEXT_BYTES = 2**31
MEND = (
    "Fetch or restore the file; or remove it and fit with the pairs of all tasks, old and new, after which there is a "
    "new one."
)


@dataclass(frozen=True, eq=False)
class StoredTask:
    """What is kept of one task.

    Attributes:
        name: Its name.
        texts: Some of the texts that the generator reads of it.
        pairs_bytes: How large the pairs were that the generator was fitted to.
        adapter: The mean of its checkpoints; `None` where there was no room, or no checkpoint.
    """

    name: str
    texts: tuple[str, ...]
    pairs_bytes: int
    adapter: PackedAdapter | None = None

    @property
    def num_bytes(self) -> int:
        """How many bytes of a store it takes at most."""
        return _text_bytes(self.texts) + (0 if self.adapter is None else self.adapter.num_bytes)


@dataclass(frozen=True, eq=False)
class ReplayStore:
    """What a generator keeps of the tasks that it was fitted to.

    Attributes:
        tasks: Task name -> what is kept of it, in natural order.
        layout: The layout of its adapters.
        condition_text: Which texts stand in it, one of `CONDITION_TEXTS`.
        packing_digest: Tells whether its adapters can be unpacked with a generator's normalisation.
    """

    tasks: Mapping[str, StoredTask]
    layout: AdapterLayout
    condition_text: str
    packing_digest: str

    @property
    def num_bytes(self) -> int:
        """The size of its file."""
        return len(save(*self._content()))

    @property
    def pairs_bytes(self) -> int:
        """How large the pairs of all its tasks were together."""
        return sum(task.pairs_bytes for task in self.tasks.values())

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
            "tasks": [
                [task.name, task.pairs_bytes, task.adapter is not None, list(task.texts)]
                for task in self.tasks.values()
            ],
        }
        text = zlib.compress(json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogatepass"), 9)
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
        for name, pairs_bytes, has_adapter, texts in about["tasks"]:
            if not texts or not all(isinstance(one, str) and one for one in [name, *texts]):
                raise ValueError(f"what is kept of task {name!r:.100} are no texts")
            tasks.append(StoredTask(name, tuple(texts), int(pairs_bytes), packed.pop(0) if has_adapter else None))
        if packed or len({task.name for task in tasks}) < len(tasks):
            raise ValueError("its adapters and its tasks do not belong together")
        layout = AdapterLayout.from_dict(about["layout"])
        return cls(in_order(tasks), layout, str(about["condition_text"]), str(about["packing"]))


@dataclass(frozen=True)
class StoreBounds:
    """How large a store may become.

    Attributes:
        share: Its size in relation to that of the pairs, from 0, which means no store, to 1.
        prompts: The most texts that are kept of a task.
        most_bytes: Its size at most, whatever the pairs'; `None` sets no such bound.
    """

    share: float = 0.1
    prompts: int = 64
    most_bytes: int | None = None

    def most(self, pairs_bytes: int) -> int:
        """The most bytes that a store of such pairs may take."""
        by_share = int(self.share * pairs_bytes)
        return by_share if self.most_bytes is None else min(by_share, self.most_bytes)


def updated_store(
    old: ReplayStore | None,
    pairs: PromptCheckpointDataset,
    new: Iterable[str],
    packing: AdapterPacking,
    condition_text: str,
    bounds: StoreBounds,
) -> ReplayStore | None:
    """A store of the tasks of an old one and of new ones.

    The rule, which draws by names alone, so that no task has an advantage from the order in which they come:

    1. Of a task's texts `bounds.prompts` are kept, drawn at random; of every task half as many, and again half, as
       long as they would take more than half the room.
    2. Of a task's checkpoints the mean is kept, in eight bits a number, one task after another as long as there is
       room, in the order of a hash of their names. So each task is as likely to keep its adapter, whenever it came.

    Args:
        old: The generator's store so far, if it has one. What is in it of a new task is replaced.
        pairs: Pairs with the new tasks, their texts in the form that the generator reads.
        new: The names of those that are new.
        packing: How the generator packs adapters.
        condition_text: Which texts it reads.
        bounds: How large the store may become.

    Returns:
        The store; `None` where there is to be none, or no room for a single text of each task, which is logged.
    """
    tasks = {} if old is None else dict(old.tasks)
    for name in new:
        adapter = packing.pack(pairs.mean_state_dict(name)) if pairs.checkpoints(name) else None
        tasks[name] = StoredTask(name, _drawn(name, pairs.prompts(name), bounds.prompts), _size(pairs, name), adapter)
    store = ReplayStore(in_order(tasks.values()), packing.tokenizer.layout, condition_text, packing.digest)
    return _within(store, bounds.most(store.pairs_bytes)) if tasks and bounds.share > 0 else None


def in_order(tasks: Iterable[StoredTask]) -> dict[str, StoredTask]:
    """Stored tasks by name, in natural order."""
    return {task.name: task for task in sorted(tasks, key=lambda task: natural_key(task.name))}


def _within(store: ReplayStore, most: int) -> ReplayStore | None:
    """What there is room for."""
    tasks = dict(store.tasks)
    count = max(len(task.texts) for task in tasks.values())
    while count > 1 and sum(_text_bytes(task.texts) for task in tasks.values()) > most // 2:
        count //= 2
        tasks = {name: replace(task, texts=_drawn(name, task.texts, count)) for name, task in tasks.items()}
    bare = replace(store, tasks={name: replace(task, adapter=None) for name, task in tasks.items()})
    room = most - bare.num_bytes
    if room < 0:
        logger.warning(
            "There is no room for a replay store: it may have %d bytes, and a text of each of the %d tasks takes %d. "
            "An update of this generator will need the pairs of all tasks. Raise replay_store_share.",
            most,
            len(tasks),
            bare.num_bytes,
        )
        return None
    kept = dict(bare.tasks)
    for name in sorted(tasks, key=_rank):
        adapter = tasks[name].adapter
        if adapter is not None and adapter.num_bytes + _HEADER <= room:
            kept[name] = replace(kept[name], adapter=adapter)
            room -= adapter.num_bytes
    return replace(store, tasks=kept)


# What safetensors' own header may grow by.
_HEADER = 512


def _drawn(name: str, texts: tuple[str, ...], count: int) -> tuple[str, ...]:
    if len(texts) <= count:
        return tuple(texts)
    chosen = select_prompts(len(texts), count, int(_rank(name)[:8], 16)).tolist()
    return tuple(texts[i] for i in sorted(chosen))


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _size(pairs: PromptCheckpointDataset, name: str) -> int:
    return sum(path.stat().st_size for path in pairs.checkpoints(name)) + _text_bytes(pairs.prompts(name))


def _text_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode("utf-8", "surrogatepass")) + 4 for text in texts)
