# SPDX-License-Identifier: Apache-2.0
"""Generators of the paper's release: what they write once they are ours, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.released import (
    BASE,
    LONG,
    PROJECTIONS,
    PROMPTS,
    RANK,
    SHORT,
    SIZE,
    WIDTH,
    released_state,
    save,
    settings_file,
)
from transformers import AutoModel, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from peft_dnd import PromptConditionedLoraGenerator, load_published_generator, published_token_weights
from peft_dnd.cli.app import main
from peft_dnd.errors import CorruptFileError, GeneratorConfigError


def along(x: torch.Tensor, weight: torch.Tensor, order: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolves one axis of (N, L, C) as channels, over the plane of the other two, all named in `order`."""
    axes = ["NLC".index(axis) for axis in order]
    y = F.conv2d(x.permute(axes)[None], weight, bias, padding="same")[0]
    return y.permute([axes.index(i) for i in range(3)])


@torch.no_grad()
def reference(state: dict[str, torch.Tensor], encoder_folder: Path, projected: bool) -> dict[str, torch.Tensor]:
    """What the published code writes, from its formulas: key without PEFT's prefix -> matrix."""
    length = LONG if projected else SHORT
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    network = AutoModel.from_pretrained(encoder_folder, attn_implementation="eager").eval()
    read = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    window = min(length, 40)
    ids, mask = (read[name].reshape(-1, window) for name in ("input_ids", "attention_mask"))
    x = network(input_ids=ids, attention_mask=mask).last_hidden_state.reshape(4, length, SIZE)
    if projected:
        x = x.contiguous().view(4, SIZE, length)
        x = x @ state["down_proj.weight"].T + state["down_proj.bias"]
        x = x @ state["gate_proj.weight"].T + state["gate_proj.bias"]
        x = x.view(4, -1, SIZE)
    for i in range(3):
        w = {
            key.removeprefix(f"model.decoder.module_list.{i}.").removeprefix("linear1."): tensor
            for key, tensor in state.items()
            if f"module_list.{i}." in key
        }
        mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, unbiased=False)
        y = (x - mean) / torch.sqrt(variance + 1e-5) * w["norm.weight"] + w["norm.bias"]
        first = along(along(y, w["conv1w.weight"], "CLN"), w["conv1h.weight"], "LNC")
        second = torch.tanh(along(along(y, w["conv2h.weight"], "LNC"), w["conv2w.weight"], "CLN"))
        z = along((first + second + w["bias"]) / 3, w["linear2.weight"], "NLC", w["linear2.bias"])
        x = x + z if x.shape == z.shape else z
    tokens, matrices = list(x), {}
    for layer in range(2):
        for name, (inputs, outputs) in PROJECTIONS.items():
            for side, long_size in (("A", inputs), ("B", outputs)):
                rows = torch.cat([chunk(tokens.pop(0)) for _ in range(long_size // WIDTH)], dim=1)
                key = f"model.layers.{layer}.{name}.lora_{side}.weight"
                matrices[key] = rows if side == "A" else rows.T
    assert not tokens
    return matrices


def chunk(token: torch.Tensor) -> torch.Tensor:
    below = torch.stack([token[RANK:, 0::2].mean(1), token[RANK:, 1::2].mean(1)], 1)
    right = torch.stack([token[0::2, WIDTH:].mean(0), token[1::2, WIDTH:].mean(0)])
    codes = 0.5 * (below + right)
    mean = (codes[:, 0] / 8).mean()
    deviation = ((torch.exp(codes[:, 1] - 1.6) - 0.1) / 0.9).mean()
    return token[:RANK, :WIDTH] * deviation + mean


@pytest.fixture(params=[False, True], ids=["short prompts", "long prompts"])
def projected(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_imported_generator_writes_what_the_release_writes(
    tmp_path: Path, encoder_folder: Path, projected: bool
) -> None:
    state = released_state(projected)
    save(state, tmp_path / "released.pth")
    settings = settings_file(tmp_path, projected)
    generator = load_published_generator(tmp_path / "released.pth", settings, text_encoder=str(encoder_folder))
    expected = reference(state, encoder_folder, projected)
    found = generator.generate_adapter(PROMPTS).state_dict()
    assert set(found) == {f"base_model.model.{key}" for key in expected}
    for key, matrix in expected.items():
        torch.testing.assert_close(found[f"base_model.model.{key}"], matrix, rtol=1e-5, atol=1e-5)
    assert max(matrix.abs().max().item() for matrix in expected.values()) > 0.1

    generator.save_pretrained(tmp_path / "ours", include_text_encoder=True)
    (tmp_path / "released.pth").unlink()
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "ours")
    assert again.config.base_model_name_or_path == "some/base"
    written = again.generate_adapter(PROMPTS)
    assert all(torch.equal(matrix, found[key]) for key, matrix in written.state_dict().items())
    model = written.load_into(Qwen2ForCausalLM(Qwen2Config(**BASE)))
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


def test_in_half_precision_and_in_the_old_file_format(tmp_path: Path, encoder_folder: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in released_state(False).items()}
    save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    settings = settings_file(tmp_path, False, str(encoder_folder))
    generator = load_published_generator(tmp_path / "old.pth", settings, base_model="other/base")
    assert generator.dtype == torch.bfloat16
    assert generator.config.base_model_name_or_path == "other/base"
    assert generator.normalization.mean.dtype == torch.float32
    generator.generate_adapter(PROMPTS)


def test_token_weights_are_reported_and_readable(
    tmp_path: Path, encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = released_state(False)
    save(state, tmp_path / "released.pth")
    with caplog.at_level(logging.INFO, logger="peft_dnd"):
        load_published_generator(tmp_path / "released.pth", settings_file(tmp_path, False, str(encoder_folder)))
    assert "criterion_weight" in caplog.text and "DnDTrainer" in caplog.text
    assert torch.equal(published_token_weights(tmp_path / "released.pth"), state["criterion_weight"].flatten())
    del state["criterion_weight"]
    save(state, tmp_path / "without.pth")
    load_published_generator(tmp_path / "without.pth", settings_file(tmp_path, False, str(encoder_folder)))
    with pytest.raises(CorruptFileError, match="no 'criterion_weight'"):
        published_token_weights(tmp_path / "without.pth")


NORM = "model.decoder.module_list.1.linear1.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: s.pop(NORM), f"missing: {NORM} \\(5, 12\\)"),
        (lambda s: s.update(extra=torch.ones(2)), r"unexpected: extra \(2,\)"),
        (lambda s: s.update({NORM: torch.ones(12, 5)}), r"\(12, 5\), expected \(5, 12\)"),
        (lambda s: s.update({"down_proj.weight": torch.ones(7, 80)}), "unexpected: down_proj.weight"),
        (lambda s: s.update({NORM: torch.ones(5, 12).long()}), f"no floating-point numbers: {NORM}"),
        (lambda s: s.update(criterion_weight=torch.ones(1, 3, 1, 1)), r"\(1, 3, 1, 1\)"),
        (lambda s: s.update(criterion_weight=3), "'criterion_weight', a int"),
        (lambda s: [s.pop(key) for key in list(s)], "and 22 more"),
    ],
)
def test_a_bad_generator_is_named_and_nothing_written(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    state: dict[str, Any] = released_state(False)
    spoil(state)
    path = tmp_path / "released.pth"
    save(state, path)
    settings = settings_file(tmp_path, False)
    with pytest.raises(CorruptFileError, match=words):
        load_published_generator(path, settings)
    assert main(["import-generator", str(path), str(tmp_path / "ours"), "--settings", str(settings)]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["released.pth", "tiny.json"]


class Trap:
    """What a pickle must not get to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


@pytest.mark.parametrize("what", ["code", "cut", "text", "list", "nested"])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    path, settings = tmp_path / "released.pth", settings_file(tmp_path, False)
    objects = {"code": Trap(), "list": [torch.ones(2)], "nested": {"state": {"a": torch.ones(2)}}}
    save(objects.get(what, released_state(False)), path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    if what == "text":
        path.write_text("not a model", encoding="utf-8")
    with pytest.raises(CorruptFileError, match=r"released\.pth"):
        load_published_generator(path, settings)
    assert not (tmp_path / "trap-was-sprung").exists()
    with pytest.raises(FileNotFoundError):
        load_published_generator(tmp_path / "missing.pth", settings)


def test_settings_of_another_family_are_refused(tmp_path: Path) -> None:
    save(released_state(False), tmp_path / "released.pth")
    path = settings_file(tmp_path, False)
    data = json.loads(path.read_text(encoding="utf-8"))
    data["generator"]["decoder_type"] = "set_transformer"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(GeneratorConfigError, match="set_transformer"):
        load_published_generator(tmp_path / "released.pth", path)
