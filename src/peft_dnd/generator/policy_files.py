# SPDX-License-Identifier: Apache-2.0
"""A policy written into a generator's folder by itself, without the weights, which stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers.utils import CONFIG_NAME

from ..policy.policy import POLICY_NAME
from ..storage.cards import CARD_NAME, may_write_card
from ..storage.checksums import Checksums, file_checksum, setting_checksums
from ..storage.files import PathLike, read_json, staged_directory
from .checksums import fitted_settings
from .modeling import PromptConditionedLoraGenerator
from .summary import renew_sizes


_SETTING = "policy"


def write_policy(generator: PromptConditionedLoraGenerator, folder: PathLike) -> bool:
    """Write the policy that a generator was given into the folder that it was loaded from.

    Configuration, the policy's file, its checksums, the summary and the card are written, first beside the folder and
    then moved in.

    Args:
        generator: The generator, after [`set_policy`][peft_dnd.PromptConditionedLoraGenerator.set_policy].
        folder: Its folder.

    Returns:
        Whether the card says it too; one that was edited by hand stays as it is.

    Raises:
        SavingError: If writing fails.
    """
    folder = Path(folder)
    with_card = may_write_card(folder)
    with staged_directory(folder) as staged:
        generator.config.save_pretrained(staged)
        generator.save_policy(staged)
        checksums = Checksums.read(folder)
        if checksums is not None:
            _renewed(checksums, staged).write(staged)
        if with_card:
            (staged / CARD_NAME).write_text(generator.model_card(), encoding="utf-8")
        has_file = (staged / POLICY_NAME).is_file()
    if not has_file:
        (folder / POLICY_NAME).unlink(missing_ok=True)
    renew_sizes(folder)
    return with_card


def _renewed(checksums: Checksums, staged: Path) -> Checksums:
    """The checksums with those of the policy alone taken anew: other edits are to be found as before."""
    settings = {name: value for name, value in checksums.settings.items() if name != _SETTING}
    files = {name: value for name, value in checksums.files.items() if name != POLICY_NAME}
    now = fitted_settings(read_json(staged / CONFIG_NAME))
    if _SETTING in now:
        settings |= setting_checksums({_SETTING: now[_SETTING]})
    if (staged / POLICY_NAME).is_file():
        files[POLICY_NAME] = file_checksum(staged / POLICY_NAME)
    return replace(checksums, settings=settings, files=files)
