# SPDX-License-Identifier: Apache-2.0
"""Loading a sentence-transformers model and setting it up, with errors that say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from ..errors import GeneratorConfigError, TextEncoderError
from ..storage.hub import TEXT_ENCODER, HubOptions, find_folder
from ..storage.processes import loaded_whole
from ..storage.progress import short_bars_hidden
from .blockwise_encoder import UNLIMITED, check_token_limits


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


# What a text encoder is made of; other forms of its weights are not downloaded.
_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


def load_sentence_transformer(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **hub: Unpack[HubOptions],
) -> SentenceTransformer:
    """Load a model; arguments and errors are those of `SentenceTransformerTextEncoder.from_pretrained`."""
    # sentence-transformers takes seconds to import, and most uses of this library never encode a text.
    from sentence_transformers import SentenceTransformer

    source = _checked_source(name_or_path, hub.get("subfolder") or "")
    if not os.path.isdir(source) and (hub.get("subfolder") or hub.get("force_download")):
        # sentence-transformers itself knows neither.
        folder, _ = find_folder(TEXT_ENCODER, source, _FILES, **hub)
        source = _checked_source(folder)
    is_folder = os.path.isdir(source)
    revision, cache_dir = hub.get("revision"), hub.get("cache_dir")
    local_files_only = hub.get("local_files_only", False)
    try:
        with loaded_whole(), short_bars_hidden():
            module = SentenceTransformer(
                source,
                device="cpu" if device is None else str(device),
                revision=None if is_folder else revision,
                token=hub.get("token"),
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


def load_word_vectors(path: str | os.PathLike[str], *, max_words: int | None = None) -> SentenceTransformer:
    """Load word vectors; arguments and errors are those of `SentenceTransformerTextEncoder.from_word_vectors`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    file = os.path.expanduser(os.fspath(path))
    # sentence-transformers would look for a missing file on a server of its own.
    if not os.path.isfile(file):
        raise TextEncoderError(
            f"There is no file {file!r}. Pass a text file of word vectors, one word and its numbers a line, such as "
            "glove.6B.300d.txt; it may be gzipped, its name then ending in .gz."
        )
    # Its own list of stop words would drop "what", "which" and "not", by which prompts tell what is asked.
    tokenizer = WhitespaceTokenizer(stop_words=[], do_lower_case=False)
    try:
        words = WordEmbeddings.from_text_file(file, tokenizer=tokenizer, max_vocab_size=max_words)
    except (ValueError, OSError) as error:
        raise TextEncoderError(
            f"{file!r} is no file of word vectors: expected one word and its numbers a line, with blanks between "
            f"them. The cause: {type(error).__name__}: {error}"
        ) from error
    if words.get_embedding_dimension() < 1:
        raise TextEncoderError(
            f"{file!r} is no file of word vectors: its first line has no number. Expected one word and its numbers a "
            "line, with blanks between them."
        )
    return SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


def set_limits(module: SentenceTransformer, max_length: int | None, window_tokens: int | None) -> None:
    """Limit the tokens of one text, special ones included, and those of a window.

    Raises:
        GeneratorConfigError: If the model cannot read that many, or has no such limit.
    """
    tokenizer = getattr(module, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise GeneratorConfigError(
            f"max_length={max_length} and window_tokens={window_tokens} cannot be set: the text encoder "
            f"({type(module[0]).__name__}) does not limit the length of a text. Leave them out."
        )
    least = tokenizer.num_special_tokens_to_add() + 1
    check_token_limits(
        max_length, window_tokens, least, getattr(model_config(module), "max_position_embeddings", None)
    )
    module.max_seq_length = UNLIMITED if max_length is None else max_length


def set_padding_token(module: SentenceTransformer) -> None:
    """Give a tokenizer that has no padding token one, as those of decoder-only models often have none.

    Which one does not matter: padding is dropped again, or never made.
    """
    tokenizer = getattr(module, "tokenizer", None)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def _checked_source(name_or_path: str | os.PathLike[str], subfolder: str = "") -> str:
    """The folder or Hub id; raises where a path was meant and there is no model at it."""
    source = os.path.expanduser(os.fspath(name_or_path))
    mend = (
        "Pass the folder that SentenceTransformer.save_pretrained wrote, or a Hub id such as "
        '"sentence-transformers/all-MiniLM-L6-v2".'
    )
    if os.path.isdir(source):
        source = os.path.join(source, subfolder).rstrip(os.path.sep)
        if not any(Path(source, name).is_file() for name in ("modules.json", "config.json")):
            raise TextEncoderError(
                f"The folder {source!r} holds no text encoder: it has neither modules.json nor config.json. {mend}"
            )
        _refuse_generator(Path(source))
        return source
    is_path = isinstance(name_or_path, os.PathLike) or os.path.isabs(source) or source.startswith(".")
    if os.path.exists(source):
        raise TextEncoderError(f"The text encoder {source!r} is a file, not a folder. {mend}")
    if is_path or source.count("/") > 1 or (os.path.sep != "/" and os.path.sep in source):
        raise TextEncoderError(f"There is no text encoder at {source!r}: no such folder. {mend}")
    return source


def _refuse_generator(folder: Path) -> None:
    config = folder / "config.json"
    if config.is_file() and '"prompt_conditioned_lora_generator"' in config.read_text("utf-8", errors="replace"):
        raise TextEncoderError(
            f"{str(folder)!r} is a generator, no text encoder. If it carries one, that is "
            f"{str(folder / 'text_encoder')!r}."
        )


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
