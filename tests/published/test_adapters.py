# SPDX-License-Identifier: Apache-2.0
"""Adapters of the paper's release: they become pairs, all of them or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.released import PROMPTS, released_adapter, released_state, save, settings_file

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PaperSettings,
    PromptCheckpointDataset,
    import_published_adapters,
    load_published_generator,
    published_token_weights,
)
from peft_dnd.cli.app import main
from peft_dnd.errors import GeneratorConfigError, LayoutError, PairsFolderError, PromptError, WeightValueError


@pytest.fixture
def released_folder(tmp_path: Path) -> Path:
    """Two tasks: numbered files without PEFT's prefix; a Trainer's folders, one a pickle, of another VL version."""
    folder = tmp_path / "released"
    (folder / "law").mkdir(parents=True)
    for step in (101, 99, 100):
        save_file(released_adapter(step), folder / "law" / f"{step}.safetensors")
    for step, name in ((7, "adapter_model.safetensors"), (12, "adapter_model.bin")):
        checkpoint = folder / "med" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        state = released_adapter(step, "base_model.model.", "model.language_model.layers")
        if name.endswith("bin"):
            save(state, checkpoint / name)
        else:
            save_file(state, checkpoint / name)
        save({"lr": 1.0}, checkpoint / "optimizer.pt")
    return folder


MED = ["what is medicine ?", "doctor please"]


def test_released_adapters_become_pairs_that_a_generator_is_fitted_to(
    released_folder: Path, tmp_path: Path, encoder_folder: Path
) -> None:
    settings = settings_file(tmp_path, False, str(encoder_folder))
    tasks = import_published_adapters(
        released_folder, tmp_path / "pairs", prompts={"law": PROMPTS, "med": MED}, settings=settings
    )
    assert tasks == ("law", "med")
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert pairs.layout.difference(PaperSettings.load(settings).layout()) is None
    assert pairs.prompts("med") == tuple(MED)
    assert [path.stem for path in pairs.checkpoints("law")] == [f"step-{step:08d}" for step in (99, 100, 101)]
    for number, seed in ((0, 7), (1, 12)):
        found = pairs.state_dict("med", number)
        for key, matrix in released_adapter(seed, "base_model.model.").items():
            assert torch.equal(found[key], matrix.float())

    save(released_state(False), tmp_path / "released.pth")
    generator = load_published_generator(tmp_path / "released.pth", settings)
    before = generator.generate_adapter(PROMPTS).state_dict()
    arguments = DnDTrainingArguments(
        output_dir=str(tmp_path / "fit"), max_steps=2, report_to=[], save_strategy="no", use_cpu=True
    )
    weights = published_token_weights(tmp_path / "released.pth")
    DnDTrainer(model=generator, args=arguments, train_dataset=pairs, token_weight=weights).train()
    after = generator.generate_adapter(PROMPTS).state_dict()
    assert any(not torch.equal(matrix, before[key]) for key, matrix in after.items())


def test_one_task_alone_and_names_without_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "law"
    folder.mkdir()
    for seed, name in enumerate(("first", "last", "middle")):
        save(released_adapter(seed), folder / f"{name}.pth")
    layout = PaperSettings.load(settings_file(tmp_path, False)).layout()
    assert import_published_adapters(folder, tmp_path / "pairs", prompts={"law": PROMPTS}, layout=layout) == ("law",)
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    for number in range(3):
        expected = released_adapter(number)[key.removeprefix("base_model.model.")]
        assert torch.equal(pairs.state_dict("law", number)[key], expected.float())


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda s: s.popitem(), LayoutError, "lacks"),
        (lambda s: s.update({"model.norm.weight": torch.ones(3)}), LayoutError, "no LoRA matrix"),
        (
            lambda s: s.update({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 16)}),
            LayoutError,
            "same place",
        ),
        (lambda s: s.update({next(iter(s)): torch.ones(3, 16)}), LayoutError, r"\(3, 16\)"),
        (lambda s: s.update({next(iter(s)): torch.full((2, 16), torch.nan)}), WeightValueError, "NaN"),
    ],
)
def test_one_bad_adapter_stops_the_whole_import(
    released_folder: Path,
    tmp_path: Path,
    spoil: Callable[[dict[str, torch.Tensor]], Any],
    error: type[Exception],
    words: str,
) -> None:
    state = released_adapter(12)
    spoil(state)
    save(state, released_folder / "med" / "checkpoint-12" / "adapter_model.bin")
    settings = settings_file(tmp_path, False)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=words):
        import_published_adapters(
            released_folder, tmp_path / "pairs", prompts={"law": PROMPTS, "med": MED}, settings=settings
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_use_is_named(released_folder: Path, tmp_path: Path) -> None:
    settings, pairs = settings_file(tmp_path, False), tmp_path / "pairs"
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "typo", {"law": PROMPTS}, PairsFolderError, "no folder"),
        (released_folder, {"laws": PROMPTS}, PairsFolderError, "'laws'.*'law', 'med'"),
        (released_folder, {}, PromptError, "empty"),
        (released_folder, {"law": [""]}, PromptError, r"'law'\[0\]"),
    ]
    for folder, prompts, error, words in cases:
        with pytest.raises(error, match=words):
            import_published_adapters(folder, pairs, prompts=prompts, settings=settings)
    with pytest.raises(GeneratorConfigError, match="not both"):
        import_published_adapters(released_folder, pairs, prompts={"law": PROMPTS})
    (released_folder / "none").mkdir()
    with pytest.raises(PairsFolderError, match="no adapter"):
        import_published_adapters(released_folder, pairs, prompts={"none": PROMPTS}, settings=settings)
    import_published_adapters(released_folder, pairs, prompts={"law": PROMPTS}, settings=settings)
    with pytest.raises(PairsFolderError, match="there already"):
        import_published_adapters(released_folder, pairs, prompts={"law": PROMPTS}, settings=settings)


def test_from_the_command_line(
    released_folder: Path, tmp_path: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(released_state(True), tmp_path / "released.pth")
    settings = str(settings_file(tmp_path, True))
    ours, adapter = str(tmp_path / "ours"), str(tmp_path / "adapter")
    given = ["--settings", settings, "--text-encoder", str(encoder_folder), "--base", "other/base"]
    assert main(["import-generator", str(tmp_path / "released.pth"), ours, *given]) == 0
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": p, "response": "no"} for p in PROMPTS]))
    chats = [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": "no"}]} for p in PROMPTS]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    assert main(["generate", ours, str(tmp_path / "prompts.json"), adapter]) == 0
    written = GeneratedAdapter.from_pretrained(adapter)
    assert written.layout.base_model_name_or_path == "other/base"

    given = ["--settings", settings, "--prompts", f"law={tmp_path / 'prompts.json'}"]
    pairs = tmp_path / "pairs"
    assert main(["import-adapters", str(released_folder), str(pairs), *given, "--prompts", "med"]) == 2
    assert "TASK=FILE" in capsys.readouterr().err
    assert not pairs.exists()
    given += ["--prompts", f"med={tmp_path / 'chats.json'}"]
    assert main(["import-adapters", str(released_folder), str(pairs), *given]) == 0
    assert PromptCheckpointDataset.from_folder(pairs).prompts("med") == tuple(PROMPTS)
    (tmp_path / "chats.json").write_text("[{}]")
    assert main(["import-adapters", str(released_folder), str(tmp_path / "more"), *given]) == 1
    assert "conversations" in capsys.readouterr().err
