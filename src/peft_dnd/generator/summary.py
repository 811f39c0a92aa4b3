# SPDX-License-Identifier: Apache-2.0
"""A generator in a small JSON file beside its weights, for those who look at it without loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.summary import layout_facts
from ..errors import CorruptFileError
from ..storage.cards import CARD_NAME
from ..storage.files import read_json, write_json
from ..storage.hub import hub_id
from ..version import __version__
from .configuration import PromptConditionedLoraGeneratorConfig
from .model_card import public_base


SUMMARY_NAME = "peft_dnd_summary.json"
FORMAT_VERSION = 1


def generator_summary(
    config: PromptConditionedLoraGeneratorConfig,
    folder: Path,
    *,
    num_parameters: int,
    dtype: str,
    tasks_known: int | None,
) -> dict[str, Any]:
    """Sum up a generator in values that JSON knows. Nothing that only this machine has is named.

    Args:
        config: Its configuration.
        folder: Where its files lie, whose sizes are listed in bytes.
        num_parameters: Parameters of the decoder.
        dtype: In which the decoder is stored, `"float32"` for one.
        tasks_known: Of how many fitted tasks prompts are kept, by which new ones are judged; `None` if of none.
    """
    bases = {}
    for name, layout in config.layouts.items():
        base, revision = public_base(layout)
        bases[name] = {"base_model": base, "base_model_revision": revision, "adapter": layout_facts(layout)}
    nothing = dict.fromkeys(("base_model", "base_model_revision", "adapter"))
    return {
        "format_version": FORMAT_VERSION,
        "kind": "generator",
        "peft_dnd_version": __version__,
        **({**nothing, "bases": bases} if config.bases else bases[config.base_names[0]]),
        "decoder": {"type": config.decoder_type, "parameters": num_parameters, "dtype": dtype},
        "text_encoder": {
            "name": None if config.text_encoder_in_folder else hub_id(config.text_encoder),
            "revision": config.text_encoder_revision,
            "in_folder": config.text_encoder_in_folder,
            "layer": config.text_encoder_layer,
            "layers": config.text_encoder_layers,
        },
        "reads": {
            "num_prompts": config.num_prompts,
            "max_prompt_length": config.max_prompt_length,
            "condition": config.condition,
            "condition_text": config.condition_text,
        },
        "tasks_known": tasks_known,
        "measured": config.measured,
        "files": _sizes(folder),
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary in a generator's folder; empty if there is none, as an earlier version wrote none.

    Raises:
        CorruptFileError: If it is unreadable, or no summary.
    """
    path = folder / SUMMARY_NAME
    data = read_json(path) if path.is_file() else {}
    sizes = data.get("files", {}) if isinstance(data, dict) else None
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        raise CorruptFileError(
            f"{str(path)!r} is no summary of a generator: expected its files' sizes under 'files'. Save it again."
        )
    return data


def renew_sizes(folder: Path) -> None:
    """List the files' sizes anew in a folder's summary, if it has one, after files in it have changed."""
    path = folder / SUMMARY_NAME
    if path.is_file():
        data = read_json(path)
        path.unlink()  # it may be a link to one that is to stay
        write_json(path, {**data, "files": _sizes(folder)})


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (SUMMARY_NAME, CARD_NAME)
    }
