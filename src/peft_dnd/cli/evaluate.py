# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd evaluate`: the held-out protocol on a pairs folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bases import example_of, load_base, load_tokenizer
from .console import Base, CommandError, Device, Json, Quiet, Revision, progress, report
from .prompt_files import files_of_tasks, read_rows, texts_of


if TYPE_CHECKING:
    from peft_dnd.evaluation import Scorer

Measure = Literal["loss", "labels", "answers"]


def evaluate(
    generator: Annotated[str, typer.Argument(help="Folder or Hub id of the generator.")],
    pairs: Annotated[str, typer.Argument(help="Pairs folder: the tasks fitted to, and those held out.")],
    folder: Annotated[Path, typer.Argument(metavar="report", help="Folder for the report.")],
    base: Base,
    held_out: Annotated[
        list[str], typer.Option(metavar="TASK", help="A task that was used nowhere in fitting; may be repeated.")
    ],
    by: Annotated[
        Measure,
        typer.Option(
            help="What an example's score is: its loss with the sign turned, whether the label is right, or whether "
            "the written answer is."
        ),
    ] = "loss",
    examples: Annotated[
        Path | None,
        typer.Option(help="Folder with a file of questions and answers for each held-out task, to score on."),
    ] = None,
    column: Annotated[str, typer.Option(help="Field of the questions in it.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Field of the answers in it.")] = "answer",
    max_examples: Annotated[int, typer.Option(min=1, help="The most examples of a task that are scored.")] = 256,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens after which an example is cut.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="By answers: how long one may get.")] = 32,
    shots: Annotated[
        int, typer.Option(min=0, help="By answers: solved examples before a question in the in-context row.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that go through the base at once.")] = 16,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="ROW", help="A row to leave out, such as ridge; may be repeated.")
    ] = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score a generator's adapters on held-out tasks, beside all that they must be compared with.

    By loss and by labels the examples are the pairs folder's own (examples.jsonl), unless --examples gives others.
    The LoRA that was trained on the task has seen its own: its row is a fair ceiling with --examples alone.

    Example:
      peft-dnd evaluate generator pairs report --base Qwen/Qwen2.5-0.5B --held-out law --by answers --examples test
    """
    if by == "answers" and examples is None:
        raise typer.BadParameter("--by answers needs questions and their answers: give --examples.")
    if by == "labels" and examples is not None:
        raise typer.BadParameter("--by labels reads the pairs folder's own examples: leave --examples out.")
    if shots and by != "answers":
        raise typer.BadParameter("--shots goes with --by answers.")
    asked = None if examples is None else _questions(examples, held_out, column, answer_column, max_examples)
    from peft_dnd.adapters import GeneratedAdapter
    from peft_dnd.evaluation import HeldOutTask, evaluate_generator
    from peft_dnd.generator import PromptConditionedLoraGenerator
    from peft_dnd.pairs import PromptCheckpointDataset

    with progress(quiet):
        loaded = PromptConditionedLoraGenerator.from_pretrained(generator, revision=revision)
        training, out = PromptCheckpointDataset.from_folder(pairs, seed=seed).split(held_out)
        tasks = {
            name: HeldOutTask(
                out.prompts(name),
                GeneratedAdapter(out.layout, out.state_dict(name)) if out.checkpoints(name) else None,
                out.answers(name),
            )
            for name in out.tasks
        }
        model = load_base(base, next(iter(loaded.config.layouts.values())).task_type, device)
        loaded = loaded.for_base(model) if loaded.config.bases else loaded
        in_context: Scorer | None = None
        if asked is not None:
            tokenizer = load_tokenizer(base)
            if by == "answers":
                scorer, in_context = _by_answers(tokenizer, asked, out, max_new_tokens, batch_size, shots, seed)
            else:
                rows = {
                    name: [example_of(tokenizer, *pair, max_length) for pair in pairs_of]
                    for name, pairs_of in asked.items()
                }
                scorer = _by_loss(rows, batch_size)
        else:
            rows = {name: _own_rows(out, name, max_examples, seed) for name in out.tasks}
            scorer = _by_loss(rows, batch_size) if by == "loss" else _by_labels(rows, batch_size)
        found = evaluate_generator(
            loaded, model, training, tasks, scorer, in_context_scorer=in_context, skip=skip or (), seed=seed
        )
    how = {"scored_by": by, "scored_on": "the pairs folder's examples" if asked is None else "examples given apart"}
    found = dataclasses.replace(found, settings={**found.settings, **how})
    found.save(folder)
    text = f"{found.to_markdown()}\nSaved to {folder}"
    report({"report": str(folder), **found.to_dict(include_scores=False)}, text, as_json=as_json, quiet=quiet)


def _questions(
    folder: Path, tasks: list[str], column: str, answer_column: str, most: int
) -> dict[str, list[tuple[str, str]]]:
    if not folder.is_dir():
        raise CommandError(f"There is no folder of examples {str(folder)!r}. Expected a file in it for each task.")
    files = files_of_tasks(folder)
    found = {}
    for task in tasks:
        if task not in files:
            raise CommandError(f"{str(folder)!r} holds no file for task {task!r}; it holds {', '.join(files)}.")
        rows = read_rows(str(files[task]), column)[:most]
        source = str(files[task])
        answers = texts_of(rows, answer_column, source, are_answers=True)
        found[task] = list(zip(texts_of(rows, column, source), answers, strict=True))
    return found


def _own_rows(pairs: Any, task: str, most: int, seed: int) -> list[dict[str, Any]]:
    examples = pairs.examples(task)
    if examples is None:
        raise CommandError(
            f"Task {task!r} has no examples in the pairs folder (examples.jsonl). Give some with --examples."
        )
    rows: list[dict[str, Any]] = examples.draw(most, seed)
    return rows


def _by_answers(
    tokenizer: Any,
    asked: dict[str, list[tuple[str, str]]],
    out: Any,
    max_new_tokens: int,
    batch_size: int,
    shots: int,
    seed: int,
) -> tuple[Scorer, Scorer | None]:
    from peft_dnd.evaluation import AnswerScorer

    scorer = AnswerScorer(tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if not shots:
        return scorer, None
    solved = {}
    for task in asked:
        if out.answers(task) is None:
            raise CommandError(f"--shots takes solved examples from the prompts of {task!r}, which have no answers.")
        solved[task] = list(zip(out.prompts(task), out.answers(task), strict=True))
    return scorer, scorer.with_examples(solved, shots, seed=seed)


def _by_loss(rows: dict[str, list[dict[str, Any]]], batch_size: int) -> Scorer:
    """A scorer of the mean log-likelihood of each example's labels, in nats a token."""
    import torch

    def score(model: Any, task: str) -> list[float]:
        scores: list[float] = []
        for batch in _batches(model, rows[task], batch_size):
            labels = batch.pop("labels")
            if labels.dim() != 2:
                raise CommandError(f"The examples of {task!r} have one label each: score them --by labels.")
            logits = model(**batch).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
            )
            counted = (labels[:, 1:] != -100).sum(1).clamp(min=1)
            scores += (-losses.sum(1) / counted).tolist()
        return scores

    return score


def _by_labels(rows: dict[str, list[dict[str, Any]]], batch_size: int) -> Scorer:
    """A scorer of whether a classifying base gives an example its label."""
    from peft_dnd.evaluation import LabelScorer

    labels = {task: [row.get("labels", row.get("label")) for row in of] for task, of in rows.items()}
    wrong = next((task for task, of in labels.items() if not all(isinstance(label, int) for label in of)), None)
    if wrong is not None:
        raise CommandError(f"The examples of {wrong!r} do not have one label each, a number: score them --by loss.")
    read = {
        task: [{k: v for k, v in row.items() if k not in ("labels", "label")} for row in of]
        for task, of in rows.items()
    }

    def predict(model: Any, task: str) -> list[int]:
        found: list[int] = []
        for batch in _batches(model, read[task], batch_size):
            found += model(**batch).logits.argmax(-1).tolist()
        return found

    return LabelScorer(predict, labels)


def _batches(model: Any, rows: list[dict[str, Any]], batch_size: int) -> Any:
    from peft_dnd.pairs.collator import ExampleCollator

    collate = ExampleCollator.for_model(model)
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        yield {name: tensor.to(device) for name, tensor in collate(rows[start : start + batch_size]).items()}
