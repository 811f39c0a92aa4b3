# SPDX-License-Identifier: Apache-2.0
"""Finding generators and adapters in a folder or on the Hub, and whether all of one arrived."""

from __future__ import annotations

import difflib
import functools
import glob
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypedDict, TypeVar

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from transformers.utils import CONFIG_NAME
from typing_extensions import Unpack

from ..errors import (
    CorruptFileError,
    GeneratorNotFoundError,
    MissingFileError,
    PairsFolderError,
    PeftDndError,
    TextEncoderError,
    did_you_mean,
)
from .checksums import CHECKSUMS_NAME
from .files import PathLike
from .hub_errors import FETCHING_ERRORS, why_not_fetched


_P = ParamSpec("_P")
_Result = TypeVar("_Result")

# All that is read of a generator; what else lies in its repository is not downloaded.
GENERATOR_FILES = (
    CONFIG_NAME,
    "model*.safetensors*",
    CHECKSUMS_NAME,
    "prompt_reference.safetensors",
    "policy.safetensors",
    "replay_store.safetensors",
    "text_encoder/*",
)


class _Kind(NamedTuple):
    """What is looked for, in the words of errors."""

    noun: str
    writer: str
    error: type[PeftDndError]
    repo_type: str = "model"


class HubOptions(TypedDict, total=False):
    """Which version is read of what lies on the Hub, and how: keywords of all that loads something.

    Attributes:
        revision: Branch, tag or commit; `None` is the main branch.
        subfolder: Folder inside the repository, or inside a folder of this machine.
        token: Access token; `None` takes the one that is logged in.
        cache_dir: Where downloads are kept; `None` is the Hub's own cache.
        force_download: Whether to download anew what is there already.
        local_files_only: Whether to do without the network.
    """

    revision: str | None
    subfolder: str
    token: str | bool | None
    cache_dir: PathLike | None
    force_download: bool
    local_files_only: bool


_GENERATOR = _Kind("generator", "PromptConditionedLoraGenerator.save_pretrained", GeneratorNotFoundError)
_ADAPTER = _Kind("adapter", "GeneratedAdapter.save_pretrained or PEFT", MissingFileError)
PAIRS = _Kind("data set of pairs", "CheckpointCollector", PairsFolderError, "dataset")
TEXT_ENCODER = _Kind("text encoder", "SentenceTransformer.save_pretrained", TextEncoderError)


