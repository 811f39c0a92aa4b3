# SPDX-License-Identifier: Apache-2.0
"""The paper's settings as data: one JSON file each, in `settings/` beside this file, and nothing of them in code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig

from ..adapters.layout import AdapterLayout
from ..errors import GeneratorConfigError, did_you_mean
from ..storage.files import PathLike, read_json


_FOLDER = resources.files(__package__) / "settings"
_SUFFIX = ".json"


@dataclass(frozen=True)
class PaperSettings:
    """All that decides how large a generator is and how it is fitted for one base: a file of the paper's, or yours.

    Attributes:
        name: The file's name without its ending.
        title: What it is for.
        source: Where the values come from.
        base_model: The base model's Hub id.
        base_config: Its transformers configuration, `model_type` and `architectures` included, as far as shapes ask.
        lora: Keywords of `peft.LoraConfig`.
        generator: Keywords of `PromptConditionedLoraGeneratorConfig`, all but the layout.
        training: Keywords of `DnDTrainingArguments`.
        batch_size: Pairs in one optimiser step, over all devices.
        checkpoints_per_task: How many checkpoints of each task were collected.
        notes: What else there is to know.
    """

    name: str
    title: str
    source: str
    base_model: str
    base_config: Mapping[str, Any]
    lora: Mapping[str, Any]
    generator: Mapping[str, Any]
    training: Mapping[str, Any]
    batch_size: int
    checkpoints_per_task: int
    notes: str = ""

    @classmethod
    def load(cls, name_or_path: PathLike) -> PaperSettings:
        """Read settings.

        Args:
            name_or_path: One of [`available_settings`], or the path of a JSON file of the same form.

        Raises:
            GeneratorConfigError: If there are no such settings, or a field is missing or unknown.
            CorruptFileError: If the file is not JSON.
        """
        path = Path(name_or_path)
        if path.suffix == _SUFFIX and path.is_file():
            data = read_json(path)
        elif str(name_or_path) in available_settings():
            data = json.loads((_FOLDER / f"{path.name}{_SUFFIX}").read_text(encoding="utf-8"))
        else:
            raise GeneratorConfigError(_unknown_settings(str(name_or_path)))
        known = {field.name for field in fields(cls)} - {"name"}
        given = set(data) if isinstance(data, dict) else set()
        wrong = sorted((given ^ known) - {"notes"})
        if wrong:
            what = f"lacks {wrong[0]!r}" if wrong[0] in known else f"has an unknown field {wrong[0]!r}"
            raise GeneratorConfigError(
                f"The settings file {str(name_or_path)!r} {what}. Its fields: {', '.join(sorted(known))}."
            )
        return cls(name=path.name.removesuffix(_SUFFIX), **data)

    def lora_config(self) -> LoraConfig:
        """The adapters' plain PEFT configuration, with the base model's name."""
        return LoraConfig(**self.lora, base_model_name_or_path=self.base_model)

    def base_skeleton(self) -> nn.Module:
        """The base model on the meta device: all its modules and shapes, no weights, nothing from the Hub.

        Raises:
            GeneratorConfigError: If transformers knows no such architecture.
        """
        values = dict(self.base_config)
        architectures = values.get("architectures") or [None]
        model_class = getattr(transformers, str(architectures[0]), None)
        if model_class is None or "model_type" not in values:
            raise GeneratorConfigError(
                f"The settings {self.name!r} describe a base of architecture {architectures[0]!r} and model_type "
                f"{values.get('model_type')!r}, which transformers {transformers.__version__} does not know."
            )
        with torch.device("meta"):
            skeleton: nn.Module = model_class(AutoConfig.for_model(**values))
        return skeleton

    def layout(self) -> AdapterLayout:
        """The layout of the adapters on the base model, worked out without its weights."""
        return AdapterLayout.from_lora_config(self.lora_config(), self.base_skeleton())


def available_settings() -> tuple[str, ...]:
    """The names of the settings that come with the library.

    >>> available_settings()
    ('coding-1.5b', 'coding-7b', 'common-sense-0.5b', 'math-1.5b', 'math-7b', 'vl-3b')
    """
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in _FOLDER.iterdir()))


def _unknown_settings(name: str) -> str:
    if name.endswith(_SUFFIX):
        return f"There is no settings file {name!r}."
    known = available_settings()
    return (
        f"There are no settings {name!r}.{did_you_mean(name, known, cutoff=0.5)} Known: "
        f"{', '.join(map(repr, known))}; or give the path of a JSON file of your own."
    )
