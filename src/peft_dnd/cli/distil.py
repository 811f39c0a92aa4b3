# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd distil`: a task of prompts alone, from what a base does with a text in its window, or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bases import load_base, load_tokenizer
from .console import ApplyChatTemplate, Device, Json, Quiet, progress, report, text_of_file
from .prompt_files import read_prompts


def distil(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of the base model, with its tokenizer.")],
    inputs: Annotated[str, typer.Argument(help="File of inputs to be answered, as for generate, or -.")],
    folder: Annotated[Path, typer.Argument(help="The task's folder inside the pairs folder, such as pairs/support.")],
    context: Annotated[str | None, typer.Option(help="The text in the teacher's window.")] = None,
    context_file: Annotated[Path | None, typer.Option(help="Or a file with that text.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File of what the generator reads; by default the context and each input.")
    ] = None,
    column: Annotated[str, typer.Option(help="Field or column that holds inputs and prompts.")] = "prompt",
    teacher_adapter: Annotated[
        str | None, typer.Option(help="Folder or Hub id of an adapter that the teacher has.")
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of a generator that writes the teacher's from --prompts."),
    ] = None,
    student: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base that is to learn from this one, if it is another.")
    ] = None,
    apply_chat_template: ApplyChatTemplate = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 32,
    top_tokens: Annotated[
        int, typer.Option(min=0, help="Of how many next tokens probabilities are kept; 0: answers alone.")
    ] = 16,
    stop: Annotated[str | None, typer.Option(help="Text that ends an answer; \\n is a line end.")] = None,
    rows_at_once: Annotated[int, typer.Option(min=1, help="Inputs that go through the teacher at once.")] = 16,
    task: Annotated[str | None, typer.Option(help="The task's name; by default the folder's.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where another teacher, or other inputs, were before.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Let a teacher, the base with a text in its window, answer a task's inputs.

    A generator that is fitted to such tasks writes adapters with which the base does the same without the text: no
    labels and no checkpoints are needed. An interrupted pass goes on where it stopped when it is called again.

    With --generator the teacher needs no text: its adapter knows the task. With --student what it says is for another
    base, which is to be added to that generator; for one of other tokens with --top-tokens 0.

    Example:
      peft-dnd distil Qwen/Qwen2.5-0.5B-Instruct questions.txt pairs/support --context-file policy.txt
    """
    if generator is not None and teacher_adapter is not None:
        raise typer.BadParameter("Give the teacher's adapter by either --teacher-adapter or --generator.")
    if generator is not None and prompts is None:
        raise typer.BadParameter("--generator reads the file of --prompts: name it.")
    if context is None and context_file is None and generator is not None:
        context = ""
    if (context is None) == (context_file is None):
        raise typer.BadParameter("Give the teacher's text by either --context or --context-file.")
    if context_file is not None:
        context = text_of_file(context_file, "The context's file")
    lines = read_prompts(inputs, column)
    pool = None if prompts is None else read_prompts(prompts, column)
    from peft_dnd.adapters.generated_adapter import GeneratedAdapter
    from peft_dnd.fitting import distil_task
    from peft_dnd.generator import PromptConditionedLoraGenerator
    from peft_dnd.pairs.distillation import load_distillation

    with progress(quiet):
        teacher = load_base(base, device=device)
        if generator is not None:
            written = PromptConditionedLoraGenerator.from_pretrained(generator)
            teacher = written.generate_adapter(pool or (), base=teacher).load_into(teacher)
        if teacher_adapter is not None:
            teacher = GeneratedAdapter.from_pretrained(teacher_adapter).load_into(teacher)
        distil_task(
            folder,
            lines,
            teacher=teacher,
            tokenizer=load_tokenizer(base),
            context=str(context),
            prompts=pool,
            apply_chat_template=apply_chat_template,
            max_new_tokens=max_new_tokens,
            top_tokens=top_tokens,
            stop=None if stop is None else stop.replace("\\n", "\n"),
            rows_at_once=rows_at_once,
            task=task,
            student=None if student is None else load_base(student, device=device),
            student_tokenizer=None if student is None else load_tokenizer(student),
            overwrite=overwrite,
        )
    answered = len(load_distillation(folder) or ())
    report(
        {"folder": str(folder), "inputs": answered},
        f"{answered} inputs answered, saved to {folder}",
        as_json=as_json,
        quiet=quiet,
    )
