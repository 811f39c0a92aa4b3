# SPDX-License-Identifier: Apache-2.0
"""The frozen result of a generation: an ordinary LoRA adapter, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch import nn
from typing_extensions import Unpack

from ..errors import GeneratorConfigError
from ..storage.cards import CARD_NAME, may_write_card
from ..storage.files import PathLike, read_json, read_safetensors, staged_directory, write_json, write_safetensors
from ..storage.hub import (
    HubOptions,
    find_adapter,
    find_folder,
    hub_id,
    name_for_others,
    takes_keywords_of,
)
from ..storage.uploading import UploadOptions, upload
from .adapter_card import adapter_card
from .layout import AdapterLayout
from .layouts import layout_from_folder
from .loading import MatrixSlot, load_matrices, rescale
from .lora import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from .method_layout import MethodLayout
from .method_loading import load_method_adapter


PROVENANCE_NAME = "peft_dnd_provenance.json"


class GeneratedAdapter:
    """A LoRA adapter as a generator wrote it. Nothing about it changes any more.

    Args:
        layout: Which matrices it has.
        state_dict: PEFT on-disk key -> tensor, just the layout's; entries for frozen base weights are left out.
        provenance: Where it came from, in values that JSON knows: generator, revision, number and SHA-256 of the
            prompts, seed, version of the library. Never the prompts themselves.

    Raises:
        LayoutError: If a key is missing or unknown, or a shape differs.
        WeightValueError: If a tensor is on the meta device or holds NaN or infinity.
        GeneratorConfigError: If the provenance holds something that JSON does not know.
    """

    def __init__(
        self,
        layout: AdapterLayout,
        state_dict: Mapping[str, torch.Tensor],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        layout.check_state_dict(state_dict, source="the generated adapter")
        self._layout = layout
        # Copies, so that no one who holds the given tensors can change the adapter, least of all by training them.
        self._state_dict = {
            tensor.key: state_dict[tensor.key].detach().clone(memory_format=torch.contiguous_format)
            for tensor in layout.tensors
        }
        try:
            self._provenance: dict[str, Any] = json.loads(
                json.dumps(dict(provenance or {}), allow_nan=False, sort_keys=True)
            )
        except (TypeError, ValueError) as error:
            raise GeneratorConfigError(
                f"An adapter's provenance must be JSON: {error}. Got {provenance!r}."
            ) from error

    @property
    def layout(self) -> AdapterLayout:
        """Which matrices it has, in what order and scaling."""
        return self._layout

    @property
    def peft_config(self) -> PeftConfig:
        """A new plain PEFT configuration, with `inference_mode=False`, at every access."""
        return self._layout.peft_config()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where it came from, read-only."""
        return MappingProxyType(self._provenance)

    @property
    def out_of_distribution(self) -> float | None:
        """How unlike the prompts are to those of the fitted tasks, from 0 to 1, even for new tasks of their kind.

        See [`PromptReference.score`][peft_dnd.text.PromptReference.score]; `None` if it is not known.
        """
        return self._provenance.get("out_of_distribution")

    @property
    def nearest_tasks(self) -> dict[str, float]:
        """What it rests on: the fitted tasks that the prompts lie nearest to, five at most.

        Name -> the share of the prompts whose nearest known prompt is one of the task's, largest first; empty if it is
        not known. See [`PromptReference.nearest_tasks`][peft_dnd.text.PromptReference.nearest_tasks].
        """
        return dict(self._provenance.get("nearest_tasks") or ())

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return self._layout.num_parameters

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The matrices under the keys of PEFT's `adapter_model.safetensors`, module by module, A before B.

        This is what `peft.set_peft_model_state_dict` and inference servers take. The tensors are copies: PEFT's
        hot-swap and its `low_cpu_mem_usage` put the very tensors that they are given into the model.
        """
        return {key: tensor.clone() for key, tensor in self._state_dict.items()}

    def to(self, dtype: torch.dtype) -> GeneratedAdapter:
        """The same adapter in another floating-point dtype.

        Raises:
            WeightValueError: If a number is too large for the dtype.
            GeneratorConfigError: If it is no floating-point dtype.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise GeneratorConfigError(f"An adapter's dtype must be a floating-point torch.dtype, got {dtype!r}.")
        converted = {key: tensor.to(dtype) for key, tensor in self._state_dict.items()}
        return GeneratedAdapter(self._layout, converted, self._provenance)

    def load_into(self, model: nn.Module, adapter_name: str = "default") -> nn.Module:
        """Put the adapter into a model.

        A base model becomes a `PeftModel`. A model that has adapters already, PEFT's or transformers' own, gets one
        more, which is made the active one. If it has one of this name, that one's matrices are overwritten in place
        (hot-swap), provided that nothing else about it differs: a compiled model needs no new compilation, and an
        optimiser keeps its parameters. As in PEFT, new matrices are in float32 on a half-precision base.

        Args:
            model: A base model; a `PeftModel` or `PeftMixedModel`; a transformers model with adapters; any of them
                compiled, for a hot-swap.
            adapter_name: The adapter's name in the model.

        Returns:
            A new `PeftModel` around a base model, otherwise the given model.

        Raises:
            BaseModelMismatchError: If the adapter does not fit the base model, which is left untouched.
            LayoutError: If there is an adapter of that name that differs in more than its weights.
        """
        if isinstance(self._layout, MethodLayout):
            return load_method_adapter(model, adapter_name, self._layout, self._state_dict)
        return load_matrices(model, adapter_name, self._layout, self._state_dict)

    @torch.no_grad()
    def write_into(self, slots: Sequence[MatrixSlot]) -> None:
        """Copy the matrices where a model keeps those of an adapter, without looking again whether they fit.

        Args:
            slots: What [`matrix_slots`][peft_dnd.adapters.loading.matrix_slots] gave for an adapter with the same
                modules.
        """
        for slot in slots:
            slot.write(self._state_dict[slot.key])
        rescale(slots, self._layout)

    def save_pretrained(self, save_directory: PathLike, *, prompts: Sequence[str] | None = None) -> None:
        """Save as PEFT does, with the provenance beside: a folder that stock PEFT loads.

        The files are `adapter_config.json`, `adapter_model.safetensors`, `README.md` and
        `peft_dnd_provenance.json`. All are written beside the folder first and then moved in.

        Args:
            save_directory: The folder.
            prompts: The prompts that the adapter was generated from, to be listed in its card. Without them the card
                has their hash alone.

        Raises:
            PromptError: If the prompts are others than those that it was generated from.
            DestinationError: If `save_directory` names no place, or a file is in its way.
            SavingError: If writing fails, on a full disk for instance.
        """
        with staged_directory(save_directory) as staged:
            write_json(staged / ADAPTER_CONFIG_NAME, self._saved_config())
            write_safetensors(staged / ADAPTER_WEIGHTS_NAME, self._state_dict)
            write_json(staged / PROVENANCE_NAME, self._provenance)
            if may_write_card(Path(save_directory)):
                (staged / CARD_NAME).write_text(self.model_card(prompts=prompts), encoding="utf-8")

    @classmethod
    @takes_keywords_of(find_folder)
    def from_pretrained(cls, name_or_path: PathLike, **hub: Unpack[HubOptions]) -> GeneratedAdapter:
        """Read an adapter that [`save_pretrained`][GeneratedAdapter.save_pretrained], `push_to_hub` or PEFT wrote.

        Args:
            name_or_path: Folder or Hub id.
            hub: See [`HubOptions`][peft_dnd.storage.hub.HubOptions].

        Raises:
            FileNotFoundError: If there is no such folder or repository, or the configuration or the weights are
                missing.
            CorruptFileError: If a file is unreadable, for instance cut short.
            LayoutError: If it is no plain LoRA adapter.
        """
        folder = find_adapter(name_or_path, (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PROVENANCE_NAME), **hub)
        layout = layout_from_folder(folder)
        provenance = folder / PROVENANCE_NAME
        state_dict = read_safetensors(folder / ADAPTER_WEIGHTS_NAME)
        if isinstance(layout, MethodLayout):  # what PEFT saves beside, the layout has told apart
            state_dict = {tensor.key: state_dict[tensor.key] for tensor in layout.tensors}
        return cls(
            layout,
            state_dict,
            read_json(provenance) if provenance.is_file() else None,
        )

    @takes_keywords_of(upload)
    def push_to_hub(
        self, repo_id: str, *, prompts: Sequence[str] | None = None, **commit: Unpack[UploadOptions]
    ) -> CommitInfo:
        """Save the adapter and upload it to the Hub.

        Names of folders on this machine, of the base model and of the generator, are left out of what is uploaded;
        where the base model thus has no name there is a warning.

        Args:
            repo_id: Hub id, `"user/name"`.
            prompts: See [`save_pretrained`].
            commit: See [`UploadOptions`][peft_dnd.storage.uploading.UploadOptions].

        Returns:
            The Hub's description of the commit.

        Raises:
            HfHubHTTPError: The Hub's own, if you may not write there.
            SavingError: If the connection breaks off. The repository is as it was then.
            PromptError: If the prompts are others than those that it was generated from.
        """
        public = self._for_others()
        public.model_card(prompts=prompts)  # before anything is made on the Hub

        def save(folder: Path, name: str) -> None:
            public.save_pretrained(folder)
            if may_write_card(folder):
                (folder / CARD_NAME).write_text(public.model_card(name, prompts), encoding="utf-8")

        return upload(save, repo_id, "generated LoRA adapter", **commit)

    def _for_others(self) -> GeneratedAdapter:
        base = name_for_others(
            self._layout.base_model_name_or_path,
            "The adapter's base model",
            "The adapter is uploaded without a base model's name. To have it named, set "
            "generator.config.base_model_name_or_path to its Hub id before generating.",
        )
        provenance = dict(self._provenance)
        if "generator" in provenance:
            provenance["generator"] = hub_id(provenance["generator"])
        revision = self._layout.base_model_revision if base else None
        layout = replace(self._layout, base_model_name_or_path=base, base_model_revision=revision)
        return GeneratedAdapter(layout, self._state_dict, provenance)

    def __repr__(self) -> str:
        source = self._provenance.get("generator")
        return f"GeneratedAdapter({self._layout.in_words()}, {self.num_parameters:,} parameters" + (
            f", from {source!r})" if source else ")"
        )

    def _saved_config(self) -> dict[str, Any]:
        config = self.peft_config
        config.inference_mode = True  # as PEFT saves it: who loads it says whether to train it further
        # Sets have another order in every process; the same adapter is to give the same bytes.
        return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}

    def model_card(self, name: str | None = None, prompts: Sequence[str] | None = None) -> str:
        """The text of the README.md that is saved along.

        Args:
            name: The folder or Hub id that its snippet loads the adapter from; `push_to_hub` fills it in.
            prompts: The prompts that the adapter was generated from, to be listed. Without them their hash alone is.

        Raises:
            PromptError: If the prompts are others than those that it was generated from.
        """
        return adapter_card(self._layout, self._provenance, name=name, prompts=prompts)
