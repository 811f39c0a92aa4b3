# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: help that is quick and whole, suggestions, exit codes, real processes, and its reference."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command

from peft_dnd import __version__
from peft_dnd.cli.app import app
from peft_dnd.cli.generate import generate
from peft_dnd.text.out_of_distribution import ACTIONS


ROOT = Path(__file__).parents[2]
VERBS = dict(get_command(app).commands)
DOOR = [sys.executable, "-c", "import sys, peft_dnd_cli; sys.exit(peft_dnd_cli.main())"]


def options_of(verb: str) -> list[str]:
    """The long options of a verb but for --help."""
    return [name for option in VERBS[verb].params for name in option.opts if name.startswith("--")]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_a_whole_example(run, verb: str) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0 and not ran.err
    example = ran.out.partition("Example:\n")[2]
    assert re.search(rf"^ +peft-dnd {verb} \S", example, flags=re.MULTILINE)
    for option in re.findall(r"(?<!\w)--[a-z][a-z-]+", example):
        assert option in options_of(verb), f"the example of {verb} has {option}"


@pytest.mark.parametrize("verb", VERBS)
def test_the_reference_documents_every_verb_and_option(verb: str) -> None:
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    section = re.search(rf"^## `{verb}`\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, f"no section on {verb}"
    shared = text.partition("## ")[0]
    missing = [name for name in options_of(verb) if f"`{name}" not in section[1] + shared]
    assert not missing
    documented = set(re.findall(r"`(--[a-z][a-z-]+)", section[1]))
    negated = {name for option in VERBS[verb].params for name in option.secondary_opts}
    assert documented <= {*options_of(verb), *negated}, "options that do not exist"


def test_commands_in_documents_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for verb, rest in re.findall(r"peft-dnd ([a-z][a-z-]+)((?:[^\n`]|\\\n)*)", text):
            assert verb in VERBS, f"{page.name}: peft-dnd {verb}"
            for option in re.findall(r"(?<!\S)(--[a-z][a-z-]+)", rest):
                assert option in options_of(verb), f"{page.name}: peft-dnd {verb} {option}"


def test_usage(run) -> None:
    assert run("--version") == (0, f"peft-dnd {__version__}\n", "")
    for arguments, words in (
        ((), "missing command"),
        (("generat",), "'generate'"),
        (("generate", "g", "p", "a", "--sed", "1"), "--seed"),
        (("generate",), "generator"),
    ):
        ran = run(*arguments)
        assert ran.code == 2 and words in ran.err.lower() and not ran.out


def test_choices_are_the_librarys() -> None:
    annotated = get_type_hints(generate, include_extras=False)["out_of_distribution"]
    choices, nothing = get_args(annotated)
    assert get_args(choices) == ACTIONS and nothing is type(None)


def test_an_interrupted_command_ends_without_a_traceback(run, generator_folder, monkeypatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_dnd.generator.PromptConditionedLoraGeneratorConfig.from_pretrained", interrupt)
    ran = run("inspect", generator_folder)
    assert ran.code == 130 and ran.err.endswith("peft-dnd: interrupted.\n") and "Traceback" not in ran.err


def test_a_bug_is_no_error_of_the_user(run, generator_folder, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("peft_dnd.generator.PromptConditionedLoraGeneratorConfig.from_pretrained", fail)
    with pytest.raises(ZeroDivisionError):
        run("inspect", generator_folder)


def test_help_and_wrong_paths_do_not_wait_for_the_library() -> None:
    script = """
import sys
import peft_dnd_cli
for arguments in (["--help"], ["generate", "--help"], ["fit", "--help"], ["generate", "g", "no-such-file", "a"]):
    sys.argv = ["peft-dnd", *arguments]
    peft_dnd_cli.main()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"peft_dnd", "peft", "torch", "transformers", "numpy",
                                                                 "huggingface_hub", "yaml", "rich"}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.rstrip().endswith("[]")
    assert "no-such-file" in ran.stderr


def test_a_real_process_writes_json_to_standard_output_alone(generator_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(generator_folder), "-", str(tmp_path / "adapter"), "--json"]
    ran = subprocess.run([*DOOR, *arguments], input="what is the law ?\n", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["adapter"] == str(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_a_real_process_that_is_interrupted_ends_with_130(generator_folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", str(generator_folder), "-", str(tmp_path / "adapter")]
    process = subprocess.Popen(
        [*DOOR, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores interrupts, and so would whatever it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(3)  # it waits for standard input
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in error and "Traceback" not in error
    assert not (tmp_path / "adapter").exists()
