# SPDX-License-Identifier: Apache-2.0
"""Why the Hub did not give what was asked for, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import constants, errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# What a connection that breaks raises is of the HTTP library that the installed huggingface_hub stands on, httpx or
# httpx2; and where files come by Xet, which is another protocol, an error of its own.
_CONNECTION_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError.__bases__[0],
    *filter(None, [getattr(errors, "XetDownloadError", None)]),
)
# A ValueError is what it raises for a repository whose files' names would lead out of the cache.
FETCHING_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError, ValueError, OSError, *_CONNECTION_ERRORS)
# An upload of a large file that fails in a thread is a RuntimeError, whatever the cause.
UPLOADING_ERRORS: tuple[type[Exception], ...] = (RuntimeError, *_CONNECTION_ERRORS)


def why_not_fetched(name: str, revision: str | None, error: BaseException) -> str:
    """Why something could not be fetched from the Hub, and the mend: sentences for an error's end.

    Args:
        name: The Hub id.
        revision: What was asked for, `None` for the main branch.
        error: What `huggingface_hub` raised.
    """
    causes = list(_causes(error))
    at = f"the revision {revision!r}, " if revision else ""
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"The repository has no revision {revision!r}: name one of its branches or tags, or a whole commit id."
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            "Its owner gives access on request. Ask for it on the repository's page on the Hub, and pass token=... of "
            "an account that has it, or log in with `hf auth login`."
        )
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes) or constants.HF_HUB_OFFLINE:
        return (
            "It is not in the Hub's cache, and the Hub was not asked because HF_HUB_OFFLINE is set. Check the "
            f"spelling, {at}or allow the network; a private repository needs your access token as well."
        )
    refused = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if refused is not None:
        return _why_refused(refused, at)
    if isinstance(error, ValueError):
        return f"huggingface_hub refuses it ({_in_words(error)})."
    if not isinstance(error, OSError) or any(isinstance(cause, _CONNECTION_ERRORS) for cause in causes):
        return (
            f"The connection to the Hub failed. Check the network and try again: what has arrived whole is kept. "
            f"({_in_words(error)})"
        )
    return f"Check the spelling, {at}the network and your access token. ({_in_words(error)})"


def _why_refused(error: HfHubHTTPError, at: str) -> str:
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message", "")
    if status == 401 and "credentials" in said:
        return "The Hub does not know the access token. Pass one that is valid, or log in again with `hf auth login`."
    if status in (401, 404) or isinstance(error, RepositoryNotFoundError):
        return (
            f"The Hub has no such repository, or it is private. Check the spelling, {at}and for a private one pass "
            f"token=... of an account that may read it, or log in with `hf auth login`. The Hub said {status}."
        )
    if status == 403:
        return f"Your access token may not read it (the Hub said 403: {said}). Pass token=... of an account that may."
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdigit() else "in some minutes"
        return f"The Hub has had too many requests from you (429). Try again {when}; with a token the limit is higher."
    return f"The Hub failed ({_in_words(error)}). Try again later."


def why_not_uploaded(repo_id: str, error: BaseException) -> str:
    """The message for an upload to a repository that broke off."""
    cause = list(_causes(error))[-1]
    return (
        f"Cannot upload to {repo_id!r} on the Hub: sending broke off ({_in_words(cause)}). The repository is as it "
        "was, since a commit is made only when all is there. Check the network and try again: what was sent whole is "
        "not sent again."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
