# SPDX-License-Identifier: Apache-2.0
"""From prompts to what a decoder reads: the half of the generator that holds the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import TextEncoderError
from ..storage.hub import may_be_hub_id
from ..text.encoder import TextEncoder, check_how_it_reads, condition_size
from ..text.named_encoder import load_named_encoder
from ..text.padded_token_states import padded_token_states
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import draw_prompt_set, select_prompts
from ..text.prompts_and_answers import condition_texts
from ..text.token_states import TokenStates
from .checksums import check_text_encoder_files
from .configuration import TEXT_ENCODER_FOLDER
from .heads import HeadsMixin


# The most prompts that a decoder which reads sets is given. More say hardly more, and attention has to hold them all.
SET_LIMIT = 1024


class PromptReadingMixin(HeadsMixin):
    """Gives a generator its text encoder, which is loaded at first need.

    A frozen text encoder is kept beside the module, not in it: it is neither saved with the weights nor counted among
    the parameters. One that is to be fitted too becomes the submodule `text_encoder_module`.
    """

    _text_encoder: TextEncoder | None
    _folder: Path | None
    _commit: str | None
    _token: str | bool | None

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded at first need.

        Raises:
            TextEncoderError: If it cannot be loaded, or its width is not the configuration's.
            GeneratorConfigError: If one was passed that does not read as the configuration says.
        """
        return self.load_text_encoder()

    def load_text_encoder(self) -> TextEncoder:
        """Load the text encoder if it is not loaded yet; if it is to be fitted too, make it part of this module."""
        if self._text_encoder is None:
            self._text_encoder = self._find_text_encoder() if self.whole is None else self.whole.load_text_encoder()
        encoder = self._text_encoder
        check_how_it_reads(
            encoder, self.config.text_encoder_layer, self.config.window_tokens, self.config.text_encoder_layers
        )
        size = condition_size(encoder, self.config.condition)
        if size != self.config.condition_size:
            raise TextEncoderError(
                f"The text encoder {encoder.name_or_path!r} gives {self.config.condition} of width {size}; the "
                f"generator was built for {self.config.condition_size}. Use the text encoder it was built with."
            )
        if not self.config.freeze_text_encoder and "text_encoder_module" not in self._modules:
            encoder.trainable = True
            self.text_encoder_module = encoder.module
        return encoder

    def _find_text_encoder(self) -> TextEncoder:
        config = self.config
        name, revision, token = config.text_encoder, config.text_encoder_revision, self._token
        if config.text_encoder_in_folder and self._folder is not None:
            folder = self._folder / TEXT_ENCODER_FOLDER
            if not folder.is_dir():
                raise TextEncoderError(
                    f"The generator is to carry its text encoder in {str(folder)!r}, and that folder is missing. Save "
                    "the generator again with save_pretrained(..., include_text_encoder=True)."
                )
            check_text_encoder_files(self._folder)
            name, revision, token = str(folder), None, None
        if name is None:
            raise TextEncoderError(
                "The configuration names no text encoder. Set config.text_encoder to a sentence-transformers model, "
                "or pass PromptConditionedLoraGenerator(config, text_encoder=...)."
            )
        if self._commit is not None and not config.text_encoder_in_folder and not may_be_hub_id(name):
            raise TextEncoderError(
                f"The generator is from the Hub and names the text encoder {name!r}, a folder of whoever uploaded it. "
                "Pass the text encoder itself: from_pretrained(..., text_encoder=encoder)."
            )
        return load_named_encoder(
            name,
            revision=revision,
            token=token,
            layer=config.text_encoder_layer,
            layers=config.text_encoder_layers,
            window_tokens=config.window_tokens,
        )

    def condition_texts(
        self, prompts: PromptsLike, answers: PromptsLike | None = None, *, seed: int = 0, what: str = "prompts"
    ) -> tuple[str, ...]:
        """The texts that the generator reads of a task, in the form that `config.condition_text` asks for.

        Args:
            prompts: The prompts.
            answers: Their answers, if the generator reads them.
            seed: Decides which prompts have their answer, for `"mixed"`.
            what: What error messages call the prompts.

        Raises:
            PromptTypeError: As in [`condition_texts`][peft_dnd.text.prompts_and_answers.condition_texts].
            PromptError: As there.
        """
        config = self.config
        return condition_texts(
            prompts, answers, config.condition_text, answer_ratio=config.answer_ratio, seed=seed, what=what
        )

    def encode_prompts(
        self, prompts: Sequence[str], *, seed: int = 0, read: TokenStates | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a task's prompts into what `forward` takes for one task.

        Args:
            prompts: Any number of prompts. A decoder that was built for N of them reads those that
                [`select_prompts`] chooses. One that reads sets reads all, in an order that does not depend on the
                given one; of more than `SET_LIMIT` it reads that many.
            seed: Seed of that choice.
            read: What `read_states` gave for just these prompts, where they have been read already.

        Returns:
            States of shape (N, L, C), float32, and their bool mask of shape (N, L), on the CPU.
        """
        chosen = self._choose(prompts, seed)
        there = list(dict.fromkeys(chosen)) if read is None else prompts
        states = self.read_states(self.text_encoder, there) if read is None else read
        position = {prompt: i for i, prompt in enumerate(there)}
        return states.select(torch.tensor([position[prompt] for prompt in chosen]), self.config.max_prompt_length)

    def _choose(self, prompts: Sequence[str], seed: int) -> list[str]:
        if not self.decoder.reads_sets:
            return [prompts[i] for i in select_prompts(len(prompts), self.config.num_prompts, seed).tolist()]
        ordered = sorted(prompts)
        return [ordered[i] for i in draw_prompt_set(len(ordered), SET_LIMIT, seed).tolist()]

    def read_states(self, encoder: TextEncoder, prompts: Sequence[str]) -> TokenStates:
        """The states of prompts in the form that `config.condition` asks for."""
        if self.config.condition == "sentence_embeddings":
            return TokenStates.from_vectors(encoder.encode_sentences(prompts))
        if self.config.condition == "padded_token_states":
            return padded_token_states(encoder, prompts, self.config.max_prompt_length)
        if self.config.window_tokens is not None:
            windowed: Any = encoder  # which takes one keyword more, see `TextEncoder`
            states: TokenStates = windowed.encode_tokens(prompts, max_length=self.config.max_prompt_length)
            return states
        return encoder.encode_tokens(prompts).cut(self.config.max_prompt_length)
