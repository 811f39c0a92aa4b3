# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd generate`: adapters from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bases import load_tokenizer
from .console import CommandError, Json, Quiet, Revision, adapter_place, progress, report
from .prompt_files import STANDARD_INPUT, Format, Row, files_of_tasks, read_dataset, read_prompts, read_rows, texts_of


if TYPE_CHECKING:
    from peft_dnd.adapters import GeneratedAdapter

_COLUMN = "prompt"


def generate(
    generator: Annotated[str, typer.Argument(help="Folder or Hub id of the generator.")],
    prompts: Annotated[
        str | None,
        typer.Argument(
            help="File of prompts, - for standard input, or a folder with a file for each task; none with --dataset."
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Argument(help="Folder to save to; of several tasks each gets a folder in it.")
    ] = None,
    column: Annotated[str, typer.Option(help="Field or column that holds the prompts.")] = _COLUMN,
    answer_column: Annotated[str, typer.Option(help="And the answers, for a generator that reads them.")] = "answer",
    file_format: Annotated[
        Format | None, typer.Option("--format", help="Format of the file, where its name does not say it.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set on the Hub to take the prompts from.")] = None,
    dataset_config: Annotated[str | None, typer.Option(help="Which configuration of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Which split of the data set, as datasets writes it.")] = "train",
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Folder or Hub id of a base, in whose chat template prompts are read."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="For which base, if the generator has several: as inspect names them.")
    ] = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which prompts are read if there are too many.")] = 0,
    out_of_distribution: Annotated[
        Literal["ignore", "warn", "shrink", "mean", "refuse"] | None,
        typer.Option(
            help="What to do if the prompts are unlike those of the tasks that the generator was fitted on; by "
            "default it warns where it can tell."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Score above which prompts are unlike them; by default what those tasks give."
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the decoder's weights from disk as it runs, to save memory.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload to this repository; of several tasks to REPO-TASK each."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="New repositories are private.")] = False,
    prompts_in_card: Annotated[
        bool,
        typer.Option("--prompts-in-card", help="List the prompts in the adapter's card, not just their hash."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a task's adapter from its prompts, or those of several tasks.

    Prompts are a text file with one a line, a .jsonl with {"prompt": "..."} a line, a .csv or .parquet with a column
    of them, a column of a data set on the Hub, or standard input. A folder of such files is several tasks, each called
    as its file.

    Example:
      peft-dnd generate org/generator prompts.txt adapter --out-of-distribution refuse
      peft-dnd generate org/generator adapter --dataset allenai/ai2_arc --dataset-config ARC-Easy --column question
      head -100 questions.txt | peft-dnd generate org/generator - --push-to-hub me/adapter
    """
    if dataset is not None:
        if adapter is not None:
            raise typer.BadParameter("With --dataset there is no file of prompts: give GENERATOR ADAPTER alone.")
        prompts, adapter = None, prompts
    elif prompts is None:
        raise typer.BadParameter("There are no prompts: give a file, a folder of files, - or --dataset.")
    if adapter is None and push_to_hub is None:
        raise typer.BadParameter("There is no place for the adapter: name a folder, or --push-to-hub REPO.")
    # Read before the library is loaded, so that a wrong path is told at once.
    several = prompts is not None and prompts != STANDARD_INPUT and Path(prompts).is_dir()
    if dataset is not None:
        found = read_dataset(dataset, column, answer_column, config=dataset_config, split=split)
        rows: dict[str, list[Row]] = {"": found}
    elif several:
        rows = {task: _rows(str(path), column, None) for task, path in files_of_tasks(Path(str(prompts))).items()}
    else:
        rows = {"": _rows(str(prompts), column, file_format)}
    texts = {task: texts_of(of, column, dataset or task or str(prompts)) for task, of in rows.items()}
    for task in rows if adapter is not None else ():
        adapter_place(str(Path(str(adapter), task)))
    if chat_template is not None:
        texts = _in_chat_template(chat_template, rows, column)
    with progress(quiet):
        loaded = _load(generator, revision, stream=stream).for_base(base)
        if prompts_in_card and loaded.config.condition_text != "prompts":
            raise CommandError("--prompts-in-card is for generators that read prompts alone; this one reads answers.")
        adapters = _generated(
            loaded,
            rows,
            texts,
            answer_column,
            seed=seed,
            out_of_distribution=out_of_distribution,
            threshold=threshold,
        )
        facts = [
            _deliver(task, made, adapter, push_to_hub, private=private, prompts=texts[task], listed=prompts_in_card)
            for task, made in adapters.items()
        ]
    places = ", ".join(str(fact["adapter"] or fact["repository"]) for fact in facts)
    first = next(iter(adapters.values()))
    count = sum(map(len, texts.values()))
    summary = (
        f"{first!r} from {count} prompts, saved to {places}" if not several else f"{len(facts)} adapters: {places}"
    )
    report({"adapters": facts} if several else facts[0], summary, as_json=as_json, quiet=quiet)


def _rows(source: str, column: str, file_format: Format | None) -> list[Row]:
    if Path(source).suffix.lower() == ".json" and file_format is None:
        return [{column: prompt} for prompt in read_prompts(source, column)]
    return read_rows(source, column, file_format)


def _in_chat_template(base: str, rows: dict[str, list[Row]], column: str) -> dict[str, list[str]]:
    from peft_dnd.text import prompt_texts

    tokenizer = load_tokenizer(base)
    return {
        task: list(prompt_texts(of, column=column, tokenizer=tokenizer, what=f"the prompts of task {task!r}"))
        for task, of in rows.items()
    }


def _load(name: str, revision: str | None, *, stream: bool) -> Any:
    from peft_dnd.generator import PromptConditionedLoraGenerator, StreamedLoraGenerator

    kind = StreamedLoraGenerator if stream else PromptConditionedLoraGenerator
    return kind.from_pretrained(name, revision=revision)


def _generated(
    generator: Any, rows: dict[str, list[Row]], texts: dict[str, list[str]], answer_column: str, **options: Any
) -> dict[str, GeneratedAdapter]:
    from peft_dnd.errors import CorruptFileError

    # A file may hold answers that the generator does not read, as a pairs folder's prompts.jsonl does.
    answers = None
    if generator.config.condition_text != "prompts":
        try:
            answers = {
                task: texts_of(of, answer_column, task or "the prompts", are_answers=True) for task, of in rows.items()
            }
        except CorruptFileError as error:
            raise CommandError(
                f'The generator reads answers too. Give a .jsonl, one {{"prompt": "...", "answer": "..."}} a line, '
                f"or another file with both. {error}"
            ) from error
    if "" in texts:
        answers_of_one = None if answers is None else answers[""]
        return {"": generator.generate_adapter(texts[""], answers=answers_of_one, **options)}
    found: dict[str, GeneratedAdapter] = generator.generate_adapters(texts, answers=answers, **options)
    return found


def _deliver(
    task: str,
    made: GeneratedAdapter,
    folder: str | None,
    repository: str | None,
    *,
    private: bool,
    prompts: list[str],
    listed: bool,
) -> dict[str, Any]:
    in_card = prompts if listed else None
    place = None if folder is None else str(Path(folder, task) if task else folder)
    if place is not None:
        made.save_pretrained(place, prompts=in_card)
    name = f"{repository}-{task}" if repository and task else repository
    if name is not None:
        made.push_to_hub(name, prompts=in_card, private=private or None)
    return {
        "task": task or None,
        "adapter": place,
        "repository": name,
        "base_model": made.layout.base_model_name_or_path,
        "modules": len(made.layout.modules),
        "max_rank": made.layout.max_rank,
        "parameters": made.num_parameters,
        "prompts": len(prompts),
        "out_of_distribution": made.out_of_distribution,
        "provenance": dict(made.provenance),
    }
