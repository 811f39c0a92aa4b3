# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: the options that each has, what goes to standard output, and suggestions for typing errors."""

from __future__ import annotations

import difflib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no summary; warnings, errors and --json remain.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Base = Annotated[str, typer.Option("--base", help="Folder or Hub id of the base model, with its tokenizer.")]
Device = Annotated[
    str | None, typer.Option(help="Where the models run: cpu, cuda, ...; the first GPU if there is one.")
]
ApplyChatTemplate = Annotated[
    bool | None, typer.Option(help="Whether texts go into the tokenizer's chat template; by default if it has one.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A setting of the recipe, such as training.max_steps=100; may be repeated."
    ),
]


class CommandError(Exception):
    """The input is at fault, as can be told without the library. The command ends with 1 and this message."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known one, or all of them.

    >>> suggestion("promt", ["prompt", "answer"])
    " Did you mean 'prompt'?"
    >>> suggestion("x", ["prompt", "answer"])
    ' Known: answer, prompt.'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(sorted(known)) or 'none'}."


def one_paragraph(error: Exception) -> str:
    """An error's message without line breaks, as other libraries put them in; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def report(facts: Mapping[str, Any], summary: str, *, as_json: bool, quiet: bool) -> None:
    """Print the result of a verb to standard output: as JSON, or in words unless they are not wanted."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    elif not quiet:
        typer.echo(summary)


@contextmanager
def progress(quiet: bool) -> Iterator[None]:
    """Within this context all that other libraries print goes to standard error, or nowhere if it is not wanted."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as transformers_logging

    from peft_dnd.storage.progress import short_bars_hidden

    if not quiet:
        # transformers' Trainer prints what it logs.
        with redirect_stdout(sys.stderr), short_bars_hidden():
            yield
        return
    shown, hub_hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
        if not hub_hidden:
            enable_progress_bars()


def named_places(given: Iterable[str] | None, option: str, form: str) -> dict[str, str]:
    """What an option that may be repeated names: name -> file, folder or Hub id.

    Args:
        given: What the option was given.
        option: How it is called, such as `"--prompts"`.
        form: Of what form each must be, such as `"TASK=FILE"`.

    Raises:
        typer.BadParameter: If one is of another form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for item in given or ():
        name, equals, place = item.partition("=")
        name = name.strip()
        if not (name and equals and place):
            raise typer.BadParameter(f"{option} {item!r} is not of the form {form}.")
        if name in found:
            raise typer.BadParameter(f"{option} names {name!r} twice, {found[name]!r} and {place!r}: give it one.")
        found[name] = place
    return found


def text_of_file(path: Path, what: str) -> str:
    """A text that an option names by its file.

    Raises:
        CommandError: If there is no such file, or it is not in UTF-8.
    """
    try:
        return existing_file(path, what).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{what} {str(path)!r} is not in UTF-8 ({error}). Convert it.") from error


def existing_file(path: Path, what: str) -> Path:
    """The path, if there is a file, or a pipe or terminal such as shells make of `<(...)`.

    Raises:
        CommandError: Otherwise; it says what is there instead.
    """
    if path.is_file() or path.is_fifo() or path.is_char_device():
        return path
    found = "is a folder" if path.is_dir() else "does not exist"
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    near = (
        difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
        if parent.is_dir()
        else []
    )
    hint = f" There is {str(path.parent / near[0])!r}." if near and parent == path.absolute().parent else ""
    raise CommandError(f"{what} {str(path)!r} {found}.{hint} Check the spelling, and from where the path is counted.")


def adapter_place(place: str) -> str:
    """The folder to write an adapter to, if it is one of its own.

    transformers puts an adapter that lies among a model's files on the model, whenever that is loaded.

    Raises:
        CommandError: If a model, a generator or a task of a pairs folder is there.
    """
    for file, what in (("config.json", "a model or a generator"), ("task.json", "a task of a pairs folder")):
        if Path(place, file).is_file():
            raise CommandError(
                f"{place!r} holds {what} ({file}), which an adapter among its files would change. Name a folder of "
                "the adapter's own, which need not exist."
            )
    return place
