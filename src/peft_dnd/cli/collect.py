# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd collect`: LoRA training of tasks, its last checkpoints kept in a pairs folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bases import example_of, load_base, load_tokenizer
from .console import CommandError, Device, Json, Quiet, Settings, named_places, progress, report
from .prompt_files import read_prompts, read_rows, texts_of
from .recipes import built, check_names, read_recipe, section, wanted


if TYPE_CHECKING:
    from torch import nn

_NAMES = (
    "base",
    "output",
    "tasks",
    "prompts",
    "column",
    "answer_column",
    "last",
    "every",
    "max_length",
    "seed",
    "lora",
    "training",
)
_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_TRAINING = {"save_strategy": "no", "report_to": "none"}


def collect(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file with the same names as the options.")] = None,
    base: Annotated[str | None, typer.Option(help="Folder or Hub id of the base, with its tokenizer.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Pairs folder to write to.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE", help="A task and its training examples, .jsonl, .csv or .parquet; may be repeated."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="A task's pool of prompts; by default its examples' questions."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Field of the questions. [default: prompt]")] = None,
    answer_column: Annotated[str | None, typer.Option(help="Field of the answers. [default: answer]")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Checkpoints to keep of each task. [default: 50]")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Steps from one to the next. [default: 1]")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the adapters, lora.r. [default: 8]")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Training steps, training.max_steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="training.learning_rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="training.per_device_train_batch_size.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of every task's training. [default: 0]")] = None,
    settings: Settings = None,
    examples_only: Annotated[
        bool, typer.Option("--examples-only", help="Train nothing: write examples and prompts, to fit on task loss.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train complete tasks anew.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Train a LoRA adapter for each task and keep its last checkpoints, to fit a generator to.

    Each example is a question and its answer; the loss is on the answer. All adapters start alike. Tasks that are
    complete are passed over, so that an interrupted run is simply started again. With --examples-only no adapter is
    trained: fit with --base and task_loss_weight then. Sections of a recipe: lora (what
    peft.LoraConfig takes) and training (what transformers.TrainingArguments takes). For other data, losses or trainers
    use CheckpointCollector in Python.

    Example:
      peft-dnd collect --base Qwen/Qwen2.5-0.5B -o pairs --task law=law.jsonl --task tax=tax.jsonl --max-steps 200 \
          --learning-rate 1e-4

      base: Qwen/Qwen2.5-0.5B           # the same as recipe.yaml: peft-dnd collect recipe.yaml
      output: pairs
      tasks: {law: law.jsonl, tax: tax.jsonl}
      training: {max_steps: 200, learning_rate: 1e-4}
    """
    plan = read_recipe(
        recipe,
        _NAMES,
        settings,
        base=base,
        output=output,
        tasks=named_places(task, "--task", "TASK=FILE"),
        prompts=named_places(prompts, "--prompts", "TASK=FILE"),
        column=column,
        answer_column=answer_column,
        last=last,
        every=every,
        seed=seed,
        lora__r=rank,
        training__max_steps=max_steps,
        training__learning_rate=learning_rate,
        training__per_device_train_batch_size=batch_size,
    )
    pairs = Path(wanted(plan, "output", "--output"))
    base_name = str(wanted(plan, "base", "--base"))
    wanted(plan, "tasks", "--task")
    if examples_only:
        _check_trains_nothing(plan)
    texts = _texts(plan)
    left = [] if overwrite else _complete_tasks(pairs, texts)
    made = {name: of_task for name, of_task in texts.items() if name not in left}
    with progress(quiet):
        if examples_only:
            _write_examples(plan, pairs, base_name, made)
        else:
            _Collection(plan, pairs, base_name, device, quiet=quiet).run(made)
    summary = f"{len(made)} task(s) collected in {pairs}: {', '.join(made) or 'none'}" + (
        f"; complete before: {', '.join(left)}" if left else ""
    )
    facts = {"pairs": str(pairs), "collected": list(made), "complete_before": left}
    report(facts, summary, as_json=as_json, quiet=quiet)


_Texts = tuple[list[str], list[str], list[str] | None]
"""Of a task: questions, answers, and prompts where they are given apart."""


def _check_trains_nothing(plan: dict[str, Any]) -> None:
    said = [name for name in ("lora", "training", "last", "every") if plan.get(name)]
    if said:
        raise CommandError(
            f"{said[0]!r} is about training, and with --examples-only nothing is trained. Leave one of them out."
        )


def _complete_tasks(pairs: Path, tasks: Iterable[str]) -> list[str]:
    from peft_dnd.pairs.writer import task_record

    records = {name: task_record(pairs / name) for name in tasks}
    return [name for name, record in records.items() if record is not None and record.complete]


def _write_examples(plan: dict[str, Any], pairs: Path, base: str, texts: dict[str, _Texts]) -> None:
    """Write tasks without checkpoints."""
    from peft_dnd.pairs import write_task_without_checkpoints

    tokenizer = load_tokenizer(base)
    rows = {name: _examples(plan, tokenizer, *of_task[:2]) for name, of_task in texts.items()}
    for name, (questions, answers, prompts) in texts.items():
        write_task_without_checkpoints(
            pairs / name,
            prompts or questions,
            rows[name],
            answers=None if prompts else answers,
            overwrite=True,
        )


def _examples(
    plan: dict[str, Any], tokenizer: Any, questions: list[str], answers: list[str]
) -> list[dict[str, list[int]]]:
    max_length = int(plan.get("max_length", 512))
    return [example_of(tokenizer, *pair, max_length) for pair in zip(questions, answers, strict=True)]


def _texts(plan: dict[str, Any]) -> dict[str, _Texts]:
    """What is said of each task; all read before anything is trained."""
    column, answer_column = plan.get("column", "prompt"), plan.get("answer_column", "answer")
    tasks, pools = section(plan, "tasks"), section(plan, "prompts")
    check_names(pools, tasks, "'prompts' of the recipe")
    found = {}
    for name, file in tasks.items():
        rows = read_rows(str(file), column)
        pool = read_prompts(str(pools[name]), column) if name in pools else None
        found[str(name)] = (
            texts_of(rows, column, str(file)),
            texts_of(rows, answer_column, str(file), are_answers=True),
            pool,
        )
    return found


class _Collection:
    """Trains one task after another on one base."""

    def __init__(self, plan: dict[str, Any], pairs: Path, base: str, device: str | None, *, quiet: bool) -> None:
        from peft import LoraConfig
        from transformers import TrainingArguments

        self._plan, self._pairs, self._base_name, self._device = plan, pairs, base, device
        lora = {**section(plan, "lora")}
        self._lora = lambda: built(LoraConfig, "lora", lora, {field.name for field in fields(LoraConfig)}, **_LORA)
        training = {"seed": plan.get("seed", 0), "disable_tqdm": quiet, **_TRAINING}
        if device == "cpu":
            training["use_cpu"] = True
        self._arguments = lambda folder: built(
            TrainingArguments,
            "training",
            section(plan, "training"),
            {field.name for field in fields(TrainingArguments)} - {"output_dir"},
            output_dir=folder,
            **training,
        )
        self._lora()  # now, rather than when the base is loaded
        with tempfile.TemporaryDirectory() as folder:
            self._arguments(folder)

    def run(self, texts: dict[str, _Texts]) -> None:
        """Train tasks."""
        if not texts:
            return
        model, tokenizer = load_base(self._base_name, device=self._device), load_tokenizer(self._base_name)
        for name, of_task in texts.items():
            model = self._train(name, model, tokenizer, *of_task)

    def _train(
        self,
        name: str,
        base: nn.Module,
        tokenizer: Any,
        questions: list[str],
        answers: list[str],
        prompts: list[str] | None,
    ) -> nn.Module:
        from peft import get_peft_model
        from transformers import Trainer, set_seed

        from peft_dnd.pairs import CheckpointCollector
        from peft_dnd.pairs.collator import ExampleCollator

        rows = _examples(self._plan, tokenizer, questions, answers)
        collector = CheckpointCollector(
            self._pairs / name,
            prompts or questions,
            answers=None if prompts else answers,
            last=self._plan.get("last", 50),
            every=self._plan.get("every", 1),
            overwrite=True,
            examples=rows,
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._arguments(folder)
            set_seed(arguments.seed)
            try:
                model: Any = get_peft_model(base, self._lora())
            except ValueError as error:
                raise CommandError(f"'lora' of the recipe does not fit the base: {error}") from error
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=rows,
                data_collator=ExampleCollator(tokenizer.pad_token_id or 0),
                callbacks=[collector],
            )
            trainer.train()
        return model.unload()
