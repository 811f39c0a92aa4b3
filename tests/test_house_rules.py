# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a machine can check: who may import whom, what import costs, what may not be written."""

from __future__ import annotations

import ast
import importlib
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

# The rooms in the order in which data flows: each may import only those that stand before it. CONTRIBUTING.md says
# what each holds.
ROOMS = [
    "version",
    "errors",
    "storage",
    "adapters",
    "text",
    "decoders",
    "pairs",
    "policy",
    "generator",
    "peft_integration",
    "evaluation",
    "fitting",
    "published",
    "serving",
    "engines",
    "synthesis",
    "page",
    "cli",
]
# What may be imported within a function: heavy, and needed by few.
HEAVY = {
    "gguf",
    "gradio",
    "lm_eval",
    "matplotlib",
    "pandas",
    "pyarrow",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "starlette",
    "vllm",
}
# The command's verbs import all but these and one another when they run, so that `--help` waits for nothing.
LIGHT = {*sys.stdlib_module_names, "typer"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def faces() -> list[Path]:
    """The stubs that say which names a package's `__init__.py` loads when they are asked for."""
    return sorted(PACKAGE.rglob("__init__.pyi"))


def module_of(path: Path) -> str:
    """A file's module, relative to the package: `"pairs.writer"`; a package's own is its name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules, or names from a package itself, that a file imports, wherever in the file."""
    folder = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = folder[: len(folder) - node.level + 1] if node.level else ()
            ends = [node.module] if node.module else [name.name for name in node.names]
            found.update(".".join([*package, end]) for end in ends)
    return found


def own_imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, as `module_of` names them; `""` is the package itself."""
    full = {name for name in imported_modules(path) if name.split(".")[0] == PACKAGE.name}
    return {name.removeprefix(PACKAGE.name).removeprefix(".") for name in full}


def upward_imports(sources: Mapping[str, set[str]]) -> list[str]:
    """What runs against the order of `ROOMS`: `"importer <- imported"`."""
    return sorted(
        f"{module} <- {imported}"
        for module, imports in sources.items()
        for imported in imports
        if module and (not imported or ROOMS.index(imported.split(".")[0]) > ROOMS.index(module.split(".")[0]))
    )


def first_circle(sources: Mapping[str, set[str]]) -> tuple[str, ...] | None:
    try:
        tuple(TopologicalSorter(sources).static_order())
    except CycleError as error:
        return tuple(error.args[1])
    return None


# What a face loads when it is asked counts as imported by it: so a circle through a face is one as well.
IMPORTS = {module_of(path): own_imports(path) for path in sources()}
for path in faces():
    IMPORTS[module_of(path)] |= own_imports(path)


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("py.typed", "__pycache__")
    }
    assert rooms - {"__init__", "__init__.pyi"} == set(ROOMS)


def test_the_map_for_contributors_is_that_of_the_rooms() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, flags=re.MULTILINE)
    assert re.findall(r"\w+", " ".join(rows)) == ROOMS
    assert set(re.findall(r"\b(\w+)\[\1\]", text)) <= set(ROOMS), "the picture has a room of its own"


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
    turned["text.prompts"].add("text.prompts_and_answers")
    assert upward_imports(turned) == [] and first_circle(turned) is not None
    assert first_circle({**IMPORTS, "adapters.layout": {"adapters"}}) is not None, "a circle through a face"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from ..generator.modeling import PromptConditionedLoraGenerator", "generator.modeling"),
        ("from ..generator import PromptConditionedLoraGenerator", "generator"),
        ("from .. import generator", "generator"),
        ("from peft_dnd.generator import modeling", "generator"),
        ("import peft_dnd.generator.modeling", "generator.modeling"),
        ("from peft_dnd import DnDConfig", ""),
    ],
)
def test_however_it_is_written_an_upward_import_is_seen(
    line: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "peft_dnd")
    file = tmp_path / "peft_dnd" / "adapters" / "layout.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"def late():\n    {line}\n", encoding="utf-8")
    assert own_imports(file) == {found}
    assert upward_imports({"adapters.layout": own_imports(file)}) == [f"adapters.layout <- {found}"]


def test_decoders_know_nothing_but_where_tokens_belong() -> None:
    known = set().union(*(imports for module, imports in IMPORTS.items() if module.split(".")[0] == "decoders"))
    assert {module for module in known if not module.startswith("decoders")} == {"adapters.positions", "errors"}


def within_functions(path: Path) -> list[ast.Import | ast.ImportFrom]:
    functions = [node for node in ast.walk(syntax_of(path)) if isinstance(node, ast.FunctionDef)]
    inside = [node for function in functions for node in ast.walk(function)]
    return [node for node in inside if isinstance(node, ast.Import | ast.ImportFrom)]


def modules_named(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The outermost package of each module that a statement imports; `"."` for a relative import."""
    if isinstance(node, ast.Import):
        return {name.name.split(".")[0] for name in node.names}
    return {"." if node.level else str(node.module).split(".")[0]}


@pytest.mark.parametrize("path", [path for path in sources() if path.parent.name != "cli"], ids=module_of)
def test_only_what_is_heavy_is_imported_within_a_function(path: Path) -> None:
    for node in within_functions(path):
        assert modules_named(node) <= HEAVY, f"line {node.lineno}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=module_of)
def test_a_verb_imports_the_library_when_it_runs_and_nothing_else_then(path: Path) -> None:
    """Beside the library there is what that needs too, but nothing light or of the command's own hides there."""
    late = within_functions(path)
    for node in late:
        assert not modules_named(node) & {"."}, f"line {node.lineno}: a file of the command is light, import it above"
        assert not modules_named(node) & LIGHT, f"line {node.lineno}: this is light, import it above"
    types_only = [node for node in syntax_of(path).body if isinstance(node, ast.If)]
    assert all(ast.unparse(node.test) == "TYPE_CHECKING" for node in types_only)
    for node in syntax_of(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert modules_named(node) <= LIGHT | {"."}, f"line {node.lineno}"


def changes_of_peft(path: Path) -> list[str]:
    """What a file assigns to of that which PEFT defines, by `=` or by `setattr`."""
    tree = syntax_of(path)
    names = {
        (name.asname or name.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
        if str(node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0] == "peft"
    }
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += [target.value for target in node.targets if isinstance(target, ast.Attribute)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets.append(node.args[0])
    return [text for text in map(ast.unparse, targets) if text.split(".")[0] in names]


def test_peft_is_changed_in_one_place() -> None:
    changes = {module_of(path): changes_of_peft(path) for path in sources()}
    assert {module: changed for module, changed in changes.items() if changed} == {
        "peft_integration.injection": ["BaseTuner"]
    }


def test_a_pickle_is_read_in_one_place() -> None:
    readers = [module_of(path) for path in sources() if "torch.load(" in path.read_text(encoding="utf-8")]
    assert readers == ["published.files"]


def test_every_file_is_short_and_licensed() -> None:
    for folder in ("src", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert lines[0] == "# SPDX-License-Identifier: Apache-2.0", path
            assert len(lines) <= 450, f"{path} has {len(lines)} lines"


def test_the_oldest_torch_that_is_tested_is_the_oldest_that_is_declared() -> None:
    tested = re.search(r"^OLDEST_TORCH \?= (\S+)\.0$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert tested and f'"torch>={tested[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def names_of(package: str) -> set[str]:
    return set(importlib.import_module(f"peft_dnd.{package}").__all__)


@pytest.mark.parametrize("package", [*filter(None, map(module_of, faces())), "decoders"])
def test_every_name_of_a_face_can_be_imported_and_stands_in_the_reference(package: str) -> None:
    page = (ROOT / "docs" / "reference" / f"{package}.md").read_text(encoding="utf-8")
    assert all(hasattr(importlib.import_module(f"peft_dnd.{package}"), name) for name in names_of(package))
    assert names_of(package) <= set(re.findall(r"`(\w+)`", page))
    in_bold = set(re.findall(r"\*\*`(\w+)`\*\*", page))
    assert in_bold == names_of(package) & set(peft_dnd.__all__), "in bold is what peft_dnd itself has too"


@pytest.mark.parametrize("path", faces(), ids=module_of)
def test_no_name_of_a_face_is_that_of_a_file_beside_it(path: Path) -> None:
    """Whichever of the two was imported first, the face would give the file."""
    names = re.findall(r" as (\w+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert names and set(names) & {beside.stem for beside in path.parent.iterdir()} == set()


def test_the_index_leads_from_every_public_name_to_its_package() -> None:
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    leads = dict(re.findall(r"\[`(\w+)`\]\((\w+)\.md", index))
    assert leads.keys() == set(peft_dnd.__all__) - {"__version__"}
    assert [name for name, package in leads.items() if name not in names_of(package)] == []


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
