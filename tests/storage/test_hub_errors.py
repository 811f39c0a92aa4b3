# SPDX-License-Identifier: Apache-2.0
"""When the Hub says no, or falls silent, the error names the thing and the mend, and nothing half-fetched is left."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hub_state import READER, HubServer, needs_a_patient_hub
from support.live_models import PROMPTS

from peft_dnd import DnDConfig, GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.errors import GeneratorNotFoundError, MissingFileError, PairsFolderError, PeftDndError


pytest_plugins = ("support.hub_server", "support.adapter_fixtures")

Load = Callable[..., Any]
LOADERS: dict[str, tuple[Load, str, type[PeftDndError]]] = {
    "generator": (PromptConditionedLoraGenerator.from_pretrained, "models", GeneratorNotFoundError),
    "adapter": (GeneratedAdapter.from_pretrained, "models", MissingFileError),
    "pairs": (PromptCheckpointDataset.from_hub, "datasets", PairsFolderError),
}


@pytest.fixture(params=list(LOADERS))
def what(
    request: pytest.FixtureRequest, generator_folder: Path, adapter_folder: str, pairs_folder: Path, hub: HubServer
) -> tuple[Load, type[PeftDndError], Callable[..., str]]:
    """A way to load, the error that it raises, and what puts such a thing on the Hub."""
    load, kind, error = LOADERS[request.param]
    folder = {"generator": generator_folder, "adapter": Path(adapter_folder), "pairs": pairs_folder}[request.param]
    return load, error, lambda repo_id, **flags: hub.put(repo_id, folder, kind=kind, **flags)


def refusal(load: Load, error: type[PeftDndError], *given: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(*given, **options)
    return " ".join(str(caught.value).split())


class TestRefused:
    def test_no_such_repository_or_none_that_one_may_see(self, what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        load, error, put = what
        put("you/private", private=True)
        for name in ("me/typo", "you/private"):
            said = refusal(load, error, name)
            assert repr(name) in said and "no such repository, or it is private. Check the spelling" in said
            assert "token=..." in said and "404" in said
        monkeypatch.delenv("HF_TOKEN")
        assert "401" in refusal(load, error, "you/private")
        assert load("you/private", token=READER) is not None

    def test_a_token_that_is_none(self, what: Any) -> None:
        load, error, put = what
        put("me/thing", private=True)
        assert "does not know the access token" in refusal(load, error, "me/thing", token="hf_nobody")

    def test_a_gated_repository(self, what: Any) -> None:
        load, error, put = what
        put("you/gated", gated=True)
        said = refusal(load, error, "you/gated")
        assert "gives access on request" in said and "token=..." in said

    def test_no_such_revision(self, what: Any) -> None:
        load, error, put = what
        put("me/thing")
        said = refusal(load, error, "me/thing", revision="v2")
        assert "no revision 'v2'" in said and "branches or tags" in said

    def test_an_entry_that_is_not_there(self, hub: HubServer, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("nothing else")
        hub.put("me/empty", tmp_path)
        assert "no config.json" in refusal(
            PromptConditionedLoraGenerator.from_pretrained, GeneratorNotFoundError, "me/empty"
        )
        assert "adapter" in refusal(GeneratedAdapter.from_pretrained, MissingFileError, "me/empty")


@pytest.fixture
def carried_folder(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> Path:
    """A generator that carries its text encoder, as one on the Hub does."""
    generator.save_pretrained(tmp_path / "carried", include_text_encoder=True)
    return tmp_path / "carried"


class TestFallingSilent:
    @needs_a_patient_hub
    def test_too_many_requests_say_when_to_come_again(self, what: Any, hub: HubServer, waited: list[float]) -> None:
        load, error, put = what
        put("me/thing")
        hub.refuse("/api/(models|datasets)/", 429, "Too many", method="GET", Retry_After="40")
        said = refusal(load, error, "me/thing")
        assert "429" in said and "in 40 seconds" in said
        one_file = "/resolve/.*(/config|adapter_config|law/task).json"
        hub.refuse(one_file, 429, "Too many", method="HEAD", times=3, Retry_After="3")
        assert load("me/thing") is not None and 4.0 in waited, "a file's turn is waited for"

    def test_the_hub_is_out_of_order(self, what: Any, hub: HubServer) -> None:
        load, error, put = what
        put("me/thing")
        hub.refuse("/api/", 503, "Down for maintenance", method="GET")
        said = refusal(load, error, "me/thing")
        assert "503" in said and "Try again later" in said

    def test_nobody_is_there(self, what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        load, error, _ = what
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert "Check the network" in refusal(load, error, "me/thing")

    @needs_a_patient_hub
    def test_a_download_that_breaks_off_goes_on_where_it_was(
        self, carried_folder: Path, hub: HubServer, waited: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)  # what has come of one is lost
        large = hashlib.sha256((carried_folder / "model.safetensors").read_bytes()).hexdigest()
        hub.put("me/generator", carried_folder)
        hub.break_off(f"/large/{large}", after=50_000)
        loaded = PromptConditionedLoraGenerator.from_pretrained("me/generator")
        assert loaded.generate_adapter(PROMPTS)
        asked = [asked for asked in hub.asked if asked.path.startswith("/large/")]
        assert [of.headers.get("range") for of in asked].count(None) == 2, "each of the two large files"
        (again,) = [of for of in asked if "range" in of.headers]
        assert int(again.headers["range"].removeprefix("bytes=").removesuffix("-")) in range(10_000, 60_000)

    @needs_a_patient_hub
    def test_a_download_that_breaks_off_for_good_leaves_nothing_half(
        self, carried_folder: Path, hub: HubServer, waited: list[float]
    ) -> None:
        hub.put("me/generator", carried_folder)
        hub.break_off("/large/", after=0, times=99)
        load = PromptConditionedLoraGenerator.from_pretrained
        said = refusal(load, GeneratorNotFoundError, "me/generator")
        assert "connection to the Hub failed" in said and "try again" in said
        left = [path.name for path in Path(hub.cache).rglob("*") if path.is_file()]
        assert left and not any(name.endswith((".incomplete", ".safetensors")) for name in left)
        with pytest.raises(GeneratorNotFoundError):  # half of a generator is none
            load("me/generator", local_files_only=True)
        hub.faults.clear()
        assert load("me/generator").generate_adapter(PROMPTS)

    def test_what_was_fetched_once_is_there_when_the_hub_is_not(
        self, generator_folder: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = hub.put("me/generator", generator_folder)
        PromptConditionedLoraGenerator.from_pretrained("me/generator")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert DnDConfig(generator="me/generator", prompts=PROMPTS).generator_commit == commit
        said = refusal(PromptConditionedLoraGenerator.from_pretrained, GeneratorNotFoundError, "me/other")
        assert "HF_HUB_OFFLINE is set" in said and "spelling" in said
