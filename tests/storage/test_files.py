# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole can be read by whom the umask lets."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_dnd.storage.files import staged_directory, write_json, write_safetensors


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors and `tempfile` make files that only their owner may read; a shared folder must not end so."""
    with staged_directory(tmp_path / "folder") as staged:
        (staged / "inside").mkdir()
        save_file({"x": torch.zeros(2)}, staged / "inside" / "model.safetensors")
    write_safetensors(tmp_path / "folder" / "adapter.safetensors", {"x": torch.zeros(2)})
    write_json(tmp_path / "folder" / "config.json", {})
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
