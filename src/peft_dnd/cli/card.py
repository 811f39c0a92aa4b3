# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd card`: the model card of a generator or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import CommandError, Json, Quiet, Revision, progress, report
from .inspect import what_is


def card(
    what: Annotated[str, typer.Argument(help="Folder or Hub id of a generator, or of an adapter.")],
    write: Annotated[bool, typer.Option("--write", help="Write it into the folder's README.md.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a card that was edited by hand as well.")] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of a report of evaluate, to go into the generator's configuration and card."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print the model card of a generator or an adapter as it would be written today, or write it.

    Example:
      peft-dnd card generator
      peft-dnd card generator --write --evaluation report
    """
    if force and not write:
        raise typer.BadParameter("--force says what to replace: it goes with --write.")
    if evaluation is not None and not write:
        raise typer.BadParameter("--evaluation is written into the generator: it goes with --write.")
    kind = what_is(what, revision)
    if kind == "pairs":
        raise CommandError(f"{what!r} holds pairs, which have no card of ours. Name a generator or an adapter.")
    if write and not Path(what).is_dir():
        raise CommandError(f"{what!r} is no folder here to write a card into. Leave --write out, or download it.")
    with progress(quiet):
        loaded = _load(what, kind, revision)
        if evaluation is not None:
            _attach(loaded, evaluation, kind)
    text = loaded.model_card(None if Path(what).is_dir() else what)
    if write:
        _write(Path(what), text, loaded, force=force, with_config=evaluation is not None)
        report({"card": str(Path(what) / "README.md")}, f"Written to {what}/README.md", as_json=as_json, quiet=quiet)
    else:
        report({"card": text}, text, as_json=as_json, quiet=False)


def _load(what: str, kind: str, revision: str | None) -> Any:
    from peft_dnd.adapters import GeneratedAdapter
    from peft_dnd.generator import PromptConditionedLoraGenerator

    return (PromptConditionedLoraGenerator if kind == "generator" else GeneratedAdapter).from_pretrained(
        what, revision=revision
    )


def _attach(loaded: Any, evaluation: Path, kind: str) -> None:
    from peft_dnd.evaluation import EvaluationReport

    if kind != "generator":
        raise CommandError("--evaluation is of a generator's adapters: name the generator.")
    EvaluationReport.load(evaluation).attach_to(loaded)


def _write(folder: Path, text: str, loaded: Any, *, force: bool, with_config: bool) -> None:
    from peft_dnd.generator.summary import renew_sizes
    from peft_dnd.storage.cards import CARD_NAME, may_write_card
    from peft_dnd.storage.files import staged_directory

    if not force and not may_write_card(folder):
        raise CommandError(
            f"{str(folder / CARD_NAME)!r} was edited by hand, so it is not replaced. Print the new card without "
            "--write and take over what you want, or replace it with --force."
        )
    with staged_directory(folder) as staged:
        (staged / CARD_NAME).write_text(text, encoding="utf-8")
        if with_config:
            loaded.config.save_pretrained(staged)
    if with_config:
        renew_sizes(folder)
