# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd demo`: a page in the browser to drop prompts on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import CommandError, Device, Json, Quiet, progress, report
from .prompt_files import read_prompts, read_rows, texts_of


if TYPE_CHECKING:
    from peft_dnd.page import PromptPage

_ANSWER_COLUMN = "answer"


def demo(
    generators: Annotated[list[str], typer.Argument(help="Folders or Hub ids of generators to choose from.")],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base to try adapters on, where it is not what a generator names."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; by default the first free one from 7860.")
    ] = None,
    max_prompts: Annotated[int, typer.Option(min=1, help="The most prompts of one adapter.")] = 1000,
    max_upload_bytes: Annotated[int, typer.Option(min=1, help="The largest file of prompts.")] = 2**20,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="After how many tokens an answer is cut.")] = 64,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a page in the browser: drop prompts, watch an adapter being made, try it beside its base, download it.

    Runs until it is interrupted. Whoever can reach the address can use it; what visitors give is in a temporary
    folder while it runs, and their prompts are not logged.

    Example:
      pip install "peft-dnd[page]"
      peft-dnd demo demo_output/seed-0/generator
      peft-dnd demo org/generator org/another --port 8000
    """
    with progress(quiet):
        page = page_of(
            generators,
            base=base,
            device=device,
            upload_bytes=max_upload_bytes,
            prompts=max_prompts,
            answer_tokens=max_new_tokens,
        )
    try:
        address = page.launch(host=host, port=port, wait=False)
        report(
            {"url": address, "generators": list(generators)}, f"The page is at {address}", as_json=as_json, quiet=quiet
        )
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes then, too
        page.wait()
    finally:
        page.close()


def page_of(
    generators: Sequence[str], *, base: str | None = None, device: str | None = None, **limits: int
) -> PromptPage:
    """The page of some generators, loaded with their bases.

    Args:
        generators: Their folders or Hub ids.
        base: Folder or Hub id of the base, where it is not what they name.
        device: Where the base is to run.
        limits: Of `peft_dnd.page.PageLimits`.

    Raises:
        CommandError: If Gradio is not installed, or no generator was named.
        PeftDndError: If a generator, or the given base, is not there or cannot be used.
    """
    if not generators:
        raise CommandError("There is no generator to show. Name a folder or a Hub id.")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CommandError(
            'The page is made with Gradio, which is not installed: pip install "peft-dnd[page]"'
        ) from error
    from peft_dnd.page import ChatBase, PageGenerator, PageLimits, PromptPage, short_name

    bases: dict[str, ChatBase] = {}
    loaded = []
    places = list(dict.fromkeys(generators))
    short = [short_name(name) for name in places]
    for name, label in zip(places, short, strict=True):
        # Two folders may end alike.
        shown = label if short.count(label) == 1 else name
        one = PageGenerator.from_pretrained(name, name=shown, base=base, device=device, bases=bases)
        if one.base is None:
            typer.echo(f"peft-dnd: {name}: adapters can be made, not tried. {one.why_no_base}", err=True)
        loaded.append(one)
    return PromptPage(loaded, read_file, PageLimits(**limits))


def read_file(path: Path, column: str, with_answers: bool) -> tuple[list[str], list[str] | None]:
    """Read a visitor's file with what `generate` reads files with.

    Raises:
        PromptError: If something is wrong with it.
    """
    from peft_dnd.errors import PeftDndError, PromptError

    try:
        if path.suffix.lower() == ".parquet":
            # A small one may hold gigabytes, which nobody knows before they are there.
            raise CommandError("This page takes no Parquet files. Save the prompts as .jsonl or .csv.")
        if path.suffix.lower() == ".json":
            return read_prompts(str(path), column), None
        rows = read_rows(str(path), column)
        texts = texts_of(rows, column, path.name)
        return texts, texts_of(rows, _ANSWER_COLUMN, path.name) if with_answers else None
    except (CommandError, PeftDndError) as error:
        # Where the file lies here is nothing to the visitor.
        raise PromptError(str(error).replace(str(path), path.name)) from error
