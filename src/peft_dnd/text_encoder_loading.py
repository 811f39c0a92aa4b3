# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Loading a sentence-transformers model and setting it up, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from transformers import PreTrainedTokenizerBase

from .errors import GeneratorConfigError, TextEncoderError


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_sentence_transformer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> SentenceTransformer:
    """Load a model; arguments and errors are those of `SentenceTransformerTextEncoder.from_pretrained`."""
    # sentence-transformers takes seconds to import, and most uses of this library never encode a text.
    from sentence_transformers import SentenceTransformer

    source = _checked_source(name_or_path)
    is_folder = os.path.isdir(source)
    try:
        module = SentenceTransformer(
            source,
            device="cpu" if device is None else str(device),
            revision=None if is_folder else revision,
            token=token,
            cache_folder=None if cache_dir is None else str(cache_dir),
            # A folder needs no Hub; without this, sentence-transformers asks it who the folder's base model is.
            local_files_only=local_files_only or is_folder,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # three libraries load the parts, each with exceptions of its own
        raise TextEncoderError(_loading_failed(source, is_folder, revision, local_files_only, error)) from error
    if dtype is not None:
        module.to(dtype)
    return module


def model_config(module: SentenceTransformer) -> Any:
    """The transformers configuration below a model; `None` where there is no transformers model."""
    return getattr(module.transformers_model, "config", None)


def set_max_length(module: SentenceTransformer, max_length: int) -> None:
    """Limit the tokens of one text, special ones included.

    Raises:
        GeneratorConfigError: If the model cannot read that many, or has no such limit.
    """
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise GeneratorConfigError(
            f"max_length={max_length} cannot be set: the text encoder ({type(module[0]).__name__}) does not limit the "
            "length of a text. Leave max_length out."
        )
    least = tokenizer.num_special_tokens_to_add() + 1
    most = getattr(model_config(module), "max_position_embeddings", None)
    if max_length < least or (most is not None and max_length > most):
        raise GeneratorConfigError(
            f"max_length of the text encoder must be from {least} (its special tokens and one more) to "
            f"{most or 'any number'} (its position embeddings), not {max_length}."
        )
    module.max_seq_length = max_length


def _checked_source(name_or_path: str | os.PathLike[str]) -> str:
    """The folder or Hub id; raises where a path was meant and there is no model at it."""
    source = os.path.expanduser(os.fspath(name_or_path))
    mend = (
        "Pass the folder that SentenceTransformer.save_pretrained wrote, or a Hub id such as "
        '"sentence-transformers/all-MiniLM-L6-v2".'
    )
    if os.path.isdir(source):
        if not any(Path(source, name).is_file() for name in ("modules.json", "config.json")):
            raise TextEncoderError(
                f"The folder {source!r} holds no text encoder: it has neither modules.json nor config.json. {mend}"
            )
        return source
    is_path = isinstance(name_or_path, os.PathLike) or os.path.isabs(source) or source.startswith(".")
    if os.path.exists(source):
        raise TextEncoderError(f"The text encoder {source!r} is a file, not a folder. {mend}")
    if is_path or source.count("/") > 1 or (os.path.sep != "/" and os.path.sep in source):
        raise TextEncoderError(f"There is no text encoder at {source!r}: no such folder. {mend}")
    return source


def _loading_failed(
    source: str, is_folder: bool, revision: str | None, local_files_only: bool, error: Exception
) -> str:
    cause = f"{type(error).__name__}: {str(error).strip()}"
    if is_folder:
        return (
            f"The text encoder in the folder {source!r} cannot be loaded; its files may be incomplete or cut short. "
            f"Write or download it again, with its weights as safetensors. The cause: {cause}"
        )
    named = f"{source!r}" + (f" (revision {revision!r})" if revision else "")
    if local_files_only or huggingface_hub.constants.HF_HUB_OFFLINE:
        why = "local_files_only=True was given" if local_files_only else "HF_HUB_OFFLINE is set"
        return (
            f"The text encoder {named} is no folder here and cannot be loaded from the Hub's cache, and the Hub is "
            f"not asked because {why}. Allow it, download the model first (hf download {source}), or pass a folder. "
            f"The cause: {cause}"
        )
    return (
        f"The text encoder {named} is no folder here and cannot be loaded from the Hub. Check the id, the revision "
        f"and the connection; a private or gated model needs token=... or `hf auth login`. The cause: {cause}"
    )
