# SPDX-License-Identifier: Apache-2.0
"""What others see of a generator: its upload, its card and its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from typing_extensions import Unpack

from ..storage.cards import CARD_NAME, may_write_card
from ..storage.hub import GENERATOR_FILES, hub_id, name_for_others, takes_keywords_of
from ..storage.uploading import UploadOptions, upload
from ..text.out_of_distribution import PromptReference
from .configuration import PromptConditionedLoraGeneratorConfig
from .model_card import generator_card
from .revision_history import MOST_POINTS_LOST, check_regression
from .summary import generator_summary


class PublishingMixin:
    """Gives a generator its `push_to_hub` and its card."""

    config: PromptConditionedLoraGeneratorConfig
    decoder: Any
    heads: nn.ModuleDict
    prompt_reference: PromptReference | None
    load_text_encoder: Any
    save_pretrained: Any

    @takes_keywords_of(upload)
    def push_to_hub(
        self,
        repo_id: str,
        *,
        max_shard_size: int | str = "50GB",
        include_text_encoder: bool | None = None,
        include_replay_store: bool = False,
        most_points_lost: float | None = MOST_POINTS_LOST,
        **commit: Unpack[UploadOptions],
    ) -> CommitInfo:
        """Save the generator and upload it to the Hub.

        Names of folders on this machine, of the base model and of the text encoder, are left out of what is uploaded,
        with a warning of what others will lack.

        Args:
            repo_id: Hub id, `"user/name"`.
            max_shard_size: Largest weights file.
            include_text_encoder: See [`save_pretrained`].
            include_replay_store: Whether what is kept of the fitted tasks goes along, some of their prompts among it:
                only then can others go on with new tasks.
            most_points_lost: How many points of 100 the last update may have lost, in the mean over the earlier tasks
                of the store; `None` publishes it whatever it lost.
            commit: See [`UploadOptions`][peft_dnd.storage.uploading.UploadOptions].

        Returns:
            The Hub's description of the commit.

        Raises:
            HfHubHTTPError: The Hub's own, if you may not write there.
            SavingError: If the connection breaks off. The repository is as it was then.
            TextEncoderError: If the text encoder is to go along and cannot be loaded.
            RegressionError: If the last update lost more than may be.
        """
        if most_points_lost is not None:
            check_regression(self.config.measured, most_points_lost)
        names = self.names_for_others(include_text_encoder)
        carry = self.config.carries_text_encoder(include_text_encoder)
        if carry:
            self.load_text_encoder()  # while its name is still there
        with changed(self.config, **names):
            self.model_card()  # what cannot be in a card is refused before anything is made on the Hub

            def save(folder: Path, name: str) -> None:
                self.save_pretrained(
                    folder,
                    max_shard_size=max_shard_size,
                    include_text_encoder=include_text_encoder,
                    include_replay_store=include_replay_store,
                )
                if may_write_card(folder):
                    with changed(self.config, text_encoder_in_folder=carry):
                        (folder / CARD_NAME).write_text(self.model_card(name), encoding="utf-8")

            return upload(save, repo_id, "PromptConditionedLoraGenerator", GENERATOR_FILES, **commit)

    def names_for_others(self, include_text_encoder: bool | None = None) -> dict[str, Any]:
        """What the configuration may say on the Hub, where folders of this machine mean nothing.

        Warns of what others will lack.

        Args:
            include_text_encoder: Whether the text encoder goes along; see [`save_pretrained`].

        Returns:
            The configuration's `text_encoder`, `None` where it names a folder, and its `layout` and `bases`, with the
            models' names `None` where they do.
        """
        config = self.config
        if config.carries_text_encoder(include_text_encoder):
            text_encoder = hub_id(config.text_encoder)
        else:
            text_encoder = name_for_others(
                config.text_encoder,
                "The generator's text encoder",
                "Without it nobody else can use the generator. Carry it along, with include_text_encoder=True or "
                "config.text_encoder_in_folder = True, or set config.text_encoder to its Hub id.",
            )

        def public(base: str | None) -> str | None:
            return name_for_others(
                base,
                "The generator's base model",
                "So that others know which model the generator is for, set config.base_model_name_or_path to its Hub "
                "id.",
            )

        return {"text_encoder": text_encoder, **config.names_of_models(public)}

    def model_card(self, name: str | None = None) -> str:
        """The text of the README.md that is saved along.

        Args:
            name: The folder or Hub id that its snippet loads the generator from; `push_to_hub` fills it in.
        """
        return generator_card(
            self.config, num_parameters=self.num_decoder_parameters(), measured=self.config.measured, name=name
        )

    def num_decoder_parameters(self) -> int:
        """How many parameters the decoder has, of several bases with all its heads."""
        return sum(parameter.numel() for module in (self.decoder, self.heads) for parameter in module.parameters())

    def _summary(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        reference = self.prompt_reference
        dtypes = {tensor.dtype for key, tensor in weights.items() if key.startswith("decoder.")}
        return generator_summary(
            self.config,
            folder,
            num_parameters=self.num_decoder_parameters(),
            dtype=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
            tasks_known=None if reference is None else len(reference.counts),
        )


@contextmanager
def changed(config: PromptConditionedLoraGeneratorConfig, **values: Any) -> Iterator[None]:
    """Within this context the configuration has other values."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
