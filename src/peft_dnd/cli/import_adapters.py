# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd import-adapters`: adapters of the paper's release made into a pairs folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, Json, Quiet, progress, report
from .prompt_files import read_prompts


def import_adapters(
    adapters: Annotated[Path, typer.Argument(help="Folder with one folder of checkpoints for each task.")],
    pairs: Annotated[str, typer.Argument(help="Pairs folder to write to.")],
    settings: Annotated[
        str, typer.Option(help="Settings that they were made with: a name such as common-sense-0.5b, or a JSON file.")
    ],
    prompts: Annotated[
        list[str],
        typer.Option(metavar="TASK=FILE", help="A task and its file of prompts; once for each task."),
    ],
    column: Annotated[str, typer.Option(help="Field or column that holds the prompts.")] = "prompt",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Turn adapters of the paper's release into a pairs folder, to which a generator can be fitted.

    Example:
      peft-dnd import-adapters data/common_sense_reasoning pairs --settings common-sense-0.5b \
          --prompts ARC-e=prompts/ARC-e_train.json --prompts BoolQ=prompts/BoolQ_train.json
    """
    pools: dict[str, list[str]] = {}
    for given in prompts:
        task, equals, file = given.partition("=")
        if not equals:
            raise typer.BadParameter(f"--prompts {given!r} is not of the form TASK=FILE.")
        if task in pools:
            raise CommandError(f"--prompts names the task {task!r} twice.")
        pools[task] = read_prompts(file, column)
    from peft_dnd.published import import_published_adapters

    with progress(quiet):
        tasks = import_published_adapters(adapters, pairs, prompts=pools, settings=settings)
    report(
        {"pairs": pairs, "tasks": list(tasks)},
        f"{len(tasks)} task(s), saved to {pairs}: {', '.join(tasks)}",
        as_json=as_json,
        quiet=quiet,
    )
