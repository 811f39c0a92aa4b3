# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd fit`: a generator fitted to a pairs folder."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .bases import load_base
from .console import CommandError, Device, Json, Quiet, Settings, progress, report
from .recipes import built, names, read_recipe, section, wanted


_NAMES = (
    "pairs",
    "output",
    "text_encoder",
    "tasks",
    "held_out",
    "update",
    "seed",
    "generator",
    "training",
    "base",
    "lora",
    "include_text_encoder",
    "push_to_hub",
)
_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_LOSSES_OF_THE_BASE = ("task_loss_weight", "distillation_weight")
_ON_THE_BASE = (
    "To fit on the base's own loss give --base and --set training.task_loss_weight=1 for tasks that have examples, "
    "training.distillation_weight=1 for those that distil made"
)
_TRAINING = {"report_to": "none", "save_total_limit": 2}


def fit(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file with the same names as the options.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Pairs folder, or Hub id of one.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the generator.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the model that reads the prompts.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task to measure on and not to fit to; may be repeated.")
    ] = None,
    update: Annotated[
        str | None, typer.Option(metavar="GENERATOR", help="A fitted generator to go on from, with new tasks.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts read at once, generator.num_prompts.")
    ] = None,
    decoder: Annotated[str | None, typer.Option(help="Kind of decoder, generator.decoder_type.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="training.max_steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="training.num_train_epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="training.per_device_train_batch_size.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="training.learning_rate.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, for task loss or for tasks that distil made.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all that is drawn. [default: 0]")] = None,
    settings: Settings = None,
    include_text_encoder: Annotated[
        bool, typer.Option("--include-text-encoder", help="Save the text encoder in the generator's folder.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the fitted generator to this repository.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a generator that is there.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Fit a generator to a pairs folder.

    Sections of a recipe: generator (what PromptConditionedLoraGeneratorConfig.from_adapters takes), training (what
    DnDTrainingArguments takes) and, for pairs without checkpoints, lora (what peft.LoraConfig takes). On several GPUs
    use DnDTrainer in Python. With --update the pairs are new tasks for a generator that is there already; what it
    keeps of the tasks before them is mixed in.

    Example:
      peft-dnd fit --pairs pairs -o generator --text-encoder sentence-transformers/all-MiniLM-L6-v2 --held-out law \
          --max-steps 2000
      peft-dnd fit --update generator --pairs new-pairs -o generator-2 --max-steps 700

      pairs: pairs                      # the same as recipe.yaml: peft-dnd fit recipe.yaml
      output: generator
      text_encoder: sentence-transformers/all-MiniLM-L6-v2
      held_out: [law]
      training: {max_steps: 2000}
    """
    plan = read_recipe(
        recipe,
        _NAMES,
        settings,
        pairs=pairs,
        output=output,
        text_encoder=text_encoder,
        held_out=held_out,
        update=update,
        base=base,
        seed=seed,
        include_text_encoder=include_text_encoder or None,
        push_to_hub=push_to_hub,
        generator__num_prompts=num_prompts,
        generator__decoder_type=decoder,
        training__max_steps=max_steps,
        training__num_train_epochs=epochs,
        training__per_device_train_batch_size=batch_size,
        training__learning_rate=learning_rate,
    )
    folder = Path(wanted(plan, "output", "--output"))
    wanted(plan, "pairs", "--pairs")
    if plan.get("update") is None:
        wanted(plan, "text_encoder", "--text-encoder")
    elif plan.get("text_encoder") or section(plan, "generator") or section(plan, "lora"):
        raise CommandError(
            "A generator to go on from has a text encoder, settings and a LoRA layout of its own: leave yours out."
        )
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    if resume and not checkpoints:
        raise CommandError(f"There is no checkpoint in {str(folder)!r} to resume from. Leave --resume out.")
    if not resume and not overwrite and ((folder / "config.json").exists() or checkpoints):
        raise CommandError(
            f"{str(folder)!r} holds a generator, or part of a fit, already. Name another folder, or go on with "
            "--resume, or replace it with --overwrite."
        )
    with progress(quiet):
        facts = _fit(plan, folder, device, resume=resume, quiet=quiet)
    measured = ", ".join(f"{name} {value:.4g}" for name, value in facts["measured"].items() if "loss" in name)
    summary = f"Generator saved to {folder} ({measured})"
    if facts["points_lost"]:
        worst, points = next(iter(facts["points_lost"].items()))
        summary += (
            f"\nOn {len(facts['points_lost'])} earlier tasks it lost {facts['mean_points_lost']:.1f} points of 100 in "
            f"the mean, {points:.1f} on {worst!r}."
        )
    report(facts, summary, as_json=as_json, quiet=quiet)


def _fit(plan: dict[str, Any], folder: Path, device: str | None, *, resume: bool, quiet: bool) -> dict[str, Any]:
    from peft_dnd.errors import RegressionError
    from peft_dnd.fitting import DnDTrainer, DnDTrainingArguments
    from peft_dnd.generator import PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig, revisions
    from peft_dnd.generator.revision_history import REVISIONS

    own = {"output_dir": str(folder), "seed": plan.get("seed", 0), "disable_tqdm": quiet, **_TRAINING}
    if device == "cpu":
        own["use_cpu"] = True
    known = {field.name for field in fields(DnDTrainingArguments)} - {"output_dir", "push_to_hub"}
    arguments = built(DnDTrainingArguments, "training", section(plan, "training"), known, **own)
    _check_base(plan, arguments)
    generator: Any = None
    if plan.get("update") is not None:
        generator = PromptConditionedLoraGenerator.from_pretrained(str(plan["update"]))
    base = None if plan.get("base") is None else load_base(str(plan["base"]), device=device)
    training, held_out = _read_pairs(plan, base, arguments)
    if generator is None:
        make_config = PromptConditionedLoraGeneratorConfig.from_adapters
        config = built(
            lambda **settings: make_config(training, str(plan["text_encoder"]), **settings),
            "generator",
            section(plan, "generator"),
            set(inspect.signature(make_config).parameters) - {"adapters", "text_encoder"},
        )
        generator = PromptConditionedLoraGenerator(config)
    trainer = DnDTrainer(generator, arguments, training, held_out, base_model=base)
    trainer.train(resume_from_checkpoint=resume or None)
    if held_out is not None:
        trainer.evaluate()
    carry = True if plan.get("include_text_encoder") else None
    generator.save_pretrained(folder, include_text_encoder=carry)
    repository = plan.get("push_to_hub")
    if repository:
        most = arguments.most_points_lost
        try:
            generator.push_to_hub(str(repository), include_text_encoder=carry, most_points_lost=most)
        except RegressionError as error:
            raise CommandError(f"{error} Nothing was uploaded; the update is in {str(folder)!r}.") from error
    last = revisions(generator.config.measured)[-1]
    return {
        "generator": str(folder),
        "repository": repository,
        "training_tasks": list(training.tasks),
        "held_out": [] if held_out is None else list(held_out.tasks),
        "decoder_parameters": sum(parameter.numel() for parameter in generator.decoder.parameters()),
        "revision": last.number,
        "replayed_tasks": last.replayed,
        "mean_points_lost": last.mean_lost if last.lost else None,
        "points_lost": last.lost,
        "measured": {
            name: value
            for name, value in generator.config.measured.items()
            if not isinstance(value, dict) and name != REVISIONS
        },
    }


def _check_base(plan: dict[str, Any], arguments: Any) -> None:
    """Make sure that a base is named where its loss is taken, and only where it is good for something."""
    taken = [name for name in _LOSSES_OF_THE_BASE if getattr(arguments, name) > 0]
    if taken and plan.get("base") is None:
        raise CommandError(
            f"training.{taken[0]} is {getattr(arguments, taken[0]):g}: name the base whose loss is taken, with --base."
        )
    if plan.get("base") is not None and not taken and not section(plan, "lora"):
        raise CommandError(f"The base {str(plan['base'])!r} would not be used. {_ON_THE_BASE}, or leave --base out.")


def _read_pairs(plan: dict[str, Any], base: Any, arguments: Any) -> tuple[Any, Any]:
    """The pairs to fit to, and those held out or `None`."""
    from peft import LoraConfig

    from peft_dnd.adapters import AdapterLayout
    from peft_dnd.pairs import PromptCheckpointDataset
    from peft_dnd.storage.hub import hub_id

    lora = built(LoraConfig, "lora", section(plan, "lora"), {field.name for field in fields(LoraConfig)}, **_LORA)
    source, tasks = str(plan["pairs"]), names(plan, "tasks") or None
    read: Any = PromptCheckpointDataset.from_hub if hub_id(source) else PromptCheckpointDataset.from_folder
    if not Path(source).exists() and "/" not in source:
        read = PromptCheckpointDataset.from_folder  # a misspelt folder, most likely: whose error says so
    layout = None
    if section(plan, "lora"):
        if base is None:
            raise CommandError("'lora' of the recipe says what adapters the base gets: name the base, with --base.")
        layout = AdapterLayout.from_lora_config(lora, base)
    pairs = read(source, tasks, seed=plan.get("seed", 0), layout=layout)
    if not pairs.has_checkpoints:
        if not any(getattr(arguments, name) > 0 for name in _LOSSES_OF_THE_BASE):
            raise CommandError(f"The tasks in {source!r} have no checkpoints to fit to. {_ON_THE_BASE}.")
        if layout is None and plan.get("update") is None:
            raise CommandError(
                f"The tasks in {source!r} have no checkpoints, from which it would be read what adapters the base "
                "gets: say it, with --set lora.r=8, and what else peft.LoraConfig takes."
            )
    held_out = names(plan, "held_out")
    return pairs.split(held_out) if held_out else (pairs, None)
