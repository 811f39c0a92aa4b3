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
"""`SentenceTransformerTextEncoder`: any sentence-transformers model as the text encoder of a generator."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .errors import GeneratorConfigError, PromptError, TextEncoderError
from .files import staged_directory
from .prompts import TokenStates, check_prompts
from .text_encoder_loading import load_sentence_transformer, model_config, set_max_length


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


logger = logging.getLogger(__name__)

_TOKENIZING_BATCH = 256
_TRAINING_BLOCK_TOKENS = 1024
_PROGRESS_BAR_FROM = 512  # prompts; short ones take all-MiniLM-L6-v2 some 14 ms each on one CPU core


class SentenceTransformerTextEncoder:
    """Token states and sentence embeddings of prompts by a sentence-transformers model.

    Token states are the model's `token_embeddings` of every token that is not padding, special tokens included; a
    sentence embedding is what `SentenceTransformer.encode` gives. Where the model names a default prompt of its own
    (an instruction before each text), it stands before each of ours, as in `encode`. A prompt longer than
    `max_length` tokens is cut there, and a warning says how many were.

    **What the states of a prompt depend on.** Frozen, on that prompt alone, to the byte: not on the other prompts of
    the call, their number or order, nor on other calls, nor on autocast. This is because each prompt goes through the
    model alone. `block_tokens` above 1 lets prompts of equal token length share a pass; still nothing is padded and
    the same list gives the same bytes, but matrix kernels may round a row differently in other company, so that
    another list with the same prompt agrees to about 1e-5 only. On one CPU core, 1152 prompts of 10 to 16 tokens took
    all-MiniLM-L6-v2 16 s alone, 7 s with `block_tokens=64` and 5 s with 256; from about 60 tokens a prompt there was
    nothing to gain. Across machines, devices and library versions the agreement is about 1e-5 as well.

    **Training.** Frozen (the default), the model is in eval mode, without gradients. A trainable encoder keeps the
    graph, is in the train or eval mode that its module is in (eval at first, as transformers has it), and always lets
    prompts of equal length share a pass, as it has no bytes to keep.

    Args:
        module: The model. It is adopted, not copied: frozen, moved and limited to `max_length` in place.
        name_or_path: The Hub id or folder that it came from; default: what the model itself says.
        max_length: The most tokens of one prompt; default: the model's own limit.
        trainable: Whether gradients flow into the model.
        block_tokens: How many tokens may go through the frozen model at once, at least one prompt's; see above.

    Raises:
        GeneratorConfigError: If `max_length` or `block_tokens` is impossible.
        TextEncoderError: If the model gives no sentence embedding.
    """

    def __init__(
        self,
        module: SentenceTransformer,
        *,
        name_or_path: str | None = None,
        max_length: int | None = None,
        trainable: bool = False,
        block_tokens: int = 1,
    ) -> None:
        if block_tokens < 1:
            raise GeneratorConfigError(f"block_tokens must be at least 1, not {block_tokens}.")
        self.module = module
        self.name_or_path = name_or_path or getattr(model_config(module), "_name_or_path", None) or None
        self.block_tokens = block_tokens
        self.trainable = trainable
        self._has_warned_of_cuts = False
        if max_length is not None:
            set_max_length(module, max_length)
        self._token_size, self._sentence_size = self._measured_sizes()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        max_length: int | None = None,
        trainable: bool = False,
        block_tokens: int = 1,
    ) -> SentenceTransformerTextEncoder:
        """Load a model from a folder or from the Hub.

        A plain transformers encoder (no `modules.json`) works as well; sentence-transformers then pools by the mean.
        Only safetensors weights are read and no code of the repository is run; for a model that needs either, load it
        with `sentence_transformers.SentenceTransformer` and pass it to the constructor.

        Args:
            name_or_path: A folder or a Hub id, for instance `"sentence-transformers/all-MiniLM-L6-v2"`.
            revision: Branch, tag or commit on the Hub.
            token: Hub token, for private or gated models.
            device: Where to put the model; default: the CPU.
            dtype: Floating point type of the weights; default: as stored. States are `float32` in any case.
            cache_dir: Where downloads are kept; default: the Hub's own cache.
            local_files_only: Never ask the Hub.
            max_length: As in the class.
            trainable: As in the class.
            block_tokens: As in the class.

        Raises:
            TextEncoderError: If there is no such model, it cannot be reached, or its files are damaged.
            GeneratorConfigError: As in the class.
        """
        module = load_sentence_transformer(
            name_or_path,
            revision=revision,
            token=token,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls(
            module,
            name_or_path=os.fspath(name_or_path),
            max_length=max_length,
            trainable=trainable,
            block_tokens=block_tokens,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the model so that `from_pretrained(folder)` and sentence-transformers load it; whole or not at all.

        The weights are written as safetensors; `max_length` is kept, `trainable` and `block_tokens` are not.
        """
        with staged_directory(folder) as staged:
            self.module.save_pretrained(str(staged), create_model_card=False, safe_serialization=True)

    def to(self, device: torch.device | str) -> SentenceTransformerTextEncoder:
        """Move the model to a device."""
        self.module.to(device)
        return self

    @property
    def trainable(self) -> bool:
        """Whether gradients flow into the model.

        Setting it to `False` freezes every parameter; to `True`, releases them all if none requires a gradient, and
        otherwise leaves the choice of those that do as it is.
        """
        return self._trainable

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        if not trainable:
            self.module.requires_grad_(False)
        elif not any(parameter.requires_grad for parameter in self.module.parameters()):
            self.module.requires_grad_(True)
        self._trainable = trainable

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.module.device

    @property
    def embedding_size(self) -> int:
        """C, the size of one token state.

        Raises:
            TextEncoderError: If the model has no token states.
        """
        if self._token_size is None:
            raise self._no_token_states()
        return self._token_size

    @property
    def sentence_embedding_size(self) -> int:
        """The size of one sentence embedding; it differs from C where the model projects or truncates it."""
        return self._sentence_size

    @property
    def max_length(self) -> int | None:
        """The most tokens of one prompt, special tokens included; `None` if the model has no limit."""
        limit = getattr(self.module, "max_seq_length", None)
        # "No limit" is written as None, as infinity, or as a number beyond all sense.
        return int(limit) if limit is not None and limit < 2**31 else None

    @property
    def commit_hash(self) -> str | None:
        """The Hub commit that the model came from; `None` if it came from a folder or was built in memory."""
        return getattr(model_config(self.module), "_commit_hash", None)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many token states each prompt has: its tokens, special ones included, but `max_length` at most.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
            TextEncoderError: If the model has no token states.
        """
        lengths = [length for length in self._token_lengths(check_prompts(prompts)) if length is not None]
        if not lengths:
            raise self._no_token_states()
        return lengths

    def encode_tokens(self, prompts: Sequence[str]) -> TokenStates:
        """The states of all tokens of each prompt that are not padding, special tokens included.

        Args:
            prompts: The prompts.

        Returns:
            Token states, `float32`, on the device of the model.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`], or if the tokenizer makes no token of a prompt.
            TextEncoderError: If the model has no token states (a static embedding, a bag of words), or they are not
                finite.
        """
        if self._token_size is None:
            raise self._no_token_states()
        return TokenStates.from_list(self._encode(prompts, _token_states))

    def encode_sentences(self, prompts: Sequence[str]) -> Tensor:
        """The sentence embedding of each prompt, as `SentenceTransformer.encode` gives it.

        Args:
            prompts: The prompts.

        Returns:
            `float32`, `(n, sentence_embedding_size)`, on the device of the model.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`], or if the tokenizer makes no token of a prompt.
            TextEncoderError: If the embeddings are not finite.
        """
        return torch.stack(self._encode(prompts, _sentence_embedding))

    def _encode(self, prompts: Sequence[str], read: Callable[[dict[str, Any]], Tensor]) -> list[Tensor]:
        """Encode prompts and take one tensor of each prompt's output, in the order of the prompts."""
        checked = check_prompts(prompts)
        lengths = self._token_lengths(checked)
        if 0 in lengths:
            prompt = checked[lengths.index(0)]
            raise PromptError(
                f"prompts[{lengths.index(0)}] ({prompt!a:.60}) has no token in the vocabulary of the text encoder. "
                "Leave it out, or use an encoder that knows its script."
            )
        self._warn_of_cuts(checked, lengths)
        outputs: dict[int, Tensor] = {}
        with transformers_logging.tqdm(
            total=len(checked), desc="Encoding prompts", unit="prompt", disable=len(checked) < _PROGRESS_BAR_FROM
        ) as progress:
            for block in _blocks(lengths, _TRAINING_BLOCK_TOKENS if self.trainable else self.block_tokens):
                rows = self._forward([checked[index] for index in block])
                outputs.update((index, read(row).float()) for index, row in zip(block, rows, strict=True))
                progress.update(len(block))
        ordered = [outputs[index] for index in range(len(checked))]
        _check_finite(ordered, checked)
        return ordered

    def _forward(self, texts: list[str]) -> list[dict[str, Any]]:
        """The model's outputs for texts of equal token length, one dictionary each."""
        if not self.trainable:
            # Inside a mixed-precision training step autocast would otherwise change the states. `encode` itself sets
            # eval mode, which a `train()` on a parent module may have undone.
            with torch.autocast(self.device.type, enabled=False):
                outputs = self.module.encode(texts, batch_size=len(texts), output_value=None, show_progress_bar=False)
            return cast("list[dict[str, Any]]", outputs)
        output = self.module(self._features(texts))
        output["sentence_embedding"] = output["sentence_embedding"][..., : self.module.truncate_dim]
        batched = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.dim() > 0}
        return [{name: value[row] for name, value in batched.items()} for row in range(len(texts))]

    def _features(self, texts: list[str]) -> dict[str, Any]:
        """Tokenize as `SentenceTransformer.encode` does, onto the device of the model."""
        if hasattr(self.module, "preprocess"):
            features = self.module.preprocess(texts, prompt=self._instruction() or None)
        else:  # in the oldest sentence-transformers that is supported, 5.2, it had another name and less to do
            features = self.module.tokenize([self._instruction() + text for text in texts])
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in features.items()
        }

    def _instruction(self) -> str:
        """What the model by its own configuration puts before each text; mostly nothing."""
        return self.module.prompts.get(self.module.default_prompt_name or "") or ""

    def _token_lengths(self, prompts: tuple[str, ...]) -> list[int | None]:
        """How many tokens each prompt has, as far as the model's features say so."""
        lengths: list[int | None] = []
        for start in range(0, len(prompts), _TOKENIZING_BATCH):
            batch = list(prompts[start : start + _TOKENIZING_BATCH])
            mask = self._features(batch).get("attention_mask")
            lengths += [None] * len(batch) if mask is None else mask.sum(dim=1).tolist()
        return lengths

    def _warn_of_cuts(self, prompts: tuple[str, ...], lengths: list[int | None]) -> None:
        tokenizer = getattr(self.module, "tokenizer", None)
        limit = self.max_length
        if limit is None or not isinstance(tokenizer, PreTrainedTokenizerBase):
            return
        # Most prompts are shorter; only of those that fill the limit must be asked whether they would exceed it.
        full = [
            self._instruction() + prompt
            for prompt, length in zip(prompts, lengths, strict=True)
            if length is not None and length >= limit
        ]
        num_cut = sum(len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) > limit for text in full)
        if num_cut:
            # A warning once, and then quietly: a served generator sees the same prompts again and again.
            logger.log(
                logging.INFO if self._has_warned_of_cuts else logging.WARNING,
                "%d of %d prompts are longer than the text encoder's limit of %d tokens and were cut there.",
                num_cut,
                len(prompts),
                limit,
            )
            self._has_warned_of_cuts = True

    def _measured_sizes(self) -> tuple[int | None, int]:
        """Sizes of token states (`None` if there are none) and sentence embeddings, from one short text."""
        self.module.eval()
        with torch.no_grad():
            output = self.module(self._features(["a"]))
        if "sentence_embedding" not in output:
            raise TextEncoderError(
                f"The text encoder gives no sentence embedding, only {sorted(output)}. Use a sentence-transformers "
                "model that ends in a pooling module."
            )
        token_size = output["token_embeddings"].shape[-1] if "token_embeddings" in output else None
        return token_size, output["sentence_embedding"][..., : self.module.truncate_dim].shape[-1]

    def _no_token_states(self) -> TextEncoderError:
        return TextEncoderError(
            f"The text encoder ({' + '.join(type(module).__name__ for module in self.module)}) gives one embedding a "
            "prompt and no token states, which the decoder reads. Use a transformer encoder such as "
            '"sentence-transformers/all-MiniLM-L6-v2", or a decoder that reads sentence embeddings.'
        )


