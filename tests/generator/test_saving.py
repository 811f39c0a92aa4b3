# SPDX-License-Identifier: Apache-2.0
"""Where nothing can be written, or a process is killed in writing: the place is named, and what was good stays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.collecting import PROMPTS, fresh_adapter, in_child_process, needs_fork, train
from support.comparing import bytes_below
from support.constants import TASK_PROMPTS
from torch import nn

from peft_dnd import (
    CheckpointCollector,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    write_examples,
)
from peft_dnd.cli.app import main
from peft_dnd.errors import SavingError
from peft_dnd.pairs.initialization import use_common_initialization
from peft_dnd.storage.files import staged_directory, staged_file, write_json, write_safetensors


resource = pytest.importorskip("resource")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can make a file")
LARGE = {"x": torch.zeros(10_000)}


@contextmanager
def small_files_only(size: int = 4096) -> Iterator[None]:
    """Within this context larger files cannot be written, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hidden_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def check(error: SavingError, target: Path, number: int, words: str = "untouched") -> None:
    assert error.errno == number and isinstance(error, OSError)
    assert error.filename == str(target)
    assert str(error).startswith(f"Cannot save to {str(target)!r}: ")
    assert os.strerror(number) in str(error) and words in str(error)
    assert ".peft_dnd_staging" not in str(error)


