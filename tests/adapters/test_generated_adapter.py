# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from support.live_models import PROMPTS, TOKENS, logits
from torch import nn

from peft_dnd.adapters.generated_adapter import PROVENANCE_NAME, GeneratedAdapter
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.lora import live_state_dict
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, LayoutError, WeightValueError
from peft_dnd.storage.cards import GENERATED_MARK


pytest_plugins = ("support.adapter_fixtures",)

FreshBase = Callable[[], nn.Module]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", PROVENANCE_NAME]


def test_nothing_about_it_can_be_set(adapter: GeneratedAdapter) -> None:
    adapter.state_dict().clear()
    adapter.peft_config.r = 77
    assert len(adapter.state_dict()) == len(adapter.layout.tensors)
    assert adapter.peft_config.r == 3
    with pytest.raises(TypeError):
        adapter.provenance["seed"] = 1  # type: ignore[index]
    for name in ("layout", "provenance", "peft_config", "num_parameters"):
        with pytest.raises(AttributeError):
            setattr(adapter, name, None)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in adapter.state_dict().values())
    assert type(adapter.peft_config) is LoraConfig
    assert not adapter.peft_config.inference_mode


def test_no_tensor_is_shared_with_the_outside(adapter: GeneratedAdapter, fresh_base: FreshBase) -> None:
    given = adapter.state_dict()
    made = GeneratedAdapter(adapter.layout, given, {})
    for tensor in given.values():
        tensor.zero_()
    for tensor in made.state_dict().values():
        tensor.zero_()
    model = get_peft_model(fresh_base(), adapter.peft_config, low_cpu_mem_usage=True)
    set_peft_model_state_dict(model, made.state_dict(), low_cpu_mem_usage=True)  # assigns the tensors themselves
    with torch.no_grad():
        for parameter in live_state_dict(model, "default").values():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, adapter.state_dict()[key]) for key, tensor in made.state_dict().items())


def test_what_is_no_adapter_is_refused(adapter: GeneratedAdapter) -> None:
    state = adapter.state_dict()
    key = next(iter(state))
    with pytest.raises(LayoutError, match="lacks"):
        GeneratedAdapter(adapter.layout, {name: state[name] for name in list(state)[1:]}, {})
    with pytest.raises(LayoutError, match="'more'"):
        GeneratedAdapter(adapter.layout, {**state, "more": torch.zeros(1)}, {})
    with pytest.raises(WeightValueError, match="meta"):
        GeneratedAdapter(adapter.layout, {**state, key: state[key].to("meta")}, {})
    with pytest.raises(WeightValueError, match="NaN"):
        GeneratedAdapter(adapter.layout, {**state, key: state[key] * torch.nan}, {})
    with pytest.raises(GeneratorConfigError, match="JSON"):
        GeneratedAdapter(adapter.layout, state, {"when": object()})


def test_provenance_tells_where_it_came_from_and_no_prompt(adapter: GeneratedAdapter, adapter_folder: str) -> None:
    stored = json.loads((Path(adapter_folder) / PROVENANCE_NAME).read_text())
    assert stored == adapter.provenance
    assert stored["num_prompts"] == len(PROMPTS)
    assert len(stored["prompts_sha256"]) == 64
    assert {"generator", "generator_revision", "seed", "peft_dnd_version"} <= set(stored)
    for file in FILES:
        content = (Path(adapter_folder) / file).read_bytes()
        assert not any(prompt.encode() in content for prompt in PROMPTS)


def test_it_is_saved_just_as_peft_saves_it(
    adapter: GeneratedAdapter, adapter_folder: str, fresh_base: FreshBase, tmp_path: Path
) -> None:
    model = get_peft_model(fresh_base(), adapter.peft_config)
    set_peft_model_state_dict(model, adapter.state_dict())
    model.save_pretrained(tmp_path)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (Path(adapter_folder), tmp_path)
    )
    assert ours["target_modules"] == sorted(ours["target_modules"])  # the same bytes in every process
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = config["base_model_name_or_path"] or None  # older PEFT versions write ""
    assert ours == theirs
    assert ours["inference_mode"] is True
    weights = [GeneratedAdapter.from_pretrained(folder).state_dict() for folder in (Path(adapter_folder), tmp_path)]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_saving_and_reading_back_changes_nothing(
    adapter: GeneratedAdapter, adapter_folder: str, tmp_path: Path
) -> None:
    assert sorted(os.listdir(adapter_folder)) == FILES
    read = GeneratedAdapter.from_pretrained(adapter_folder)
    assert read.layout == adapter.layout
    assert read.provenance == adapter.provenance
    assert all(torch.equal(tensor, adapter.state_dict()[key]) for key, tensor in read.state_dict().items())
    read.save_pretrained(tmp_path / "again")
    for file in FILES:
        assert (tmp_path / "again" / file).read_bytes() == (Path(adapter_folder) / file).read_bytes()


