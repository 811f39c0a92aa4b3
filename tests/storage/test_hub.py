# SPDX-License-Identifier: Apache-2.0
"""What comes from the Hub is one commit, and of it only what is read; what goes there goes as asked."""

from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects
from peft import get_peft_model
from support.live_models import OTHER_PROMPTS, PROMPTS, assert_holds
from torch import nn

import peft_dnd.storage.hub
from peft_dnd import (
    DnDConfig,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    StreamedLoraGenerator,
    release_generator,
)
from peft_dnd.errors import GeneratorConfigError, GeneratorNotFoundError, MissingFileError
from peft_dnd.peft_integration import injection
from peft_dnd.storage.hub import HubOptions, UploadOptions
from peft_dnd.text.out_of_distribution import REFERENCE_NAME
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]
FIRST, SECOND = "1" * 40, "2" * 40
TOKEN = "hf_secret"


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


def same(one: GeneratedAdapter, other: GeneratedAdapter) -> bool:
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[key]) for key, tensor in one.state_dict().items())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty; nothing else of the Hub can be reached."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Hub is asked to do: method -> its arguments."""
    asked: dict[str, Any] = {}

    def record(name: str, result: Any) -> Callable[..., Any]:
        def call(self: HfApi, repo_id: str, **given: Any) -> Any:
            asked[name] = {"repo_id": repo_id, "token": self.token, **given}
            if "folder_path" in given:
                asked["files"] = {path.name for path in Path(given["folder_path"]).iterdir()}
            return result

        return call

    monkeypatch.setattr(HfApi, "create_repo", record("create_repo", SimpleNamespace(repo_id="me/generator")))
    monkeypatch.setattr(HfApi, "create_branch", record("create_branch", None))
    monkeypatch.setattr(HfApi, "upload_folder", record("upload_folder", SimpleNamespace(oid="c0ffee")))
    return asked


class TestUploads:
    pytestmark = pytest.mark.filterwarnings("ignore:The generator's text encoder is")

    def test_saving_and_pushing_in_one_forgets_nothing(
        self, generator: PromptConditionedLoraGenerator, calls: dict[str, Any], tmp_path: Path
    ) -> None:
        commit = {"commit_message": "first", "commit_description": "text", "revision": "dev", "create_pr": True}
        generator.save_pretrained(
            tmp_path,
            push_to_hub=True,
            repo_id="me/generator",
            private=True,
            token="t",
            max_shard_size="20KB",
            **commit,
        )
        assert calls["create_repo"]["private"] is True
        assert {name: calls["upload_folder"][name] for name in commit} == commit
        assert {call["token"] for name, call in calls.items() if name != "files"} == {"t"}
        assert "create_branch" not in calls  # a pull request makes its own
        shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
        assert len(shards) > 1 and shards <= calls["files"]

    def test_only_the_process_that_writes_pushes(
        self, generator: PromptConditionedLoraGenerator, calls: dict[str, Any], tmp_path: Path
    ) -> None:
        generator.save_pretrained(tmp_path, is_main_process=False, push_to_hub=True, private=True)
        assert not calls

    @pytest.mark.parametrize("what", ["generator", "adapter"])
    def test_a_missing_branch_is_made(
        self, what: str, generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter, calls: dict[str, Any]
    ) -> None:
        pushed = generator if what == "generator" else adapter
        pushed.push_to_hub("generator", revision="dev", commit_description="text")
        branch = calls["create_branch"]
        assert (branch["repo_id"], branch["branch"], branch["exist_ok"]) == ("me/generator", "dev", True)
        assert calls["upload_folder"]["revision"] == "dev"
        assert calls["upload_folder"]["commit_description"] == "text"


