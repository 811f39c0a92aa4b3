# SPDX-License-Identifier: Apache-2.0
"""Folders and repositories that mean harm: no code of theirs runs, and no file outside their place is touched."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.hub_state import Blob, HubServer
from support.live_models import PROMPTS

from peft_dnd import (
    AdapterLayout,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    StreamedLoraGenerator,
)
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
    GeneratorNotFoundError,
    LayoutError,
    TextEncoderError,
)


pytest_plugins = ("support.hub_server", "support.adapter_fixtures")

LOADERS = (PromptConditionedLoraGenerator, StreamedLoraGenerator)
EVIL = (
    "import pathlib\npathlib.Path({path!r}).write_text('ran')\nclass Evil:\n    pass\nEvilConfig = EvilModel = Evil\n"
)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def folder(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> Path:
    """A generator in two shards or more, with its text encoder."""
    generator.save_pretrained(tmp_path / "generator", include_text_encoder=True, max_shard_size="40KB")
    return tmp_path / "generator"


@pytest.fixture
def canary(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when code of the generator's folder runs, from which everything is imported that can be."""
    for place in (folder, folder / "text_encoder"):
        (place / "evil.py").write_text(EVIL.format(path=str(tmp_path / "ran")))
        monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(folder)
    return tmp_path / "ran"


class TestCode:
    @pytest.mark.parametrize("loader", LOADERS)
    def test_a_generators_own_classes_are_taken(self, loader: Any, folder: Path, canary: Path) -> None:
        names = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
        edit(folder / "config.json", lambda data: data.update(auto_map=names))
        assert type(loader.from_pretrained(folder)) is loader
        assert not canary.exists()

    @pytest.mark.parametrize(
        ("file", "change"),
        [
            ("modules.json", lambda modules: modules[0].update(type="evil.Evil")),
            (
                "config.json",
                lambda data: data.update(auto_map={"AutoModel": "evil.EvilModel"}, model_type="evil"),
            ),
            (
                "tokenizer_config.json",
                lambda data: data.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"),
            ),
        ],
    )
    def test_a_text_encoders_code_does_not_run(
        self, file: str, change: Callable[[Any], Any], folder: Path, canary: Path
    ) -> None:
        edit(folder / "text_encoder" / file, change)
        loaded = PromptConditionedLoraGenerator.from_pretrained(folder)
        try:
            loaded.generate_adapter(PROMPTS)
        except TextEncoderError as error:
            assert "text_encoder" in str(error)
        assert not canary.exists()

    def test_a_pickle_in_place_of_weights_is_not_read(self, folder: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.write_text, (folder / "ran", "ran"))

        torch.save({"a": Bomb()}, folder / "pytorch_model.bin")  # noqa: TID251 (to see it refused)
        encoder = folder / "text_encoder"
        shutil.copy(folder / "pytorch_model.bin", encoder)
        (encoder / "model.safetensors").unlink()
        with pytest.raises(TextEncoderError, match="safetensors"):
            PromptConditionedLoraGenerator.from_pretrained(folder).generate_adapter(PROMPTS)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        with pytest.raises(GeneratorNotFoundError, match="no weights in safetensors format"):
            PromptConditionedLoraGenerator.from_pretrained(folder)
        assert not (folder / "ran").exists()

    def test_an_adapters_own_class_is_not_taken(self, adapter_folder: str, canary: Path, tmp_path: Path) -> None:
        shutil.copytree(adapter_folder, tmp_path / "adapter")
        mapping = {"base_model_class": "Evil", "parent_library": "evil"}
        edit(tmp_path / "adapter" / "adapter_config.json", lambda data: data.update(auto_mapping=mapping))
        assert GeneratedAdapter.from_pretrained(tmp_path / "adapter").num_parameters
        assert not canary.exists()


