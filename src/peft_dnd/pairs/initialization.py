# SPDX-License-Identifier: Apache-2.0
"""The common initialisation of a pairs folder: the adapter that the training of all its tasks starts from."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..adapters.layout import AdapterLayout
from ..adapters.layouts import layout_from_folder, layout_from_model, live_tensors
from ..adapters.lora import ADAPTER_WEIGHTS_NAME
from ..errors import LayoutError
from ..storage.files import PathLike, errors_of_writing_below, read_safetensors, staged_directory
from ..storage.processes import is_share
from .folder import INITIALIZATION_FOLDER, adapter_digest, write_matrices


logger = logging.getLogger(__name__)


def use_common_initialization(model: nn.Module, pairs: PathLike, adapter_name: str = "default") -> str:
    """Start a model's adapter from the common initialisation of a pairs folder.

    Where the folder has none yet, the adapter as it is becomes that. Of several processes that do so at once one
    creates it, and all end with the same. The parameters stay the same objects, so an optimiser may hold them already.

    Args:
        model: A `PeftModel`, or a transformers model with an adapter of its own.
        pairs: The pairs folder.
        adapter_name: The adapter.

    Returns:
        The initialisation's digest.

    Raises:
        LayoutError: If the initialisation has another layout than the adapter, or the adapter is sharded.
        WeightValueError: If the initialisation holds NaN or infinity.
        FileNotFoundError: If its folder lacks one of its files.
        CorruptFileError: If one of them is unreadable.
    """
    layout = layout_from_model(model, adapter_name)
    matrices = whole_matrices(model, adapter_name)
    folder = Path(pairs) / INITIALIZATION_FOLDER
    if not folder.exists():
        create_initialization(folder, layout, matrices)
    initial = read_initialization(folder, layout)
    with torch.no_grad():
        for key, matrix in matrices.items():
            matrix.copy_(initial[key])
    return adapter_digest(initial)


def has_common_initialization(model: nn.Module, pairs: PathLike, adapter_name: str = "default") -> bool:
    """Whether a model's adapter is already the common initialisation of a pairs folder; errors as for using it."""
    folder = Path(pairs) / INITIALIZATION_FOLDER
    if not folder.exists():
        return False
    initial = read_initialization(folder, layout_from_model(model, adapter_name))
    return all(
        torch.equal(matrix.detach().cpu(), initial[key].to(matrix.dtype))
        for key, matrix in whole_matrices(model, adapter_name).items()
    )


def whole_matrices(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """A live adapter's parameters under their on-disk keys.

    Raises:
        LayoutError: If this process has only a share of one of them.
    """
    matrices = dict(live_tensors(model, adapter_name))
    for key, matrix in matrices.items():
        if is_share(matrix):
            raise LayoutError(
                f"{key!r} is sharded over several processes (FSDP, tensor parallelism or DeepSpeed ZeRO-3), so no "
                "process has it whole. Train the adapter in one process, or with DDP or ZeRO-1."
            )
    return matrices


def create_initialization(folder: Path, layout: AdapterLayout, matrices: Mapping[str, torch.Tensor]) -> None:
    """Write the common initialisation of a pairs folder, unless another process has done so meanwhile.

    Args:
        folder: The initialisation's folder inside the pairs folder.
        layout: Its layout.
        matrices: PEFT on-disk key -> matrix.

    Raises:
        LayoutError: If they do not have the layout.
        WeightValueError: If they hold NaN or infinity.
    """
    layout.check_state_dict(matrices, source="The adapter that is to be the common initialisation")
    mine = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        with errors_of_writing_below(mine, folder):
            with staged_directory(mine) as staged:
                write_matrices(staged / ADAPTER_WEIGHTS_NAME, matrices)
                layout.peft_config().save_pretrained(str(staged))
            # Renaming a folder over one that holds files fails: that is how only the first process gets through.
            os.rename(mine, folder)
        logger.info("Created the common initialisation in %s.", folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def read_initialization(folder: Path, layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Read the common initialisation of a pairs folder; errors as for using it."""
    difference = layout_from_folder(folder).difference(layout)
    if difference is not None:
        raise LayoutError(
            f"The adapter does not have the layout of the common initialisation in {str(folder)!r}: {difference} (the "
            "first is the initialisation, the second the adapter). All tasks of a pairs folder need one LoRA "
            "configuration and one base model: use theirs, or another pairs folder."
        )
    initial = read_safetensors(folder / ADAPTER_WEIGHTS_NAME)
    layout.check_state_dict(initial, source=f"The common initialisation in {str(folder)!r}")
    return initial
