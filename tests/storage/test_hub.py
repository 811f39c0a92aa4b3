# SPDX-License-Identifier: Apache-2.0
"""What comes from the Hub is one commit, and of it only what is read."""

from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from peft import get_peft_model
from support.comparing import same_weights
from support.hub_state import OWNER, HubServer
from support.live_models import OTHER_PROMPTS, PROMPTS, assert_holds
from torch import nn

from peft_dnd import (
    DnDConfig,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    StreamedLoraGenerator,
    release_generator,
)
from peft_dnd.errors import GeneratorConfigError, GeneratorNotFoundError, MissingFileError
from peft_dnd.generator.summary import SUMMARY_NAME
from peft_dnd.peft_integration import injection
from peft_dnd.storage.hub import HubOptions
from peft_dnd.text.out_of_distribution import REFERENCE_NAME
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


pytest_plugins = ("support.adapter_fixtures", "support.hub_server")

FreshBase = Callable[[], nn.Module]
FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = OWNER


def put_into_cache(cache: Path, repo_id: str, commit: str, folder: Path, ref: str | None = "main") -> None:
    """Lay a folder's files out as the Hub's cache holds them, and point a branch at them."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        link = root / "snapshots" / commit / path.relative_to(folder)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    if ref is not None:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)


def shifted(generator: PromptConditionedLoraGenerator, by: float) -> PromptConditionedLoraGenerator:
    """A generator whose adapters are others."""
    other = copy.deepcopy(generator)
    with torch.no_grad():
        other.normalization.mean.add_(by)
    return other


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty; nothing else of the Hub can be reached."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.mark.parametrize("loader", [PromptConditionedLoraGenerator, StreamedLoraGenerator])
@pytest.mark.parametrize("subfolder", ["", "v[1]/best"])
def test_only_what_is_read_is_downloaded(
    loader: type[PromptConditionedLoraGenerator],
    subfolder: str,
    generator: PromptConditionedLoraGenerator,
    pairs: PromptCheckpointDataset,
    hub: HubServer,
    tmp_path: Path,
) -> None:
    own = copy.deepcopy(generator)
    own.fit_out_of_distribution(pairs)
    repository = tmp_path / "repository"
    own.save_pretrained(repository / subfolder, max_shard_size="20KB", include_text_encoder=True)
    needed = {path.relative_to(repository) for path in repository.rglob("*") if path.is_file()}
    needed -= {Path(subfolder, "README.md"), Path(subfolder, SUMMARY_NAME)}
    assert Path(subfolder, REFERENCE_NAME) in needed and len(needed) > 10
    for other in ("pytorch_model.bin", "training_args.bin", "runs/events", "checkpoint-9/model.safetensors"):
        for place in (repository / "other" / other, repository / subfolder / other):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("large")

    commit = hub.put("org/generator", repository)
    loaded = loader.from_pretrained("org/generator", subfolder=subfolder)
    snapshot = Path(hub.cache, "models--org--generator", "snapshots", commit)
    assert {path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file()} == needed
    assert loaded.prompt_reference is not None
    assert same_weights(loaded.generate_adapter(PROMPTS), own.generate_adapter(PROMPTS))


def test_weights_are_read_at_the_commit_whose_configuration_was_read(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, cache: Path, tmp_path: Path
) -> None:
    other = shifted(generator, 1.0)
    generator.save_pretrained(tmp_path / "first", include_text_encoder=True)
    other.save_pretrained(tmp_path / "second", include_text_encoder=True)
    put_into_cache(cache, "org/gen", FIRST, tmp_path / "first")
    config = DnDConfig(generator="org/gen", prompts=PROMPTS)
    assert config.generator_commit == FIRST
    put_into_cache(cache, "org/gen", SECOND, tmp_path / "second")  # the branch moves
    model = get_peft_model(fresh_base(), config, "before")
    assert_holds(model, "before", generator.generate_adapter(PROMPTS))
    later = DnDConfig(generator="org/gen", generator_revision="main", prompts=PROMPTS)
    assert later.generator_commit == SECOND
    model.add_adapter("after", later)
    assert_holds(model, "after", other.generate_adapter(PROMPTS))
    pinned = DnDConfig(generator="org/gen", generator_revision=FIRST, prompts=PROMPTS)
    assert pinned.generator_commit == FIRST
    for revision in ("dev", "3" * 40):
        with pytest.raises(GeneratorNotFoundError, match=revision):
            DnDConfig(generator="org/gen", generator_revision=revision, prompts=PROMPTS)
    # Neither a folder nor a loaded generator has one.
    assert DnDConfig(generator=str(tmp_path / "first"), prompts=PROMPTS).generator_commit is None
    assert DnDConfig(generator=generator, prompts=PROMPTS).generator_commit is None
    release_generator()


def test_a_text_encoder_knows_its_commit(encoder_folder: Path, cache: Path, tmp_path: Path) -> None:
    put_into_cache(cache, "org/encoder", FIRST, encoder_folder, ref="v1")
    put_into_cache(cache, "org/encoder", SECOND, encoder_folder)
    load = SentenceTransformerTextEncoder.from_pretrained
    assert load("org/encoder").commit_hash == SECOND
    assert load("org/encoder", revision="v1").commit_hash == FIRST
    assert load("org/encoder", revision=FIRST).commit_hash == FIRST
    put_into_cache(tmp_path / "elsewhere", "org/encoder", FIRST, encoder_folder)
    assert load("org/encoder", cache_dir=tmp_path / "elsewhere").commit_hash == FIRST
    assert load(encoder_folder).commit_hash is None


class TestHubOptions:
    @pytest.mark.parametrize("loader", [GeneratedAdapter, PromptConditionedLoraGenerator, StreamedLoraGenerator])
    def test_a_signature_shows_them_all(self, loader: Any) -> None:
        shown = inspect.signature(loader.from_pretrained).parameters
        defaults = {name: shown[name].default for name in HubOptions.__annotations__}
        assert defaults == {
            "revision": None,
            "subfolder": "",
            "token": None,
            "cache_dir": None,
            "force_download": False,
            "local_files_only": False,
        }
        assert all(shown[name].annotation == kind.__forward_arg__ for name, kind in HubOptions.__annotations__.items())

    @pytest.mark.parametrize("loader", [GeneratedAdapter, PromptConditionedLoraGenerator, StreamedLoraGenerator])
    def test_a_misspelt_one_is_refused(self, loader: Any, generator_folder: Path) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
            loader.from_pretrained(str(generator_folder), revison="v1")

    def test_what_was_meant_is_said(self) -> None:
        with pytest.raises(
            TypeError, match=r"from_pretrained\(\) .* 'local_file_only'\. Did you mean 'local_files_only'"
        ):
            GeneratedAdapter.from_pretrained("org/adapter", local_file_only=True)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"'dytpe'\. Did you mean 'dtype'"):
            StreamedLoraGenerator.from_pretrained("org/generator", dytpe="float32")  # type: ignore[call-arg]


class TestGeneratorKwargs:
    def test_the_generator_is_found_and_loaded_as_they_say(
        self, generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, tmp_path: Path
    ) -> None:
        generator.save_pretrained(tmp_path / "repository" / "best", include_text_encoder=True)
        put_into_cache(tmp_path / "own", "org/gen", FIRST, tmp_path / "repository")
        options = {"cache_dir": tmp_path / "own", "subfolder": "best", "local_files_only": True}
        with pytest.raises(GeneratorNotFoundError):
            DnDConfig(generator="org/gen", prompts=PROMPTS)
        config = DnDConfig(generator="org/gen", prompts=PROMPTS, generator_kwargs=options)
        assert config.generator_commit == FIRST
        model = get_peft_model(fresh_base(), config, "law")
        assert_holds(model, "law", generator.generate_adapter(PROMPTS))
        model.add_adapter("med", DnDConfig(generator="org/gen", prompts=OTHER_PROMPTS, generator_kwargs=options))
        assert_holds(model, "med", generator.generate_adapter(OTHER_PROMPTS))
        half = {**options, "dtype": torch.bfloat16, "device_map": "cpu"}
        model.add_adapter("rounded", DnDConfig(generator="org/gen", prompts=PROMPTS, generator_kwargs=half))
        (kept,) = injection._kept  # the one in float32 has made room
        assert kept[1].dtype == torch.bfloat16
        expected = PromptConditionedLoraGenerator.from_pretrained(
            tmp_path / "repository", subfolder="best", dtype=torch.bfloat16
        )
        assert_holds(model, "rounded", expected.generate_adapter(PROMPTS))
        release_generator()
        assert not injection._kept

    def test_a_token_is_passed_on_and_never_written(
        self,
        generator: PromptConditionedLoraGenerator,
        fresh_base: FreshBase,
        tmp_path: Path,
        hub: HubServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.delenv("HF_TOKEN")
        generator.save_pretrained(tmp_path / "uploaded", include_text_encoder=True)
        hub.put("me/gen", tmp_path / "uploaded", private=True)
        config = DnDConfig(generator="me/gen", prompts=PROMPTS, generator_kwargs={"token": TOKEN})
        files = [path.rpartition("/")[2] for path in hub.paths("GET") if "/resolve/" in path]
        assert files == ["config.json"]  # the weights are for later
        model = get_peft_model(fresh_base(), config)
        assert len([path for path in hub.paths("GET") if path.startswith("/large/")]) == 2
        config.save_pretrained(str(tmp_path / "config"))
        model.save_pretrained(str(tmp_path / "adapter"))
        injection._kept[0][1].generate_adapter(PROMPTS).save_pretrained(tmp_path / "generated")
        injection._kept[0][1].save_pretrained(tmp_path / "generator")
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(written) >= 8 and not any(TOKEN.encode() in path.read_bytes() for path in written)
        assert TOKEN not in repr(config) and TOKEN not in str(config.to_dict())
        for other in (copy.copy(config), copy.deepcopy(config)):
            assert other.generator_kwargs == {"token": TOKEN}
        config.generator_kwargs = {"token": TOKEN, "subfolder": ""}
        config.generator_kwargs["dtype"] = "float32"
        pickled = pickle.dumps(config)
        assert TOKEN.encode() not in pickled
        assert pickle.loads(pickled).generator_kwargs == {"subfolder": "", "dtype": "float32"}
        with pytest.raises(GeneratorConfigError, match="loaded generator and generator_kwargs") as caught:
            DnDConfig(generator=generator, prompts=PROMPTS, generator_kwargs={"token": TOKEN})
        assert TOKEN not in str(caught.value)
        release_generator()

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"revision": "v1"}, "generator_revision"),
            ({"text_encoder": None}, "Load the generator yourself"),
            ({"output_loading_info": True}, "Load the generator yourself"),
            ("token", "dictionary.*got str"),
        ],
    )
    def test_what_does_not_belong_is_refused(self, given: Any, words: str, generator_folder: Path) -> None:
        with pytest.raises(GeneratorConfigError, match=words):
            DnDConfig(generator=str(generator_folder), prompts=PROMPTS, generator_kwargs=given)


class TestAdapterFromTheHub:
    def test_it_is_read_at_any_revision_and_place(
        self, adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, cache: Path, tmp_path: Path
    ) -> None:
        adapter.save_pretrained(tmp_path / "first")
        other_adapter.save_pretrained(tmp_path / "second" / "law")
        put_into_cache(cache, "org/adapter", FIRST, tmp_path / "first", ref="v1")
        put_into_cache(cache, "org/adapter", SECOND, tmp_path / "second")
        load = GeneratedAdapter.from_pretrained
        for read in (load("org/adapter", revision="v1"), load("org/adapter", revision=FIRST)):
            assert same_weights(read, adapter) and read.provenance == adapter.provenance
        assert same_weights(load("org/adapter", subfolder="law"), other_adapter)
        assert same_weights(load(tmp_path / "second", subfolder="law"), other_adapter)
        with pytest.raises(MissingFileError, match=r"no adapter_model\.safetensors in .*models--org--adapter"):
            load("org/adapter")
        with pytest.raises(MissingFileError, match=r"no adapter at 'org/adapter'.*the revision 'v2'.*access token"):
            load("org/adapter", revision="v2")

    def test_only_the_adapter_is_fetched_into_the_cache_that_is_named(
        self, adapter_folder: str, hub: HubServer, tmp_path: Path
    ) -> None:
        commit = hub.put("org/adapter", Path(adapter_folder))
        for number in (1, 2):
            GeneratedAdapter.from_pretrained("org/adapter", cache_dir=tmp_path / "here", force_download=True)
            assert len([path for path in hub.paths("GET") if path.startswith("/large/")]) == number
        snapshot = tmp_path / "here" / "models--org--adapter" / "snapshots" / commit
        assert {path.name for path in snapshot.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "peft_dnd_provenance.json",
        }

    def test_what_is_no_name_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        for name, words in (
            (None, "named by its folder or its Hub id"),
            ("", "named by"),
            (tmp_path / "file", "is a file"),
        ):
            with pytest.raises(MissingFileError, match=words):
                GeneratedAdapter.from_pretrained(name)  # type: ignore[arg-type]
        with pytest.raises(MissingFileError, match=r"'org/adapter'\. Check the spelling") as caught:
            GeneratedAdapter.from_pretrained("not a valid id!")
        assert isinstance(caught.value.__cause__, HFValidationError)
