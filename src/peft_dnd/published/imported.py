# SPDX-License-Identifier: Apache-2.0
"""What a pairs folder has already that imported adapters must go with: tasks, factors, a common initialisation."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from ..adapters.layout import AdapterLayout
from ..adapters.shared_factors import SharedInputs
from ..errors import LayoutError
from ..pairs.folder import INITIALIZATION_FOLDER, TASK_NAME, load_task, may_be_task
from ..pairs.initialization import create_initialization, read_initialization
from ..pairs.writer import task_record
from ..storage.files import read_json
from ..storage.progress import with_progress
from .adapter_files import FoundAdapter


ORIGIN_NAME = "origin.json"
FACTORS = SHARED, CANONICAL, KEPT = ("shared", "canonical", "kept")


def factors_of(pairs: Path) -> str:
    """How the tasks of a pairs folder were made, as far as it says; where it has none, what does best for most."""
    if (pairs / INITIALIZATION_FOLDER).is_dir():
        return SHARED
    for path in sorted(pairs.glob(f"*/{ORIGIN_NAME}")):
        content = read_json(path)
        made_as = content.get("made_as") if isinstance(content, dict) else None
        found = made_as.get("factors") if isinstance(made_as, dict) else None
        if found in FACTORS:
            return str(found)
    return CANONICAL if any(pairs.glob(f"*/{TASK_NAME}")) else SHARED


def check_neighbours(pairs: Path, planned: Collection[str], target: AdapterLayout) -> None:
    """Refuse to write tasks of these names beside others of another layout: nothing could be fitted to both.

    Raises:
        LayoutError: If there is one.
    """
    for folder in sorted(path.parent for path in pairs.glob(f"*/{TASK_NAME}")):
        if folder.name in planned or not may_be_task(folder.name):
            continue
        record = task_record(folder)
        if record is None or not record.complete or not record.steps:
            continue
        other = load_task(folder).layout
        difference = None if other is None else other.difference(target)
        if difference is not None:
            raise LayoutError(
                f"Task {record.task!r}, which is in {str(pairs)!r} already, has another layout than these adapters "
                f"are brought to: {difference} (the first is the task's). Bring them to its own, with layout=... "
                f"(--like {pairs}) or the same rank, or write to another pairs folder."
            )


def has_no_other_tasks(pairs: Path, planned: Collection[str]) -> bool:
    """Whether there are tasks, all of them of these names and made by an import."""
    there = {path.parent.name for path in pairs.glob(f"*/{TASK_NAME}")}
    imported = {path.parent.name for path in pairs.glob(f"*/{ORIGIN_NAME}")}
    return bool(there) and there <= imported & set(planned)


def rank_of_initialization(pairs: Path) -> int | None:
    """The rank of the common initialisation; `None` if there is none."""
    folder = pairs / INITIALIZATION_FOLDER
    return AdapterLayout.from_folder(folder).max_rank if folder.is_dir() else None


def shared_start(
    pairs: Path, found: Sequence[FoundAdapter], target: AdapterLayout, *, renew: bool
) -> dict[str, torch.Tensor]:
    """The common initialisation; where there is none, or it is to be renewed, the adapters' shared A, with B zero.

    Args:
        pairs: The pairs folder.
        found: The adapters.
        target: The layout that they are brought to.
        renew: Whether to find it anew.

    Returns:
        PEFT on-disk key -> matrix.
    """
    folder = pairs / INITIALIZATION_FOLDER
    if renew or not folder.exists():
        inputs = SharedInputs(target.max_rank)
        for adapter in with_progress(found, "Looking for shared inputs"):
            inputs.add(adapter.layout, adapter.read())
        start = {tensor.key: torch.zeros(tensor.shape, dtype=torch.float32) for tensor in target.tensors}
        if renew:
            shutil.rmtree(folder, ignore_errors=True)
        create_initialization(folder, target, {**start, **inputs.matrices(target)})
    return read_initialization(folder, target)