def takes_keywords_of(source: Callable[..., Any]) -> Callable[[Callable[_P, _Result]], Callable[_P, _Result]]:
    """Have a function that passes its `**` on to `source` show and check the keywords as if they stood there.

    `help`, notebooks and the reference see their names and defaults, and a misspelt one is a `TypeError`. A function
    with `**kwargs`, which takes these and more, shows them as well and checks the rest itself.
    """
    keywords = [value for value in inspect.signature(source).parameters.values() if value.kind is value.KEYWORD_ONLY]

    def decorate(function: Callable[_P, _Result]) -> Callable[_P, _Result]:
        signature = inspect.signature(function)
        *own, last = signature.parameters.values()
        rest = [last] if last.name == "kwargs" else []
        signature = signature.replace(parameters=[*own, *keywords, *rest])

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _Result:
            for name in () if rest else kwargs.keys() - signature.parameters.keys():
                meant = did_you_mean(name, signature.parameters)
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {name!r}.{meant}")
            return function(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorate


def find_generator(
    name: str, files: Sequence[str] = GENERATOR_FILES, **hub: Unpack[HubOptions]
) -> tuple[Path, str | None]:
    """Find a generator's folder, downloading it from the Hub where needed, as one snapshot of one commit.

    Args:
        name: Folder or Hub id.
        files: Which files to download; all that is read of it by default.
        hub: See [`HubOptions`].

    Returns:
        The local folder, and the commit if it is from the Hub.

    Raises:
        GeneratorNotFoundError: If there is none.
    """
    folder, commit = find_folder(_GENERATOR, name, files, **hub)
    if not (folder / CONFIG_NAME).is_file():
        raise GeneratorNotFoundError(
            f"{str(folder)!r} holds no {CONFIG_NAME}, so it is no generator's folder. Expected what "
            f"{_GENERATOR.writer} writes.{what_it_is_instead(folder)}"
        )
    return folder, commit


def find_adapter(name: PathLike, files: Sequence[str], **hub: Unpack[HubOptions]) -> Path:
    """Find an adapter's folder, downloading it from the Hub where needed.

    Args:
        name: Folder or Hub id.
        files: Which files to download.
        hub: See [`HubOptions`].

    Raises:
        FileNotFoundError: If there is no such folder, nor such a repository. Whether it holds an adapter is not
            looked at.
    """
    return find_adapter_and_commit(name, files, **hub)[0]


def find_adapter_and_commit(
    name: PathLike, files: Sequence[str], **hub: Unpack[HubOptions]
) -> tuple[Path, str | None]:
    """Find an adapter's folder as `find_adapter` does, and the commit if it is from the Hub."""
    return find_folder(_ADAPTER, _name(_ADAPTER, name), files, **hub)


def find_folder(
    kind: _Kind,
    name: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """The folder, and the commit if it is from the Hub, of what is asked for with the keywords of [`HubOptions`]."""
    if Path(name).is_dir():
        return Path(name) / subfolder, None
    _refuse_what_is_no_hub_id(kind, name)
    prefix = f"{glob.escape(subfolder.strip('/'))}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            name,
            repo_type=kind.repo_type,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[prefix + file for file in files],
        )
    except FETCHING_ERRORS as error:
        raise kind.error(
            f"There is no {kind.noun} at {name!r}: it is no folder here, and the Hub gave none. "
            + why_not_fetched(name, revision, error)
            + folder_meant(name)
        ) from error
    return Path(snapshot) / subfolder, Path(snapshot).name


def commit_in_cache(
    name: str, files: Sequence[str], *, revision: str | None = None, cache_dir: PathLike | None = None
) -> str | None:
    """The commit of a model that was just loaded from the Hub, as the cache has it; `None` if that is not known.

    Args:
        name: Hub id; of anything else nothing is known.
        files: Names of files, one of which the model has.
        revision: The branch, tag or commit that was asked for.
        cache_dir: Where downloads are kept.
    """
    if hub_id(name) is None:
        return None
    for file in files:
        path = try_to_load_from_cache(
            name, file, cache_dir=None if cache_dir is None else Path(cache_dir), revision=revision
        )
        if isinstance(path, str):
            return Path(path).parent.name
    return None


def generator_name(name: object) -> str:
    """The name of a generator, given as text or as a path.

    Raises:
        GeneratorNotFoundError: If it is neither, or empty.
    """
    return _name(_GENERATOR, name)


def _name(kind: _Kind, name: object) -> str:
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise kind.error(f"The {kind.noun} is named by its folder or its Hub id, a string; got {name!r}.")
    return str(os.fspath(name))


def what_it_is_instead(folder: PathLike) -> str:
    """Of a folder without a generator, what else of this library's is in it, as a sentence for an error's end."""
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        return " This one holds an adapter: load it with peft.PeftModel.from_pretrained(base_model, folder)."
    if any(folder.glob("*/task.json")):
        return " This one holds pairs, to which a generator is fitted: PromptCheckpointDataset.from_folder reads it."
    return ""


def _refuse_what_is_no_hub_id(kind: _Kind, name: str) -> None:
    if Path(name).exists():
        raise kind.error(
            f"There is no {kind.noun} at {name!r}: it is a file. Expected a folder that {kind.writer} has written, or "
            "a Hub id."
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise kind.error(
            f"There is no {kind.noun} at {name!r}: there is no such folder, and a Hub id has the form "
            f"'org/{kind.noun.split()[-1]}'. Check the spelling, and from where the path is counted."
            + folder_meant(name)
        ) from error


def folder_meant(name: str) -> str:
    """A sentence that names the folder here that was probably meant; empty if none is like it."""
    parent = Path(name).parent
    try:
        there = [path.name for path in parent.iterdir() if path.is_dir()]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(Path(name).name, there, n=1, cutoff=0.75)
    return f" There is a folder {str(parent / near[0])!r} here." if near else ""


def hub_id(name_or_path: str | None) -> str | None:
    """The name if it can be a Hub id: not a folder here, nor anything that the Hub would refuse."""
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, whatever folders there are."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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
