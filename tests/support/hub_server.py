# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the Hub's own HTTP, as far as it is used here, and can be told to go wrong.

Repositories are held in memory. The large files' contents are at another host name than the rest, as the Hub's are, so
that a test can see who is given a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

from support.hub_cards import card_data, card_errors
from support.hub_state import LFS_NAMES, OWNER, USERS, Asked, Blob, HubServer, Refused, Repo


_REPO = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        hub = self.server.hub
        self.sent: int | None = None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(self._chunks())
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), unquote(split.path)
        with hub.lock:
            hub.asked.append(
                Asked(
                    self.command,
                    path,
                    {name.lower(): value for name, value in self.headers.items()},
                    self.headers.get("Host", ""),
                )
            )
            try:
                self._go_wrong(path)
                self._route(split.path)
            except Refused as refused:
                body = json.dumps({"error": str(refused)}).encode()
                self._send(refused.status, body, refused.headers)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _go_wrong(self, path: str) -> None:
        for fault in self.server.hub.faults:
            if fault.times and fault.method in ("", self.command) and re.search(fault.path, path):
                fault.times -= 1
                self.sent = fault.sent
                fault.act()

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if self.sent is None else body[: self.sent])
        if self.sent is not None:
            self.close_connection = True

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _user(self, *, needed: bool = False) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise Refused(401, "Invalid username or password.")
        return USERS.get(token)

    def _route(self, path: str) -> None:
        for methods, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                return handle(self, **{name: value and unquote(value) for name, value in found.groupdict().items()})
        raise Refused(404, f"Nothing at {path}")

    def _create(self) -> None:
        asked = json.loads(self.body)
        user = self._user(needed=True)
        owner = asked.get("organization") or user
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id, kind = f"{owner}/{asked['name']}", f"{asked.get('type', 'model')}s"
        known = (kind, repo_id) in self.server.hub.repos
        if not known:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.hub.repos[kind, repo_id] = repo = Repo(private=private)
            repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        prefix = "" if kind == "models" else f"{kind}/"
        self._json({"url": f"{self.server.hub.url}/{prefix}{repo_id}", "id": repo_id}, 409 if known else 200)

    def _info(self, kind: str, repo: str, revision: str | None = None) -> None:
        found = self.server.hub.repo(kind, repo, self._user())
        oid = found.at(revision or "main")
        names = list(found.commits[oid])
        card = found.commits[oid].get("README.md")
        facts = {"id": repo, "sha": oid, "private": found.private, "siblings": [{"rfilename": name} for name in names]}
        self._json({**facts, "cardData": card_data(card.content.decode()) if card else None})

    def _tree(self, kind: str, repo: str, revision: str, path: str | None = None) -> None:
        found = self.server.hub.repo(kind, repo, self._user())
        files = found.commits[found.at(revision)]
        if path and not any(name.startswith(f"{path}/") for name in files):
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        self._json([_entry(name, blob) for name, blob in files.items() if name.startswith(path or "")])

    def _refs(self, kind: str, repo: str) -> None:
        found = self.server.hub.repo(kind, repo, self._user())
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in found.branches.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def _branch(self, kind: str, repo: str, branch: str) -> None:
        found = self.server.hub.repo(kind, repo, self._user(needed=True), write=True)
        if branch in found.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        found.branches[branch] = found.at(json.loads(self.body).get("startingPoint", "main"))
        self._json({})

    def _validate(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        write = "create_pr" not in self.query
        found = self.server.hub.repo(kind, repo, self._user(needed=True), write=write)
        there = found.commits[found.at(revision)]
        self._json(
            {
                "files": [
                    {
                        "path": name,
                        "uploadMode": "lfs" if name.endswith(LFS_NAMES) or file["size"] > 10**7 else "regular",
                        "shouldIgnore": False,
                        "oid": there[name].etag if name in there else None,
                    }
                    for file in json.loads(self.body)["files"]
                    for name in [file["path"]]
                ]
            }
        )

    def _batch(self, prefix: str | None, repo: str) -> None:
        self._user(needed=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            actions = {
                "upload": {"href": f"{self.server.hub.cdn}/large/{oid}"},
                "verify": {"href": f"{self.server.hub.url}/verify"},
            }
            objects.append({**asked, **({} if oid in self.server.hub.large else {"actions": actions})})
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "The content is not what was announced")
        self.server.hub.large[oid] = self.body
        self._send(200, b"")

    def _verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.server.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "No such object")
        self._json({})

    def _commit(self, kind: str, repo: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        user = self._user(needed=True)
        found = self.server.hub.repo(kind, repo, user, write=not proposed)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", found.at(revision)) != found.at(revision):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[found.at(revision)])
        for line in lines[1:]:
            operation, value = line["key"], line["value"]
            if operation == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation == "lfsFile":
                if value["oid"] not in self.server.hub.large:
                    raise Refused(400, f"LFS object {value['oid']} has not been uploaded")
                files[value["path"]] = Blob(self.server.hub.large[value["oid"]], True)
            elif operation == "deletedFile":
                del files[value["path"]]
        number = sum(name.startswith("refs/pr/") for name in found.branches) + 1
        oid = found.commit(f"refs/pr/{number}" if proposed else revision, files, header["summary"])
        url = f"{self.server.hub.url}/{'' if kind == 'models' else f'{kind}/'}{repo}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self._json({**answer, "pullRequestUrl": f"{url}/discussions/{number}"} if proposed else answer)

    def _resolve(self, prefix: str | None, repo: str, revision: str, name: str) -> None:
        found = self.server.hub.repo("datasets" if prefix else "models", repo, self._user())
        oid = found.at(revision)
        blob = found.commits[oid].get(name)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            self.server.hub.large[blob.etag] = blob.content
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
            self._send(302, b"", {**headers, "Location": f"{self.server.hub.cdn}/large/{blob.etag}"})
        else:
            self._send_range(blob.content, headers)

    def _download(self, oid: str) -> None:
        self._send_range(self.server.hub.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_range(self, content: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        span = f"bytes {first}-{last}/{len(content)}"
        return self._send(206, content[first : last + 1], {**headers, "Content-Range": span})


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.etag, "size": len(blob.content), "pointerSize": 134}
    return entry


_FILE = r"/(?P<prefix>datasets/)?(?P<repo>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("GET", _REPO, _Handler._info),
    ("GET", _REPO + r"/revision/(?P<revision>[^/]+)", _Handler._info),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler._tree),
    ("GET", _REPO + r"/refs", _Handler._refs),
    ("POST", _REPO + r"/branch/(?P<branch>[^/]+)", _Handler._branch),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", _Handler._commit),
    ("POST", _FILE + r"\.git/info/lfs/objects/batch", _Handler._batch),
    ("GET HEAD", _FILE + r"/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler._resolve),
    ("PUT", r"/large/(?P<oid>\w+)", _Handler._upload),
    ("GET HEAD", r"/large/(?P<oid>\w+)", _Handler._download),
    ("POST", r"/verify", _Handler._verify),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


@contextmanager
def serving() -> Iterator[HubServer]:
    """A server that answers within this context."""
    hub = HubServer()
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.hub = hub
        hub.url, hub.cdn = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()


def settings_for(hub: HubServer, home: Path) -> dict[str, str]:
    """The environment in which a process of its own talks to a server, as nobody in particular."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def hub(local_hub: HubServer) -> HubServer:
    """The same, by the name under which most tests know it."""
    return local_hub


@pytest.fixture
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that this process talks to, as a user who has logged in as "me", with an empty cache.

    `huggingface_hub` reads its settings from the environment when it is imported, which was long ago: here they are
    set to what it would have read.
    """
    with serving() as server:
        server.cache = str(tmp_path / "hub_cache")
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": server.cache,
            "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # and what transformers keeps
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # of the functions that huggingface_hub itself has
        monkeypatch.setenv("HF_TOKEN", OWNER)
        close_session()
        yield server
        close_session()


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long `huggingface_hub` waited, in seconds, before it tried again; here the waits take no time."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits
