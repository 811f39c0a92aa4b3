# SPDX-License-Identifier: Apache-2.0
"""A mutation run over a generator's folder: what was damaged or edited is refused, never used as if right."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_dnd.generator.streaming
from peft_dnd import DnDConfig, PromptCheckpointDataset, PromptConditionedLoraGenerator, StreamedLoraGenerator
from peft_dnd.cli.app import main
from peft_dnd.errors import BaseModelMismatchError, CorruptFileError, FormatVersionError, PeftDndError
from peft_dnd.generator import renew_checksums
from peft_dnd.storage import checksums
from peft_dnd.storage.files import read_json, read_safetensors, write_json, write_safetensors


PROMPTS = ["what is the law ?", "a court please"]
LOADERS = [PromptConditionedLoraGenerator, StreamedLoraGenerator]
Tensors = dict[str, torch.Tensor]
Mutation = Callable[[Path], None]
MUTATIONS: dict[str, Mutation] = {}
# What shows without checksums too, by names, shapes or values.
SHOWS: set[str] = set()


@pytest.fixture(scope="module")
def whole(
    generator: PromptConditionedLoraGenerator,
    pairs_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A generator's folder with all that can be in one, in three files of weights."""
    own = copy.deepcopy(generator)
    own.fit_out_of_distribution(PromptCheckpointDataset.from_folder(pairs_folder))
    folder = tmp_path_factory.mktemp("damaged") / "generator"
    own.save_pretrained(folder, include_text_encoder=True, max_shard_size="40KB")
    assert len(shards(folder)) > 1
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "generator"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def on_weights(change: Callable[[Tensors], object], *, shows: bool = False) -> Callable[[Path], None]:
    """A mutation of the tensors of one shard, as long as it changes the first."""

    def mutate(folder: Path) -> None:
        for path in shards(folder):
            tensors = read_safetensors(path)
            before = {name: tensor.clone() for name, tensor in tensors.items()}
            change(tensors)
            same = tensors.keys() == before.keys() and all(
                tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
                for name, tensor in tensors.items()
            )
            if not same:
                write_safetensors(path, tensors)
                return
        raise AssertionError("nothing was changed")

    mutate.__name__ = change.__name__
    MUTATIONS[change.__name__] = mutate
    if shows:
        SHOWS.add(change.__name__)
    return mutate


def on_config(name: str, change: Callable[[Any], Any]) -> None:
    def mutate(folder: Path) -> None:
        config = read_json(folder / "config.json")
        before = json.dumps(config, sort_keys=True)
        config[name] = change(config.get(name))
        assert json.dumps(config, sort_keys=True) != before
        write_json(folder / "config.json", config)

    MUTATIONS[f"config_{name}_{change.__name__}"] = mutate


def dropped(tensors: Tensors) -> None:
    del tensors[min(tensors)]


def renamed(tensors: Tensors) -> None:
    tensors["decoder.other.weight"] = tensors.pop(min(tensors))


def added(tensors: Tensors) -> None:
    tensors["decoder.other.weight"] = torch.zeros(2)


def reshaped(tensors: Tensors) -> None:
    name = min(name for name in tensors if tensors[name].ndim > 1)
    tensors[name] = tensors[name].flatten()


def exchanged(tensors: Tensors) -> None:
    names = sorted(name for name in tensors if tensors[name].numel() > 1 and not torch.all(tensors[name] == 0))
    for first in names:
        for second in names:
            alike = first < second and tensors[first].shape == tensors[second].shape
            if alike and not torch.equal(tensors[first], tensors[second]):
                tensors[first], tensors[second] = tensors[second], tensors[first]
                return


def turned_about(tensors: Tensors) -> None:
    tensors[max(tensors)] = tensors[max(tensors)].flip(-1).contiguous()


def nan_in_a_weight(tensors: Tensors) -> None:
    tensors[min(tensors)].view(-1)[-1] = float("nan")


def other_type(tensors: Tensors) -> None:
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name].view(torch.int32) if tensors[name].dtype == torch.float32 else tensors[name].float()


def rounded(tensors: Tensors) -> None:
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name].bfloat16()


def mean_zeroed(tensors: Tensors) -> None:
    if "normalization.mean" in tensors:
        tensors["normalization.mean"].zero_()


def mean_negated(tensors: Tensors) -> None:
    if "normalization.mean" in tensors:
        tensors["normalization.mean"].neg_()


def scale_doubled(tensors: Tensors) -> None:
    if "normalization.scale" in tensors:
        tensors["normalization.scale"].mul_(2)


def scale_zeroed(tensors: Tensors) -> None:
    if "normalization.scale" in tensors:
        tensors["normalization.scale"][1] = 0


def scale_negated(tensors: Tensors) -> None:
    if "normalization.scale" in tensors:
        tensors["normalization.scale"].neg_()


def scale_infinite(tensors: Tensors) -> None:
    if "normalization.scale" in tensors:
        tensors["normalization.scale"][0] = float("inf")


for change in (exchanged, turned_about, other_type, rounded, mean_zeroed, mean_negated, scale_doubled):
    on_weights(change)
for change in (dropped, renamed, added, reshaped, nan_in_a_weight, scale_zeroed, scale_negated, scale_infinite):
    on_weights(change, shows=True)


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


for share in (0.0, 0.001, 0.01, 0.3, 0.5, 0.9, 1.0):
    MUTATIONS[f"byte_flipped_at_{share}"] = lambda folder, share=share: flip(shards(folder)[-1], share)  # type: ignore[misc]


@mutation
def byte_flipped_in_the_prompt_reference(folder: Path) -> None:
    flip(folder / "prompt_reference.safetensors", 0.9)


@mutation
def byte_flipped_in_the_text_encoder(folder: Path) -> None:
    flip(next((folder / "text_encoder").rglob("*.safetensors")), 0.9)


@mutation
def truncated(folder: Path) -> None:
    content = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(content[: len(content) // 2])


@mutation
def without_a_shard(folder: Path) -> None:
    shards(folder)[0].unlink()


@mutation
def weights_of_another_generator(folder: Path) -> None:
    for path in shards(folder):
        write_safetensors(
            path,
            {
                name: tensor.neg() if tensor.is_floating_point() and "scale" not in name else tensor
                for name, tensor in read_safetensors(path).items()
            },
        )


@mutation
def checksums_truncated(folder: Path) -> None:
    path = folder / "checksums.json"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


@mutation
def checksums_of_another_form(folder: Path) -> None:
    write_json(folder / "checksums.json", {"format_version": 1, "tensors": []})


def alpha(layout: dict[str, Any]) -> dict[str, Any]:
    layout["modules"][0][4] *= 2
    return layout


def rslora(layout: dict[str, Any]) -> dict[str, Any]:
    return {**layout, "use_rslora": True}


def shorter(value: int) -> int:
    return value - 1


def kernel(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "kernel_size": 5}


def turned_off(_: Any) -> str:
    return "none"


for name, change in (
    ("layout", alpha),
    ("layout", rslora),
    ("max_prompt_length", shorter),
    ("condition_size", shorter),
    ("decoder_config", kernel),
    ("normalization", turned_off),
):
    on_config(name, change)


def use(folder: Path, loader: Any) -> None:
    loader.from_pretrained(folder).generate_adapter(PROMPTS)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", MUTATIONS)
def test_what_was_damaged_is_refused(name: str, loader: Any, damaged: Path) -> None:
    MUTATIONS[name](damaged)
    with pytest.raises(PeftDndError):
        use(damaged, loader)


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_without_checksums_what_shows_is_still_refused(name: str, damaged: Path) -> None:
    (damaged / "checksums.json").unlink()
    MUTATIONS[name](damaged)
    with pytest.raises(PeftDndError):
        use(damaged, PromptConditionedLoraGenerator)


@pytest.mark.parametrize("loader", LOADERS)
def test_whole_folders_load_with_checksums_and_without(loader: Any, damaged: Path) -> None:
    use(damaged, loader)
    (damaged / "checksums.json").unlink()  # as earlier versions saved it
    use(damaged, loader)


def test_the_error_names_what_differs_and_how_an_edit_is_accepted(damaged: Path) -> None:
    MUTATIONS["exchanged"](damaged)
    with pytest.raises(CorruptFileError, match=r"the tensor 'decoder.*in 'model-0.*renew_checksums") as caught:
        use(damaged, PromptConditionedLoraGenerator)
    assert str(damaged) in str(caught.value)
    before = {path: path.read_bytes() for path in damaged.rglob("*.safetensors")}
    renew_checksums(damaged)
    use(damaged, PromptConditionedLoraGenerator)
    assert {path: path.read_bytes() for path in before} == before


def test_checksums_of_another_kind_are_refused_until_they_are_renewed(damaged: Path) -> None:
    written = read_json(damaged / "checksums.json")
    write_json(damaged / "checksums.json", {**written, "algorithm": "md5"})
    for loader in LOADERS:
        with pytest.raises(FormatVersionError, match=r"checksums by 'md5'.*another version.*renew_checksums"):
            use(damaged, loader)
    renew_checksums(damaged)
    assert read_json(damaged / "checksums.json") == written
    for loader in LOADERS:
        use(damaged, loader)


def test_checksums_do_not_depend_on_the_files(damaged: Path, tmp_path: Path) -> None:
    PromptConditionedLoraGenerator.from_pretrained(damaged).save_pretrained(tmp_path / "one")
    assert len(shards(tmp_path / "one")) == 1
    one, many = (read_json(folder / "checksums.json") for folder in (tmp_path / "one", damaged))
    assert one["tensors"] == many["tensors"] and one["settings"] == many["settings"]


def test_names_may_be_edited(damaged: Path) -> None:
    config = read_json(damaged / "config.json")
    config["layout"]["base_model_name_or_path"] = "org/base"
    write_json(damaged / "config.json", {**config, "text_encoder": "org/encoder", "measured": {"accuracy": 1}})
    use(damaged, PromptConditionedLoraGenerator)


def test_streamed_weights_are_checked_when_they_are_read(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_dnd.generator.streaming, "_HELD_BYTES", 0)
    loaded = StreamedLoraGenerator.from_pretrained(damaged)
    for _ in range(2):
        loaded.generate_adapter(PROMPTS)
    on_weights(last_number)(damaged)
    with pytest.raises(CorruptFileError, match=r"the tensor 'decoder.*renew"):
        use(damaged, StreamedLoraGenerator)


def last_number(tensors: Tensors) -> None:
    name = max((name for name in tensors if name.startswith("decoder")), key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[-1] += 1


def test_what_was_found_alike_is_read_again_only_when_it_changes(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    taken = checksums.tensor_checksums
    monkeypatch.setattr(checksums, "tensor_checksums", lambda *given: read.extend(given[0]) or taken(*given))
    use(damaged, PromptConditionedLoraGenerator)
    count = len(read)
    use(damaged, PromptConditionedLoraGenerator)
    assert len(read) == 2 * count > 0, "just written: another change might not tell"
    monkeypatch.setattr(checksums, "_SETTLED_NANOSECONDS", 0)
    for _ in range(3):
        use(damaged, PromptConditionedLoraGenerator)
    assert len(read) == 3 * count
    time.sleep(0.02)
    flip(shards(damaged)[-1], 0.9)
    with pytest.raises(CorruptFileError):
        use(damaged, PromptConditionedLoraGenerator)


def test_inspect_says_so_and_it_can_be_renewed(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(damaged)]) == 0
    assert "as saved: yes" in capsys.readouterr().out
    MUTATIONS["mean_negated"](damaged)
    MUTATIONS["byte_flipped_in_the_text_encoder"](damaged)
    assert main(["inspect", str(damaged)]) == 1
    told = capsys.readouterr().out
    assert "'normalization.mean'" in told and "text_encoder/" in told
    with pytest.raises(CorruptFileError, match="or peft-dnd renew-checksums") as caught:
        PromptConditionedLoraGenerator.from_pretrained(damaged)
    command = str(caught.value).rpartition("or peft-dnd ")[2].replace("'", "").split()
    (damaged / "prompt_reference.safetensors").unlink()
    assert main(command) == 0 and "counts as right" in capsys.readouterr().out
    listed = json.loads((damaged / "peft_dnd_summary.json").read_text(encoding="utf-8"))["files"]
    assert "prompt_reference.safetensors" not in listed, "the summary follows"
    assert listed["config.json"] == (damaged / "config.json").stat().st_size
    use(damaged, PromptConditionedLoraGenerator)
    assert main(["renew-checksums", str(damaged / "text_encoder")]) == 1
    assert main(["renew-checksums", f"{damaged}x"]) == 1
    assert f"is no folder here, and checksums are renewed in one. There is a folder {str(damaged)!r} here" in (
        capsys.readouterr().err
    )


def test_an_adapter_does_not_go_onto_another_base(generator_folder: Path) -> None:
    other: nn.Module = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(BaseModelMismatchError):
        get_peft_model(other, DnDConfig(generator=generator_folder, prompts=PROMPTS))


def test_a_default_type_of_float64(generator_folder: Path, fresh_base: Callable[[], nn.Module]) -> None:
    expected = PromptConditionedLoraGenerator.from_pretrained(generator_folder).generate_adapter(PROMPTS)
    torch.set_default_dtype(torch.float64)
    try:
        for loader in LOADERS:
            found = loader.from_pretrained(generator_folder).generate_adapter(PROMPTS)
            for key, tensor in found.state_dict().items():
                torch.testing.assert_close(tensor, expected.state_dict()[key], check_dtype=False)
        base = fresh_base().double()
        model: nn.Module = get_peft_model(base, DnDConfig(generator=generator_folder, prompts=PROMPTS))  # type: ignore[arg-type]
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
