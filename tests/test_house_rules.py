# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Rules of the house that a machine can check: who may import whom, what import costs, what may not be written."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_dnd


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_dnd"

# The rooms from the ground up: each may import only those that stand before it.
ROOMS = [
    "version",
    "errors",
    "files",
    "processes",
    "progress",
    "hub",
    "stored_weights",
    "lora",
    "layout",
    "tokenizer",
    "published_tokenizer",
    "settings",
    "prompts",
    "condition_text",
    "text_encoder",
    "text_encoder_blocks",
    "text_encoder_loading",
    "sentence_transformer_outputs",
    "sentence_transformer",
    "hidden_states_encoder",
    "padded_states",
    "representative",
    "decoders",
    "positions",
    "losses",
    "factor_losses",
    "configuration",
    "matching",
    "loading",
    "model_card",
    "adapter",
    "conditioning",
    "out_of_distribution",
    "generation",
    "modeling",
    "streaming",
    "dnd_config",
    "integration",
    "examples",
    "prompt_pool",
    "pairs",
    "initialization",
    "pair_writer",
    "collection",
    "task_slices",
    "published_files",
    "published",
    "data",
    "collator",
    "pair_statistics",
    "task_loss",
    "evaluation",
    "training_args",
    "objective",
    "fitting_inputs",
    "uploads",
    "trainer",
    "cli",
]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            rooms.update(names)
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_downwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ROOMS, f"{room} has no place in the order of rooms"
    allowed = set(ROOMS[: ROOMS.index(room)])
    assert imported_rooms(path) <= allowed


def test_decoders_and_losses_know_nothing_of_the_rest() -> None:
    for path in [*(PACKAGE / "decoders").glob("*.py"), PACKAGE / "losses.py"]:
        assert imported_rooms(path) <= {"errors"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_inside_a_function_hides_a_circle(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"


def test_a_pickle_is_read_in_one_place() -> None:
    readers = [path.name for path in sources() if "torch.load(" in path.read_text(encoding="utf-8")]
    assert readers == ["published_files.py"]


def test_every_file_is_short_and_licensed() -> None:
    for folder in ("src", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert lines[0].startswith("# Copyright"), path
            assert len(lines) <= 450, f"{path} has {len(lines)} lines"


def test_every_public_name_stands_in_the_reference() -> None:
    reference = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").rglob("*.md"))
    missing = [
        name for name in peft_dnd.__all__ if not name.startswith("_") and not re.search(rf"\b{name}\b", reference)
    ]
    assert not missing


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True)


def test_import_is_quiet_and_light() -> None:
    script = """
import json, logging, sys
before = {}
import peft, transformers
handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
known = set(sys.modules)
import peft_dnd
assert list(logging.getLogger().handlers) == handlers and logging.getLogger().level == level
print(json.dumps(sorted(set(sys.modules) - known)))
"""
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    brought = json.loads(result.stdout)
    heavy = {"sentence_transformers", "transformers.trainer", "datasets", "trl", "sklearn", "scipy", "pandas"}
    assert not heavy & set(brought)


def test_fitting_names_load_when_asked() -> None:
    result = run_python("from peft_dnd import *; import peft_dnd; print(DnDTrainer.__name__, len(dir(peft_dnd)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("DnDTrainer")
    with pytest.raises(AttributeError, match="typo"):
        _ = peft_dnd.typo
