# SPDX-License-Identifier: Apache-2.0
"""Every command in README, docs and examples is one that there is, with options and arguments that it takes."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.documented import PAGES, ROOT, blocks, name_of
from typer.main import get_command

from peft_dnd.cli.app import app, main
from peft_dnd.fitting.arguments import DnDTrainingArguments


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[import-not-found,no-redef]

pytest_plugins = ("support.documented",)

COMMAND: Any = get_command(app)
# A page's commands of these verbs run as they stand, on tiny folders of the same names. Whatever else is to be said on
# such a line comes last, and wins.
RUNS = {"generate": [], "inspect": [], "card": [], "collect": ["--max-steps", "2", "--set", "last=2"]}
ON_PAGES = {"docs/how-to/use-a-generator.md", "docs/how-to/collect-pairs.md"}


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block of shell code, in words."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            yield words[: words.index("|")]
            words = words[words.index("|") + 1 :]
        if words:
            yield words


def all_commands(program: str) -> list[Any]:
    """Where each command of a program stands, and its words after the program's own."""
    found = []
    for page in PAGES:
        for code in blocks(page, "bash", "text"):
            if "peft-dnd" in code or "python " in code or "make " in code or "pip " in code or "torchrun" in code:
                found += [(name_of(page), words) for words in safe_commands(code) if words[0] == program]
    return [pytest.param(words[1:], id=f"{page}: {' '.join(words)}"[:90]) for page, words in found]


def safe_commands(code: str) -> list[list[str]]:
    try:
        return list(commands(code))
    except ValueError:  # text that is no shell code: an error message for one, with a quotation mark in it
        return []


def parse(words: list[str]) -> None:
    """Have the command line read by the verb's own parser, without running it; usage errors are raised."""
    verb = COMMAND.commands[words[0]]
    with verb.make_context(words[0], list(words[1:])):
        pass


@pytest.mark.parametrize("words", [*all_commands("peft-dnd")])
def test_a_command_is_read_by_its_own_parser(words: list[str]) -> None:
    usage = any(word.startswith("[") or word.isupper() for word in words)
    words = [word.strip("[]") for word in words]
    if usage:  # of alternatives the first
        words = [word.partition("|")[0] for word in words]
    parse(words)
    if usage:
        known = {(parameter.metavar or parameter.name).upper() for parameter in COMMAND.commands[words[0]].params}
        placeholders = [word for word in words if re.fullmatch(r"[A-Z]+", word)]
        named = [word for place, word in enumerate(words) if word in placeholders and words[place - 1][0] != "-"]
        assert set(named) <= known, "a usage line calls the arguments what the verb calls them"


@pytest.mark.parametrize("verb", COMMAND.commands)
def test_the_examples_that_help_shows_are_read_by_the_verb_s_own_parser(verb: str) -> None:
    example = COMMAND.commands[verb].epilog.partition("Example:")[2].replace("\b", "")
    found = [words[1:] for words in commands(example) if words[0] == "peft-dnd"]
    assert found
    for words in found:
        parse(words)


def test_a_wrong_command_is_found() -> None:
    for words, what in (
        (["generate", "g", "p", "a", "--sed", "1"], "--sed"),
        (["generate", "g", "p", "a", "more"], "more"),
        (["generate", "g", "p", "a", "--seed", "one"], "valid int"),
        (["evaluate", "generator"], "pairs"),
    ):
        with pytest.raises(Exception, match=what) as error:
            parse(words)
        assert "UsageError" in {kind.__name__ for kind in type(error.value).__mro__}


def scripts() -> list[Any]:
    """Calls of Python scripts: the script's name, and the words after it."""
    found = []
    for page in PAGES:
        for code in blocks(page, "bash", "text"):
            for words in safe_commands(code):
                (place, *_) = [*(i for i, word in enumerate(words) if word.endswith(".py")), -1]
                if place >= 0 and words[0] != "sbatch":
                    found.append(pytest.param(words[place], words[place + 1 :], id=f"{name_of(page)}: {words[place]}"))
    return found


@pytest.mark.parametrize(("script", "words"), scripts())
def test_scripts_are_there_and_have_the_options(script: str, words: list[str]) -> None:
    places = [ROOT / script] if "/" in script else sorted(ROOT.glob(f"examples/*/{script}"))
    assert [path for path in places if path.is_file()], f"there is no {script}"
    source = places[0].read_text(encoding="utf-8")
    fields = {field.name for field in dataclasses.fields(DnDTrainingArguments)}
    for option in (word for word in words if word.startswith("--")):
        name = option.removeprefix("--").partition("=")[0]
        assert f'"{option}"' in source or name in fields or re.search(rf"^    {name}: ", source, re.M), option
    for path in (word for word in words if word.startswith(("examples/", "benchmarks/")) and "$" not in word):
        assert (ROOT / path).exists(), path


def texts() -> list[Path]:
    return [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").rglob("README.md"))]


@pytest.mark.parametrize("page", texts(), ids=name_of)
def test_targets_extras_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    shell = "".join(blocks(page, "bash"))
    asked = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"^make ([a-z-]+)", shell, flags=re.M)}
    assert asked <= targets, "make has no such target"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        name.strip() for names in re.findall(r"(?:peft-dnd|\.)\[([a-z, -]+)\]", text) for name in names.split(",")
    }
    assert named <= set(extras), "there is no such extra"
    for path in re.findall(r"`((?:examples|benchmarks|docs|tests|src)/[\w./-]*\w)`", text):
        assert (ROOT / path).exists() or re.search(r"_[NS]\b", path), f"there is no {path}"


@pytest.mark.parametrize("page", sorted(ON_PAGES))
def test_commands_run_on_folders_of_the_same_names(
    page: str, documented: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (documented / "pairs").rename("other-pairs")
    ran = 0
    for code in blocks(ROOT / page, "bash"):
        for words in commands(code):
            if words[0] == "peft-dnd" and words[1] in RUNS:
                assert main([*words[1:], *RUNS[words[1]]]) == 0, f"{' '.join(words)}\n{capsys.readouterr().err}"
                ran += 1
    assert ran
