# SPDX-License-Identifier: Apache-2.0
"""What a pairs folder is refused for, and in which words."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.collecting import write, write_pairs

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.errors import (
    CorruptFileError,
    FormatVersionError,
    LayoutError,
    PairsFolderError,
    PromptError,
    WeightValueError,
)
from peft_dnd.pairs.dataset import PromptCheckpointDataset
from peft_dnd.pairs.folder import checkpoint_path, read_task, write_task
from peft_dnd.pairs.prompt_pool import read_prompts, write_prompts
from peft_dnd.storage.files import read_safetensors, write_safetensors


@pytest.fixture
def pairs(tmp_path: Path, layout: AdapterLayout) -> Path:
    return write_pairs(tmp_path / "pairs", layout)


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | changes), encoding="utf-8")


@pytest.mark.parametrize("sub", ["nowhere", "law/task.json"])
def test_no_folder(pairs, sub):
    with pytest.raises(PairsFolderError, match=rf"no folder '.*{sub}'"):
        PromptCheckpointDataset.from_folder(pairs / sub)


def test_a_folder_without_tasks(tmp_path):
    with pytest.raises(PairsFolderError, match=r"no task at all.*none"):
        PromptCheckpointDataset.from_folder(tmp_path)


def test_the_folder_of_one_task(pairs):
    with pytest.raises(PairsFolderError, match=r"the folder of one task\. Pass the folder that it lies in"):
        PromptCheckpointDataset.from_folder(pairs / "law")


def test_an_unknown_task_lists_the_known(pairs):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    names = re.escape("'law', 'medicine', 'task 2', 'task 10'")
    for call in (
        lambda: PromptCheckpointDataset.from_folder(pairs, tasks=["law", "lore"]),
        lambda: dataset.split(held_out=["lore"]),
        lambda: dataset.prompts("lore"),
    ):
        with pytest.raises(PairsFolderError, match=rf"no task 'lore'.*{names}"):
            call()


def test_a_split_that_leaves_nothing(pairs):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    for held_out in ([], dataset.tasks):
        with pytest.raises(PairsFolderError, match="one of the two parts empty"):
            dataset.split(held_out)


def test_a_task_without_its_record(pairs):
    (pairs / "law" / "task.json").unlink()
    with pytest.raises(PairsFolderError, match=r"no task\.json in '.*law'.*Collect the task again"):
        PromptCheckpointDataset.from_folder(pairs)


def test_an_incomplete_task(pairs):
    write_task(pairs / "law", dataclasses.replace(read_task(pairs / "law"), complete=False, steps=()))
    with pytest.raises(PairsFolderError, match=r"'law'.*incomplete.*3 checkpoints so far.*tasks="):
        PromptCheckpointDataset.from_folder(pairs)


def test_two_tasks_of_one_name(pairs):
    shutil.copytree(pairs / "law", pairs / "copy of law")
    with pytest.raises(PairsFolderError, match=r"copy of law' and '.*law' both call their task 'law'"):
        PromptCheckpointDataset.from_folder(pairs)


def test_a_missing_checkpoint(pairs):
    checkpoint_path(pairs / "law", 2).unlink()
    with pytest.raises(PairsFolderError, match=r"'law' lacks 1 of its 3 checkpoints.*step-00000002"):
        PromptCheckpointDataset.from_folder(pairs)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_task_without_prompts(pairs, content):
    path = pairs / "law" / "prompts.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(PairsFolderError, match=r"'law' has no prompts.*prompts\.jsonl"):
        PromptCheckpointDataset.from_folder(pairs)


def test_an_empty_prompt(pairs):
    write_prompts(pairs / "law", ["one", " "])
    with pytest.raises(PromptError, match=r"law/prompts\.jsonl'\[1\] is only white space"):
        PromptCheckpointDataset.from_folder(pairs)


@pytest.mark.parametrize("line", ['{"prompt": "cut', '{"text": "a"}', '{"prompt": 3}', "[]", "\udcff"])
def test_a_corrupt_line_of_prompts_is_named(pairs, line):
    path = pairs / "law" / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptFileError, match=r"Line 2 of '.*law/prompts\.jsonl'"):
        PromptCheckpointDataset.from_folder(pairs)


def test_prompts_of_any_script_come_back_as_they_were(tmp_path):
    prompts = ("tab\tnew\nline\r\n", "\u2028 \x85 \x0c", "数学 🙂", 'quote " and \\', "x" * 100_000)
    write_prompts(tmp_path, prompts)
    assert read_prompts(tmp_path) == prompts


@pytest.mark.parametrize("damage", ["cut short", "no safetensors", "empty"])
def test_a_corrupt_checkpoint_is_found_at_once(pairs, damage):
    path = checkpoint_path(pairs / "task 2", 2)
    content = path.read_bytes()
    path.write_bytes({"cut short": content[:-10], "no safetensors": b"\x80\x04pickle" * 9, "empty": b""}[damage])
    with pytest.raises(CorruptFileError, match=r"task 2/checkpoints/step-00000002\.safetensors'"):
        PromptCheckpointDataset.from_folder(pairs)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format_version": "one"}', '{"format_version": 1, "task": 3}']
)
def test_a_corrupt_record(pairs, content):
    (pairs / "law" / "task.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"law/task\.json'"):
        PromptCheckpointDataset.from_folder(pairs)


def test_a_newer_format(pairs):
    edit(pairs / "law" / "task.json", format_version=2, peft_dnd_version="9.9")
    with pytest.raises(FormatVersionError, match=r"format 2, written by peft_dnd 9\.9.*up to 1\..*pip install"):
        PromptCheckpointDataset.from_folder(pairs)


def test_a_task_of_another_layout_names_both_and_the_first_difference(pairs, layout):
    modules = list(layout.modules)
    out = modules[3].shape_b[0]
    modules[3] = dataclasses.replace(modules[3], shape_b=(out + 1, modules[3].rank))
    write(pairs / "other", dataclasses.replace(layout, modules=tuple(modules)), 1)
    pattern = (
        rf"Tasks 'law' \('.*law/.*step-00000001.*'\) and 'other' \('.*other/.*'\).*{re.escape(modules[3].name)}.*"
        rf"shape_b \({out}, 3\) in the first and \({out + 1}, 3\)"
    )
    with pytest.raises(LayoutError, match=pattern):
        PromptCheckpointDataset.from_folder(pairs)


def test_another_scaling_is_another_layout(pairs):
    edit(pairs / "medicine" / "adapter_config.json", lora_alpha=12)
    with pytest.raises(LayoutError, match=r"'law'.*'medicine'.*alpha 6.* 12"):
        PromptCheckpointDataset.from_folder(pairs)


def test_checkpoints_of_one_task_that_differ_name_the_file(pairs):
    path = checkpoint_path(pairs / "law", 3)
    tensors = read_safetensors(path)
    tensors = {key: tensor for key, tensor in tensors.items() if ".layers.1.mlp.up_proj." not in key}
    write_safetensors(path, tensors)
    with pytest.raises(LayoutError, match=r"step-00000003.*layers\.1\.mlp\.up_proj' is adapted in the first and not"):
        PromptCheckpointDataset.from_folder(pairs)


def test_a_nan_names_file_and_key_when_it_is_read(pairs, layout):
    path = checkpoint_path(pairs / "law", 2)
    tensors = read_safetensors(path)
    key = layout.tensors[5].key
    tensors[key].view(-1)[3] = float("nan")
    write_safetensors(path, tensors)
    dataset = PromptCheckpointDataset.from_folder(pairs)
    assert dataset[0]["task"] == "law"
    with pytest.raises(WeightValueError, match=rf"law/checkpoints/step-00000002.*{re.escape(key)}"):
        dataset[1]


def test_tasks_that_did_not_start_alike_are_warned_of(pairs, layout, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_dnd"):
        PromptCheckpointDataset.from_folder(pairs)
        assert caplog.text == ""
        write(pairs / "other", layout, 1, initialization="sha256:1")
        PromptCheckpointDataset.from_folder(pairs)
    assert "'law' and 'other' did not start from one common initialisation" in caplog.text
