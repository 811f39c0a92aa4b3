# SPDX-License-Identifier: Apache-2.0
"""What a server that stands in for the Hub holds: users, repositories with their commits, and what is to go wrong."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from support.hub_cards import card_data


needs_a_patient_hub = pytest.mark.skipif(
    Version(version("huggingface_hub")) < Version("2"),
    reason="older huggingface_hub neither waits as long as it is told nor goes on with half a file",
)
OWNER, READER = "hf_owner", "hf_reader"  # the tokens of the users "me" and "you"
USERS = {OWNER: "me", READER: "you"}
LFS_NAMES = (".safetensors", ".bin", ".parquet", ".gguf")


class Refused(Exception):
    """What is answered in place of what was asked for."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass
class Blob:
    """A file's content as the Hub stores it."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Git's name of it."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        """The SHA-256 of a large file, Git's name of another."""
        return hashlib.sha256(self.content).hexdigest() if self.lfs else self.oid


@dataclass
class Repo:
    """A repository: its commits and where its branches are."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        """Add a commit to a branch."""
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str:
        """The commit that a branch, or a commit's own id, names."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Fault:
    """Something that goes wrong: on requests of a method whose path matches, so many times."""

    method: str
    path: str
    act: Callable[[], Any]
    times: int
    sent: int | None = None  # how much of the answer's body gets through before the connection breaks


@dataclass
class Asked:
    """A request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    host: str


class HubServer:
    """The server; `url` is what `HF_ENDPOINT` is to be."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.lock = threading.RLock()
        self.url = self.cdn = self.cache = ""

    def put(self, repo_id: str, folder: Path, *, kind: str = "models", branch: str = "main", **flags: bool) -> str:
        """Have a repository hold a folder's files, and nothing else, in a new commit."""
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.name.endswith(LFS_NAMES))
            for path in folder.rglob("*")
            if path.is_file()
        }
        with self.lock:
            repo = self.repos.setdefault((kind, repo_id), Repo(**flags))
            return repo.commit(branch, files, "put")

    def files(self, repo_id: str, revision: str = "main", *, kind: str = "models") -> dict[str, bytes]:
        """A repository's files."""
        repo = self.repos[kind, repo_id]
        return {name: blob.content for name, blob in repo.commits[repo.at(revision)].items()}

    def fetch(self, repo_id: str, folder: Path, revision: str = "main") -> Path:
        """Write a repository's files into a folder."""
        for name, content in self.files(repo_id, revision).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def card(self, repo_id: str) -> dict[str, Any]:
        """What the Hub reads from the head of a repository's card."""
        return card_data(self.files(repo_id)["README.md"].decode())

    def refuse(
        self,
        path: str,
        status: int,
        message: str = "",
        code: str = "",
        *,
        method: str = "",
        times: int = 1,
        **headers: str,
    ) -> None:
        """Answer the next requests, whose path matches, with an error."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        def act() -> None:
            raise Refused(status, message, code, named)

        self.faults.append(Fault(method, path, act, times))

    def break_off(self, path: str, after: int, *, times: int = 1) -> None:
        """Break the connection of the next downloads, whose path matches, after so many bytes of the body."""
        self.faults.append(Fault("GET", path, lambda: None, times, sent=after))

    def before(self, path: str, act: Callable[[], Any], *, method: str = "", times: int = 1) -> None:
        """Do something else first when a path is asked for."""
        self.faults.append(Fault(method, path, act, times))

    def paths(self, method: str) -> list[str]:
        """What was asked for by a method."""
        return [asked.path for asked in self.asked if asked.method == method]

    def repo(self, kind: str, repo_id: str, user: str | None, *, write: bool = False) -> Repo:
        """A repository, if a user may see it or write to it."""
        repo = self.repos.get((kind, repo_id))
        owns = user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.gated and not owns and not write:
            raise Refused(403 if user else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        if write and not owns:
            raise Refused(403 if user else 401, "You don't have the required permissions.")
        return repo
