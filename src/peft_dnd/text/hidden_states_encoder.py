# SPDX-License-Identifier: Apache-2.0
"""`HiddenStatesTextEncoder`: a transformers model in memory, the base model itself, as the text encoder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import GeneratorConfigError, TextEncoderError
from ..storage.files import staged_directory
from ..storage.progress import short_bars_hidden
from .blockwise_encoder import UNLIMITED, BlockwiseTextEncoder, check_token_limits, windows
from .layers import layer_from_front
from .prompts import check_prompts


class HiddenStatesTextEncoder(BlockwiseTextEncoder):
    """The hidden states of a transformers model that is loaded already, most of all of the base model itself.

    The model is read as the base that it is: with PEFT's adapters off, in eval mode and without gradients. It is left
    as it was found, and it is never fitted, so that it may be in training at the same time. All its layers are run.
    For a model that is only there to read prompts, use
    [`SentenceTransformerTextEncoder.from_pretrained`][peft_dnd.text.sentence_transformer_encoder.SentenceTransformerTextEncoder]
    with `layer`, which drops the layers that are not needed; it gives the same states.

    What the states of a prompt depend on, and how long prompts are read in windows, is as described there. A sentence
    embedding is the mean of a prompt's token states.

    Args:
        model: The model, or a `PeftModel` around it; of an encoder-decoder the encoder is used.
        tokenizer: Its tokenizer.
        layer: The layer whose hidden states are the token states, in transformers' own count: 0 is the embeddings, the
            number of layers the output, and negative numbers count from there.
        name_or_path: The Hub id or folder that the model came from; default: what the model itself says.
        max_length: The most tokens of one prompt; default: as many as the model or its tokenizer can take, or no limit
            if there are windows.
        window_tokens: The most tokens that go through the model at once; default: longer prompts are cut instead.
        block_tokens: How many tokens of prompts of equal length may go through the model at once, at least one
            prompt's.

    Raises:
        GeneratorConfigError: If `layer`, `max_length`, `window_tokens` or `block_tokens` is impossible.

    Example:
        ```python
        encoder = HiddenStatesTextEncoder(base_model, tokenizer, layer=12)
        generator = PromptConditionedLoraGenerator.from_pretrained("org/generator", text_encoder=encoder)
        model = get_peft_model(base_model, DnDConfig(generator=generator, prompts=prompts))
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layer: int = -1,
        *,
        name_or_path: str | None = None,
        max_length: int | None = None,
        window_tokens: int | None = None,
        block_tokens: int = 1,
    ) -> None:
        super().__init__(window_tokens=window_tokens, block_tokens=block_tokens)
        self.module = model
        self.tokenizer = tokenizer
        self.layer: int | None = layer_from_front(self._reader.config, layer)
        self.name_or_path: str | None = name_or_path or getattr(self._reader.config, "_name_or_path", None) or None
        self._most = getattr(self._reader.config.get_text_config(), "max_position_embeddings", None)
        check_token_limits(max_length, window_tokens, tokenizer.num_special_tokens_to_add() + 1, self._most)
        self._max_length = max_length

    @property
    def trainable(self) -> bool:
        """Always `False`; see [`SentenceTransformerTextEncoder`][peft_dnd.text] for one to be fitted.

        Raises:
            GeneratorConfigError: If it is set to `True`.
        """
        return False

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        if trainable:
            raise GeneratorConfigError(
                "A HiddenStatesTextEncoder reads a model that belongs to others, so it cannot be fitted. Set "
                "freeze_text_encoder=True, or use SentenceTransformerTextEncoder.from_pretrained(..., layer=...)."
            )

    @property
    def embedding_size(self) -> int:
        """C, the size of one token state."""
        return int(self._reader.config.get_text_config().hidden_size)

    @property
    def sentence_embedding_size(self) -> int:
        """The size of one sentence embedding: C as well."""
        return self.embedding_size

    @property
    def max_length(self) -> int | None:
        """The most tokens of one prompt, special tokens included; `None` if there is no limit."""
        if self._max_length is not None or self.window_tokens is not None:
            return self._max_length
        limits = [limit for limit in (self._most, self.tokenizer.model_max_length) if limit is not None]
        return min([limit for limit in limits if limit < UNLIMITED], default=None)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many token states each prompt has: its tokens, special ones included, but `max_length` at most.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
        """
        return self._token_lengths(check_prompts(prompts))

    def encode_sentences(self, prompts: Sequence[str]) -> Tensor:
        """The mean of each prompt's token states; arguments and errors are those of `encode_tokens`.

        Returns:
            `float32`, `(n, C)`, on the device of the model.
        """
        return self.encode_tokens(prompts).mean()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the model without its head, so that `SentenceTransformerTextEncoder.from_pretrained` loads it.

        Raises:
            TextEncoderError: If PEFT's adapters are in the model.
        """
        if any(isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in self.module.modules()):
            raise TextEncoderError(
                "The text encoder is a model with PEFT's adapters in it, which cannot be saved as the base that it "
                "is. Let the generator name it instead of carrying it (text_encoder_in_folder=False), or pass a "
                "HiddenStatesTextEncoder of the base model without adapters."
            )
        # sentence-transformers takes the encoder half out of an encoder-decoder itself.
        model = self._model if self._model.config.is_encoder_decoder else self._reader
        with staged_directory(folder) as staged, short_bars_hidden():
            model.save_pretrained(staged)
            self.tokenizer.save_pretrained(str(staged))

    @property
    def _model(self) -> PreTrainedModel:
        model = self.module.get_base_model() if isinstance(self.module, PeftModel) else self.module
        if not isinstance(model, PreTrainedModel):
            raise GeneratorConfigError(
                f"The model of a HiddenStatesTextEncoder must be a transformers model or a PeftModel around one, not "
                f"{type(model).__name__}."
            )
        return model

    @property
    def _reader(self) -> PreTrainedModel:
        """The part of the model that gives hidden states, without a head."""
        model = self._model
        return cast(PreTrainedModel, model.get_encoder() if model.config.is_encoder_decoder else model.base_model)

    def _encode(self, prompts: Sequence[str], encode: Callable[[list[str]], list[Tensor]]) -> list[Tensor]:
        with _read_as_base(self.module):
            return super()._encode(prompts, encode)

    def _token_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._tokenize(prompts)]

    def _whole_lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]]

    def _tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        limit = self.max_length
        tokens: Any = self.tokenizer(
            list(prompts), truncation=limit is not None, max_length=limit, padding=False, verbose=False
        )
        return [list(ids) for ids in tokens["input_ids"]]

    def _token_states(self, prompts: list[str], max_length: int | None) -> list[Tensor]:
        model = self._reader
        ids = torch.tensor(self._tokenize(prompts), device=cast(Tensor, model.get_input_embeddings().weight).device)
        cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        states = []
        for window in windows(ids.shape[1], self.window_tokens, max_length):
            part = ids[:, window]
            output = model(input_ids=part, attention_mask=torch.ones_like(part), output_hidden_states=True, **cache)
            states.append(output.hidden_states[cast(int, self.layer)].float())
        return list(torch.cat(states, dim=1)[:, :max_length])


@contextmanager
def _read_as_base(model: nn.Module) -> Iterator[None]:
    """Adapters off, eval mode, no gradients, no autocast; afterwards all is as it was.

    Raises:
        TextEncoderError: If an adapter is merged into the model's weights.
    """
    parts: list[Any] = [*model.modules()]
    if any(part.merged for part in parts if isinstance(part, BaseTunerLayer)):
        raise TextEncoderError(
            "An adapter is merged into the text encoder, so that it is no longer the base model. Call "
            "model.unmerge_adapter(), or pass a HiddenStatesTextEncoder of the base model without adapters."
        )
    switches = [part for part in parts if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    enabled = [part for part in switches if not part.disable_adapters]
    training = [part for part in parts if part.training]
    # Switching adapters changes what of them requires a gradient.
    with_gradient = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for part in enabled:
            part.enable_adapters(False)
        model.eval()
        device = next(model.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part in enabled:
            part.enable_adapters(True)
        for part in training:
            part.training = True
        for parameter, requires_grad in with_gradient:
            parameter.requires_grad_(requires_grad)
