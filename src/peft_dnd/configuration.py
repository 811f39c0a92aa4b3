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
"""The generator's configuration: what it reads, what it writes, and what lies between."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from transformers import PretrainedConfig

from .errors import FormatVersionError, GeneratorConfigError, GeneratorNotFoundError
from .files import PathLike
from .layout import AdapterLayout
from .sentence_transformer import SentenceTransformerTextEncoder
from .text_encoder import TextEncoder
from .tokenizer import WeightTokenizer


FORMAT_VERSION = 1
CONDITIONS = ("token_states", "sentence_embeddings")
NORMALIZATIONS = ("per_tensor", "none")
_PROMPTS_LOOKED_AT = 64
_LENGTH_STEP = 8


@runtime_checkable
class PromptedAdapters(Protocol):
    """What [`PromptConditionedLoraGeneratorConfig.from_adapters`] reads: a `PromptCheckpointDataset`, for one."""

    @property
    def layout(self) -> AdapterLayout:
        """The layout that all its adapters share."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        ...

    def prompts(self, task: str) -> tuple[str, ...]:
        """A task's prompts."""
        ...


class PromptConditionedLoraGeneratorConfig(PretrainedConfig):
    """Configuration of a [`PromptConditionedLoraGenerator`].

    Use [`from_adapters`][PromptConditionedLoraGeneratorConfig.from_adapters] to have what can be read off your
    adapters and text encoder filled in.

    Args:
        layout: What is written: an [`AdapterLayout`] or its dictionary.
        text_encoder: Hub id or folder of the sentence-transformers model that reads the prompts; `"text_encoder"` with
            `text_encoder_in_folder=True` for one carried inside the generator's own folder.
        text_encoder_revision: Branch, tag or commit of a text encoder on the Hub.
        text_encoder_in_folder: Whether the text encoder lies in the generator's folder, in `text_encoder/`.
        freeze_text_encoder: Whether fitting leaves the text encoder as it is. If not, it is always carried.
        condition: `"token_states"`: the decoder reads the state of every token of every prompt, as in the paper;
            `"sentence_embeddings"`: one pooled vector a prompt, so that `max_prompt_length` is 1.
        num_prompts: How many prompts N the decoder reads at once.
        max_prompt_length: How many tokens L it reads of each; longer prompts are cut, shorter ones padded and masked.
        condition_size: Width C of the text encoder's states.
        chunk_width: Columns per weight token; `None` chooses the width that wastes least.
        normalization: `"per_tensor"`: tokens are shifted by the mean training adapter and scaled per tensor;
            `"none"`: raw weights.
        decoder_type: The family of decoders, a key of [`peft_dnd.decoders.DECODERS`].
        decoder_config: That decoder's own settings, e.g. `{"kernel_size": 9, "cascade": [[N, L, C], ...]}`.
        measured: What was measured of the generator: metric -> value, for its model card. `DnDTrainer` fills it in.
        format_version: Version of the folder's format; a newer one than this library knows is refused.

    Raises:
        GeneratorConfigError: If a value is impossible, or a name looks like a misspelt one.
        FormatVersionError: If `format_version` is newer than this version of the library.
    """

    model_type = "prompt_conditioned_lora_generator"

    def __init__(
        self,
        layout: AdapterLayout | Mapping[str, Any] | None = None,
        text_encoder: str | None = None,
        text_encoder_revision: str | None = None,
        text_encoder_in_folder: bool = False,
        freeze_text_encoder: bool = True,
        condition: str = "token_states",
        num_prompts: int = 16,
        max_prompt_length: int = 64,
        condition_size: int = 384,
        chunk_width: int | None = None,
        normalization: str = "per_tensor",
        decoder_type: str = "hyper_convolution",
        decoder_config: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise FormatVersionError(
                f"This generator is of format version {format_version}; this version of peft_dnd reads up to "
                f"{FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-dnd"
            )
        self.layout = layout.to_dict() if isinstance(layout, AdapterLayout) else layout
        self.text_encoder = text_encoder
        self.text_encoder_revision = text_encoder_revision
        self.text_encoder_in_folder = text_encoder_in_folder
        self.freeze_text_encoder = freeze_text_encoder
        self.condition = condition
        self.num_prompts = num_prompts
        self.max_prompt_length = max_prompt_length
        self.condition_size = condition_size
        self.chunk_width = chunk_width
        self.normalization = normalization
        self.decoder_type = decoder_type
        self.decoder_config = dict(decoder_config or {})
        self.measured = dict(measured or {})
        self.format_version = format_version
        self._check_values()
        _refuse_misspelt(kwargs, own=[name for name in vars(self) if not name.startswith("_")])
        super().__init__(**kwargs)

    @classmethod
    def from_adapters(
        cls,
        adapters: PromptedAdapters | AdapterLayout,
        text_encoder: str | TextEncoder,
        *,
        text_encoder_revision: str | None = None,
        text_encoder_in_folder: bool = False,
        freeze_text_encoder: bool = True,
        condition: str = "token_states",
        num_prompts: int = 16,
        max_prompt_length: int | None = None,
        chunk_width: int | None = None,
        normalization: str = "per_tensor",
        decoder_type: str = "hyper_convolution",
        decoder_config: Mapping[str, Any] | None = None,
    ) -> PromptConditionedLoraGeneratorConfig:
        """Build a configuration for adapters like the given ones.

        The layout is the adapters'; `condition_size` is the text encoder's. Where `max_prompt_length` is `None` it
        becomes the length of the longest of up to 64 prompts of each task, rounded up to a multiple of 8, or for a
        bare layout 64, and never more than the text encoder reads.

        Args:
            adapters: A `PromptCheckpointDataset`, or a layout alone.
            text_encoder: Hub id or folder of a sentence-transformers model, or a loaded text encoder.
            text_encoder_revision: See the class.
            text_encoder_in_folder: See the class.
            freeze_text_encoder: See the class.
            condition: See the class.
            num_prompts: See the class.
            max_prompt_length: See the class, and above.
            chunk_width: See the class.
            normalization: See the class.
            decoder_type: See the class.
            decoder_config: See the class.

        Raises:
            TextEncoderError: If the text encoder cannot be loaded.
            GeneratorConfigError: If a value is impossible.
        """
        if isinstance(text_encoder, str):
            name: str | None = text_encoder
            encoder: TextEncoder = SentenceTransformerTextEncoder.from_pretrained(
                text_encoder, revision=text_encoder_revision
            )
        else:
            encoder, name = text_encoder, text_encoder.name_or_path
        layout = adapters if isinstance(adapters, AdapterLayout) else adapters.layout
        if condition == "sentence_embeddings":
            max_prompt_length = 1
        elif max_prompt_length is None:
            max_prompt_length = 64 if isinstance(adapters, AdapterLayout) else _longest_prompt(adapters, encoder)
            max_prompt_length = min(max_prompt_length, encoder.max_length or max_prompt_length)
        return cls(
            layout=layout,
            text_encoder=name,
            text_encoder_revision=text_encoder_revision,
            text_encoder_in_folder=text_encoder_in_folder,
            freeze_text_encoder=freeze_text_encoder,
            condition=condition,
            num_prompts=num_prompts,
            max_prompt_length=max_prompt_length,
            condition_size=condition_size(encoder, condition),
            chunk_width=chunk_width,
            normalization=normalization,
            decoder_type=decoder_type,
            decoder_config=decoder_config,
        )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Find and read a generator's `config.json`; called by `from_pretrained`.

        Raises:
            GeneratorNotFoundError: If there is none, or it is another kind of model's.
        """
        name = str(pretrained_model_name_or_path)
        try:
            config_dict, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise GeneratorNotFoundError(
                f"There is no generator at {name!r}: expected a folder that "
                "PromptConditionedLoraGenerator.save_pretrained has written, or a Hub id. Check the spelling, the "
                f"network and your access token. ({error})"
            ) from error
        if config_dict.get("model_type") != cls.model_type:
            raise GeneratorNotFoundError(
                f"{name!r} is a model of type {config_dict.get('model_type')!r}, no generator; expected "
                f"{cls.model_type!r}."
            )
        return config_dict, rest

    @property
    def adapter_layout(self) -> AdapterLayout:
        """The layout of the adapters that the generator writes.

        Raises:
            GeneratorConfigError: If the configuration has none.
        """
        if self.layout is None:
            raise GeneratorConfigError(
                "The configuration has no adapter layout. Build it with "
                "PromptConditionedLoraGeneratorConfig.from_adapters(pairs, text_encoder=...)."
            )
        return AdapterLayout.from_dict(self.layout)

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base model that the adapters are for, if known."""
        return self.layout["base_model_name_or_path"] if self.layout else None

    @base_model_name_or_path.setter
    def base_model_name_or_path(self, name: str | None) -> None:
        self.layout = replace(self.adapter_layout, base_model_name_or_path=name).to_dict()

    @property
    def condition_shape(self) -> tuple[int, int, int]:
        """(N, L, C) of what the decoder reads."""
        return (self.num_prompts, self.max_prompt_length, self.condition_size)

    def weight_tokenizer(self) -> WeightTokenizer:
        """The tokenizer of the layout at this configuration's chunk width."""
        return WeightTokenizer(self.adapter_layout, self.chunk_width)

    def _check_values(self) -> None:
        for name in ("num_prompts", "max_prompt_length", "condition_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise GeneratorConfigError(f"{name} must be a positive integer, got {value!r}.")
        for name, choices in (("condition", CONDITIONS), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in choices:
                raise GeneratorConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if self.condition == "sentence_embeddings" and self.max_prompt_length != 1:
            raise GeneratorConfigError(
                f"With condition='sentence_embeddings' each prompt is one vector, so max_prompt_length must be 1, got "
                f"{self.max_prompt_length}."
            )


def condition_size(encoder: TextEncoder, condition: str) -> int:
    """The width of what a text encoder gives in the form of a condition, one of `CONDITIONS`."""
    return encoder.embedding_size if condition == "token_states" else encoder.sentence_embedding_size


def _longest_prompt(adapters: PromptedAdapters, encoder: TextEncoder) -> int:
    longest = 1
    for task in adapters.tasks:
        longest = max(longest, *encoder.count_tokens(adapters.prompts(task)[:_PROMPTS_LOOKED_AT]))
    return math.ceil(longest / _LENGTH_STEP) * _LENGTH_STEP


def _refuse_misspelt(kwargs: Mapping[str, Any], own: list[str]) -> None:
    # transformers keeps unknown keywords as attributes, so that configurations of other versions load; a near miss of
    # one of our own names is a typo, though, and would silently leave the default in force.
    for name in kwargs:
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
        if near:
            raise GeneratorConfigError(f"Unknown setting {name!r}. Did you mean {near[0]!r}?")
