# SPDX-License-Identifier: Apache-2.0
"""Text-to-LoRA's checkpoints: what they write once they are ours, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.released import save
from support.text_to_lora import KINDS, LAYERS, RANK, SIZES, reference, write_checkpoint
from torch import nn

from peft_dnd import AdapterLayout, DnDConfig, PromptConditionedLoraGenerator, StreamedLoraGenerator
from peft_dnd.cli.app import main
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, LayoutError, MissingFileError
from peft_dnd.published import load_text_to_lora
from peft_dnd.published.files import read_tensors
from peft_dnd.text import SentenceTransformerTextEncoder


DESCRIPTION = ["what is the law ?"]
PARENTS = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}


def as_reference(tensors: dict[str, torch.Tensor]) -> dict[tuple[int, str, str], torch.Tensor]:
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        assert parts[:3] == ["base_model", "model", "model"] and parts[5] == PARENTS[parts[6]]
        found[int(parts[4]), parts[6], parts[7].removeprefix("lora_")] = tensor
    return found


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_writes_what_the_published_formulas_write(
    kind: dict[str, Any], encoder: SentenceTransformerTextEncoder, tmp_path: Path
) -> None:
    state = write_checkpoint(tmp_path / "theirs", kind, "org/encoder")
    generator = load_text_to_lora(tmp_path / "theirs", text_encoder=encoder)
    expected = reference(state, kind, encoder.encode_sentences(DESCRIPTION)[0])
    adapter = generator.generate_adapter(DESCRIPTION)
    found = as_reference(adapter.state_dict())
    assert found.keys() == expected.keys() and len(found) == 2 * LAYERS * len(SIZES)
    for place, matrix in expected.items():
        torch.testing.assert_close(found[place], matrix, atol=1e-5, rtol=1e-4)
    generator.save_pretrained(tmp_path / "ours")
    for loader in (PromptConditionedLoraGenerator, StreamedLoraGenerator):
        again = loader.from_pretrained(tmp_path / "ours", text_encoder=encoder).generate_adapter(DESCRIPTION)
        for key, tensor in again.state_dict().items():  # weights that lie elsewhere in memory round the last bit anew
            torch.testing.assert_close(tensor, adapter.state_dict()[key], atol=1e-6, rtol=1e-5)


def test_another_width_of_tokens_writes_the_same(
    encoder: SentenceTransformerTextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rebuilt, z-scored", "rank by rank, shared"):
        kind = KINDS[name]
        state = write_checkpoint(tmp_path / name, kind, None)
        monkeypatch.setattr("peft_dnd.adapters.tokenizer.choose_chunk_width", lambda layout: 7)
        generator = load_text_to_lora(tmp_path / name, text_encoder=encoder)
        assert generator.config.chunk_width == 7
        expected = reference(state, kind, encoder.encode_sentences(DESCRIPTION)[0])
        found = as_reference(generator.generate_adapter(DESCRIPTION).state_dict())
        for place, matrix in expected.items():
            torch.testing.assert_close(found[place], matrix, atol=1e-5, rtol=1e-4)


def test_it_goes_onto_the_base_and_to_stock_peft(
    encoder_folder: Path, fresh_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "theirs", KINDS["task loss"], str(encoder_folder))
    load_text_to_lora(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    ids = torch.tensor([[1, 2, 3]])
    base: Any = fresh_base()
    plain = base(ids).logits
    config = DnDConfig(generator=tmp_path / "ours", prompts=DESCRIPTION)
    model = get_peft_model(base, config)
    logits = model(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"], saved["peft_type"]) == (RANK, 6, True, "LORA")
    again: Any = PeftModel.from_pretrained(fresh_base(), tmp_path / "adapter")  # type: ignore[arg-type]
    torch.testing.assert_close(again(ids).logits, logits)


def test_a_step_in_between_and_other_names(encoder: SentenceTransformerTextEncoder, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, KINDS["task loss"], None)
    step = tmp_path / "checkpoints" / "it_100" / "hypermod.pt"
    step.parent.mkdir(parents=True)
    (tmp_path / "hypermod.pt").rename(step)
    generator = load_text_to_lora(step, text_encoder=encoder, base_model="org/base")
    assert generator.generate_adapter(DESCRIPTION).layout.base_model_name_or_path == "org/base"


def test_several_descriptions_are_read_as_their_mean(encoder: SentenceTransformerTextEncoder, tmp_path: Path) -> None:
    kind = KINDS["task loss"]
    state = write_checkpoint(tmp_path, kind, None)
    lines = ["what is the law ?", "a court please", "law ."]
    found = as_reference(load_text_to_lora(tmp_path, text_encoder=encoder).generate_adapter(lines).state_dict())
    for place, matrix in reference(state, kind, encoder.encode_sentences(lines).mean(0)).items():
        torch.testing.assert_close(found[place], matrix, atol=1e-5, rtol=1e-4)


def test_on_the_command_line(encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "theirs", KINDS["shared head"], None)
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "ours"), "--text-encoder", str(encoder_folder)]
    assert main(["import-generator", *arguments]) == 0
    assert "some/base" in capsys.readouterr().out
    PromptConditionedLoraGenerator.from_pretrained(tmp_path / "ours").generate_adapter(DESCRIPTION)
    assert main(["import-generator", *arguments, "--settings", "math-7b"]) == 2
    (tmp_path / "x.pth").write_bytes(b"x")
    assert main(["import-generator", str(tmp_path / "x.pth"), str(tmp_path / "y")]) == 2
    assert "--settings" in capsys.readouterr().err
    assert main(["import-generator", str(tmp_path / "nowhere"), str(tmp_path / "y")]) == 2
    assert "is no folder of Text-to-LoRA's" in " ".join(capsys.readouterr().err.split())
    assert main(["import-generator", str(tmp_path), str(tmp_path / "y")]) == 1


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = read_tensors(folder / "hypermod.pt")
    change(state)
    save({key: tensor.clone() for key, tensor in state.items()}, folder / "hypermod.pt")


def arguments(folder: Path, text: str) -> None:
    path = folder / "args.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "\n" + text, encoding="utf-8")


def edit_config(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def exchange(state: dict[str, Any], first: str, second: str) -> None:
    state[first], state[second] = state[second], state[first]


MUTATIONS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no weights": (lambda f: (f / "hypermod.pt").unlink(), MissingFileError, "There is no hypermod.pt"),
    "no arguments": (lambda f: (f / "args.yaml").unlink(), MissingFileError, r"There is no args.yaml"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), MissingFileError, "adapter_config.json"),
    "truncated": (
        lambda f: (f / "hypermod.pt").write_bytes((f / "hypermod.pt").read_bytes()[:900]),
        CorruptFileError,
        "hypermod.pt",
    ),
    "no state dict": (lambda f: save([torch.ones(2)], f / "hypermod.pt"), CorruptFileError, "no state dict"),
    "code": (lambda f: save({"x": Path}, f / "hypermod.pt"), CorruptFileError, "more .* than tensors"),
    "another model": (lambda f: save({"x": torch.ones(2)}, f / "hypermod.pt"), CorruptFileError, "found x"),
    "dropped": (lambda f: rewrite(f, lambda s: s.pop("mlp2.mlp.4.bias")), CorruptFileError, "missing: mlp2.4.bias"),
    "dropped head": (lambda f: rewrite(f, lambda s: s.pop("heads.q_proj.weight")), CorruptFileError, "no .heads"),
    "dropped sizes": (lambda f: rewrite(f, lambda s: s.pop("AB_offset.B.q_proj")), CorruptFileError, "AB_offset"),
    "dropped kinds": (
        lambda f: rewrite(f, lambda s: s.pop("layer_type_encoder.0.weight")),
        CorruptFileError,
        "missing: kind_encoder.0.weight",
    ),
    "renamed": (
        lambda f: rewrite(f, lambda s: s.update(other=s.pop("mixer.1.weight"))),
        CorruptFileError,
        "missing: mixer.1.weight; unexpected: other",
    ),
    "exchanged heads": (
        lambda f: rewrite(f, lambda s: exchange(s, "heads.q_proj.weight", "heads.v_proj.weight")),
        CorruptFileError,
        "heads.*rows",
    ),
    "turned": (lambda f: rewrite(f, lambda s: s.update({"mlp1.mlp.1.weight": s["mlp1.mlp.1.weight"].T})),
        CorruptFileError, "of another shape: mlp1.1.weight"),
    "NaN": (lambda f: rewrite(f, lambda s: s["mixer.1.bias"].fill_(float("nan"))), CorruptFileError, "mixer.1.bias"),
    "NaN in the offset": (
        lambda f: rewrite(f, lambda s: s["AB_offset.A.q_proj"].fill_(float("nan"))), CorruptFileError, "AB_offset"),
    "sizes": (
        lambda f: rewrite(f, lambda s: s.update({"AB_offset.A.q_proj": torch.zeros(LAYERS, RANK, 25)})),
        CorruptFileError, "expected .3, 25. for each layer",
    ),
    "other arguments": (lambda f: arguments(f, "shared_AB_head: true"), CorruptFileError, "rows|missing"),
    "other encoder": (lambda f: arguments(f, "encoder_type: vq"), GeneratorConfigError, "encoder_type='vq'"),
    "task numbers": (lambda f: arguments(f, "use_one_hot_task_emb: true"), GeneratorConfigError, "one_hot"),
    "other fit": (lambda f: arguments(f, "training_task: x"), GeneratorConfigError, "training_task='x'"),
    "no YAML": (lambda f: arguments(f, "{: ["), CorruptFileError, "not readable YAML"),
    "no mapping": (lambda f: (f / "args.yaml").write_text("- 3"), CorruptFileError, "names and values"),
    "scaling": (lambda f: arguments(f, "delta_w_scaling: -1"), CorruptFileError, "delta_w_scaling=-1"),
    "code in YAML": (lambda f: arguments(f, "x: !!python/name:os.system"), CorruptFileError, "YAML"),
    "rank": (
        lambda f: edit_config(f, '"r": 3', '"r": 4'), CorruptFileError, "r=4",
    ),
    "DoRA": (
        lambda f: edit_config(f, '"r": 3', '"r": 3, "use_dora": true'), LayoutError, "dora",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_damaged_is_refused(name: str, encoder: SentenceTransformerTextEncoder, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, KINDS["task loss"], None)
    mutate, error, message = MUTATIONS[name]
    mutate(tmp_path)
    with pytest.raises(error, match=message):
        load_text_to_lora(tmp_path, text_encoder=encoder)


def test_another_layout_is_refused(
    layout: AdapterLayout, encoder: SentenceTransformerTextEncoder, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, KINDS["task loss"], None)
    with pytest.raises(LayoutError, match=r"kind 'down_proj'|kind 'gate_proj'.*none"):
        load_text_to_lora(tmp_path, text_encoder=encoder, layout=layout)
