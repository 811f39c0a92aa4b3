# SPDX-License-Identifier: Apache-2.0
"""The command put together: its verbs, and what becomes of errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from inspect import cleandoc
from typing import Annotated

import typer

from .card import card
from .collect import collect
from .console import CommandError, one_paragraph
from .demo import demo
from .distil import distil
from .evaluate import evaluate
from .export import export
from .fit import fit
from .generate import generate
from .import_adapters import import_adapters
from .import_generator import import_generator
from .inspect import inspect
from .policy import policy
from .renew_checksums import renew_checksums
from .serve import serve
from .synthesize import synthesize
from .verify import verify


_INTERRUPTED = 130
# In the order in which they are used: a generator at hand first, then the way to one of one's own.
_VERBS: dict[Callable[..., None], str] = {
    generate: "Write adapters from prompts.",
    inspect: "Say what something is, and what it fits.",
    verify: "Make an adapter again and compare.",
    export: "Write an adapter for a serving engine.",
    card: "Print or write a model card.",
    policy: "Show or set what a generator does not do.",
    renew_checksums: "Accept an edit of a generator's folder.",
    collect: "Train adapters, keeping their checkpoints.",
    distil: "Let a teacher answer a task's inputs.",
    synthesize: "Make a task of a few seed prompts.",
    fit: "Fit a generator to a pairs folder.",
    serve: "Serve adapters over HTTP.",
    evaluate: "Score a generator on held-out tasks.",
    demo: "Serve a page to drop prompts on.",
    import_generator: "Turn a released generator into ours.",
    import_adapters: "Turn released adapters into pairs.",
}

app = typer.Typer(
    name="peft-dnd",
    help="LoRA adapters from prompts.",
    epilog="`peft-dnd VERB --help` shows a whole example of each.",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-dnd {metadata.version('peft-dnd')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    """LoRA adapters from prompts."""


for _verb, _in_short in _VERBS.items():
    _text, _, _example = (_verb.__doc__ or "").partition("Example:\n")
    app.command(
        name=_verb.__name__.replace("_", "-"),
        help=_text,
        short_help=_in_short,
        # \b: the lines of a paragraph stay as they are.
        epilog="\b\nExample:\n" + cleandoc(_example).replace("\n\n", "\n\n\b\n"),
    )(_verb)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name; `None` reads the real one.

    Returns:
        0; 1 with a message on standard error if the input is at fault, or the result cannot be saved; 2 if the command
        was called wrongly; 130 if it was interrupted.
    """
    try:
        app(arguments, prog_name="peft-dnd")
    except SystemExit as stopped:
        if stopped.code == _INTERRUPTED:
            print("peft-dnd: interrupted.", file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except KeyboardInterrupt:
        print("peft-dnd: interrupted.", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        if not _is_foreseen(error):
            raise
        print(f"peft-dnd: {one_paragraph(error)}", file=sys.stderr)
        return 1
    return 0


def _is_foreseen(error: Exception) -> bool:
    """Whether an error is about what the user gave: anything else is a bug, and shows where it happened."""
    library = sys.modules.get("peft_dnd.errors")  # where it was never imported, nothing of it was raised
    return isinstance(error, CommandError | OSError) or (
        library is not None and isinstance(error, library.PeftDndError)
    )
