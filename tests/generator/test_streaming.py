# SPDX-License-Identifier: Apache-2.0
"""A streamed generator gives what the loaded one gives, holds next to nothing, and refuses what is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dnd import (
    AdapterLayout,
    DnDConfig,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.cli.app import main
from peft_dnd.decoders import plane_convolution
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
    GeneratorNotFoundError,
    NotFittedError,
    PeftDndError,
    WeightValueError,
)
from peft_dnd.generator import streaming
from peft_dnd.storage.stored_weights import stored_tensors


PROMPTS = ["what is tax law ?", "what is the law of the court ?", "a court please"]
DECODERS = {
    "hyper_convolution": {"kernel_size": 3, "zero_init_output": False},
    "set_transformer": {"hidden_size": 24, "num_heads": 2, "zero_init_output": False},
    "core": {"hidden_size": 24, "zero_init_output": False},
    "text_to_lora": {"zero_init_output": False},
}


@pytest.fixture(params=sorted(DECODERS))
def folder(request: pytest.FixtureRequest, layout: AdapterLayout, encoder_folder: Path, tmp_path: Path) -> Path:
    """A generator of each family, saved in shards; the set transformer's prompts are projected as well."""
    return save(tmp_path / "generator", layout, encoder_folder, request.param)


def save(
    folder: Path,
    layout: AdapterLayout,
    encoder_folder: Path,
    decoder_type: str,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        str(encoder_folder),
        num_prompts=4,
        max_prompt_length=16,
        decoder_type=decoder_type,
        decoder_config={**DECODERS[decoder_type], **settings},
    )
    torch.manual_seed(0)
    model = PromptConditionedLoraGenerator(config)
    shape = model.weight_tokenizer.grid_shape
    model.normalization.set_statistics(torch.randn(shape) * 0.1, torch.full((shape[0],), 0.1))
    model.decoder.to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Have every parameter streamed, convolutions 16 channels at a time; gives the shapes of all that is read."""
    monkeypatch.setattr(streaming, "_HELD_BYTES", 0)
    monkeypatch.setattr(plane_convolution, "OUT_BLOCK", 16)
    read: list[tuple[int, ...]] = []
    whole = streaming.StreamedWeight.__getitem__

    def noted(self: Any, rows: Any) -> torch.Tensor:
        found = whole(self, rows)
        read.append(tuple(found.shape))
        return found

    monkeypatch.setattr(streaming.StreamedWeight, "__getitem__", noted)
    return read


def same(first: GeneratedAdapter, second: GeneratedAdapter, *, rounding: float = 0.0) -> bool:
    """Whether two adapters have the same bytes, or else agree to rounding.

    Matrix products, unlike convolutions, may round otherwise where a weight begins at another address.
    """
    one, other = first.state_dict(), second.state_dict()
    return list(one) == list(other) and all(
        torch.allclose(one[key], other[key], rtol=rounding, atol=rounding) for key in one
    )


def rounding_of(model: PromptConditionedLoraGenerator) -> float:
    """How far apart adapters of a generator may be: not at all if its decoder has nothing but convolutions."""
    settings = model.config.decoder_config
    if model.config.decoder_type == "hyper_convolution" and "length_projection" not in settings:
        return 0.0
    return 1e-5 if model.dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("decoder_type", "settings"),
    [
        ("hyper_convolution", {}),
        ("hyper_convolution", {"length_projection": {"length": 20}}),
        ("set_transformer", {}),
        ("core", {}),
        ("text_to_lora", {}),
    ],
)
def test_streaming_gives_the_same_adapter(
    nothing_held: list[tuple[int, ...]],
    layout: AdapterLayout,
    encoder_folder: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    decoder_type: str,
    settings: dict[str, Any],
) -> None:
    folder = save(tmp_path / "generator", layout, encoder_folder, decoder_type, dtype, **settings)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = PromptConditionedLoraGenerator.from_pretrained(folder)
    streamed = StreamedLoraGenerator.from_pretrained(folder)
    assert (streamed.dtype, streamed.device) == (loaded.dtype, torch.device("cpu")) == (dtype, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in streamed.decoder.parameters() if parameter.dim() > 2)
    nothing_held.clear()
    first = streamed.generate_adapter(PROMPTS, seed=1)
    assert same(first, loaded.generate_adapter(PROMPTS, seed=1), rounding=rounding_of(loaded))
    assert first.provenance == loaded.generate_adapter(PROMPTS, seed=1).provenance
    once = len(nothing_held)
    assert same(first, streamed.generate_adapter(PROMPTS, seed=1))
    assert len(nothing_held) == 2 * once  # nothing is kept from one adapter to the next
    assert all(parameter.is_meta for parameter in streamed.decoder.parameters() if parameter.dim() > 2)


@pytest.mark.parametrize("folder", ["hyper_convolution"], indirect=True)
def test_slices_are_smaller_than_a_layer(nothing_held: list[tuple[int, ...]], folder: Path) -> None:
    streamed = StreamedLoraGenerator.from_pretrained(folder)
    nothing_held.clear()
    streamed.generate_adapter(PROMPTS)
    largest = max(streamed.decoder.parameters(), key=lambda parameter: parameter.numel())
    assert max(torch.Size(shape).numel() for shape in nothing_held) < largest.numel()


def test_another_dtype_than_the_saved_one(folder: Path) -> None:
    loaded = PromptConditionedLoraGenerator.from_pretrained(folder, dtype=torch.bfloat16)
    streamed = StreamedLoraGenerator.from_pretrained(folder, dtype=torch.bfloat16)
    assert streamed.dtype == torch.bfloat16
    assert streamed.normalization.mean.dtype == torch.float32
    expected = loaded.generate_adapter(PROMPTS)
    assert same(expected, streamed.generate_adapter(PROMPTS), rounding=rounding_of(loaded))


def test_goes_where_a_generator_goes(folder: Path, fresh_base: Callable[[], nn.Module]) -> None:
    streamed = StreamedLoraGenerator.from_pretrained(folder)
    model = get_peft_model(fresh_base(), DnDConfig(generator=streamed, prompts=PROMPTS))
    expected = streamed.generate_adapter(PROMPTS).state_dict()
    found = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert found and all(torch.equal(found[key], expected[key]) for key in expected)
    tasks = {"law": PROMPTS, "art": ["a colour please"]}
    assert list(streamed.generate_adapter(tasks)) == ["law", "art"]


def test_command_streams(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    assert main(["generate", str(folder), str(tmp_path / "prompts.txt"), str(tmp_path / "adapter"), "--stream"]) == 0
    loaded = PromptConditionedLoraGenerator.from_pretrained(folder)
    found = GeneratedAdapter.from_pretrained(tmp_path / "adapter")
    assert same(found, loaded.generate_adapter(PROMPTS), rounding=rounding_of(loaded))


def test_neither_saved_nor_fitted(folder: Path, tmp_path: Path) -> None:
    streamed = StreamedLoraGenerator.from_pretrained(folder)
    with pytest.raises(WeightValueError, match="Copy its folder"):
        streamed.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    states, mask = streamed.encode_prompts(PROMPTS)
    assert not streamed(states[None], mask[None]).requires_grad


def cut(folder: Path) -> None:
    shard = max(folder.glob("model-*.safetensors"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-10])


def cut_into_the_header(folder: Path) -> None:
    shard = next(folder.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:20])


def spoil_the_header(folder: Path) -> None:
    shard = next(folder.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    shard.write_bytes(bytes(data))


def remove_a_shard(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def remove_all_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def rename_a_weight(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    name, shard = next((name, shard) for name, shard in places.items() if name.startswith("decoder."))
    tensors = load_file(folder / shard)
    tensors["decoder.other"] = tensors.pop(name)
    save_file(tensors, folder / shard, metadata={"format": "pt"})


def edit_the_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    setting = {"hyper_convolution": "kernel_size", "set_transformer": "num_latents", "core": "mixing_size"}
    config["decoder_config"][setting.get(config["decoder_type"], "head_in_size")] = 9
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (cut, CorruptFileError, "cut short"),
        (cut_into_the_header, CorruptFileError, "cut short"),
        (spoil_the_header, CorruptFileError, "not a safetensors file"),
        (remove_a_shard, GeneratorNotFoundError, "not all of them"),
        (remove_all_weights, GeneratorNotFoundError, "no weights"),
        (rename_a_weight, CorruptFileError, "missing keys"),
        (edit_the_config, CorruptFileError, "mismatched keys"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_named_before_anything_is_decoded(
    folder: Path, damage: Callable[[Path], None], error: type[PeftDndError], words: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=words):
        StreamedLoraGenerator.from_pretrained(folder)


def test_damage_done_since_is_named_while_decoding(nothing_held: list[tuple[int, ...]], folder: Path) -> None:
    streamed = StreamedLoraGenerator.from_pretrained(folder)
    streamed.encode_prompts(PROMPTS)
    cut(folder)
    with pytest.raises(CorruptFileError, match="cut short"):
        for _ in range(2):  # the last bytes of a shard may be buffers, which are read at once
            streamed.generate_adapter(PROMPTS)
            cut(folder)


def test_unfitted_and_missing_generators(
    generator_config: PromptConditionedLoraGeneratorConfig, tmp_path: Path
) -> None:
    PromptConditionedLoraGenerator(generator_config).save_pretrained(tmp_path / "unfitted")
    with pytest.raises(NotFittedError):
        StreamedLoraGenerator.from_pretrained(tmp_path / "unfitted").generate_adapter(PROMPTS)
    with pytest.raises(GeneratorNotFoundError):
        StreamedLoraGenerator.from_pretrained(tmp_path / "nothing")


MEASURE = """
import re, sys
import torch
from pathlib import Path
from peft_dnd import PromptConditionedLoraGenerator, StreamedLoraGenerator

