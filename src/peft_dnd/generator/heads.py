# SPDX-License-Identifier: Apache-2.0
"""The heads of a generator of several bases: one for each base beside the first, all on one trunk."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapters.layout import AdapterLayout
from ..adapters.positions import token_positions
from ..adapters.tokenizer import WeightNormalization, WeightTokenizer
from ..decoders import PartialDecoder, build_decoder, check_headed, head_of, share_trunk
from ..errors import GeneratorConfigError, NotFittedError
from .bases import default_base_name, layout_of, module_key
from .configuration import PromptConditionedLoraGeneratorConfig


logger = logging.getLogger(__name__)

_NORMALIZATION = "normalization"


class HeadsMixin(nn.Module):
    """Gives a generator its heads for further bases, and the generator of each base alone.

    Attributes:
        heads: For each base but the first the decoder's submodules that are its own, and its normalisation.
    """

    config: PromptConditionedLoraGeneratorConfig
    decoder: Any
    normalization: WeightNormalization
    weight_tokenizer: WeightTokenizer
    heads: nn.ModuleDict
    replay_store: Any
    _decoders: dict[str, Any]

    @property
    def whole(self) -> Any:
        """The generator of several bases that this one of a single base is a part of; `None` for any other."""
        return self.__dict__.get("_whole")

    def build_heads(self) -> None:
        """Make the heads of all bases but the first, for the decoder that there is."""
        self.heads = nn.ModuleDict()
        # Decoders whose heads alone are modules of this one: all else of them is the first's.
        self._decoders = {}
        for name in self.config.bases:
            self._build_head(name)

    def _build_head(self, name: str) -> None:
        one = self.config.of_base(name)
        entry = self.config.bases[name]
        check_headed(self.decoder, one.decoder_type, entry.get("decoder_config", {}))
        tokenizer, decoder = build_for(one)
        share_trunk(decoder, self.decoder)
        head = {**head_of(decoder), _NORMALIZATION: WeightNormalization(tokenizer.grid_shape)}
        self._decoders[name] = decoder
        self.heads[module_key(name)] = nn.ModuleDict(head)
        # A rule may change between versions, a fitted generator may not: what was derived is written down.
        own = {setting: decoder.resolved_settings[setting] for setting in decoder.head_settings}
        firsts = self.decoder.resolved_settings
        differing = {setting: value for setting, value in own.items() if value != firsts[setting]}
        self.config.bases[name] = {**entry, "chunk_width": tokenizer.chunk_width, "decoder_config": differing}

    def decoder_of(self, name: str) -> Any:
        """The decoder that writes a base's adapters: the trunk of all, and its own head."""
        if name not in self._decoders:
            return self.decoder
        decoder = self._decoders[name]
        decoder.training = self.decoder.training
        if hasattr(decoder, "gradient_checkpointing"):
            decoder.gradient_checkpointing = self.decoder.gradient_checkpointing
        return decoder

    def for_base(self, base: str | nn.Module | None = None) -> Any:
        """The generator of one base alone. It shares its weights with this one, so that fitting it fits them here.

        Args:
            base: The base's name in the configuration, its model's Hub id or folder, or the model itself: then the
                base is meant whose layout fits it. `None`: the only one.

        Returns:
            A [`PromptConditionedLoraGenerator`]; this very one if it has no other base.

        Raises:
            GeneratorConfigError: If there is none of that name, or it is not clear which is meant.
            BaseModelMismatchError: If the model fits none.
        """
        name = self.config.find_base(base)
        if not self.config.bases:
            return self
        alone = copy.copy(self)
        alone._modules = {key: module for key, module in self._modules.items() if key != "heads"}
        alone.config = self.config.of_base(name)
        alone.__dict__["_whole"] = self  # beside the submodules, not among them
        alone.build_heads()
        alone.decoder = self.decoder_of(name)
        if name in self._decoders:
            head: Any = self.heads[module_key(name)]
            alone.normalization = head[_NORMALIZATION]
            alone.weight_tokenizer = alone.config.weight_tokenizer()
            alone.replay_store = None  # it holds the first base's adapters
        return alone

    def add_base(
        self,
        adapters: Any,
        *,
        name: str | None = None,
        chunk_width: int | None = None,
        decoder_config: Mapping[str, Any] | None = None,
    ) -> Any:
        """Give the generator a head for one more base, to be fitted: `DnDTrainer(returned, args, pairs).train()`.

        All that is there stays as it is, also in that fit.

        Args:
            adapters: The base's `PromptCheckpointDataset`, or the layout of its adapters alone.
            name: What the base is to be called; by default the last part of its model's name.
            chunk_width: Columns per weight token; `None` chooses the width that wastes least.
            decoder_config: Settings of the decoder's head that are its own, e.g. `{"num_templates": 32}`.

        Returns:
            The generator of the new base alone, as [`for_base`] gives it.

        Raises:
            GeneratorConfigError: If there is a base of that name, the decoder has no part that could be a head, or a
                value is impossible.
        """
        if self.whole is not None:
            raise GeneratorConfigError(
                "This generator is one base's part of another. Add the base to that one: "
                "generator.whole.add_base(...)."
            )
        if not isinstance(adapters, AdapterLayout) and not hasattr(adapters, "layout"):
            raise GeneratorConfigError(
                f"add_base takes a PromptCheckpointDataset or an AdapterLayout, got {adapters!r:.80}. A pairs folder "
                "is read by PromptCheckpointDataset.from_folder."
            )
        policy: Any = getattr(self, "policy", None)
        if policy is not None and (policy.norms is not None or policy.never_written):
            raise GeneratorConfigError(
                "The generator's policy bounds the modules of its one base, and would refuse every adapter of "
                "another. Set a policy without norms and never_written first: generator.set_policy(...)."
            )
        layout = layout_of(adapters)
        name = default_base_name(layout) if name is None else name
        before = (self.config.base_name, dict(self.config.bases), self.config.format_version)
        self.config.put_base(name, layout, chunk_width=chunk_width, decoder_config=decoder_config)
        try:
            self._build_head(name)
        except BaseException:
            self.config.base_name, self.config.bases, self.config.format_version = before
            raise
        head: Any = self.heads[module_key(name)]
        head.to(next(self.decoder.parameters()).device)
        head.train(self.training)
        return self.for_base(name)

    @contextmanager
    def head_alone(self) -> Iterator[None]:
        """Within this context nothing is trained that this generator shares with other bases'."""
        if self.whole is None:
            yield
            return
        others = [self.whole.for_base(name).normalization for name in self.whole.config.base_names]
        if not any(other.fitted for other in others if other is not self.normalization):
            raise NotFittedError(
                "The head of one base cannot be fitted alone before the trunk has been, which it would leave as it "
                "is. Fit all bases first: DnDTrainer(generator, args, train_dataset={name: pairs, ...})."
            )
        own = {id(parameter) for module in head_of(self.decoder).values() for parameter in module.parameters()}
        shared = [each for each in self.parameters() if each.requires_grad and id(each) not in own]
        logger.info("Fitting the head of the base %r alone.", self.config.base_names[0])
        for parameter in shared:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in shared:
                parameter.requires_grad_(True)


def head_parts(head: Any) -> dict[str, nn.Module]:
    """What of a further base's head the decoder has, without the normalisation."""
    return {name: part for name, part in head.items() if name != _NORMALIZATION}


def build_for(config: PromptConditionedLoraGeneratorConfig) -> tuple[WeightTokenizer, Any]:
    """The weight tokenizer and the decoder that a configuration of one base asks for.

    Raises:
        GeneratorConfigError: If its values contradict each other.
    """
    tokenizer = config.weight_tokenizer()
    decoder = build_decoder(
        config.decoder_type,
        config.condition_shape,
        tokenizer.grid_shape,
        config.decoder_config,
        token_positions(tokenizer),
    )
    if isinstance(decoder, PartialDecoder) and not config.adapter_layout.modules:
        raise GeneratorConfigError(
            f"The decoder {config.decoder_type!r} writes one of LoRA's two matrices, and a "
            f"{config.adapter_layout.method} adapter has others. Use decoder_type='set_transformer'."
        )
    return tokenizer, decoder
