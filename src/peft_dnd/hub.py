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

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
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
                f"({type(error).__name__}: {error}). Check the spelling, the revision {revision!r}, the network and "
                "your access token."
            ) from error
        folder = Path(snapshot)
        commit = folder.name
    folder = folder / subfolder
    if not (folder / CONFIG_NAME).is_file():
        raise GeneratorNotFoundError(
            f"{str(folder)!r} holds no {CONFIG_NAME}, so it is no generator's folder. Expected what "
            "PromptConditionedLoraGenerator.save_pretrained writes."
        )
    return folder, commit


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
