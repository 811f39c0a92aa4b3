# SPDX-License-Identifier: Apache-2.0
"""Whether a generator's files hold what its configuration says, found out before anything of that size is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.tokenizer import WeightTokenizer
from ..errors import CorruptFileError, GeneratorConfigError, GeneratorNotFoundError, PeftDndError
from ..storage.hub import check_loading_info
from ..storage.stored_weights import StoredTensor, stored_tensors
from .bases import module_key
from .configuration import PromptConditionedLoraGeneratorConfig


_SCALE = "normalization.scale"


def check_stored(
    name: str,
    build: Callable[[PromptConditionedLoraGeneratorConfig], nn.Module],
    config: PromptConditionedLoraGeneratorConfig,
    folder: Path,
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    """Build a generator without weights and compare it with what lies in its folder, from the files' headers.

    What the configuration says is not trusted before: neither time nor memory goes into sizes that the files do not
    have.

    Args:
        name: The generator's folder or Hub id, for errors.
        build: Its class.
        config: Its configuration.
        folder: Its folder.

    Returns:
        The generator, on the meta device, and the tensors in the files.

    Raises:
        GeneratorNotFoundError: If there are no weights in safetensors format, or not all of them.
        CorruptFileError: If a file is cut short, or holds other tensors than the configuration says.
        GeneratorConfigError: If a value of the configuration is impossible.
    """
    try:
        stored = stored_tensors(folder)
    except FileNotFoundError as error:
        raise GeneratorNotFoundError(
            f"The generator {name!r} has a configuration but no weights in safetensors format, or not all of them "
            f"({error}). Save it again, or fetch it again with force_download=True."
        ) from error
    _check_sizes(name, config, stored)
    try:
        with torch.device("meta"):
            model = build(config)
    except PeftDndError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, LookupError) as error:
        raise GeneratorConfigError(
            f"The generator {name!r} cannot be built as its config.json says ({type(error).__name__}: "
            f"{error!s:.200}). It was edited or damaged: save or fetch the generator again."
        ) from error
    check_loading_info(name, differences(model, stored))
    return model, stored


def differences(model: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, list[str]]:
    """How stored tensors differ from a model's, under the names that transformers has for it."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        "missing_keys": sorted(set(expected) - set(stored)),
        "unexpected_keys": sorted(set(stored) - set(expected)),
        "mismatched_keys": [name for name in expected if name in stored and expected[name] != stored[name].shape],
    }


def _check_sizes(name: str, config: PromptConditionedLoraGeneratorConfig, stored: Mapping[str, StoredTensor]) -> None:
    for number, base in enumerate(config.base_names or (None,)):
        one = config if base is None else config.of_base(base)
        scale = f"heads.{module_key(str(base))}.{_SCALE}" if number else _SCALE
        tokens = WeightTokenizer(one.adapter_layout, one.chunk_width).num_tokens
        found = stored[scale].shape if scale in stored else None
        if found != (tokens,):
            raise CorruptFileError(
                f"The generator {name!r} has mismatched keys, {scale!r} for one: by config.json it has {tokens} "
                f"weight tokens, and its weights have {'none' if found is None else list(found)}. The weights do not "
                "fit config.json: it was edited, or is another generator's."
            )
    for setting, number in _numbers(config.decoder_config):
        # As many layers as that would have a tensor each.
        if number >= 2**31 or ("layers" in setting and number > len(stored)):
            raise GeneratorConfigError(
                f"The generator {name!r} is to have a decoder with {setting} of {number!r:.80}, and its weights have "
                f"{len(stored)} tensors. Its config.json was edited: save or fetch the generator again."
            )


def _numbers(settings: Any, name: str = "") -> Iterable[tuple[str, int]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _numbers(value, str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _numbers(value, name)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield name, settings
