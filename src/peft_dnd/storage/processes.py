# SPDX-License-Identifier: Apache-2.0
"""Several processes on one fit (DDP, FSDP, DeepSpeed): what transformers' Trainer does not see to by itself."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from transformers.integrations import deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import GeneratorConfigError, WeightValueError


if TYPE_CHECKING:
    from transformers import TrainingArguments

_Value = TypeVar("_Value")


def is_first_process() -> bool:
    """Whether this is the process that writes and reports: the only one, or that of rank 0."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def agree(value: _Value) -> _Value:
    """The first process's value, in all processes; each has to call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def is_share(tensor: torch.Tensor) -> bool:
    """Whether a parameter is here in part only: sharded by FSDP or tensor parallelism, or by DeepSpeed ZeRO-3."""
    return tensor.numel() == 0 or hasattr(tensor, "full_tensor")


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Within this context transformers loads a model whole: ZeRO-3 would shard it, although no engine gathers it."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def check_whole(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Make sure that weights that are about to be written are whole.

    Raises:
        WeightValueError: If one of them is here in part only.
    """
    for key, tensor in state_dict.items():
        if is_share(tensor):
            raise WeightValueError(
                f"{key!r} is sharded over several processes (FSDP or DeepSpeed ZeRO-3), so no process can write it. "
                "Call trainer.save_model(folder) in every process, which gathers the weights: with FSDP under "
                "state_dict_type FULL_STATE_DICT, with ZeRO-3 under stage3_gather_16bit_weights_on_model_save."
            )


def check_sharding(args: TrainingArguments, plugin: Any, *, fits_text_encoder: bool) -> None:
    """Make sure that sharding is as asked for, and of what can be sharded.

    Args:
        args: The training arguments.
        plugin: accelerate's FSDP plugin; `None` where it does not shard.
        fits_text_encoder: Whether the text encoder is fitted too.

    Raises:
        GeneratorConfigError: If a text encoder that is fitted too would be sharded, or weights were to be loaded in
            the first process alone.
    """
    if fits_text_encoder and (plugin is not None or is_deepspeed_zero3_enabled()):
        raise GeneratorConfigError(
            "A text encoder that is fitted too (freeze_text_encoder=False) cannot be sharded: it reads prompts "
            "outside of training steps as well. Use DDP or DeepSpeed ZeRO-2, or freeze it."
        )
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        raise GeneratorConfigError(
            "FSDP's cpu_ram_efficient_loading cannot send a generator's statistics to the other processes, and leaves "
            "them a text encoder without weights. Set it to false (fsdp_cpu_ram_efficient_loading in accelerate's "
            "configuration)."
        )
    asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and plugin is None:
        warnings.warn(
            f"FSDP was asked for, and accelerate does not shard on {args.device.type.upper()}: every process holds "
            "the whole model, as with DDP. Leave FSDP out here, or run on GPUs.",
            stacklevel=3,
        )


def separate_noise(args: TrainingArguments) -> None:
    """Have each of several processes draw noise and dropout of its own; all were seeded alike."""
    if args.world_size > 1:
        torch.manual_seed(args.seed + args.process_index)
