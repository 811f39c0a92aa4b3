# SPDX-License-Identifier: Apache-2.0
"""The generator's configuration: what it reads, what it writes, and what lies between."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from ..adapters.layout import AdapterLayout
from ..adapters.published_tokenizer import PublishedTokenizer
from ..adapters.tokenizer import WeightTokenizer
from ..errors import (
    CorruptFileError,
    FormatVersionError,
    GeneratorConfigError,
    GeneratorNotFoundError,
    PeftDndError,
    did_you_mean,
)
from ..storage.cards import check_card_metadata
from ..storage.files import PathLike, read_json
from ..storage.hub import generator_name, what_it_is_instead
from ..text.encoder import TextEncoder, check_how_it_reads, check_text_encoder, condition_size, longest_prompt
from ..text.named_encoder import load_named_encoder
from .bases import AdaptersOfBases, BasesMixin, check_base_name, checked_bases
from .configuration_checks import as_dict, as_list, check_values, refuse_misspelt
from .paper_settings import PaperSettings


FORMAT_VERSION = 1
# Of a generator with a policy or several bases, so that a version which knows neither does not pass over them.
NEWER_FORMAT_VERSION = 2
TEXT_ENCODER_FOLDER = "text_encoder"


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


class PromptConditionedLoraGeneratorConfig(BasesMixin, PretrainedConfig):
    """Configuration of a [`PromptConditionedLoraGenerator`].

    Use [`from_adapters`][PromptConditionedLoraGeneratorConfig.from_adapters] to have what can be read off your
    adapters and text encoder filled in.

    Args:
        layout: What is written: an [`AdapterLayout`] or its dictionary.
        text_encoder: Hub id or folder of the model that reads the prompts: a sentence-transformers model, or any other
            that [`SentenceTransformerTextEncoder`] loads, a T5 or a language model for instance; `"text_encoder"` with
            `text_encoder_in_folder=True` for one carried inside the generator's own folder.
        text_encoder_revision: Branch, tag or commit of a text encoder on the Hub.
        text_encoder_layer: The layer whose hidden states are read, from 0, the embeddings, up to the number of layers,
            the output; `None` for what the model itself gives, mostly its output.
        text_encoder_layers: In place of one layer: those whose states where the answer would begin are read, as
            [`AnswerStatesTextEncoder`] does, one vector a prompt.
        text_encoder_in_folder: Whether the text encoder lies in the generator's folder, in `text_encoder/`.
        freeze_text_encoder: Whether fitting leaves the text encoder as it is. If not, it is always carried.
        condition: `"token_states"`: the decoder reads the state of every token of every prompt, as in the paper;
            `"sentence_embeddings"`: one pooled vector a prompt, so that `max_prompt_length` is 1;
            `"padded_token_states"`: the padding's states too, which only generators of the paper's release need.
        num_prompts: How many prompts N the decoder reads at once; for one that reads sets, the most that it reads of a
            task at a step of fitting. When it is used it reads all that it is given.
        max_prompt_length: How many tokens L it reads of each; longer prompts are cut, shorter ones padded and masked.
        window_tokens: The most tokens that go through the text encoder at once. Longer prompts are read in windows of
            so many, up to `max_prompt_length`; with `None` they are cut where the text encoder's own limit is.
        condition_text: Which texts are read of a task: `"prompts"`, as in the paper; `"prompts_and_answers"`;
            `"mixed"`; or `"answers"`. See [`condition_texts`].
        answer_ratio: For `"mixed"`: which share of the texts holds answers.
        condition_size: Width C of the text encoder's states.
        chunk_width: Columns per weight token; `None` chooses the width that wastes least.
        token_format: `"chunks"`: weights as they are, see [`WeightTokenizer`]; `"published"`: the tokens of the
            paper's release, which carry their own scales, see [`PublishedTokenizer`]; with `normalization="none"`.
        normalization: `"per_tensor"`: tokens are shifted by the mean training adapter and scaled per tensor;
            `"none"`: raw weights.
        decoder_type: The family of decoders, a key of [`peft_dnd.decoders.DECODERS`]: `"set_transformer"`, or the
            paper's `"hyper_convolution"`.
        decoder_config: That decoder's own settings, e.g. `{"num_templates": 32}`.
        measured: What was measured of the generator: metric -> value, for its model card. `DnDTrainer` fills it in.
        card_metadata: What only you can say at the head of its card: `license`, `datasets`, `language`, `tags`.
        policy: What [`set_policy`][peft_dnd.PromptConditionedLoraGenerator] keeps here of the generator's policy.
        base_name: What the base of `layout` is called; by default the last part of its model's name.
        bases: Further bases that adapters are written for: name -> its `layout`, `chunk_width` and, of
            `decoder_config`, what the base has its own of.
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
        text_encoder_layer: int | None = None,
        text_encoder_layers: Sequence[int] | None = None,
        text_encoder_in_folder: bool = False,
        freeze_text_encoder: bool = True,
        condition: str = "token_states",
        num_prompts: int = 16,
        max_prompt_length: int = 64,
        window_tokens: int | None = None,
        condition_text: str = "prompts",
        answer_ratio: float = 0.2,
        condition_size: int = 384,
        chunk_width: int | None = None,
        token_format: str = "chunks",
        normalization: str = "per_tensor",
        decoder_type: str = "set_transformer",
        decoder_config: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        card_metadata: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        base_name: str | None = None,
        bases: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        if not isinstance(format_version, int):
            raise GeneratorConfigError(f"format_version must be an integer, got {format_version!r}.")
        if format_version > NEWER_FORMAT_VERSION:
            raise FormatVersionError(
                f"This generator is of format version {format_version}; this version of peft_dnd reads up to "
                f"{NEWER_FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-dnd"
            )
        self.layout = layout.to_dict() if isinstance(layout, AdapterLayout) else layout
        self.text_encoder = text_encoder
        self.text_encoder_revision = text_encoder_revision
        self.text_encoder_layer = text_encoder_layer
        self.text_encoder_layers = None if text_encoder_layers is None else as_list(text_encoder_layers)
        self.text_encoder_in_folder = text_encoder_in_folder
        self.freeze_text_encoder = freeze_text_encoder
        self.condition = condition
        self.num_prompts = num_prompts
        self.max_prompt_length = max_prompt_length
        self.window_tokens = window_tokens
        self.condition_text = condition_text
        self.answer_ratio = answer_ratio
        self.condition_size = condition_size
        self.chunk_width = chunk_width
        self.token_format = token_format
        self.normalization = normalization
        self.decoder_type = decoder_type
        self.decoder_config = as_dict("decoder_config", decoder_config)
        self.measured = as_dict("measured", measured)
        self.card_metadata = check_card_metadata(card_metadata or {})
        self.policy = as_dict("policy", policy)
        if base_name is not None:
            check_base_name(base_name)
        self.base_name = base_name
        self.bases = checked_bases(bases)
        self.format_version = max(format_version, NEWER_FORMAT_VERSION if self.bases else FORMAT_VERSION)
        check_values(self)
        refuse_misspelt(kwargs, own=[name for name in vars(self) if not name.startswith("_")])
        super().__init__(**kwargs)

    @classmethod
    def from_adapters(
        cls,
        adapters: PromptedAdapters | AdapterLayout | Mapping[str, PromptedAdapters | AdapterLayout],
        text_encoder: str | TextEncoder,
        *,
        text_encoder_revision: str | None = None,
        text_encoder_layer: int | None = None,
        text_encoder_layers: Sequence[int] | None = None,
        text_encoder_in_folder: bool = False,
        freeze_text_encoder: bool = True,
        condition: str = "token_states",
        num_prompts: int = 16,
        max_prompt_length: int | None = None,
        window_tokens: int | None = None,
        condition_text: str = "prompts",
        answer_ratio: float = 0.2,
        chunk_width: int | None = None,
        normalization: str = "per_tensor",
        decoder_type: str = "set_transformer",
        decoder_config: Mapping[str, Any] | None = None,
    ) -> PromptConditionedLoraGeneratorConfig:
        """Build a configuration for adapters like the given ones.

        The layout is the adapters'; `condition_size` is the text encoder's. Where `max_prompt_length` is `None` it
        becomes the length of the longest of up to 64 prompts of each task, rounded up to a multiple of 8, or for a
        bare layout 64, and never more than the text encoder reads.

        Args:
            adapters: A `PromptCheckpointDataset`, or a layout alone; for several bases a dictionary, name -> one of
                these.
            text_encoder: Hub id or folder of a model, or a loaded text encoder.
            text_encoder_revision: See the class. `None` keeps the commit that the Hub gave.
            text_encoder_layer: See the class; negative numbers count from the output, -1. Of a loaded text encoder it
                is known.
            text_encoder_layers: See the class. Of a loaded text encoder they are known.
            text_encoder_in_folder: See the class. A loaded text encoder that came from nowhere is always carried.
            freeze_text_encoder: See the class.
            condition: See the class.
            num_prompts: See the class.
            max_prompt_length: See the class, and above.
            window_tokens: See the class. Of a loaded text encoder it is known.
            condition_text: See the class.
            answer_ratio: See the class.
            chunk_width: See the class.
            normalization: See the class.
            decoder_type: See the class.
            decoder_config: See the class.

        Raises:
            TextEncoderError: If the text encoder cannot be loaded.
            GeneratorConfigError: If a value is impossible.
        """
        given = AdaptersOfBases.of(adapters)
        if isinstance(text_encoder, str):
            name: str | None = text_encoder
            encoder = load_named_encoder(
                text_encoder,
                revision=text_encoder_revision,
                layer=text_encoder_layer,
                layers=text_encoder_layers,
                window_tokens=window_tokens,
            )
        else:
            check_text_encoder(text_encoder)
            encoder, name = text_encoder, text_encoder.name_or_path
            check_how_it_reads(encoder, text_encoder_layer, window_tokens, text_encoder_layers)
        if condition_text != "prompts":
            given = given.with_condition(condition_text, answer_ratio)
        if condition == "sentence_embeddings":
            max_prompt_length = 1
        elif max_prompt_length is None:
            pools = given.pools()
            longest = longest_prompt(encoder, pools) if pools else 64
            max_prompt_length = min(longest, encoder.max_length or longest)
        return cls(
            layout=given.layout,
            base_name=given.base_name,
            bases=given.entries(),
            text_encoder=name,
            # A branch moves on, and with it what the prompts are read by: the commit that was loaded stays.
            text_encoder_revision=text_encoder_revision or getattr(encoder, "commit_hash", None),
            text_encoder_layer=getattr(encoder, "layer", None),
            text_encoder_layers=getattr(encoder, "layers", None),
            text_encoder_in_folder=text_encoder_in_folder or name is None,
            freeze_text_encoder=freeze_text_encoder,
            condition=condition,
            num_prompts=num_prompts,
            max_prompt_length=max_prompt_length,
            window_tokens=getattr(encoder, "window_tokens", None),
            condition_text=condition_text,
            answer_ratio=answer_ratio,
            condition_size=condition_size(encoder, condition),
            chunk_width=chunk_width,
            normalization=normalization,
            decoder_type=decoder_type,
            decoder_config=decoder_config,
        )

    @classmethod
    def from_settings(
        cls, name_or_path: PathLike, layout: AdapterLayout | None = None, **overrides: Any
    ) -> PromptConditionedLoraGeneratorConfig:
        """Build a configuration from settings of the paper, or from a file of the same form.

        Args:
            name_or_path: One of [`available_settings`], `"common-sense-0.5b"` for one, or the path of a JSON file.
            layout: The adapters' layout. `None` works it out from the settings' base architecture, without weights.
            overrides: Settings of this class that are to differ from the file's, `text_encoder` for one.

        Raises:
            GeneratorConfigError: If there are no such settings, an override is no setting of this class, or a value
                is impossible.
        """
        settings = PaperSettings.load(name_or_path)
        known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]
        for name in overrides:
            if name not in known or name == "layout":
                meant = did_you_mean(name, known) or f" Known: {known}."
                raise GeneratorConfigError(f"Unknown setting {name!r}.{meant}")
        return cls(layout=layout or settings.layout(), **{**settings.generator, **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Find and read a generator's `config.json`; called by `from_pretrained`.

        Raises:
            GeneratorNotFoundError: If there is none, or it is another kind of model's.
            CorruptFileError: If it is no JSON, for instance cut short.
        """
        name = generator_name(pretrained_model_name_or_path)
        file = Path(name, kwargs.get("subfolder") or "", CONFIG_NAME)
        # Says what is wrong with the file: of a damaged one transformers says that there is none, or stumbles over it.
        content = read_json(file) if file.is_file() else {}
        if not isinstance(content, dict):
            raise GeneratorNotFoundError(
                f"{name!r} is no generator; expected a {CONFIG_NAME} with a JSON object.{what_it_is_instead(name)}"
            )
        try:
            config_dict, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            raise GeneratorNotFoundError(
                f"There is no generator at {name!r}: expected a folder that "
                "PromptConditionedLoraGenerator.save_pretrained has written, or a Hub id. Check the spelling, the "
                f"network and your access token. ({error})"
            ) from error
        found = config_dict.get("model_type") if isinstance(config_dict, dict) else None
        if found != cls.model_type:
            what = "no generator" if found is None else f"a model of type {found!r}, no generator"
            raise GeneratorNotFoundError(
                f"{name!r} is {what}; expected a {CONFIG_NAME} of type {cls.model_type!r}.{what_it_is_instead(name)}"
            )
        return config_dict, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of a dictionary; called by `from_pretrained`.

        Raises:
            GeneratorConfigError: If a value is impossible.
            CorruptFileError: If it is of another kind than any configuration's.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except PeftDndError:
            raise
        except Exception as error:  # transformers takes every value for good, and fails wherever it happens to use it
            raise CorruptFileError(
                f"A generator's {CONFIG_NAME} holds what is no value of a configuration ({type(error).__name__}: "
                f"{error!s:.200}). It was edited or damaged: save or fetch the generator again."
            ) from error

    @property
    def adapter_layout(self) -> AdapterLayout:
        """The layout of the adapters that the generator writes, for its one base; of several see `layouts`.

        Raises:
            GeneratorConfigError: If the configuration has none, or several.
        """
        return self.only_layout

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base model that the adapters are for, if known, and if there is one."""
        return self.layout.get("base_model_name_or_path") if self.layout and not self.bases else None

    @base_model_name_or_path.setter
    def base_model_name_or_path(self, name: str | None) -> None:
        # A revision is that of the model of the name.
        self.layout = replace(self.adapter_layout, base_model_name_or_path=name, base_model_revision=None).to_dict()

    @property
    def base_model_revision(self) -> str | None:
        """The commit, branch or tag of the base model on the Hub, if known."""
        return self.layout.get("base_model_revision") if self.layout and not self.bases else None

    @base_model_revision.setter
    def base_model_revision(self, revision: str | None) -> None:
        self.layout = replace(self.adapter_layout, base_model_revision=revision).to_dict()

    def carries_text_encoder(self, asked: bool | None = None) -> bool:
        """Whether the text encoder is saved in the generator's folder: as asked, and always if it is fitted too.

        Args:
            asked: `None` leaves it to `text_encoder_in_folder`.
        """
        return (self.text_encoder_in_folder if asked is None else asked) or not self.freeze_text_encoder

    @property
    def condition_shape(self) -> tuple[int, int, int]:
        """(N, L, C) of what the decoder reads."""
        return (self.num_prompts, self.max_prompt_length, self.condition_size)

    def weight_tokenizer(self) -> WeightTokenizer:
        """The tokenizer of the layout in this configuration's token format, at its chunk width."""
        tokenizer = PublishedTokenizer if self.token_format == "published" else WeightTokenizer
        return tokenizer(self.adapter_layout, self.chunk_width)