@pytest.mark.parametrize("loader", [PromptConditionedLoraGenerator, StreamedLoraGenerator])
@pytest.mark.parametrize("subfolder", ["", "v[1]/best"])
def test_only_what_is_read_is_downloaded(
    loader: type[PromptConditionedLoraGenerator],
    subfolder: str,
    generator: PromptConditionedLoraGenerator,
    pairs: PromptCheckpointDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = copy.deepcopy(generator)
    own.fit_out_of_distribution(pairs)
    repository, snapshot = tmp_path / "repository", tmp_path / "snapshot"
    own.save_pretrained(repository / subfolder, max_shard_size="20KB", include_text_encoder=True)
    needed = {path.relative_to(repository) for path in repository.rglob("*") if path.is_file()}
    needed.remove(Path(subfolder, "README.md"))
    assert Path(subfolder, REFERENCE_NAME) in needed and len(needed) > 10
    for other in ("pytorch_model.bin", "training_args.bin", "runs/events", "checkpoint-9/model.safetensors"):
        for place in (repository / "other" / other, repository / subfolder / other):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("large")

    def download(repo_id: str, *, allow_patterns: list[str], **given: Any) -> str:
        names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes((repository / name).read_bytes())
        return str(snapshot)

    monkeypatch.setattr(peft_dnd.storage.hub, "snapshot_download", download)
    loaded = loader.from_pretrained("org/generator", subfolder=subfolder)
    assert {path.relative_to(snapshot) for path in snapshot.rglob("*") if path.is_file()} == needed
    assert loaded.prompt_reference is not None
    assert same(loaded.generate_adapter(PROMPTS), own.generate_adapter(PROMPTS))


def test_weights_are_read_at_the_commit_whose_configuration_was_read(
    generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, cache: Path, tmp_path: Path
) -> None:
    other = shifted(generator, 1.0)
    generator.save_pretrained(tmp_path / "first")
    other.save_pretrained(tmp_path / "second")
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


class TestUploadOptions:
    @pytest.mark.parametrize("kind", [GeneratedAdapter, PromptConditionedLoraGenerator])
    def test_a_signature_shows_them_all(self, kind: Any) -> None:
        shown = inspect.signature(kind.push_to_hub).parameters
        assert {name: shown[name].annotation for name in UploadOptions.__annotations__} == {
            name: annotation.__forward_arg__ for name, annotation in UploadOptions.__annotations__.items()
        }

    def test_a_misspelt_one_is_refused(self, generator: PromptConditionedLoraGenerator, calls: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=r"push_to_hub\(\) .* 'privat'\. Did you mean 'private'"):
            generator.push_to_hub("me/generator", privat=True)  # type: ignore[call-arg]
        assert not calls

    def test_a_commit_says_what_was_uploaded(
        self, generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter, calls: dict[str, Any]
    ) -> None:
        adapter.push_to_hub("me/adapter")
        assert calls["upload_folder"]["commit_message"] == "Upload generated LoRA adapter"
        with pytest.warns(UserWarning, match="text encoder is"):
            generator.push_to_hub("me/generator")
        assert calls["upload_folder"]["commit_message"] == "Upload PromptConditionedLoraGenerator"


class TestGeneratorKwargs:
    def test_the_generator_is_found_and_loaded_as_they_say(
        self, generator: PromptConditionedLoraGenerator, fresh_base: FreshBase, tmp_path: Path
    ) -> None:
        generator.save_pretrained(tmp_path / "repository" / "best")
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
        generator_folder: Path,
        fresh_base: FreshBase,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked = []

        def download(repo_id: str, *, token: str | None, allow_patterns: list[str], **given: Any) -> str:
            asked.append((token, allow_patterns))
            return str(generator_folder)

        monkeypatch.setattr(peft_dnd.storage.hub, "snapshot_download", download)
        config = DnDConfig(generator="org/gen", prompts=PROMPTS, generator_kwargs={"token": TOKEN})
        assert asked == [(TOKEN, ["config.json"])]  # the weights are for later
        model = get_peft_model(fresh_base(), config)
        assert [token for token, _ in asked] == [TOKEN, TOKEN]
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
            assert same(read, adapter) and read.provenance == adapter.provenance
        assert same(load("org/adapter", subfolder="law"), other_adapter)
        assert same(load(tmp_path / "second", subfolder="law"), other_adapter)
        with pytest.raises(MissingFileError, match=r"no adapter_model\.safetensors in .*models--org--adapter"):
            load("org/adapter")
        with pytest.raises(MissingFileError, match=r"no adapter at 'org/adapter'.*the revision 'v2'.*access token"):
            load("org/adapter", revision="v2")

    def test_only_the_adapter_is_asked_for(self, adapter_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def download(repo_id: str, **given: Any) -> str:
            asked.update(given)
            return adapter_folder

        monkeypatch.setattr(peft_dnd.storage.hub, "snapshot_download", download)
        GeneratedAdapter.from_pretrained("org/adapter", token="t", cache_dir="here", force_download=True)
        assert (asked["token"], asked["cache_dir"], asked["force_download"]) == ("t", Path("here"), True)
        assert asked["allow_patterns"] == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "peft_dnd_provenance.json",
        ]

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
