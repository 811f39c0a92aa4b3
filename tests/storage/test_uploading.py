# SPDX-License-Identifier: Apache-2.0
"""What goes to the Hub is whole, in one commit, and takes the place of what was there; over the Hub's own HTTP."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from support.comparing import same_weights
from support.hub_state import READER, HubServer, needs_a_patient_hub
from support.live_models import OTHER_PROMPTS, PROMPTS, logits
from torch import nn

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.errors import GeneratorConfigError, PromptError, SavingError
from peft_dnd.generator.summary import SUMMARY_NAME
from peft_dnd.storage.cards import GENERATED_MARK
from peft_dnd.storage.uploading import UploadOptions
from peft_dnd.text.out_of_distribution import REFERENCE_NAME


pytest_plugins = ("support.hub_server", "support.adapter_fixtures")

FreshBase = Callable[[], nn.Module]


def test_a_generator_there_and_back(generator: PromptConditionedLoraGenerator, hub: HubServer) -> None:
    commit = generator.push_to_hub("me/generator", private=True, include_text_encoder=True)
    assert hub.repos["models", "me/generator"].private
    assert hub.repos["models", "me/generator"].messages[1:] == ["Upload PromptConditionedLoraGenerator"]
    hub.asked.clear()
    loaded = PromptConditionedLoraGenerator.from_pretrained("me/generator")
    adapter = loaded.generate_adapter(PROMPTS)
    assert same_weights(adapter, generator.generate_adapter(PROMPTS))
    assert adapter.provenance["generator"] == "me/generator"
    assert adapter.provenance["generator_revision"] == commit.oid
    fetched = {path.split(commit.oid + "/")[1] for path in hub.paths("GET") if "/resolve/" in path}
    assert "config.json" in fetched and not {"README.md", SUMMARY_NAME, ".gitattributes"} & fetched
    # Large files are elsewhere, and whoever holds them gets no token.
    large = [asked for asked in hub.asked if asked.path.startswith("/large/")]
    assert large and all(asked.host.startswith("localhost") for asked in large)
    assert not any("authorization" in asked.headers for asked in large)


def test_an_adapter_there_and_back_and_into_stock_peft(
    adapter: GeneratedAdapter, hub: HubServer, fresh_base: FreshBase, expected: torch.Tensor
) -> None:
    commit = adapter.push_to_hub("adapter", commit_description="text")  # the user's own name space
    assert hub.repos["models", "me/adapter"].messages[1:] == ["Upload generated LoRA adapter"]
    assert commit.oid == hub.repos["models", "me/adapter"].branches["main"]
    read = GeneratedAdapter.from_pretrained("me/adapter", revision=commit.oid)
    assert same_weights(read, adapter) and read.provenance["prompts_sha256"] == adapter.provenance["prompts_sha256"]
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_base(), "me/adapter")), expected)


@pytest.mark.filterwarnings("ignore:The generator's text encoder is")
class TestOptions:
    def test_saving_and_pushing_in_one_forgets_nothing(
        self, generator: PromptConditionedLoraGenerator, hub: HubServer, tmp_path: Path
    ) -> None:
        options: Any = {"commit_message": "first", "private": True, "token": "hf_owner", "revision": "dev"}
        generator.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/generator", max_shard_size="20KB", **options)
        repo = hub.repos["models", "me/generator"]
        assert repo.private and repo.messages[-1] == "first"
        shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
        assert len(shards) > 1 and shards <= hub.files("me/generator", "dev").keys()
        assert set(hub.files("me/generator")) == {".gitattributes"}

    def test_only_the_process_that_writes_pushes(
        self, generator: PromptConditionedLoraGenerator, hub: HubServer, tmp_path: Path
    ) -> None:
        generator.save_pretrained(tmp_path, is_main_process=False, push_to_hub=True, private=True)
        assert not hub.asked

    def test_a_branch_that_is_missing_is_made_and_one_that_is_there_goes_on(
        self, adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, hub: HubServer
    ) -> None:
        first = adapter.push_to_hub("me/adapter", revision="dev")
        second = other_adapter.push_to_hub("me/adapter", revision="dev")
        load = GeneratedAdapter.from_pretrained
        assert same_weights(load("me/adapter", revision="dev"), other_adapter)
        assert same_weights(load("me/adapter", revision=first.oid), adapter) and second.oid != first.oid

    def test_a_pull_request(self, adapter: GeneratedAdapter, hub: HubServer) -> None:
        adapter.push_to_hub("me/adapter")
        before = hub.files("me/adapter")
        proposed = adapter.to(torch.bfloat16).push_to_hub("me/adapter", create_pr=True, token=READER)
        assert proposed.pr_revision == "refs/pr/1" and hub.files("me/adapter") == before
        read = GeneratedAdapter.from_pretrained("me/adapter", revision="refs/pr/1").state_dict()
        assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
        asked = len(hub.asked)
        with pytest.raises(GeneratorConfigError, match=r"to the main branch.*'dev'.*Leave one"):
            adapter.push_to_hub("me/adapter", create_pr=True, revision="dev")
        assert len(hub.asked) == asked

    @pytest.mark.parametrize("kind", [GeneratedAdapter, PromptConditionedLoraGenerator])
    def test_a_signature_shows_them_all(self, kind: Any) -> None:
        shown = inspect.signature(kind.push_to_hub).parameters
        assert {name: shown[name].annotation for name in UploadOptions.__annotations__} == {
            name: annotation.__forward_arg__ for name, annotation in UploadOptions.__annotations__.items()
        }

    def test_a_misspelt_one_is_refused(self, generator: PromptConditionedLoraGenerator, hub: HubServer) -> None:
        with pytest.raises(TypeError, match=r"push_to_hub\(\) .* 'privat'\. Did you mean 'private'"):
            generator.push_to_hub("me/generator", privat=True)  # type: ignore[call-arg]
        assert not hub.asked


class TestWhatWasThere:
    def test_what_an_earlier_generator_left_is_not_read_beside_the_new_one(
        self, generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, hub: HubServer
    ) -> None:
        earlier = copy.deepcopy(generator)
        earlier.fit_out_of_distribution(pairs)
        with torch.no_grad():
            earlier.normalization.mean.add_(1.0)
        earlier.push_to_hub("me/generator", include_text_encoder=True)
        assert {"model.safetensors", REFERENCE_NAME} <= hub.files("me/generator").keys()
        generator.push_to_hub("me/generator", include_text_encoder=True, max_shard_size="20KB")
        files = hub.files("me/generator")
        # transformers reads a single file rather than shards: the earlier weights under the new configuration.
        assert "model.safetensors" not in files and sum(name.startswith("model-0") for name in files) > 1
        assert REFERENCE_NAME not in files and ".gitattributes" in files
        loaded = PromptConditionedLoraGenerator.from_pretrained("me/generator")
        assert loaded.prompt_reference is None
        assert same_weights(loaded.generate_adapter(PROMPTS), generator.generate_adapter(PROMPTS))
        assert len(hub.repos["models", "me/generator"].messages) == 3, "one commit each"

    def test_a_card_that_someone_edited_stays(self, adapter: GeneratedAdapter, hub: HubServer, tmp_path: Path) -> None:
        adapter.push_to_hub("me/adapter")
        folder = hub.fetch("me/adapter", tmp_path / "edited")
        card = (folder / "README.md").read_text()
        (folder / "README.md").write_text(card.replace(GENERATED_MARK, "My words."))
        hub.put("me/adapter", folder)
        adapter.to(torch.bfloat16).push_to_hub("me/adapter")
        assert b"My words." in hub.files("me/adapter")["README.md"]
        assert len(hub.files("me/adapter")["adapter_model.safetensors"]) < len(
            (folder / "adapter_model.safetensors").read_bytes()
        )

    def test_nothing_new_is_no_new_commit(self, adapter: GeneratedAdapter, hub: HubServer) -> None:
        first = adapter.push_to_hub("me/adapter")
        assert adapter.push_to_hub("me/adapter").oid == first.oid


class TestWhenItFails:
    def test_a_commit_that_was_overtaken_is_made_again_on_the_later_one(
        self, adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, hub: HubServer, tmp_path: Path
    ) -> None:
        other_adapter.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "notes.txt").write_text("from the other")
        hub.before("/commit/", lambda: hub.put("me/adapter", tmp_path / "other"), method="POST")
        adapter.push_to_hub("me/adapter")
        assert hub.files("me/adapter")["notes.txt"] == b"from the other"
        assert same_weights(GeneratedAdapter.from_pretrained("me/adapter"), adapter)
        assert len(hub.paths("PUT")) == 1, "what is there already is not sent again"

    def test_always_overtaken_is_said_by_the_hub(
        self, adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, hub: HubServer, tmp_path: Path
    ) -> None:
        other_adapter.save_pretrained(tmp_path / "other")
        hub.before("/commit/", lambda: hub.put("me/adapter", tmp_path / "other"), method="POST", times=9)
        with pytest.raises(HfHubHTTPError, match=r"(?s)412.*A commit has happened since"):
            adapter.push_to_hub("me/adapter")
        assert len([path for path in hub.paths("POST") if "/commit/" in path]) == 3
        assert same_weights(GeneratedAdapter.from_pretrained("me/adapter"), other_adapter)

    @pytest.mark.parametrize(
        ("token", "words"),
        [
            ("hf_nobody", "401.*Invalid credentials"),
            (READER, r"403.*namespace 'me'.*token has the correct permissions"),
            (False, "401"),
        ],
    )
    def test_who_may_not_write_is_told_so(
        self, adapter: GeneratedAdapter, hub: HubServer, token: Any, words: str
    ) -> None:
        with pytest.raises(HfHubHTTPError) as caught:
            adapter.push_to_hub("me/adapter", token=token)
        assert re.search(words, " ".join(str(caught.value).split()))
        assert not hub.repos

    @needs_a_patient_hub
    def test_too_many_requests_are_waited_for(
        self, adapter: GeneratedAdapter, hub: HubServer, waited: list[float]
    ) -> None:
        hub.refuse("/preupload/", 429, "Too many", Retry_After="7")
        adapter.push_to_hub("me/adapter")
        assert 8.0 in waited and same_weights(GeneratedAdapter.from_pretrained("me/adapter"), adapter)

    @pytest.mark.filterwarnings("ignore:The generator's text encoder is")
    def test_a_connection_that_breaks_leaves_what_was_there(
        self, generator: PromptConditionedLoraGenerator, hub: HubServer, waited: list[float]
    ) -> None:
        generator.push_to_hub("me/generator")
        before, other = hub.files("me/generator"), copy.deepcopy(generator)
        with torch.no_grad():
            other.normalization.mean.add_(1.0)
        hub.refuse("/large/", 503, "Down", method="PUT", times=99)
        with pytest.raises(SavingError, match=r"'me/generator' on the Hub.*broke off.*as it was.*try again"):
            other.push_to_hub("me/generator")
        assert hub.files("me/generator") == before


class TestCards:
    def test_a_generator_says_what_it_is(self, generator: PromptConditionedLoraGenerator, hub: HubServer) -> None:
        own = copy.deepcopy(generator)
        own.config.base_model_name_or_path = "org/base"
        own.config.base_model_revision = "c0ffee"
        own.config.card_metadata = {"license": "apache-2.0", "datasets": ["me/pairs"], "tags": ["law"]}
        own.config.measured = {
            "eval_loss": 0.25,
            "evaluation": {
                "tasks": ["law", "med"],
                "confidence": 0.95,
                "rows": [["untouched base", 1, 0.5, [0.4, 0.6]], ["**generated**", 8, 0.75, [0.7, 0.8]]],
                "share_of_gap_closed": [0.5, [0.4, 0.6]],
                "conditioning_gain": None,
                "not_measured": {},
            },
        }
        own.push_to_hub("me/generator", include_text_encoder=True)
        data = hub.card("me/generator")
        assert (data["base_model"], data["base_model_revision"]) == ("org/base", "c0ffee")
        assert (data["library_name"], data["license"], data["datasets"]) == ("peft_dnd", "apache-2.0", ["me/pairs"])
        assert {"peft", "lora", "peft_dnd", "law"} <= set(data["tags"])
        metrics = {
            metric["type"]: metric["value"]
            for result in data["model-index"][0]["results"]
            for metric in result["metrics"]
        }
        assert metrics == {
            "eval_loss": 0.25,
            "mean_score_row_1": 0.5,
            "mean_score_row_8": 0.75,
            "share_of_gap_closed": 0.5,
        }
        summary = json.loads(hub.files("me/generator")[SUMMARY_NAME])
        assert summary["base_model_revision"] == "c0ffee" and summary["measured"] == own.config.measured
        sizes = {name: len(content) for name, content in hub.files("me/generator").items() if name in summary["files"]}
        assert summary["files"] == sizes and "text_encoder/model.safetensors" in sizes
        assert summary["adapter"]["adapter_parameters"] == own.config.adapter_layout.num_parameters

    def test_what_a_card_cannot_say_is_refused_before_anything_is_made(
        self, generator: PromptConditionedLoraGenerator, hub: HubServer
    ) -> None:
        own = copy.deepcopy(generator)
        for metadata, words in (({"licence": "mit"}, "'licence'. Did you mean 'license'"), ({"tags": 3}, "strings")):
            own.config.card_metadata = metadata
            with pytest.raises(GeneratorConfigError, match=words):
                own.push_to_hub("me/generator", include_text_encoder=True)
        assert not hub.asked

    def test_an_adapter_tells_its_prompts_only_if_asked(self, adapter: GeneratedAdapter, hub: HubServer) -> None:
        adapter.push_to_hub("me/adapter")
        files = hub.files("me/adapter")
        assert not any(prompt.encode() in content for prompt in PROMPTS for content in files.values())
        assert adapter.provenance["prompts_sha256"].encode() in files["README.md"]
        adapter.push_to_hub("me/adapter", prompts=PROMPTS)
        assert all(prompt.encode() in hub.files("me/adapter")["README.md"] for prompt in PROMPTS)
        with pytest.raises(PromptError, match="not those that the adapter was generated from"):
            adapter.push_to_hub("me/other", prompts=OTHER_PROMPTS)
        assert ("models", "me/other") not in hub.repos