class TestPlaces:
    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp_path}/outside.safetensors", "..", 7, ["x"]])
    def test_weights_lie_in_the_generators_folder(self, loader: Any, name: Any, folder: Path, tmp_path: Path) -> None:
        shard = sorted(folder.glob("model-*.safetensors"))[0]
        shutil.move(shard, tmp_path / "outside.safetensors")  # it is all there, but not here
        told = name.format(tmp_path=tmp_path) if isinstance(name, str) else name

        def move(data: dict[str, Any]) -> None:
            places = data["weight_map"]
            places.update({key: told for key, place in places.items() if place == shard.name})

        edit(folder / "model.safetensors.index.json", move)
        with pytest.raises(CorruptFileError, match=r"index\.json.*beside it"):
            loader.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["../../../../evil.json", "text_encoder/../../../../evil.json"])
    def test_a_repositorys_files_go_nowhere_but_into_the_cache(
        self, name: str, folder: Path, hub: HubServer, tmp_path: Path
    ) -> None:
        commit = hub.put("me/generator", folder)
        hub.repos["models", "me/generator"].commits[commit][name] = Blob(b"{}", False)
        before = {path for path in tmp_path.rglob("*") if Path(hub.cache) not in path.parents}
        try:
            PromptConditionedLoraGenerator.from_pretrained("me/generator")
        except GeneratorNotFoundError as error:
            assert "huggingface_hub refuses it" in str(error)
        after = {path for path in tmp_path.rglob("*") if Path(hub.cache) not in path.parents}
        assert after - before <= {Path(hub.cache)}
        assert not list(tmp_path.rglob("evil.json"))

    def test_a_text_encoder_is_not_looked_for_on_this_machine(
        self, folder: Path, encoder_folder: Path, hub: HubServer
    ) -> None:
        edit(
            folder / "config.json",
            lambda data: data.update(text_encoder=str(encoder_folder), text_encoder_in_folder=False),
        )
        hub.put("me/generator", folder)
        loaded = PromptConditionedLoraGenerator.from_pretrained("me/generator")
        with pytest.raises(TextEncoderError, match=r"a folder of whoever uploaded it.*text_encoder=encoder"):
            loaded.generate_adapter(PROMPTS)
        assert PromptConditionedLoraGenerator.from_pretrained(folder).generate_adapter(PROMPTS), "one's own may"

    def test_a_task_that_is_called_like_a_path_is_only_a_name(self, pairs_folder: Path, tmp_path: Path) -> None:
        pairs = tmp_path / "deep" / "pairs"
        shutil.copytree(pairs_folder, pairs)
        edit(pairs / "law" / "task.json", lambda data: data.update(task="../../evil"))
        dataset = PromptCheckpointDataset.from_folder(pairs)
        assert "../../evil" in dataset.tasks and dataset.state_dict("../../evil")
        assert not (tmp_path / "evil").exists()


class TestSizes:
    """What a header says is not believed before it is known to be there."""

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data["layout"]["modules"][0].__setitem__(2, [3, 2**40]),
            lambda data: data["layout"]["modules"][0].__setitem__(3, [2**40, 3]),
            lambda data: data.update(num_prompts=2**30),
            lambda data: data.update(max_prompt_length=2**30),
            lambda data: data.update(condition_size=2**30),
            lambda data: data.update(chunk_width=1),
            lambda data: data["decoder_config"].update(num_layers=10**9),
            lambda data: data.update(decoder_type="set_transformer", decoder_config={"num_layers": 10**9}),
            lambda data: data.update(decoder_type="set_transformer", decoder_config={"hidden_size": 2**30}),
            lambda data: data.update(decoder_type="core", decoder_config={}),
        ],
    )
    def test_a_configuration_that_lies(self, loader: Any, change: Callable[[Any], Any], folder: Path) -> None:
        edit(folder / "config.json", change)
        tracemalloc.start()
        try:
            with pytest.raises((CorruptFileError, GeneratorConfigError, LayoutError)):
                loader.from_pretrained(folder)
            assert tracemalloc.get_traced_memory()[1] < 2**28
        finally:
            tracemalloc.stop()

    def test_a_pattern_that_would_take_for_ever(self, adapter_folder: str, tmp_path: Path) -> None:
        shutil.copytree(adapter_folder, tmp_path / "adapter")
        for pattern in ("(.*a)+$", "((a*)*)*b", ".*a.*b.*c.*d.*e"):
            edit(tmp_path / "adapter" / "adapter_config.json", lambda data: data.update(alpha_pattern={pattern: 8}))  # noqa: B023
            with pytest.raises(LayoutError, match="take for ever"):
                AdapterLayout.from_folder(tmp_path / "adapter")
        # What people write stays possible.
        for pattern in (r".*\.layers\.\d+\.self_attn\.(q|k)_proj", "^model.layers.0.mlp.up_proj", r"re\.escaped"):
            edit(tmp_path / "adapter" / "adapter_config.json", lambda data: data.update(alpha_pattern={pattern: 8}))  # noqa: B023
            assert AdapterLayout.from_folder(tmp_path / "adapter")

    def test_a_layout_keeps_what_peft_takes(self, base_model: torch.nn.Module) -> None:
        config = LoraConfig(target_modules=r".*\.layers\.\d+\..*_proj", alpha_pattern={"q_proj": 4.5})
        layout = AdapterLayout.from_lora_config(config, base_model)
        assert AdapterLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
