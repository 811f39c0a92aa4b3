# SPDX-License-Identifier: Apache-2.0
"""What is uploaded names nothing that only this machine has, and a card that someone edited stays theirs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.hub_state import HubServer
from torch import nn

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.storage.cards import GENERATED_MARK
from peft_dnd.text import SentenceTransformerTextEncoder


pytest_plugins = ("support.hub_server",)

Fetched = Callable[[str], Path]
PROMPTS = ["what is tax law ?", "a court please"]


@pytest.fixture
def fetched(hub: HubServer, tmp_path: Path) -> Fetched:
    """Fetches what was uploaded into a folder."""
    return lambda repo_id: hub.fetch(repo_id, tmp_path / "fetched")


@pytest.fixture
def own(generator: PromptConditionedLoraGenerator) -> PromptConditionedLoraGenerator:
    """A generator of which the configuration may be changed; its text encoder lies in a folder of this machine."""
    return copy.deepcopy(generator)


def texts_of(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def another_encoder(folder: Path, place: Path) -> Path:
    """The same text encoder with other weights."""
    shutil.copytree(folder, place)
    for file in place.rglob("*.safetensors"):
        save_file({name: tensor + 0.1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return place


class TestGenerator:
    def test_a_local_text_encoder_is_missed_before_others_miss_it(
        self, own: PromptConditionedLoraGenerator, fetched: Fetched, tmp_path: Path
    ) -> None:
        before = own.config.text_encoder
        with pytest.warns(
            UserWarning, match=r"text encoder is '.*', a folder that only this.*include_text_encoder=True"
        ):
            own.push_to_hub("me/generator")
        uploaded = fetched("me/generator")
        assert own.config.text_encoder == before
        assert json.loads((uploaded / "config.json").read_text())["text_encoder"] is None
        # What is saved here goes on naming the folder, which is right here.
        own.save_pretrained(tmp_path / "here")
        assert PromptConditionedLoraGenerator.from_pretrained(tmp_path / "here").generate_adapter(PROMPTS)

    def test_a_text_encoder_that_is_carried_needs_no_name(
        self, own: PromptConditionedLoraGenerator, fetched: Fetched, encoder_folder: Path
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            own.push_to_hub("me/generator", include_text_encoder=True)
        uploaded = fetched("me/generator")
        assert str(encoder_folder) not in texts_of(uploaded)
        loaded = PromptConditionedLoraGenerator.from_pretrained(uploaded)
        expected = own.generate_adapter(PROMPTS).state_dict()
        found = loaded.generate_adapter(PROMPTS).state_dict()
        assert all(found[key].equal(expected[key]) for key in expected)

    def test_a_text_encoder_on_the_hub_is_pinned_to_the_commit_that_was_read_by(
        self, layout: AdapterLayout, hub: HubServer, encoder_folder: Path, tmp_path: Path
    ) -> None:
        first = hub.put("org/encoder", encoder_folder)
        config = PromptConditionedLoraGeneratorConfig.from_adapters(layout, "org/encoder", num_prompts=2)
        assert config.text_encoder_revision == first
        loaded = SentenceTransformerTextEncoder.from_pretrained("org/encoder")
        assert PromptConditionedLoraGeneratorConfig.from_adapters(layout, loaded).text_encoder_revision == first
        by_branch = PromptConditionedLoraGeneratorConfig.from_adapters(
            layout, "org/encoder", text_encoder_revision="main"
        )
        assert by_branch.text_encoder_revision == "main", "who names a branch wants the branch"
        made = PromptConditionedLoraGenerator(config)
        expected = made.encode_prompts(PROMPTS)[0]
        made.save_pretrained(tmp_path / "generator")
        hub.put("org/encoder", another_encoder(encoder_folder, tmp_path / "encoder"))
        again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
        assert again.encode_prompts(PROMPTS)[0].equal(expected)
        again.config.text_encoder_revision = None
        again._text_encoder = None
        assert not again.encode_prompts(PROMPTS)[0].equal(expected), "the branch has moved on"

    def test_so_is_a_language_model_that_reads_them(
        self, layout: AdapterLayout, hub: HubServer, base_model: nn.Module, word_tokenizer: Any, tmp_path: Path
    ) -> None:
        base_model.save_pretrained(tmp_path / "base")
        word_tokenizer.save_pretrained(tmp_path / "base")
        commit = hub.put("org/base", tmp_path / "base")
        config = PromptConditionedLoraGeneratorConfig.from_adapters(layout, "org/base", text_encoder_layers=[1, 2])
        assert config.text_encoder_revision == commit

    def test_hub_ids_stay(self, own: PromptConditionedLoraGenerator, fetched: Fetched) -> None:
        own.config.text_encoder = "sentence-transformers/all-MiniLM-L6-v2"
        own.config.base_model_name_or_path = "org/base"
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            own.push_to_hub("me/generator")
        uploaded = fetched("me/generator")
        config = PromptConditionedLoraGeneratorConfig.from_pretrained(uploaded)
        assert config.text_encoder == "sentence-transformers/all-MiniLM-L6-v2"
        assert config.base_model_name_or_path == "org/base"

    def test_a_local_base_is_left_out(
        self, own: PromptConditionedLoraGenerator, fetched: Fetched, tmp_path: Path
    ) -> None:
        own.config.base_model_name_or_path = str(tmp_path / "base")
        with pytest.warns(UserWarning, match="set config.base_model_name_or_path to its Hub id"):
            own.push_to_hub("me/generator", include_text_encoder=True)
        uploaded = fetched("me/generator")
        assert str(tmp_path) not in texts_of(uploaded)
        assert own.config.base_model_name_or_path == str(tmp_path / "base")

    def test_saving_and_pushing_in_one_carries_the_text_encoder_too(
        self, own: PromptConditionedLoraGenerator, fetched: Fetched, tmp_path: Path
    ) -> None:
        own.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/generator", include_text_encoder=True)
        uploaded = fetched("me/generator")
        assert (uploaded / "text_encoder" / "modules.json").is_file()


class TestAdapter:
    def test_local_names_are_left_out(
        self, layout: AdapterLayout, generator_folder: Path, fetched: Fetched, tmp_path: Path
    ) -> None:
        generator = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
        generator.config.base_model_name_or_path = str(tmp_path / "base")
        adapter = generator.generate_adapter(PROMPTS)
        with pytest.warns(UserWarning, match=r"adapter's base model is '.*', a folder that only this machine has"):
            adapter.push_to_hub("me/adapter")
        uploaded = fetched("me/adapter")
        assert str(tmp_path) not in texts_of(uploaded) and str(generator_folder) not in texts_of(uploaded)
        again = GeneratedAdapter.from_pretrained(uploaded)
        expected = adapter.state_dict()
        assert all(tensor.equal(expected[key]) for key, tensor in again.state_dict().items())
        assert again.provenance["prompts_sha256"] == adapter.provenance["prompts_sha256"]
        assert adapter.provenance["generator"] == str(generator_folder)

    def test_hub_ids_stay(self, own: PromptConditionedLoraGenerator, layout: AdapterLayout, fetched: Fetched) -> None:
        state = own.generate_adapter(PROMPTS).state_dict()
        named = dataclasses.replace(layout, base_model_name_or_path="org/base")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            GeneratedAdapter(named, state, {"generator": "me/generator"}).push_to_hub("me/adapter")
        uploaded = fetched("me/adapter")
        assert json.loads((uploaded / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
        assert GeneratedAdapter.from_pretrained(uploaded).provenance["generator"] == "me/generator"


class TestTrainer:
    def arguments(self, folder: Path, **changes: object) -> DnDTrainingArguments:
        return DnDTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **changes)

    def test_a_card_that_someone_edited_is_kept(self, own: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
        trainer = DnDTrainer(own, self.arguments(tmp_path))
        card = tmp_path / "README.md"
        own.config.measured = {"eval_loss": 0.25}
        trainer.create_model_card()
        assert GENERATED_MARK in card.read_text() and "| eval_loss | 0.25 |" in card.read_text()
        own.config.measured = {"eval_loss": 0.125}
        trainer.create_model_card(model_name="Trainer passes this")
        assert "| eval_loss | 0.125 |" in card.read_text()
        edited = card.read_text().replace(GENERATED_MARK, "My words.")
        card.write_text(edited)
        trainer.create_model_card()
        trainer.save_model()
        assert card.read_text() == edited

    def test_says_before_fitting_what_others_will_lack(
        self, own: PromptConditionedLoraGenerator, fetched: Fetched, tmp_path: Path
    ) -> None:
        with pytest.warns(UserWarning, match="text encoder is"):
            DnDTrainer(own, self.arguments(tmp_path / "out", push_to_hub=True))
        own.config.text_encoder_in_folder = True
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            DnDTrainer(own, self.arguments(tmp_path / "out", push_to_hub=True))