def _token_states(output: dict[str, Any]) -> Tensor:
    states: Tensor = output["token_embeddings"]
    mask = output.get("attention_mask")
    return states if mask is None else states[mask.bool()]


def _sentence_embedding(output: dict[str, Any]) -> Tensor:
    return cast("Tensor", output["sentence_embedding"])


def _blocks(lengths: list[int | None], block_tokens: int) -> Iterator[list[int]]:
    """Group prompts of equal length, so that none is padded, into blocks of at most `block_tokens` tokens.

    Yields indices of prompts. A prompt longer than a block, or of unknown length, is a block of its own.
    """
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length is None:
            yield [index]
        else:
            groups.setdefault(length, []).append(index)
    for length, group in groups.items():
        size = max(1, block_tokens // length)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _check_finite(embeddings: list[Tensor], prompts: tuple[str, ...]) -> None:
    if bool(torch.isfinite(torch.stack([embedding.detach().sum() for embedding in embeddings])).all()):
        return
    bad = next(index for index, embedding in enumerate(embeddings) if not bool(torch.isfinite(embedding).all()))
    raise TextEncoderError(
        f"The text encoder's embedding of prompts[{bad}] ({prompts[bad]!a:.60}) is not finite. Load the encoder in "
        "torch.float32 (dtype=torch.float32); if that does not help, its weights are damaged."
    )
