# SPDX-License-Identifier: Apache-2.0
"""Uploading a folder to the Hub, in one commit that replaces what was there of it before."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from ..errors import GeneratorConfigError, SavingError
from .cards import CARD_NAME, may_write_card
from .hub_errors import UPLOADING_ERRORS, why_not_uploaded


# The Hub refuses a commit whose parent is no longer the branch's last one.
_OVERTAKEN = (409, 412)
_TRIES = 3


class UploadOptions(TypedDict, total=False):
    """How something is uploaded to the Hub: keywords of every `push_to_hub`.

    Attributes:
        commit_message: What the commit says; `None` says what was uploaded.
        commit_description: And its longer text.
        private: Whether a new repository is private; `None` leaves it to the account's default.
        token: Access token; `None` takes the one that is logged in.
        revision: Branch to commit to, made where missing; `None` is the main branch.
        create_pr: Whether to open a pull request, against the main branch, rather than commit.
    """

    commit_message: str | None
    commit_description: str | None
    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool


def upload(
    save: Callable[[Path, str], None],
    repo_id: str,
    what: str,
    replaced: Sequence[str] = (),
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a folder to the Hub, making the repository and the branch where they are missing.

    All goes into one commit, so that nobody ever finds half of it. A card in the repository that somebody has made
    their own stays. Where another commit comes in between, the upload starts again from that.

    Args:
        save: Writes into the folder that it is given, which is there for the upload only; the repository's full id is
            its second argument.
        repo_id: Hub id, `"user/name"`.
        what: What is uploaded, for a commit without a message.
        replaced: Patterns of files which are not to stay in the repository unless they are uploaded anew.
        commit_message: As in [`UploadOptions`], and so are the others.
        commit_description: As there.
        private: As there.
        token: As there.
        revision: As there.
        create_pr: As there.

    Returns:
        The Hub's description of the commit.

    Raises:
        HfHubHTTPError: The Hub's own, if it refuses something: you may not write there, for one.
        SavingError: If the connection breaks off.
        GeneratorConfigError: If a pull request is to be opened against another branch than the main one.
    """
    if create_pr and revision is not None:
        raise GeneratorConfigError(
            f"A pull request goes to the main branch, so create_pr=True takes no revision, got {revision!r}. Leave "
            "one of them out."
        )
    api = HfApi(token=token)
    message = commit_message or f"Upload {what}"
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _fetch_edited_card(api, repo_id, revision, folder)
            save(folder, repo_id)
            for last in (False,) * (_TRIES - 1) + (True,):
                parent, operations = _operations(api, folder, repo_id, revision, replaced)
                try:
                    return api.create_commit(
                        repo_id,
                        operations,
                        commit_message=message,
                        commit_description=commit_description,
                        revision=revision,
                        create_pr=create_pr,
                        parent_commit=parent,
                    )
                except HfHubHTTPError as error:
                    if last or error.response.status_code not in _OVERTAKEN:
                        raise
    except HfHubHTTPError:
        raise
    except UPLOADING_ERRORS as error:
        raise SavingError(why_not_uploaded(repo_id, error)) from error
    raise AssertionError("the last try returns or raises")


def _operations(
    api: HfApi, folder: Path, repo_id: str, revision: str | None, replaced: Sequence[str]
) -> tuple[str | None, list[CommitOperationAdd | CommitOperationDelete]]:
    """The last commit, and what makes of its files those of the folder."""
    head = api.repo_info(repo_id, revision=revision)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    there = api.list_repo_files(repo_id, revision=head.sha)
    gone = [name for name in filter_repo_objects(there, allow_patterns=list(replaced)) if name not in files]
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
    return head.sha, [*(CommitOperationDelete(path_in_repo=name) for name in gone), *added]


def _fetch_edited_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    if api.file_exists(repo_id, CARD_NAME, revision=revision):
        card = folder / CARD_NAME
        shutil.copyfile(api.hf_hub_download(repo_id, CARD_NAME, revision=revision), card)
        if may_write_card(folder):
            card.unlink()
