# SPDX-License-Identifier: Apache-2.0
"""The generator: prompts in, LoRA adapters out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedModel
from typing_extensions import Unpack

from ..adapters.tokenizer import WeightNormalization
from ..errors import CorruptFileError, GeneratorNotFoundError
from ..pairs.replay_store import STORE_NAME
from ..policy.policy import POLICY_NAME
from ..storage.cards import CARD_NAME, may_write_card
from ..storage.files import PathLike, staged_directory, write_json
from ..storage.hub import (
    HubOptions,
    check_loading_info,
    find_folder,
    find_generator,
    generator_name,
    takes_keywords_of,
)
from ..storage.processes import check_whole
from ..storage.progress import short_bars_hidden
from ..storage.stored_weights import floating_dtype
from ..storage.uploading import UploadOptions
from ..text.encoder import TextEncoder, check_text_encoder
from ..text.out_of_distribution import REFERENCE_NAME, PromptReference
from .checksums import checked_meanwhile, write_checksums
from .configuration import TEXT_ENCODER_FOLDER, PromptConditionedLoraGeneratorConfig
from .generation import AdapterWritingMixin
from .heads import build_for
from .publishing import PublishingMixin, changed
from .replay import ReplayStoreMixin
from .stored import check_stored
from .summary import SUMMARY_NAME


class PromptConditionedLoraGenerator(  # type: ignore[misc]  # push_to_hub writes our card
    AdapterWritingMixin, ReplayStoreMixin, PublishingMixin, PreTrainedModel
):
    """Writes the LoRA adapter of a task from a handful of its unlabelled prompts, in one forward pass.

    The method is Drag-and-Drop LLMs (arXiv 2506.16406): a text encoder turns the prompts into condition states, a
    decoder turns those into weight tokens, and the tokens are put together to the matrices of a LoRA adapter.

    Args:
        config: The configuration; see [`PromptConditionedLoraGeneratorConfig.from_adapters`].
        text_encoder: A loaded text encoder to use in place of the one that the configuration names.

    Attributes:
        decoder: Condition states (B, N, L, C) to normalised tokens (B, N_w, L_w, C_w).
        normalization: Between normalised tokens and weights; its statistics come from the training adapters.
        weight_tokenizer: Between token grids and adapter state dicts.
            Of several bases these three are the first base's; [`for_base`] gives those of another.
        prompt_reference: What is kept of the fitted tasks' prompts, to tell whether new ones belong with them; `None`
            if nothing is.
        replay_store: What is kept of the fitted tasks to go on with others; `None` if nothing is.

    Raises:
        GeneratorConfigError: If the configuration has no layout, or values that contradict each other.
    """

    config_class = PromptConditionedLoraGeneratorConfig
    config: PromptConditionedLoraGeneratorConfig
    base_model_prefix = ""
    main_input_name = "condition_states"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"normalization"}  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: PromptConditionedLoraGeneratorConfig, text_encoder: TextEncoder | None = None) -> None:
        super().__init__(config)
        check_text_encoder(text_encoder, or_none=True)
        first = config.of_base(config.base_names[0]) if config.bases else config
        self.weight_tokenizer, self.decoder = build_for(first)
        self.normalization = WeightNormalization(self.weight_tokenizer.grid_shape)
        self.build_heads()
        # A rule may change between versions, a fitted generator may not: what was derived is written down.
        config.chunk_width = self.weight_tokenizer.chunk_width
        config.decoder_config = {**config.decoder_config, **self.decoder.resolved_settings}
        self._text_encoder = text_encoder
        self.prompt_reference: PromptReference | None = None
        # Where the generator was loaded from, if it was: its folder here, its commit on the Hub, and the token used.
        self._folder: Path | None = None
        self._commit: str | None = None
        self._token: str | bool | None = None
        self.post_init()
        if text_encoder is not None and not config.freeze_text_encoder:
            self.load_text_encoder()

    def forward(
        self,
        condition_states: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        prompts: Sequence[Sequence[str]] | None = None,
        by_base: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Any:
        """Decode condition states to normalised weight tokens.

        Args:
            condition_states: Float tensor (B, N, L, C).
            condition_mask: Bool tensor (B, N, L), true where there is a token.
            prompts: In place of both, the prompts of each of B tasks, which are read here, with gradients if the text
                encoder is being fitted too. For a decoder that reads sets the tasks may have different numbers of
                them: N is the largest, and the places that are left are masked.
            by_base: In place of all of these, for each base of a generator of several what is to be decoded for it.

        Returns:
            Tensor (B, N_w, L_w, C_w) in the decoder's dtype; with `by_base` a dictionary of one for each base.
        """
        if by_base is not None:
            return {name: self._decode(self.decoder_of(name), **condition) for name, condition in by_base.items()}
        self.config.check_one_base()
        return self._decode(self.decoder, condition_states, condition_mask, prompts)

    def _decode(
        self,
        decoder: Any,
        condition_states: torch.Tensor | None = None,
        condition_mask: torch.Tensor | None = None,
        prompts: Sequence[Sequence[str]] | None = None,
    ) -> torch.Tensor:
        if prompts is not None:
            read = [self.encode_prompts(lines) for lines in prompts]
            condition_states = pad_sequence([states for states, _ in read], batch_first=True).to(self.device)
            condition_mask = pad_sequence([mask for _, mask in read], batch_first=True).to(self.device)
        if condition_states is None or condition_mask is None:
            raise ValueError("forward needs condition_states and condition_mask, or prompts; it got neither.")
        tokens: torch.Tensor = decoder(condition_states.to(self.dtype), condition_mask)
        return tokens

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """There are none: accelerate asks when it shards a model."""

    @overload  # type: ignore[override]  # a revision may be None
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *,
        text_encoder: TextEncoder | None = None,
        dtype: torch.dtype | str | None = None,
        **hub: Unpack[HubOptions],
    ) -> PromptConditionedLoraGenerator: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *model_args: Any,
        text_encoder: TextEncoder | None = None,
        **kwargs: Any,
    ) -> Any: ...

    @classmethod
    @takes_keywords_of(find_folder)
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: PathLike,
        *model_args: Any,
        text_encoder: TextEncoder | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a generator from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            model_args: Passed on.
            text_encoder: A loaded text encoder to use in place of the one that the configuration names.
            kwargs: See [`HubOptions`][peft_dnd.storage.hub.HubOptions]; and what any transformers model takes: `dtype`
                (or `torch_dtype`), `device_map`, ...

        Returns:
            The generator, in evaluation mode; with `output_loading_info=True` a pair of it and what was loaded.

        Raises:
            GeneratorNotFoundError: If there is no generator there.
            FormatVersionError: If it was saved by a newer version of the library.
            CorruptFileError: If a file is cut short, weights are missing, or they are not what was saved.
            WeightValueError: If a scale of the normalisation is not positive.
            GeneratorConfigError: If there is no floating-point type of the name `dtype`.
            TextEncoderError: If `text_encoder` is none.
        """
        name = generator_name(pretrained_model_name_or_path)
        check_text_encoder(text_encoder, or_none=True)
        for option in {"dtype", "torch_dtype"} & set(kwargs):
            if kwargs[option] not in (None, "auto"):
                kwargs[option] = floating_dtype(kwargs[option])
        hub: Any = {option: kwargs.pop(option) for option in HubOptions.__annotations__ if option in kwargs}
        folder, commit = find_generator(name, **hub)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)
        config = kwargs.pop("config", None) or PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
        if not {"variant", "state_dict", "gguf_file"} & set(kwargs):
            check_stored(name, cls, config, folder)
        try:
            with checked_meanwhile(name, folder), short_bars_hidden():
                loaded: Any = super().from_pretrained(
                    folder,
                    *model_args,
                    config=config,
                    output_loading_info=True,
                    local_files_only=True,
                    use_safetensors=True,  # a pickle is never read
                    ignore_mismatched_sizes=True,  # check_loading_info refuses them by name
                    **kwargs,
                )
                check_loading_info(name, loaded[1])
        except OSError as error:
            raise GeneratorNotFoundError(
                f"The generator {name!r} has a configuration but no weights in safetensors format ({error}). Save it "
                "again, or fetch it again with force_download=True."
            ) from error
        except SafetensorError as error:
            raise CorruptFileError(
                f"The weights of the generator {name!r} cannot be read ({error}). A file was cut short in writing or "
                "downloading: save it again, or fetch it again with force_download=True."
            ) from error
        model, info = loaded
        model._loaded_from(name, folder, commit, hub.get("token"), text_encoder)
        return (model, info) if wants_info else model

    def _loaded_from(
        self, name: str, folder: Path, commit: str | None, token: str | bool | None, text_encoder: TextEncoder | None
    ) -> None:
        """Note where the weights came from, and take up what lies beside them."""
        self.name_or_path = self.config.name_or_path = name
        self._folder, self._commit, self._token, self._text_encoder = folder, commit, token, text_encoder
        for module in self.modules():
            if isinstance(module, WeightNormalization):
                module.check(f"the generator {name!r}")
        self.load_prompt_reference(folder)
        self.load_policy(folder)
        self._find_replay_store(folder)
        if not self.config.freeze_text_encoder:
            self.load_text_encoder()

    def save_pretrained(  # type: ignore[override]  # one more keyword than the base class
        self,
        save_directory: PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        include_text_encoder: bool | None = None,
        include_replay_store: bool | None = None,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save to a folder: configuration, sharded safetensors with the normalisation statistics, summary, model card.

        The files are written beside the folder first and then moved in, so that a kill or a full disk leaves what was
        there before.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process is the one that writes.
            state_dict: The weights to write, where they are not simply this module's.
            push_to_hub: Whether to push to the Hub afterwards, to `repo_id`; the process that writes does.
            include_text_encoder: Whether to put the text encoder into `text_encoder/` as well, which makes the
                generator self-contained. `None` leaves it as the configuration says. Always done for a text encoder
                that was fitted too.
            include_replay_store: Whether to save what is kept of the fitted tasks, some of their prompts among it.
                `None` saves it into the folder, and does not push it.
            repo_id: Hub id to push to; `None` takes the folder's name.
            kwargs: What any transformers model takes, `max_shard_size` for one; and
                [`UploadOptions`][peft_dnd.storage.uploading.UploadOptions] for `push_to_hub`.

        Raises:
            DestinationError: If `save_directory` names no place, or a file is in its way.
            SavingError: If writing fails, on a full disk for instance.
        """
        commit: Any = {option: kwargs.pop(option) for option in UploadOptions.__annotations__ if option in kwargs}
        if is_main_process:
            carry = self.config.carries_text_encoder(include_text_encoder)
            encoder = self.text_encoder if carry else None  # before anything is written: it may be missing
            store = None if include_replay_store is False else self.replay_store
            with staged_directory(save_directory) as staged, short_bars_hidden():
                weights = {
                    key: value
                    for key, value in (state_dict or self.state_dict()).items()
                    if not key.startswith("text_encoder_module.")
                }
                check_whole(weights)
                with changed(self.config, text_encoder_in_folder=carry):
                    super().save_pretrained(staged, state_dict=weights, **kwargs)
                    if self.prompt_reference is not None:
                        self.prompt_reference.save(staged / REFERENCE_NAME)
                    self.save_policy(staged)
                    if store is not None:
                        store.save(staged / STORE_NAME)
                    if encoder is not None:
                        encoder.save_pretrained(staged / TEXT_ENCODER_FOLDER)
                    write_checksums(staged)
                    write_json(staged / SUMMARY_NAME, self._summary(staged, weights))
                    if may_write_card(Path(save_directory)):
                        (staged / CARD_NAME).write_text(self.model_card(), encoding="utf-8")
                written = {path.name for path in staged.iterdir()}
            # transformers reads a single file before shards: what an earlier save left must not win over this one. Nor
            # is what another generator knew of its tasks' prompts this one's.
            for pattern in ("model*.safetensors*", REFERENCE_NAME, POLICY_NAME, STORE_NAME):
                for path in Path(save_directory).glob(pattern):
                    if path.name not in written:
                        path.unlink()
        if push_to_hub and is_main_process:
            if "max_shard_size" in kwargs:
                commit["max_shard_size"] = kwargs["max_shard_size"]
            name = repo_id or Path(save_directory).name
            stored = bool(include_replay_store)
            self.push_to_hub(name, include_text_encoder=include_text_encoder, include_replay_store=stored, **commit)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Loaded tensors carry transformers' flag; from_pretrained refuses partial loads, so it is all or nothing.
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            return
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()


AutoConfig.register(
    PromptConditionedLoraGeneratorConfig.model_type, PromptConditionedLoraGeneratorConfig, exist_ok=True
)
AutoModel.register(PromptConditionedLoraGeneratorConfig, PromptConditionedLoraGenerator, exist_ok=True)
