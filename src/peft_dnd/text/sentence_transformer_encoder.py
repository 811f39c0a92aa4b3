# SPDX-License-Identifier: Apache-2.0
"""`SentenceTransformerTextEncoder`: any sentence-transformers model as the text encoder of a generator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..errors import TextEncoderError
from ..storage.files import staged_directory
from ..storage.hub import HubOptions, commit_in_cache, find_folder, takes_keywords_of
from ..storage.progress import short_bars_hidden
from .blockwise_encoder import UNLIMITED, BlockwiseTextEncoder
from .layers import choose_layer, chosen_layer
from .prompts import check_prompts
from .sentence_transformer_loading import (
    load_sentence_transformer,
    load_word_vectors,
    model_config,
    set_limits,
    set_padding_token,
)
from .sentence_transformer_outputs import TextOutput, measured_sizes, text_outputs, token_lengths, whole_lengths


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SentenceTransformerTextEncoder(BlockwiseTextEncoder):
    """Token states and sentence embeddings of prompts by any model that sentence-transformers loads.

    That is a sentence-transformers model; a plain transformers encoder; the encoder half of a T5; a decoder-only
    language model; a static embedding; a file of word vectors
    ([`from_word_vectors`][SentenceTransformerTextEncoder.from_word_vectors]). For the base model itself, as it stands
    in memory, there is [`HiddenStatesTextEncoder`][peft_dnd.text.hidden_states_encoder.HiddenStatesTextEncoder].

    Token states are the model's `token_embeddings` of every token that is not padding, special tokens included, or
    the hidden states of `layer`; of a static embedding, the rows of the tokens. A sentence embedding is what
    `SentenceTransformer.encode` gives. Where the model names a default prompt of its own (an instruction before each
    text), it stands before each of ours, as in `encode`.

    **Long prompts.** A prompt longer than `max_length` tokens is cut there, and a warning says how many were. With
    `window_tokens` a longer prompt than that goes through the model in windows of so many tokens, whose states are
    joined: the token sequence of the whole text, special tokens at its two ends, is cut every `window_tokens`, as in
    the code published with the paper. Each window is read for itself, so that memory is bounded by `window_tokens` in
    the model and by `max_length` in what comes out. The sentence embedding of such a prompt is the mean of its
    windows', weighted by their tokens.

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
        layer: The layer whose hidden states are the token states, in transformers' own count: 0 is the embeddings,
            the number of layers the output, and negative numbers count from there. Layers that this does not need are
            dropped from the model, sentence embeddings become the mean of the token states, and texts are read as they
            are. Default: what the model itself gives, mostly its output; a chat model then gets each text in its chat
            template.
        max_length: The most tokens of one prompt; default: the model's own limit, or none if there are windows.
        window_tokens: The most tokens that go through the model at once; default: longer prompts are cut instead.
        trainable: Whether gradients flow into the model.
        block_tokens: How many tokens may go through the frozen model at once, at least one prompt's; see above.

    Raises:
        GeneratorConfigError: If `layer`, `max_length`, `window_tokens` or `block_tokens` is impossible.
        TextEncoderError: If the model gives no sentence embedding.
    """

    def __init__(
        self,
        module: SentenceTransformer,
        *,
        name_or_path: str | None = None,
        layer: int | None = None,
        max_length: int | None = None,
        window_tokens: int | None = None,
        trainable: bool = False,
        block_tokens: int = 1,
    ) -> None:
        super().__init__(window_tokens=window_tokens, block_tokens=block_tokens)
        self.module = module
        self.name_or_path = name_or_path or getattr(model_config(module), "_name_or_path", None) or None
        self.trainable = trainable
        self._commit_hash: str | None = None
        set_padding_token(module)
        if max_length is not None or window_tokens is not None:
            set_limits(module, max_length, window_tokens)
        if layer is not None:
            choose_layer(module, layer)
        self._token_size, self._sentence_size = measured_sizes(module)

    @classmethod
    @takes_keywords_of(find_folder)
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layer: int | None = None,
        max_length: int | None = None,
        window_tokens: int | None = None,
        trainable: bool = False,
        block_tokens: int = 1,
        **hub: Unpack[HubOptions],
    ) -> SentenceTransformerTextEncoder:
        """Load a model from a folder or from the Hub.

        A plain transformers model (no `modules.json`) works as well, of which a T5 gives its encoder and a language
        model its layers without the head; sentence-transformers then pools by the mean, or the last token of a
        language model.
        Only safetensors weights are read and no code of the repository is run; for a model that needs either, load it
        with `sentence_transformers.SentenceTransformer` and pass it to the constructor.

        Args:
            name_or_path: A folder or a Hub id, for instance `"sentence-transformers/all-MiniLM-L6-v2"`.
            device: Where to put the model; default: the CPU.
            dtype: Floating point type of the weights; default: as stored. States are `float32` in any case.
            layer: As in the class.
            max_length: As in the class.
            window_tokens: As in the class.
            trainable: As in the class.
            block_tokens: As in the class.
            hub: See [`HubOptions`][peft_dnd.storage.hub.HubOptions].

        Raises:
            TextEncoderError: If there is no such model, it cannot be reached, or its files are damaged.
            GeneratorConfigError: As in the class.
        """
        module = load_sentence_transformer(name_or_path, device=device, dtype=dtype, **hub)
        encoder = cls(
            module,
            name_or_path=os.fspath(name_or_path),
            layer=layer,
            max_length=max_length,
            window_tokens=window_tokens,
            trainable=trainable,
            block_tokens=block_tokens,
        )
        subfolder = hub.get("subfolder") or ""
        encoder._commit_hash = commit_in_cache(
            os.fspath(name_or_path),
            [Path(subfolder, file).as_posix() for file in ("modules.json", "config.json")],
            revision=hub.get("revision"),
            # As sentence-transformers has it.
            cache_dir=hub.get("cache_dir") or os.environ.get("SENTENCE_TRANSFORMERS_HOME"),
        )
        return encoder

    @classmethod
    def from_word_vectors(
        cls, path: str | os.PathLike[str], *, max_words: int | None = None, trainable: bool = False
    ) -> SentenceTransformerTextEncoder:
        """Load a text file of word vectors, such as GloVe's or word2vec's: one word and its numbers a line.

        A prompt's tokens are its words, split at white space, bare of punctuation where a word is not known with it,
        and in lower case where it is not known otherwise; unknown words are left out. A generator that was fitted
        with such an encoder has to carry it (`text_encoder_in_folder=True`), since it has no Hub id.

        Args:
            path: The file, gzipped if its name ends in `.gz`.
            max_words: How many of its first words to keep, commonly the most frequent ones; default: all.
            trainable: As in the class.

        Raises:
            TextEncoderError: If there is no such file, or it holds no word vectors.
        """
        return cls(load_word_vectors(path, max_words=max_words), trainable=trainable)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the model so that `from_pretrained(folder)` and sentence-transformers load it; whole or not at all.

        The weights are written as safetensors. `layer` and `max_length` are kept, the latter as far as the model can
        read at once; `window_tokens`, `trainable` and `block_tokens` are not.
        """
        limit = self.max_length
        if self.window_tokens is not None:
            # Others who load the folder know of no windows.
            self.module.max_seq_length = min(self.window_tokens, limit or self.window_tokens)
        try:
            with staged_directory(folder) as staged, short_bars_hidden():
                self.module.save_pretrained(str(staged), create_model_card=False, safe_serialization=True)
        finally:
            if self.window_tokens is not None:
                self.module.max_seq_length = UNLIMITED if limit is None else limit

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
    def layer(self) -> int | None:
        """The layer whose hidden states are the token states, counted from the front; `None`: the model's output."""
        return chosen_layer(self.module)

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
        return int(limit) if limit is not None and limit < UNLIMITED else None

    @property
    def commit_hash(self) -> str | None:
        """The Hub commit that `from_pretrained` loaded the model from, by its full id; `None` if it is not known."""
        return self._commit_hash

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many token states each prompt has: its tokens, special ones included, but `max_length` at most.

        Raises:
            PromptTypeError: As in [`check_prompts`].
            PromptError: As in [`check_prompts`].
            TextEncoderError: If the model has no token states.
        """
        lengths = [length for length in token_lengths(self.module, check_prompts(prompts)) if length is not None]
        if not lengths:
            raise self._no_token_states()
        return lengths

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
        return torch.stack(
            self._encode(prompts, lambda texts: [output.sentence_embedding.float() for output in self._outputs(texts)])
        )

    def _token_lengths(self, prompts: Sequence[str]) -> list[int | None]:
        return token_lengths(self.module, prompts)

    def _whole_lengths(self, prompts: Sequence[str]) -> list[int]:
        return whole_lengths(self.module, prompts)

    def _token_states(self, prompts: list[str], max_length: int | None) -> list[Tensor]:
        if self._token_size is None:
            raise self._no_token_states()
        outputs = self._outputs(prompts, max_length)
        return [cast("Tensor", output.token_states)[:max_length].float() for output in outputs]

    def _outputs(self, texts: list[str], max_tokens: int | None = None) -> list[TextOutput]:
        return text_outputs(
            self.module, texts, window_tokens=self.window_tokens, trainable=self.trainable, max_tokens=max_tokens
        )

    def _no_token_states(self) -> TextEncoderError:
        return TextEncoderError(
            f"The text encoder ({' + '.join(type(module).__name__ for module in self.module)}) gives one embedding a "
            "prompt and no token states, which the decoder reads. Use a transformer encoder such as "
            '"sentence-transformers/all-MiniLM-L6-v2", or a decoder that reads sentence embeddings.'
        )
