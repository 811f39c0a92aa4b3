# SPDX-License-Identifier: Apache-2.0
"""The keys under which other tools write LoRA matrices, and PEFT's own key for each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import LayoutError
from .lora import matrix_keys


# What torch.compile, FSDP and activation checkpointing put between a path's parts; no model has such a part itself.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_PARALLEL_WRAPPER = "module"  # DistributedDataParallel's, and a fair name within a model: only the first part is one
_PEFT_PREFIX = ["base_model", "model"]
_PATTERN = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<linear>[AB])(?:(?:\.(?P<of_linear>[^.]+))?\.weight)?"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<of_embedding>[^.]+))?)"
)


def peft_keys(keys: Iterable[str], source: str) -> dict[str, str]:
    """PEFT's on-disk key for each key of an adapter's file, whoever wrote it.

    Taken away are the wrappers of torch.compile (`_orig_mod.`), FSDP, activation checkpointing and
    DistributedDataParallel (`module.`), and an adapter's name within the key (`lora_A.default.weight`); PEFT's prefix
    `base_model.model.` is put before what lacks it. Frozen base weights that PEFT saves beside targeted embeddings
    (`.base_layer.`) are left out.

    Args:
        keys: The file's keys.
        source: What to call it in errors.

    Returns:
        The file's key -> PEFT's.

    Raises:
        LayoutError: If a key is none of a LoRA matrix, two mean the same matrix, or several adapters are in the file.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    names: dict[str, str] = {}
    for key in keys:
        if ".base_layer." in key:
            continue
        match = _PATTERN.fullmatch(key)
        module = _module_of(match["module"]) if match else ""
        if match is None or not module:
            raise LayoutError(
                f"{source} holds {key!r}, which is no LoRA matrix. Pairs are made of lora_A and lora_B alone: use an "
                "adapter without modules_to_save, DoRA, trained biases or resized embeddings, or have the tool that "
                "wrote it save it for PEFT."
            )
        names.setdefault(match["of_linear"] or match["of_embedding"] or "", key)
        kind, side = ("linear", match["linear"]) if match["linear"] else ("embedding", match["embedding"])
        ours = matrix_keys(module, kind)["AB".index(side)]
        if len(names) > 1:
            raise LayoutError(
                f"{source} holds more than one adapter: {' and '.join(map(repr, names.values()))} are of different "
                "ones. Save each by itself: model.save_pretrained(folder, selected_adapters=[name])."
            )
        if ours in taken:
            raise LayoutError(
                f"{source} holds {taken[ours]!r} and {key!r}, which are one matrix, {ours!r}. Take one of them out of "
                "the file."
            )
        taken[ours] = key
        found[key] = ours
    return found


def _module_of(path: str) -> str:
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while parts[:1] == [_PARALLEL_WRAPPER]:
        parts = parts[1:]
    return ".".join(parts[2:] if parts[:2] == _PEFT_PREFIX else parts)
