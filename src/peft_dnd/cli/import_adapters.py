# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd import-adapters`: adapters that exist already, those of the paper among them, made into a pairs folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .adapter_lists import AdapterList, read_adapter_list
from .console import Json, Quiet, named_places, progress, report
from .inspect import layout_of
from .prompt_files import read_prompts


if TYPE_CHECKING:
    from peft_dnd.published import ImportedTask

_SHOWN = 5


def import_adapters(
    adapters: Annotated[
        str,
        typer.Argument(
            help="YAML file with each task's adapter and prompts; or folder with an adapter's folder for each task; "
            "or one adapter, folder or Hub id."
        ),
    ],
    pairs: Annotated[str, typer.Argument(help="Pairs folder to write to.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="A task and its file of prompts; may be repeated."),
    ] = None,
    from_card: Annotated[
        bool, typer.Option("--prompts-from-card", help="Take for other tasks what their adapters' cards say.")
    ] = False,
    column: Annotated[str, typer.Option(help="Field or column that holds the prompts.")] = "prompt",
    answer_column: Annotated[
        str | None, typer.Option(help="Field or column of their answers, if they are to be kept.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rank to bring all to. [default: with a shared A twice the largest, otherwise the largest]"
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Generator, adapter or pairs folder whose layout to bring them to.")
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Name of the base; repeated, other names of the same weights."),
    ] = None,
    missing_modules: Annotated[
        Literal["refuse", "zeros"], typer.Option(help="What becomes of modules that some adapters lack.")
    ] = "refuse",
    factors: Annotated[
        Literal["shared", "canonical", "kept"] | None,
        typer.Option(
            help="One A for all adapters; factors that follow from each update; A and B as they are. "
            "[default: as in the pairs folder, shared in a new one]"
        ),
    ] = None,
    pickles: Annotated[
        bool, typer.Option("--pickles", help="Read adapter_model.bin, tensors alone, where there is nothing else.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace tasks that were made otherwise.")] = False,
    settings: Annotated[
        str | None,
        typer.Option(help="Adapters of the paper's release: their settings, such as common-sense-0.5b, or a file."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Turn adapters that exist already into a pairs folder, to which a generator can be fitted.

    They may differ in alpha, rank and modules, and come from any tool: all are brought to one layout, and what is lost
    is said. Tasks that are done are passed over, so that an interrupted run is simply started again. With --settings
    the adapters are those of the paper's release.

    Example:
      peft-dnd import-adapters adapters.yaml pairs --rank 16

      law: {adapter: org/law-lora, prompts: law.txt}     # adapters.yaml
      tax: {adapter: loras/tax, prompts: {dataset: org/tax, column: question}}
      med: {adapter: org/med-lora, revision: v2, prompts: card}

      peft-dnd import-adapters data/common_sense_reasoning pairs --settings common-sense-0.5b \
          --prompts ARC-e=prompts/ARC-e_train.json --prompts BoolQ=prompts/BoolQ_train.json
    """
    files = named_places(prompts, "--prompts", "TASK=FILE")
    if settings is not None:
        own = {"--rank": rank, "--like": like, "--base": base, "--prompts-from-card": from_card, "--pickles": pickles}
        own.update({"--answer-column": answer_column, "--factors": factors, "--overwrite": overwrite})
        _of_the_release(adapters, pairs, settings, files, column, own, as_json=as_json, quiet=quiet)
        return
    if rank is not None and like is not None:
        raise typer.BadParameter("--like says the rank too: give it or --rank.")
    wanted = read_adapter_list(adapters, column, answer_column)
    for task, file in files.items():
        wanted.add_prompts(task, file, column, answer_column)
    if from_card:
        wanted.prompts = {**dict.fromkeys(wanted.adapters, "card"), **wanted.prompts}
    options: dict[str, Any] = {"rank": rank, "missing_modules": missing_modules, "factors": factors}
    options.update({"pickles": pickles, "overwrite": overwrite, "base_model": base or None})
    with progress(quiet):
        tasks = _import(wanted, pairs, like, options)
    facts = {"pairs": pairs, "tasks": [{"task": t.name, "written": t.written, "adapters": t.adapters} for t in tasks]}
    report(facts, in_words(pairs, tasks), as_json=as_json, quiet=quiet)


def _import(wanted: AdapterList, pairs: str, like: str | None, options: Mapping[str, Any]) -> tuple[ImportedTask, ...]:
    from peft_dnd.published import ExistingAdapter, import_adapters

    sources = {task: [ExistingAdapter(**each) for each in of_task] for task, of_task in wanted.adapters.items()}
    layout = None if like is None else layout_of(like)
    return import_adapters(sources, pairs, prompts=wanted.prompts, answers=wanted.answers, layout=layout, **options)


def in_words(pairs: str, tasks: Sequence[ImportedTask]) -> str:
    """What was imported, and what was lost of it."""
    written = [task.name for task in tasks if task.written]
    done = len(tasks) - len(written)
    adapters = [(task.name, each) for task in tasks for each in task.adapters]
    lines = [f"{len(written)} task(s) written to {pairs}{f', {done} complete before' if done else ''}."]
    ranks = sorted({rank for _, each in adapters for rank in each["ranks"]})
    scalings = sorted({scaling for _, each in adapters for scaling in each["scalings"]})
    lines.append(
        f"{len(adapters)} adapter(s) of rank {_range(ranks)} and scaling {_range(scalings)}, now of one layout."
    )
    lost = sorted(
        ((each["lost_share"], name, each) for name, each in adapters if each["lost_share"]), key=lambda x: -x[0]
    )
    if lost:
        most = ", ".join(
            f"{name} {share:.2%} (most in {each['lost_most']}: {each['lost_share_there']:.2%})"
            for share, name, each in lost[:_SHOWN]
        )
        lines.append(
            f"Lost to rank or shared A, as a share of the update's squared norm, by {len(lost)} of them: {most}."
        )
    else:
        lines.append("Nothing of any update was lost.")
    zeros = [(name, len(each["zero_modules"])) for name, each in adapters if each["zero_modules"]]
    if zeros:
        listed = ", ".join(f"{name} {count}" for name, count in zeros[:_SHOWN])
        lines.append(f"Zeros stand in for modules that {len(zeros)} of them lack: {listed}.")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _of_the_release(
    adapters: str,
    pairs: str,
    settings: str,
    files: Mapping[str, str],
    column: str,
    own: Mapping[str, Any],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    for name, value in own.items():
        if value:
            raise typer.BadParameter(f"{name} has no meaning with --settings, which say all of that.")
    if not files:
        raise typer.BadParameter("--settings need --prompts TASK=FILE, once for each task.")
    pools = {task: read_prompts(file, column) for task, file in files.items()}
    from peft_dnd.published import import_published_adapters

    with progress(quiet):
        tasks = import_published_adapters(adapters, pairs, prompts=pools, settings=settings)
    report(
        {"pairs": pairs, "tasks": list(tasks)},
        f"{len(tasks)} task(s), saved to {pairs}: {', '.join(tasks)}",
        as_json=as_json,
        quiet=quiet,
    )
