# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd synthesize`: a task from a few seed prompts or a description, written by a language model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .bases import load_base, load_tokenizer
from .console import ApplyChatTemplate, Device, Json, Quiet, progress, report, text_of_file
from .prompt_files import read_prompts, read_rows, texts_of


if TYPE_CHECKING:
    from torch import nn

    from peft_dnd.synthesis import Synthesis

_TOKEN = "PEFT_DND_ENDPOINT_TOKEN"
_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def synthesize(
    output: Annotated[
        Path, typer.Argument(help="The task's folder inside the pairs folder, or a .jsonl file for collect.")
    ],
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, with its tokenizer.")] = None,
    seeds: Annotated[str | None, typer.Option(help="File of seed prompts, as for generate, or -.")] = None,
    description: Annotated[str | None, typer.Option(help="What the task is, in a sentence or more.")] = None,
    description_file: Annotated[Path | None, typer.Option(help="Or a file that says so.")] = None,
    column: Annotated[str, typer.Option(help="Field or column of the seeds.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Field of their answers, where they have some.")] = "answer",
    count: Annotated[int, typer.Option(min=1, help="How many new prompts are wanted.")] = 64,
    endpoint: Annotated[
        str | None,
        typer.Option(help=f"URL of an OpenAI-compatible server that writes; its token is in {_TOKEN}."),
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    completions: Annotated[
        bool, typer.Option("--completions", help="Have the server continue texts rather than chat.")
    ] = False,
    apply_chat_template: ApplyChatTemplate = None,
    other: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Prompts of another task, to be kept apart from.")
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="Folder or Hub id of what tells prompts apart.")] = _ENCODER,
    closest: Annotated[float, typer.Option(help="Cosine above which prompts are near-duplicates.")] = 0.95,
    least_likeness: Annotated[
        float | None, typer.Option(help="Least cosine to the seeds; by default that of the seeds among themselves.")
    ] = None,
    votes: Annotated[int, typer.Option(min=1, help="For a .jsonl: answers drawn, of which most must agree.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 64,
    stop: Annotated[str | None, typer.Option(help="Text that ends an answer; \\n is a line end.")] = None,
    temperature: Annotated[float, typer.Option(help="At which prompts are written.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where something else was asked for before.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Have a language model write more prompts of a task, and answer them, to fit a generator to.

    A folder becomes a task of a pairs folder: the base answers with the description and the solved seeds in its
    window, and a generator learns to write adapters that do the same without. A .jsonl file gets prompts and answers
    in words, of the base or the endpoint, from which collect trains adapters. An interrupted pass goes on where it
    stopped when it is called again.

    Example:
      peft-dnd synthesize pairs/support --base Qwen/Qwen2.5-0.5B-Instruct --seeds seeds.txt \
          --description "Answer a customer of a French shop in French, in one sentence."

      peft-dnd synthesize law.jsonl --endpoint http://localhost:8000/v1 --endpoint-model big --seeds law.txt --votes 5
    """
    into_file = output.suffix == ".jsonl"
    _check_options(into_file, base, seeds, description, description_file, endpoint, endpoint_model, votes)
    if description_file is not None:
        description = text_of_file(description_file, "The description's file")
    prompts, answers = _seeds(seeds, column, answer_column)
    others = {file: read_prompts(file, column) for file in other or ()}
    from peft_dnd.synthesis import (
        AnswerAsked,
        EndpointWriter,
        ModelWriter,
        SynthesisSettings,
        TaskSeeds,
        synthesize_prompts,
        synthesize_task,
    )
    from peft_dnd.text.named_encoder import load_named_encoder

    known = TaskSeeds(tuple(prompts), description, answers)
    settings = SynthesisSettings(
        temperature=temperature, seed=seed, others=others, closest=closest, least_likeness=least_likeness
    )
    remote = None
    if endpoint is not None:
        token = os.environ.get(_TOKEN) or None
        remote = EndpointWriter(endpoint, str(endpoint_model), token=token, chats=not completions)
    with progress(quiet):
        common: dict[str, Any] = {
            "text_encoder": load_named_encoder(text_encoder),
            "count": count,
            "settings": settings,
            "overwrite": overwrite,
        }
        model = None if base is None else load_base(base, device=device)
        tokenizer: Any = None if base is None else load_tokenizer(base)
        own = None if model is None else ModelWriter(model, tokenizer, apply_chat_template=apply_chat_template)
        # Of a folder the base answers, whoever writes the prompts.
        answering = (remote or own) if into_file else own
        assert answering is not None
        if stop is None and not answering.chats:
            stop = "\\n"
        asked = AnswerAsked(max_new_tokens, None if stop is None else stop.replace("\\n", "\n"), votes)
        if into_file:
            done = synthesize_prompts(output, known, writer=answering, answerer=answering, asked=asked, **common)
        else:
            done = synthesize_task(
                output,
                known,
                teacher=cast("nn.Module", model),
                tokenizer=tokenizer,
                writer=remote,
                apply_chat_template=apply_chat_template,
                asked=asked,
                **common,
            )
    _report(output, done, as_json=as_json, quiet=quiet)


def _check_options(
    into_file: bool,
    base: str | None,
    seeds: str | None,
    description: str | None,
    description_file: Path | None,
    endpoint: str | None,
    endpoint_model: str | None,
    votes: int,
) -> None:
    if (endpoint is None) != (endpoint_model is None):
        raise typer.BadParameter("--endpoint and --endpoint-model go together.")
    if base is None and not (endpoint and into_file):
        raise typer.BadParameter("Give --base; only a .jsonl file can be written by an --endpoint alone.")
    if description is not None and description_file is not None:
        raise typer.BadParameter("Give either --description or --description-file.")
    if votes > 1 and not into_file:
        raise typer.BadParameter("--votes is for a .jsonl file: in a task's folder the base answers by distillation.")
    if seeds is None and description is None and description_file is None:
        raise typer.BadParameter("Give --seeds, a description, or both: nobody knows what the task is.")


def _seeds(source: str | None, column: str, answer_column: str) -> tuple[list[str], tuple[str, ...] | None]:
    """The seeds of a file, and their answers if all of them have one."""
    if source is None:
        return [], None
    if Path(source).suffix == ".json":
        return read_prompts(source, column), None
    rows = read_rows(source, column)
    prompts = texts_of(rows, column, source)
    if not any(answer_column in row for row in rows):
        return prompts, None
    return prompts, tuple(texts_of(rows, answer_column, source, are_answers=True))


def _report(output: Path, done: Synthesis, *, as_json: bool, quiet: bool) -> None:
    left_out = ", ".join(f"{number} {reason}" for reason, number in sorted(done.left_out.items()))
    facts = {
        "output": str(output),
        "prompts": len(done.prompts),
        "answered": done.answers is not None,
        "left_out": dict(done.left_out),
        "rounds": done.rounds,
    }
    summary = f"{len(done.prompts)} new prompts, saved to {output}; left out: {left_out or 'none'}"
    report(facts, summary, as_json=as_json, quiet=quiet)