def test_an_adapter_that_peft_saved_is_read_too(trained_like: Callable[[int], nn.Module], tmp_path: Path) -> None:
    model = trained_like(0)
    model.save_pretrained(tmp_path)
    adapter = GeneratedAdapter.from_pretrained(tmp_path)
    assert dict(adapter.provenance) == {}
    assert adapter.layout == AdapterLayout.from_model(model)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CorruptFileError):
        GeneratedAdapter.from_pretrained(tmp_path)


def test_a_failing_save_leaves_the_earlier_one(
    adapter: GeneratedAdapter, other_adapter: GeneratedAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.save_pretrained(tmp_path / "saved")
    before = {file: (tmp_path / "saved" / file).read_bytes() for file in FILES}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft_dnd.storage.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        other_adapter.save_pretrained(tmp_path / "saved")
    with pytest.raises(OSError, match="No space"):
        other_adapter.save_pretrained(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["saved"]
    assert {file: (tmp_path / "saved" / file).read_bytes() for file in os.listdir(tmp_path / "saved")} == before


def test_the_card_is_an_ordinary_adapter_card(adapter: GeneratedAdapter, tmp_path: Path) -> None:
    layout = replace(adapter.layout, base_model_name_or_path="org/base")
    GeneratedAdapter(layout, adapter.state_dict(), {"generator": "org/generator", "seed": 0}).save_pretrained(tmp_path)
    _, data, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(data) == {
        "library_name": "peft",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "drag-and-drop-llms", "lora", "peft_dnd"],
    }
    assert "org/generator" in text
    for local in ("/somewhere/base", str(tmp_path)):
        layout = replace(adapter.layout, base_model_name_or_path=local)
        GeneratedAdapter(layout, adapter.state_dict(), {"generator": local}).save_pretrained(tmp_path)
        assert local not in (tmp_path / "README.md").read_text()


def test_a_card_that_someone_edited_is_kept(adapter: GeneratedAdapter, tmp_path: Path) -> None:
    adapter.save_pretrained(tmp_path)
    edited = (tmp_path / "README.md").read_text().replace(GENERATED_MARK, "My words.")
    (tmp_path / "README.md").write_text(edited)
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == edited


def test_other_dtypes(adapter: GeneratedAdapter, tmp_path: Path) -> None:
    half = adapter.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {torch.float32}
    half.save_pretrained(tmp_path)
    read = GeneratedAdapter.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, half.state_dict()[key]) for key, tensor in read.items())
    with pytest.raises(GeneratorConfigError, match="floating-point"):
        adapter.to(torch.int8)
    large = {key: tensor * 1e6 for key, tensor in adapter.state_dict().items()}
    with pytest.raises(WeightValueError):
        GeneratedAdapter(adapter.layout, large, {}).to(torch.float16)


def test_copies_and_pickles(adapter: GeneratedAdapter) -> None:
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert other.layout == adapter.layout
        assert other.provenance == adapter.provenance
        assert all(torch.equal(tensor, adapter.state_dict()[key]) for key, tensor in other.state_dict().items())


def test_per_module_ranks_and_embeddings_survive_stock_peft(fresh_base: FreshBase, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        target_modules=["q_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        alpha_pattern={"layers.0.self_attn.q_proj": 9},
        use_rslora=True,
    )
    layout = AdapterLayout.from_lora_config(config, fresh_base())
    torch.manual_seed(0)
    adapter = GeneratedAdapter(layout, {tensor.key: torch.randn(tensor.shape) for tensor in layout.tensors}, {})
    adapter.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # the base's embeddings are tied
        loaded = PeftModel.from_pretrained(fresh_base(), str(tmp_path))
    assert torch.equal(logits(loaded), logits(adapter.load_into(fresh_base())))


def test_stock_peft_loads_it_where_peft_dnd_cannot_be_imported(
    adapter_folder: str, base_model: nn.Module, expected: torch.Tensor, tmp_path: Path
) -> None:
    base_model.save_pretrained(tmp_path / "base")
    script = textwrap.dedent(
        """
        import json, sys, warnings

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "peft_dnd":
                    raise ImportError("peft_dnd is blocked")

        sys.meta_path.insert(0, Blocker())
        base, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
        import torch
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        torch.set_num_threads(1)
        warnings.simplefilter("error")
        # PEFT itself calls what transformers has deprecated, whatever the adapter.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
        with torch.no_grad():
            print(json.dumps(model(input_ids=torch.tensor(tokens)).logits.tolist()))
        assert not any(name.startswith("peft_dnd") for name in sys.modules)
        try:
            import peft_dnd
        except ImportError:
            pass
        else:
            raise AssertionError("peft_dnd was importable")
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "base"), adapter_folder, json.dumps(TOKENS.tolist())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "warn" not in result.stderr.lower(), result.stderr
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout)), expected)
