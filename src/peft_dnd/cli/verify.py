# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd verify`: whether an adapter is what its provenance says, by making it again."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import CommandError, Json, Quiet, Revision, progress, report
from .prompt_files import Format, read_prompts, read_rows, texts_of


_MARKS = {True: "ok", False: "FAILED", None: "not told"}


def verify(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter.")],
    prompts: Annotated[
        str, typer.Option("--prompts", help="File of the prompts that it was made from, as generate takes it.")
    ],
    generator: Annotated[
        str | None,
        typer.Option(
            "--generator", help="Folder or Hub id of the generator; by default that which the adapter names."
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Field or column that holds the prompts.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="And the answers, for a generator that reads them.")] = "answer",
    file_format: Annotated[
        Format | None, typer.Option("--format", help="Format of the file, where its name does not say it.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say whether an adapter is what its provenance says: written by that generator, from those prompts.

    The adapter is made again and compared. It is the same if no number differs by more than rounding explains, which
    is found for this generator by trying. Ends with 1 if anything speaks against it.

    Example:
      peft-dnd verify adapter --prompts prompts.txt
      peft-dnd verify me/adapter --prompts prompts.txt --generator org/generator --json
    """
    read = read_prompts(prompts, column, file_format)  # before the library is loaded
    with progress(quiet):
        from peft_dnd.adapters import GeneratedAdapter
        from peft_dnd.generator import PromptConditionedLoraGenerator, verify_adapter

        made = GeneratedAdapter.from_pretrained(adapter)
        kept = made.provenance
        if not kept:
            raise CommandError(
                f"The adapter {adapter!r} has no peft_dnd_provenance.json, so there is nothing to verify. It is there "
                "where `peft-dnd generate` or GeneratedAdapter.save_pretrained wrote the adapter."
            )
        name = generator or kept.get("generator")
        if name is None:
            raise CommandError("The adapter does not name its generator. Give it: --generator FOLDER-OR-HUB-ID")
        at = revision or (kept.get("generator_revision") if generator in (None, kept.get("generator")) else None)
        loaded: Any = PromptConditionedLoraGenerator.from_pretrained(name, revision=at, dtype=kept.get("dtype"))
        answers = None
        if loaded.config.condition_text != "prompts":
            answers = texts_of(read_rows(prompts, column, file_format), answer_column, prompts, are_answers=True)
        found = verify_adapter(made, loaded, read, answers=answers)
    facts = {
        "adapter": adapter,
        "generator": name,
        "passed": found.passed,
        "checks": [{"what": check.what, "passed": check.passed, "said": check.said} for check in found.checks],
        "largest_difference": max(found.differences.values(), default=None),
        "tolerances": dict(found.tolerances),
    }
    lines = [f"{check.what}: {_MARKS[check.passed]}. {check.said}" for check in found.checks]
    outcome = "is what its provenance says" if found.passed else "is not what its provenance says"
    report(facts, "\n".join([*lines, f"{adapter!r} {outcome}."]), as_json=as_json, quiet=quiet)
    if not found.passed:
        raise typer.Exit(1)