@pytest.mark.parametrize("what", ["generator", "with its encoder", "encoder", "adapter"])
def test_no_room_for_it(what: str, generator: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    model: Any = {"encoder": generator.text_encoder, "adapter": generator.generate_adapter(["court"])}.get(
        what, generator
    )
    options = {"include_text_encoder": True} if what == "with its encoder" else {}
    folder = tmp_path / "deep" / "folder"
    with pytest.raises(SavingError) as caught, small_files_only():
        model.save_pretrained(folder, **options)
    check(caught.value, folder, errno.EFBIG)
    assert list((tmp_path / "deep").iterdir()) == []

    model.save_pretrained(folder, **options)
    before = bytes_below(folder)
    with pytest.raises(SavingError), small_files_only():
        model.save_pretrained(folder, **options)
    assert bytes_below(folder) == before


@on_linux
def test_a_place_where_nobody_can_write(generator: PromptConditionedLoraGenerator) -> None:
    for model in (generator, generator.generate_adapter(["court"])):
        with pytest.raises(SavingError, match="place that you can write to") as caught:
            model.save_pretrained("/proc/nowhere")
        check(caught.value, Path("/proc/nowhere"), errno.ENOENT)


def test_no_room_on_the_command_line(
    generator_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("what is the law ?", encoding="utf-8")
    with small_files_only():
        assert main(["generate", str(generator_folder), str(tmp_path / "prompts.txt"), str(tmp_path / "adapter")]) == 1
    assert f"peft-dnd: Cannot save to {str(tmp_path / 'adapter')!r}: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_no_room_for_a_checkpoint(
    fresh_base: Callable[[], nn.Module], lora_config: LoraConfig, tmp_path: Path
) -> None:
    def collect(common: bool) -> None:
        collector = CheckpointCollector(tmp_path / "pairs" / "law", PROMPTS, last=2, common_initialization=common)
        train(fresh_adapter(fresh_base, lora_config), tmp_path / "run", collector, max_steps=3)

    with pytest.raises(SavingError) as caught, small_files_only():
        collect(common=False)
    check(caught.value, tmp_path / "pairs" / "law" / "checkpoints" / "step-00000002.safetensors", errno.EFBIG)
    with pytest.raises(SavingError) as caught, small_files_only():
        collect(common=True)
    check(caught.value, tmp_path / "pairs" / "initialization", errno.EFBIG)
    assert hidden_below(tmp_path) == []
    collect(common=True)
    assert PromptCheckpointDataset.from_folder(tmp_path / "pairs").num_checkpoints == 2


def test_no_room_for_the_common_initialization(
    fresh_base: Callable[[], nn.Module], lora_config: LoraConfig, tmp_path: Path
) -> None:
    with pytest.raises(SavingError) as caught, small_files_only():
        use_common_initialization(fresh_adapter(fresh_base, lora_config), tmp_path)
    check(caught.value, tmp_path / "initialization", errno.EFBIG)


def test_what_is_written_within_what_is_written_names_the_outer_place(tmp_path: Path) -> None:
    with pytest.raises(SavingError) as caught, staged_directory(tmp_path / "folder") as staged, small_files_only():
        write_safetensors(staged / "inner" / "x.safetensors", LARGE)
    check(caught.value, tmp_path / "folder", errno.EFBIG)


def test_a_failure_after_some_files_moved_says_so(tmp_path: Path) -> None:
    (tmp_path / "b.json").mkdir()
    with pytest.raises(SavingError) as caught, staged_directory(tmp_path) as staged:
        write_json(staged / "a.json", {})
        write_json(staged / "b.json", {})
    check(caught.value, tmp_path, errno.EISDIR, words="Some of its files may be new")
    with pytest.raises(SavingError) as caught:
        write_json(tmp_path / "b.json", {})
    check(caught.value, tmp_path / "b.json", errno.EISDIR)


@pytest.mark.parametrize("staging", [staged_file, staged_directory])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        KeyboardInterrupt(),
        FileNotFoundError(errno.ENOENT, "mine", "data.csv"),
        OSError(errno.ENOSPC, "mine", "/another/disk/cache"),
        OSError(errno.EIO, "mine"),
        OSError("mine"),
    ],
    ids=repr,
)
def test_other_errors_pass_unchanged(staging: Any, error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, staging(tmp_path / "target"):
        raise error
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_rows_is_theirs(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"input_ids": [1]}
        (tmp_path / "no-such-data").read_bytes()

    with pytest.raises(FileNotFoundError, match="no-such-data") as caught:
        write_examples(tmp_path / "law", rows())
    assert not isinstance(caught.value, SavingError)


@needs_fork
def test_a_kill_in_mid_save_leaves_the_earlier_generator(
    generator: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    folder = tmp_path / "generator"
    generator.save_pretrained(folder)
    before = bytes_below(folder)

    def killed() -> None:
        torch.set_num_threads(1)
        # The card comes after the configuration and the weights.
        generator.model_card = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        generator.save_pretrained(folder)

    child = in_child_process(killed)
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    (leftover,) = hidden_below(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in leftover.iterdir()}
    assert bytes_below(folder) == before
    PromptConditionedLoraGenerator.from_pretrained(folder).generate_adapter(["court"])
    generator.save_pretrained(folder)
    assert bytes_below(folder) == before


@needs_fork
def test_a_kill_in_mid_save_leaves_the_earlier_adapter(
    generator: PromptConditionedLoraGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = generator.generate_adapter(["court"]), generator.generate_adapter(["river"])
    first.save_pretrained(tmp_path / "adapter")

    def killed() -> None:
        torch.set_num_threads(1)
        monkeypatch.setattr(
            "peft_dnd.adapters.generated_adapter.may_write_card", lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
        second.save_pretrained(tmp_path / "adapter")

    child = in_child_process(killed)
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    assert len(hidden_below(tmp_path)) == 1
    for adapter in (first, second):
        found = GeneratedAdapter.from_pretrained(tmp_path / "adapter").state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in adapter.state_dict().items())
        second.save_pretrained(tmp_path / "adapter")


def test_what_a_killed_process_left_is_no_task(pairs_folder: Path, tmp_path: Path) -> None:
    pairs = Path(shutil.copytree(pairs_folder, tmp_path / "pairs"))
    shutil.copytree(pairs / "law", pairs / ".peft_dnd_staging_x")
    (pairs / "law" / "checkpoints" / ".peft_dnd_staging_y.safetensors").write_bytes(b"half")
    (pairs / "law" / ".peft_dnd_staging_z.json").write_text("{", encoding="utf-8")
    found = PromptCheckpointDataset.from_folder(pairs)
    assert found.tasks == PromptCheckpointDataset.from_folder(pairs_folder).tasks
    assert len(found.checkpoints("law")) == 3


def test_what_another_generator_knew_of_its_tasks_does_not_stay_in_its_folder(
    generator_folder: Path, tmp_path: Path
) -> None:
    knowing = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    knowing.fit_out_of_distribution(TASK_PROMPTS)
    knowing.save_pretrained(tmp_path)
    assert PromptConditionedLoraGenerator.from_pretrained(tmp_path).prompt_reference is not None
    PromptConditionedLoraGenerator.from_pretrained(generator_folder).save_pretrained(tmp_path)
    assert PromptConditionedLoraGenerator.from_pretrained(tmp_path).prompt_reference is None
