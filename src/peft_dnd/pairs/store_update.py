# SPDX-License-Identifier: Apache-2.0
"""The rule by which a replay store takes in new tasks and stays within its bounds."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..text.encoder_probe import EncoderProbe
from ..text.prompts import select_prompts
from .dataset import PromptCheckpointDataset
from .packed_adapters import AdapterPacking
from .replay_store import ReplayStore, StoredTask, in_order, text_bytes


logger = logging.getLogger(__name__)

ROWS = ("examples", "distillation")
"""What the base's own losses are taken on: what pairs, items and stored tasks call it."""


@dataclass(frozen=True)
class StoreBounds:
    """How large a store may become.

    Attributes:
        share: Its size in relation to that of the pairs, from 0, which means no store, to 1.
        prompts: The most texts that are kept of a task.
        most_bytes: Its size at most, whatever the pairs'; `None` sets no such bound.
        rows: The most examples, and answers of a teacher, that are kept of a task.
    """

    share: float = 0.1
    prompts: int = 64
    most_bytes: int | None = None
    rows: int = 16

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
    *,
    encoder: EncoderProbe | None = None,
    rows: Sequence[str] = (),
    base: str | None = None,
) -> ReplayStore | None:
    """A store of the tasks of an old one and of new ones.

    The rule, which draws by names alone, so that no task has an advantage from the order in which they come:

    1. Of a task's texts `bounds.prompts` are kept, drawn at random; of every task half as many, and again half, as
       long as they would take more than half the room.
    2. Of the rows that a task was fitted on `bounds.rows` are kept, drawn at random; of every task half as many, and
       again half, down to none, as long as they would take more than the texts leave, or, where there are
       checkpoints, more than half of that.
    3. Of a task's checkpoints the mean is kept, in eight bits a number, one task after another as long as there is
       room, in the order of a hash of their names. So each task is as likely to keep its adapter, whenever it came.

    Args:
        old: The generator's store so far, if it has one. What is in it of a new task is replaced.
        pairs: Pairs with the new tasks, their texts in the form that the generator reads.
        new: The names of those that are new.
        packing: How the generator packs adapters.
        condition_text: Which texts it reads.
        bounds: How large the store may become.
        encoder: What its text encoder gives.
        rows: Which rows of the new tasks it was fitted on, some of `ROWS`.
        base: The digest of the base that they are for. Rows of an old store that are for another are not kept.

    Returns:
        The store; `None` where there is to be none, or no room for a single text of each task, which is logged.
    """
    tasks = {} if old is None else dict(old.tasks)
    if old is not None and rows and old.base != base:
        tasks = {name: replace(task, examples=(), distillation=()) for name, task in tasks.items()}
    for name in new:
        adapter = packing.pack(pairs.mean_state_dict(name)) if pairs.checkpoints(name) else None
        texts = _drawn(name, pairs.prompts(name), bounds.prompts)
        kept = {kind: _some_rows(pairs, name, kind, bounds.rows) for kind in rows}
        tasks[name] = StoredTask(name, texts, _size(pairs, name, rows), adapter, **kept)
    store = ReplayStore(
        in_order(tasks.values()),
        packing.tokenizer.layout,
        condition_text,
        packing.digest,
        encoder,
        base if rows or old is None else old.base,
    )
    return _within(store, bounds.most(store.pairs_bytes)) if tasks and bounds.share > 0 else None


def _within(store: ReplayStore, most: int) -> ReplayStore | None:
    """What there is room for."""
    tasks = _halved(
        store.tasks,
        max(len(task.texts) for task in store.tasks.values()),
        1,
        lambda task, count: replace(task, texts=_drawn(task.name, task.texts, count)),
        lambda tasks: sum(text_bytes(task.texts) for task in tasks.values()) <= most // 2,
    )
    bare = replace(store, tasks={name: _without_rows(task, 0, adapter=None) for name, task in tasks.items()})
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
    for_rows = room // 2 if any(task.adapter is not None for task in tasks.values()) else room
    kept = _halved(
        {name: replace(task, adapter=None) for name, task in tasks.items()},
        max(len(rows) for task in tasks.values() for rows in (task.examples, task.distillation)),
        0,
        _without_rows,
        lambda tasks: replace(store, tasks=tasks).num_bytes <= most - room + for_rows,
    )
    room = most - replace(store, tasks=kept).num_bytes
    for name in sorted(tasks, key=_rank):
        adapter = tasks[name].adapter
        if adapter is not None and adapter.num_bytes + _HEADER <= room:
            kept[name] = replace(kept[name], adapter=adapter)
            room -= adapter.num_bytes
    return replace(store, tasks=kept)


# What safetensors' own header may grow by.
_HEADER = 512


def _halved(
    tasks: Mapping[str, StoredTask],
    count: int,
    fewest: int,
    keep: Callable[[StoredTask, int], StoredTask],
    fits: Callable[[Mapping[str, StoredTask]], bool],
) -> dict[str, StoredTask]:
    """The tasks with as many of something as fit, of all alike: `count`, or half of it, or again half."""
    found = dict(tasks)
    while count > fewest and not fits(found):
        count //= 2
        found = {name: keep(task, count) for name, task in found.items()}
    return found


def _without_rows(task: StoredTask, count: int, **changes: Any) -> StoredTask:
    # They stand in the order in which they were drawn, so that the first ones are a draw as well.
    return replace(task, examples=task.examples[:count], distillation=task.distillation[:count], **changes)


def _drawn(name: str, texts: tuple[str, ...], count: int) -> tuple[str, ...]:
    if len(texts) <= count:
        return tuple(texts)
    chosen = select_prompts(len(texts), count, _seed(name)).tolist()
    return tuple(texts[i] for i in sorted(chosen))


def _some_rows(pairs: PromptCheckpointDataset, name: str, kind: str, count: int) -> tuple[Mapping[str, Any], ...]:
    found = getattr(pairs, kind)(name)
    if found is None:
        return ()
    rows = found.draw(count, _seed(name))
    random.Random(f"rows {_seed(name)}").shuffle(rows)
    return tuple(rows)


def _seed(name: str) -> int:
    return int(_rank(name)[:8], 16)


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def _size(pairs: PromptCheckpointDataset, name: str, rows: Sequence[str]) -> int:
    """How many bytes a task's pairs take, of what the generator was fitted to."""
    files = list(pairs.checkpoints(name))
    for found in (getattr(pairs, kind)(name) for kind in rows):
        files += [] if found is None else [found.path]
    return sum(path.stat().st_size for path in files) + text_bytes(pairs.prompts(name))
