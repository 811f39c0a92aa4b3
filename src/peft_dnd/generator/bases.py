# SPDX-License-Identifier: Apache-2.0
"""The bases that a generator's configuration holds: their names and layouts, which one is meant, one of them alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from torch import nn

from ..adapters.layout import AdapterLayout
from ..adapters.layouts import layout_from_dict
from ..adapters.matching import base_model_of, check_fits, match_modules, own_name
from ..adapters.method_layout import MethodLayout
from ..adapters.method_loading import check_method_fits
from ..errors import BaseModelMismatchError, GeneratorConfigError
from .configuration_checks import as_dict


_OF_A_BASE = ("layout", "chunk_width", "decoder_config")
_UNNAMED = "base"


class BasesMixin:
    """Gives a configuration its bases.

    The first one's layout and chunk width are the configuration's own; those of any others are in `bases`.
    """

    layout: Mapping[str, Any] | None
    base_name: str | None
    bases: dict[str, dict[str, Any]]
    chunk_width: int | None
    decoder_config: dict[str, Any]
    measured: dict[str, Any]
    policy: Any
    format_version: int

    @property
    def base_names(self) -> tuple[str, ...]:
        """What its bases are called, the first one first. One that was given no name has its model's."""
        if self.layout is None:
            return ()
        return (self.base_name or _model_name(self.layout) or _UNNAMED, *self.bases)

    @property
    def layouts(self) -> dict[str, AdapterLayout]:
        """The layout of each base's adapters, by the base's name."""
        given = [self.layout, *(entry["layout"] for entry in self.bases.values())] if self.layout is not None else []
        return {name: layout_from_dict(layout) for name, layout in zip(self.base_names, given, strict=True)}

    @property
    def only_layout(self) -> AdapterLayout:
        """The layout of the adapters of a configuration of one base.

        Raises:
            GeneratorConfigError: If it has none, or several.
        """
        if self.layout is None:
            raise GeneratorConfigError(
                "The configuration has no adapter layout. Build it with "
                "PromptConditionedLoraGeneratorConfig.from_adapters(pairs, text_encoder=...)."
            )
        self.check_one_base()
        return layout_from_dict(self.layout)

    def check_one_base(self) -> None:
        """Make sure that there is no question of which base is meant.

        Raises:
            GeneratorConfigError: If there are several.
        """
        if self.bases:
            raise GeneratorConfigError(
                f"The generator writes adapters for {len(self.base_names)} bases: {_listed(self.base_names)}. Say for "
                f"which: generate_adapter(prompts, base={self.base_names[0]!r}), or take the generator of one base, "
                f"generator.for_base({self.base_names[0]!r}), which can also be saved to a folder of its own."
            )

    def find_base(self, base: str | nn.Module | None = None) -> str:
        """The name of the base that is meant.

        Args:
            base: Its name here, the Hub id or folder of its model, or the model itself: then the base is meant whose
                layout fits it; of several such, the one whose name is the model's, or which has the most modules.
                `None`: the only one.

        Raises:
            GeneratorConfigError: If there is none of that name, or it is not clear which of several is meant.
            BaseModelMismatchError: If the model fits none.
        """
        if base is None:
            self.check_one_base()
            return self.base_names[0]
        if isinstance(base, nn.Module):
            return self._fitting(base)
        if not isinstance(base, str) or not base:
            raise GeneratorConfigError(f"base must be the name of a base or its model, got {base!r:.80}.")
        found = self._named(base, self.base_names)
        if len(found) != 1:
            what = "writes no adapters for the base" if not found else "has more than one base that could be"
            raise GeneratorConfigError(
                f"The generator {what} {base!r}. Known: {_listed(self.base_names)}. Name one of them, or fit "
                "a head for yours: generator.add_base(pairs, name=...)."
            )
        return found[0]

    def _named(self, asked: str, among: tuple[str, ...]) -> list[str]:
        if asked in among:
            return [asked]
        models = {name: layout.base_model_name_or_path for name, layout in self.layouts.items() if name in among}
        exact = [name for name, model in models.items() if model == asked]
        return exact or [
            name for name, model in models.items() if own_name(asked) in (name, own_name(name), own_name(model or ""))
        ]

    def _fitting(self, model: nn.Module) -> str:
        layouts, problems = self.layouts, []
        fitting = []
        for name, layout in layouts.items():
            try:
                check_layout_fits(model, layout)
                fitting.append(name)
            except BaseModelMismatchError as error:
                problems.append(error)
        if not fitting:
            if len(problems) == 1:
                raise problems[0]
            raise BaseModelMismatchError(
                f"The model fits none of the generator's bases, {_listed(layouts)}. The first: {problems[0]}"
            ) from problems[0]
        return self.choose_among(fitting, getattr(base_model_of(model), "name_or_path", None))

    def choose_among(self, fitting: list[str], model_name: str | None) -> str:
        """Which of the bases a model is whose layouts all fit it: the one of its name, or that of the most modules.

        Args:
            fitting: The bases' names.
            model_name: The model's name, if it has one.

        Raises:
            GeneratorConfigError: If it could be more than one.
        """
        layouts = self.layouts
        if len(fitting) > 1:
            by_name = self._named(model_name, tuple(fitting)) if model_name else []
            most = max(len(layouts[name].tensors) for name in fitting)
            # A layout of fewer layers fits a deeper model of the same width.
            fitting = by_name or [name for name in fitting if len(layouts[name].tensors) == most]
        if len(fitting) > 1:
            raise GeneratorConfigError(
                f"The model could be any of the bases {_listed(fitting)}, whose adapters all fit it, and is called "
                f"like none of them. Say which: base={fitting[0]!r}."
            )
        return fitting[0]

    def of_base(self, name: str) -> Any:
        """The configuration of one base alone.

        Args:
            name: Its name here.
        """
        entry = self.bases.get(name)
        # Of the others only what does not count is left out before all is copied.
        alone = copy.copy(self)
        alone.bases = {}
        if entry is not None:
            alone.measured, alone.layout = {}, entry["layout"]
            alone.chunk_width = entry.get("chunk_width")
            alone.decoder_config = {**self.decoder_config, **entry.get("decoder_config", {})}
        alone = copy.deepcopy(alone)
        alone.base_name = name if self.bases else self.base_name
        alone.format_version = 2 if self.policy else 1
        return alone

    def put_base(
        self,
        name: str,
        layout: AdapterLayout,
        *,
        chunk_width: int | None = None,
        decoder_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Enter a further base.

        Args:
            name: What it is to be called.
            layout: Its adapters' layout.
            chunk_width: Columns per weight token; `None` chooses the width that wastes least.
            decoder_config: Settings of the decoder's head that are its own.

        Raises:
            GeneratorConfigError: If there is one of that name, or a value is impossible.
        """
        check_base_name(name)
        if self.layout is not None and self.base_name is None:
            self.base_name = self.base_names[0]
        if name in self.base_names:
            raise GeneratorConfigError(
                f"The generator has a base {name!r} already. Give the new one another name: add_base(..., name=...)."
            )
        entry = {
            "layout": layout.to_dict(),
            "chunk_width": chunk_width,
            "decoder_config": as_dict("decoder_config", decoder_config),
        }
        self.bases = checked_bases({**self.bases, name: entry})
        self.format_version = 2

    def names_of_models(self, rename: Any) -> dict[str, Any]:
        """`layout` and `bases` with the models called what `rename(name)` gives for each, and no revision of none."""

        def renamed(layout: Mapping[str, Any]) -> dict[str, Any]:
            known = layout_from_dict(layout)
            model = rename(known.base_model_name_or_path)
            revision = known.base_model_revision if model else None
            return replace(known, base_model_name_or_path=model, base_model_revision=revision).to_dict()

        return {
            "layout": renamed(self.layout or {}),
            "bases": {name: {**entry, "layout": renamed(entry["layout"])} for name, entry in self.bases.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """All settings. A configuration of one base that was given no name says nothing of bases."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {name: value for name, value in found.items() if name not in ("bases", "base_name") or value}


class AdaptersOfBases:
    """The adapters that a configuration is made for: of one base, or of several by their names.

    Args:
        adapters: Base's name -> its pairs, or their layout alone; of a single base without a name under `None`.
    """

    def __init__(self, adapters: Mapping[Any, Any]) -> None:
        self._adapters = dict(adapters)

    @classmethod
    def of(cls, adapters: Any) -> AdaptersOfBases:
        """Take what `from_adapters` is given.

        Raises:
            GeneratorConfigError: If it is neither adapters nor a dictionary of them.
        """
        named = adapters if isinstance(adapters, Mapping) else {None: adapters}
        for name, one in named.items():
            if isinstance(adapters, Mapping):
                check_base_name(name)
            if not hasattr(one, "layout") and not isinstance(one, AdapterLayout):
                raise GeneratorConfigError(
                    f"from_adapters takes a PromptCheckpointDataset or an AdapterLayout, got {one!r}. A pairs folder "
                    "is read by PromptCheckpointDataset.from_folder."
                )
        if not named:
            raise GeneratorConfigError("from_adapters got a dictionary of no base: give at least one, name -> pairs.")
        return cls(named)

    @property
    def base_name(self) -> str | None:
        """What the first base is called."""
        return next(iter(self._adapters))

    @property
    def layout(self) -> AdapterLayout:
        """The layout of the first base's adapters."""
        return layout_of(self._adapters[self.base_name])

    def entries(self) -> dict[str, dict[str, Any]]:
        """The other bases, as a configuration has them."""
        others = [(name, one) for name, one in self._adapters.items() if name != self.base_name]
        return {name: {"layout": layout_of(one).to_dict()} for name, one in others}

    def with_condition(self, condition_text: str, answer_ratio: float) -> AdaptersOfBases:
        """The same with other texts in place of the prompts."""
        formed = {
            name: one.with_condition(condition_text, answer_ratio) if hasattr(one, "with_condition") else one
            for name, one in self._adapters.items()
        }
        return AdaptersOfBases(formed)

    def pools(self) -> list[Any]:
        """The prompts of every task of every base; none of bare layouts."""
        known = [one for one in self._adapters.values() if not isinstance(one, AdapterLayout)]
        return [one.prompts(task) for one in known for task in one.tasks]


def layout_of(adapters: Any) -> AdapterLayout:
    """The layout of pairs, or the layout itself."""
    layout: AdapterLayout = adapters if isinstance(adapters, AdapterLayout) else adapters.layout
    return layout


def check_layout_fits(model: nn.Module, layout: AdapterLayout) -> None:
    """Make sure that adapters of a layout, of any method, fit a model.

    Raises:
        BaseModelMismatchError: Otherwise.
    """
    if isinstance(layout, MethodLayout):
        check_method_fits(model, layout)
    else:
        check_fits(model, layout, match_modules(model, layout))


def check_base_name(name: object) -> None:
    """Refuse what can be no base's name.

    Raises:
        GeneratorConfigError: If it is none.
    """
    if not isinstance(name, str) or not name or name != name.strip():
        raise GeneratorConfigError(f"A base's name must be a text without spaces around it, got {name!r:.80}.")


def checked_bases(bases: object) -> dict[str, dict[str, Any]]:
    """The map of further bases, from whatever a configuration says.

    Raises:
        GeneratorConfigError: If it is none.
    """
    found = as_dict("bases", bases)  # type: ignore[arg-type]
    for name, entry in found.items():
        check_base_name(name)
        unknown = sorted(set(entry) - set(_OF_A_BASE)) if isinstance(entry, Mapping) else []
        if not isinstance(entry, Mapping) or unknown or not isinstance(entry.get("layout"), Mapping):
            raise GeneratorConfigError(
                f"The base {name!r} must be a dictionary of {', '.join(_OF_A_BASE)}, got {entry!r:.80}."
            )
        width = entry.get("chunk_width")
        if width is not None and (not isinstance(width, int) or isinstance(width, bool) or not 1 <= width < 2**31):
            raise GeneratorConfigError(
                f"The base {name!r} has chunk_width {width!r:.80}; expected a positive integer or None."
            )
        as_dict(f"decoder_config of the base {name!r}", entry.get("decoder_config"))
    return {name: dict(entry) for name, entry in sorted(found.items())}


def module_key(name: str) -> str:
    """A base's name where no dot may stand, as part of the names of its tensors.

    >>> module_key("Qwen/Qwen2.5-0.5B")
    'Qwen%2FQwen2%2E5-0%2E5B'
    """
    return quote(name, safe="").replace(".", "%2E")


def default_base_name(layout: AdapterLayout) -> str:
    """What a base is called if nobody says: the last part of its model's name.

    Raises:
        GeneratorConfigError: If the layout does not know its model.
    """
    if not layout.base_model_name_or_path:
        raise GeneratorConfigError(
            "The adapters do not say which base they are for. Give it a name: add_base(pairs, name='...')."
        )
    return own_name(layout.base_model_name_or_path)


def _model_name(layout: Mapping[str, Any]) -> str | None:
    model = layout.get("base_model_name_or_path")
    return own_name(model) if isinstance(model, str) and model else None


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
