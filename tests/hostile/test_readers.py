# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a file, its reader gives the thing or one of our errors, in bounded memory and time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.fuzzing import LONG, QUICK, fuzz, read
from hostile.mutations import damaged, json_files, lines_of_json, safetensors_files
from hypothesis import given, settings
from hypothesis import strategies as st
from support.live_models import PROMPTS

from peft_dnd import (
    AdapterLayout,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.published.files import read_published_prompts, read_tensors
from peft_dnd.storage.files import write_json
from peft_dnd.text.prompt_files import read_rows, texts_of


pytest_plugins = ("support.adapter_fixtures",)


def _generate(folder: Path) -> None:
    PromptConditionedLoraGenerator.from_pretrained(folder).generate_adapter(PROMPTS)


def _stream(folder: Path) -> None:
    StreamedLoraGenerator.from_pretrained(folder).generate_adapter(PROMPTS)


def _pairs(folder: Path) -> None:
    pairs = PromptCheckpointDataset.from_folder(folder, keep_in_memory=False)
    for index in range(min(len(pairs), 2)):
        item = pairs[index]
        for name in ("examples", "distillation"):
            if item[name] is not None:
                item[name].draw(2, seed=0) if hasattr(item[name], "draw") else None


KINDS: dict[str, tuple[str, Callable[[Path], Any], dict[str, Callable[[bytes], st.SearchStrategy[bytes]]]]] = {
    "layout": (
        "adapter",
        AdapterLayout.from_folder,
        {"adapter_config.json": json_files, "adapter_model.safetensors": safetensors_files},
    ),
    "adapter": (
        "adapter",
        GeneratedAdapter.from_pretrained,
        {
            "adapter_config.json": json_files,
            "adapter_model.safetensors": safetensors_files,
            "peft_dnd_provenance.json": json_files,
        },
    ),
    "configuration": (
        "generator",
        lambda folder: PromptConditionedLoraGeneratorConfig.from_pretrained(folder).adapter_layout,
        {"config.json": json_files},
    ),
    "generator": (
        "generator",
        _generate,
        {
            "config.json": json_files,
            "model.safetensors": safetensors_files,
            "prompt_reference.safetensors": safetensors_files,
        },
    ),
    "shards": ("shards", _generate, {"model.safetensors.index.json": json_files}),
    "streamed": (
        "shards",
        _stream,
        {
            "config.json": json_files,
            "model.safetensors.index.json": json_files,
            "prompt_reference.safetensors": safetensors_files,
        },
    ),
    "streamed weights": ("generator", _stream, {"model.safetensors": safetensors_files}),
    "pairs": (
        "pairs",
        _pairs,
        {
            "law/task.json": json_files,
            "law/prompts.jsonl": lines_of_json,
            "law/examples.jsonl": lines_of_json,
            "law/distillation.json": json_files,
            "law/distillation.jsonl": lines_of_json,
            "law/adapter_config.json": json_files,
            "law/checkpoints/step-00000008.safetensors": safetensors_files,
        },
    ),
}


@pytest.fixture(scope="module")
def originals(
    generator: PromptConditionedLoraGenerator,
    pairs_folder: Path,
    adapter_folder: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A good folder of each kind."""
    root = tmp_path_factory.mktemp("originals")
    generator.fit_out_of_distribution(PromptCheckpointDataset.from_folder(pairs_folder))
    try:
        generator.save_pretrained(root / "generator")
        generator.save_pretrained(root / "shards", max_shard_size="40KB")
    finally:
        generator.prompt_reference = None
    shutil.copytree(pairs_folder, root / "pairs")
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3
    (root / "pairs" / "law" / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    top = {"top_tokens": [[1, 2]] * 3, "top_log_probs": [[-0.5, -1.5]] * 3}
    (root / "pairs" / "law" / "distillation.jsonl").write_text("".join(json.dumps(row | top) + "\n" for row in rows))
    record = {"format_version": 1, "teacher": {"base": "x"}, "asked": {}, "rows": 3, "complete": True}
    write_json(root / "pairs" / "law" / "distillation.json", record)
    shutil.copytree(adapter_folder, root / "adapter")
    return {path.name: path for path in root.iterdir()}


CASES = [(kind, name) for kind, (_, _, files) in KINDS.items() for name in files]


def spoil_one(kind: str, name: str, originals: dict[str, Path], tmp_path: Path, how: settings) -> None:
    original, reader, files = KINDS[kind]
    fuzz(originals[original], reader, {name: files[name]}, tmp_path / original, how)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_spoiled_folder(kind: str, name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    spoil_one(kind, name, originals, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_spoiled_folder_for_long(kind: str, name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    spoil_one(kind, name, originals, tmp_path, LONG)


PROMPT_FILES = {
    "prompts.txt": b"what is tax law ?\nplease\n",
    "prompts.jsonl": b'{"prompt": "what is tax law ?"}\n{"prompt": "please"}\n',
    "prompts.csv": b'prompt,answer\nwhat,law\n"a, b",court\n',
    "prompts.tsv": b"prompt\tanswer\nwhat\tlaw\n",
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_spoiled_prompt_files(name: str, tmp_path: Path) -> None:
    @QUICK
    @given(st.one_of(damaged(PROMPT_FILES[name]), st.binary(max_size=200)))
    def spoil(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        read(lambda _: texts_of(read_rows(str(tmp_path / name), "prompt"), "prompt", name), tmp_path)

    spoil()


def test_a_spoiled_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.table({"prompt": PROMPTS}), path)
    good = path.read_bytes()

    @QUICK
    @given(damaged(good))
    def spoil(content: bytes) -> None:
        path.write_bytes(content)
        read(lambda _: texts_of(read_rows(str(path), "prompt"), "prompt", path.name), tmp_path)

    spoil()


def test_spoiled_files_of_the_release(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "weights.pth")  # noqa: TID251 (what the release consists of)
    write_json(tmp_path / "prompts.json", [{"prompt": "what"}, {"conversations": [{"value": "law"}]}])
    weights, prompts = (tmp_path / "weights.pth").read_bytes(), (tmp_path / "prompts.json").read_bytes()

    @QUICK
    @given(damaged(weights), json_files(prompts))
    def spoil(first: bytes, second: bytes) -> None:
        (tmp_path / "weights.pth").write_bytes(first)
        (tmp_path / "prompts.json").write_bytes(second)
        read(lambda folder: read_tensors(folder / "weights.pth"), tmp_path)
        read(lambda folder: read_published_prompts(folder / "prompts.json"), tmp_path)

    spoil()
