# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a machine can check: who may import whom, what import costs, what may not be written."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_dnd


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_dnd"

# The rooms in the order in which data flows: each may import only those that stand before it.
ROOMS = [
    "version",
    "errors",
    "storage",
    "adapters",
    "text",
    "decoders",
    "pairs",
    "generator",
    "peft_integration",
    "evaluation",
    "fitting",
    "published",
    "cli",
]
# What may be imported within a function: heavy, and needed by few.
HEAVY = {"lm_eval", "matplotlib", "scipy", "sentence_transformers", "sklearn"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """A file's module, relative to the package: `"pairs.writer"`; a package's own is its name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def own_imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in the file, as `module_of` names them."""
    folder = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found.update([".".join(parts)] if node.module else [".".join([*parts, name.name]) for name in node.names])
    return found


def upward_imports(sources: Mapping[str, set[str]]) -> list[str]:
    """What runs against the order of `ROOMS`: `"importer <- imported"`."""
    return sorted(
        f"{module} <- {imported}"
        for module, imports in sources.items()
        for imported in imports
        if module and ROOMS.index(imported.split(".")[0]) > ROOMS.index(module.split(".")[0])
    )


def first_circle(sources: Mapping[str, set[str]]) -> tuple[str, ...] | None:
    try:
        tuple(TopologicalSorter(sources).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return None


IMPORTS = {module_of(path): own_imports(path) for path in sources()}


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("py.typed", "__pycache__")
    }
    assert rooms - {"__init__", "__init__.pyi"} == set(ROOMS)


def test_rooms_import_only_downwards() -> None:
    assert upward_imports(IMPORTS) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert first_circle(IMPORTS) is None


def test_an_import_turned_round_is_found() -> None:
    turned = {module: set(imports) for module, imports in IMPORTS.items()}
    turned["adapters.layout"].add("generator.modeling")
    assert upward_imports(turned) == ["adapters.layout <- generator.modeling"]
    assert first_circle(turned) is not None
    turned = {module: set(imports) for module, imports in IMPORTS.items()}
    turned["text.prompts"].add("text.condition_text")
    assert upward_imports(turned) == [] and first_circle(turned) is not None


def test_decoders_know_nothing_but_where_tokens_belong() -> None:
    known = set().union(*(imports for module, imports in IMPORTS.items() if module.split(".")[0] == "decoders"))
    assert {module for module in known if not module.startswith("decoders")} == {"adapters.positions", "errors"}


@pytest.mark.parametrize("path", sources(), ids=module_of)
def test_only_what_is_heavy_is_imported_within_a_function(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    assert {name.name.split(".")[0] for name in node.names} <= HEAVY, f"line {node.lineno}"
                elif isinstance(node, ast.ImportFrom):
                    assert not node.level and str(node.module).split(".")[0] in HEAVY, f"line {node.lineno}"


def test_peft_is_changed_in_one_place() -> None:
    """Nowhere else is an attribute of what PEFT defines assigned to."""
    for path in sources():
        names = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "peft":
                names.update(name.asname or name.name for name in node.names)
        changed = [
            target
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in names
        ]
        assert bool(changed) == (module_of(path) == "peft_integration.injection"), path


def test_a_pickle_is_read_in_one_place() -> None:
    readers = [module_of(path) for path in sources() if "torch.load(" in path.read_text(encoding="utf-8")]
    assert readers == ["published.files"]


def test_every_file_is_short_and_licensed() -> None:
    for folder in ("src", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert lines[0] == "# SPDX-License-Identifier: Apache-2.0", path
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