torch.set_num_threads(1)
status = Path("/proc/self/status")
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", status.read_text())[1])

states, mask = torch.randn(1, 4, 16, 16), torch.ones(1, 4, 16, dtype=torch.bool)
grown, found = [], []
for made in (StreamedLoraGenerator, PromptConditionedLoraGenerator):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS")
    with torch.no_grad():
        found.append(made.from_pretrained(sys.argv[1])(states, mask))
    grown.append((kilobytes("VmHWM") - before) / 1024)
assert torch.equal(*found)
print(*grown)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_stays_far_below_the_weights(layout: AdapterLayout, encoder_folder: Path, tmp_path: Path) -> None:
    tokens = (
        PromptConditionedLoraGeneratorConfig.from_adapters(layout, str(encoder_folder)).weight_tokenizer()
    ).grid_shape
    cascade = [(4, 16, 16), (512, 3, 8), (1024, 3, 8), tokens]
    folder = save(tmp_path / "large", layout, encoder_folder, "hyper_convolution", cascade=cascade, kernel_size=9)
    size = sum(tensor.num_bytes for tensor in stored_tensors(folder).values()) / 2**20
    assert size > 180
    script = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    streamed, loaded = map(float, script.stdout.split())
    assert loaded > size  # or nothing would follow from the other figure
    assert streamed < 100


def test_a_parameter_that_another_module_uses_is_refused_and_not_made_up(
    nothing_held: list[tuple[int, ...]], layout: AdapterLayout, encoder_folder: Path, tmp_path: Path
) -> None:
    streamed = StreamedLoraGenerator.from_pretrained(save(tmp_path / "g", layout, encoder_folder, "core"))
    cores = streamed.decoder.writer.cores
    assert (cores.weight.dtype, cores.weight.device.type) == (torch.float32, "meta")
    for work in (
        lambda: torch.nn.functional.linear(torch.ones(1, cores.in_features), cores.weight),
        lambda: cores.weight * 2,
    ):
        with pytest.raises(GeneratorConfigError, match="call that module instead"):
            work()
