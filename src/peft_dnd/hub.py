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
"""Finding a generator in a folder or on the Hub, and making sure that all of it arrived."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME

from .errors import CorruptFileError, GeneratorNotFoundError
from .files import PathLike


def resolve_generator(
    name: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Find a generator's folder, downloading it from the Hub where needed, as one snapshot of one commit.

    Returns:
        The local folder, and the commit if it is from the Hub.

    Raises:
        GeneratorNotFoundError: If there is none.
    """
    commit = None
    folder = Path(name)
    if not folder.is_dir():
        _refuse_what_is_no_hub_id(name)
        try:
            snapshot = snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=[f"{subfolder}/*" if subfolder else "*"],
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise GeneratorNotFoundError(
                f"There is no generator at {name!r}: it is no folder here, and the Hub gave none "
                f"({type(error).__name__}: {error}). Check the spelling, "
                + (f"the revision {revision!r}, " if revision else "")
                + "the network and your access token."
            ) from error
        folder = Path(snapshot)
        commit = folder.name
    folder = folder / subfolder
    if not (folder / CONFIG_NAME).is_file():
        raise GeneratorNotFoundError(
            f"{str(folder)!r} holds no {CONFIG_NAME}, so it is no generator's folder. Expected what "
            f"PromptConditionedLoraGenerator.save_pretrained writes.{what_it_is_instead(folder)}"
        )
    return folder, commit


def generator_name(name: object) -> str:
    """The name of a generator, given as text or as a path.

    Raises:
        GeneratorNotFoundError: If it is neither, or empty.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise GeneratorNotFoundError(f"A generator is named by its folder or its Hub id, a string; got {name!r}.")
    return str(os.fspath(name))


def what_it_is_instead(folder: PathLike) -> str:
    """Of a folder without a generator, what else of this library's is in it, as a sentence for an error's end."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return " This one holds an adapter: load it with peft.PeftModel.from_pretrained(base_model, folder)."
    if any(folder.glob("*/task.json")):
        return " This one holds pairs, to which a generator is fitted: PromptCheckpointDataset.from_folder reads it."
    return ""


def _refuse_what_is_no_hub_id(name: str) -> None:
    if Path(name).exists():
        raise GeneratorNotFoundError(
            f"There is no generator at {name!r}: it is a file. Expected a folder that "
            "PromptConditionedLoraGenerator.save_pretrained has written, or a Hub id."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise GeneratorNotFoundError(
            f"There is no generator at {name!r}: there is no such folder, and a Hub id has the form 'org/generator'. "
            "Check the spelling, and from where the path is counted."
        ) from error


def hub_id(name_or_path: str | None) -> str | None:
    """The name if it can be a Hub id: not a folder here, nor anything that the Hub would refuse."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def name_for_others(name_or_path: str | None, what: str, mend: str) -> str | None:
    """The name as it goes to the Hub: folders of this machine are left out, with a warning.

    Args:
        name_or_path: Hub id or folder.
        what: What has that name, for the warning.
        mend: What to do about it, for the warning.
    """
    name = hub_id(name_or_path)
    if name_or_path and name is None:
        warnings.warn(f"{what} is {name_or_path!r}, a folder that only this machine has. {mend}", stacklevel=4)
    return name


def check_loading_info(name: str, info: Mapping[str, Any]) -> None:
    """Make sure that a generator's weights were loaded whole.

    Args:
        name: The generator's folder or Hub id.
        info: What transformers' `from_pretrained(..., output_loading_info=True)` gave.

    Raises:
        CorruptFileError: If a weight is missing, unknown or of the wrong shape; the first is named.
    """
    for what, mend in (
        ("missing_keys", "The weights are incomplete: save or fetch the generator again."),
        ("unexpected_keys", "The weights are another model's: check the folder."),
        ("mismatched_keys", "The weights do not fit config.json: it was edited, or is another generator's."),
        ("error_msgs", "Save or fetch the generator again."),
    ):
        found = info.get(what)
        if found:
            first = sorted(map(str, found))[0]
            raise CorruptFileError(f"The generator {name!r} has {what.replace('_', ' ')}, {first!r} for one. {mend}")
