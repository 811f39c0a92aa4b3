# SPDX-License-Identifier: Apache-2.0
"""The world's training tasks as a pairs folder, and a generator fitted to them on the base's own loss."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers.trainer_utils import get_last_checkpoint

from language_model.base import load_base, with_small_head
from language_model.going_on import reading_more
from language_model.rows import INSTRUCTION, Row, example_row, prompt_of, told_as
from language_model.teachers import copy_answers, renumbered, tokens_of
from language_model.wordings import languages
from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_task_without_checkpoints,
)
from peft_dnd.fitting.teacher import base_digest
from peft_dnd.storage.files import read_json, write_json
from peft_dnd.text import AnswerStatesTextEncoder, PromptEmbeddingCache


@dataclass(frozen=True)
class FitSettings:
    """How a generator is fitted; chosen on training tasks and earlier trials, on no held-out task's scores."""

    steps: int = 2000
    tasks_a_step: int = 16
    examples: int = 4
    prompts: int = 3
    prompt_pool: int = 8
    examples_a_task: int = 200
    rank: int = 16
    core_rank: int = 16
    hidden_size: int = 256
    layers: tuple[int, ...] = (2, 6, 10, 14, 18)
    learning_rate: float = 1e-3
    warmup: float = 0.02
    common_tokens: int = 3000
    seed: int = 0
    decoder: str = "core"
    # Weights of what is minimised: the base's loss on labelled examples, and the divergence from a teacher's answers.
    task_loss: float = 1.0
    distillation: float = 0.0
    # Of a fit that goes on from a fitted generator: prompts drawn anew, and so many more directions read.
    start: str | None = None
    pool: str = "pool"
    more_directions: int = 0
    # Whether plain tasks are asked for in other languages too, as tasks beside: in all wordings but the last.
    in_languages: bool = False
    # How the prompts of a pool tell the task, by turns, and of how many solved examples.
    told: tuple[str, ...] = (INSTRUCTION,)
    shots: int = 4
    # How often a task comes, by its examples; `None`: all alike.
    sampling: float | None = None


# What a fit differs in that starts from a fitted generator: less to unlearn, so a lower rate, and prompts never read.
GOING_ON: dict[str, Any] = {"pool": "second pool", "more_directions": 512, "learning_rate": 6e-4, "in_languages": True}
# Of the wordings in another language, how many are kept for asking.
ASKED_WORDINGS = 1


def as_record(settings: FitSettings) -> dict[str, Any]:
    """Settings as they are read again from JSON: lists, where there are tuples."""
    return dict(json.loads(json.dumps(asdict(settings))))


_ASKED_IN = "asked in"
_PROMPT_STATES = "prompt_states"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(rank: int) -> LoraConfig:
    """Plain LoRA on all projections, with a scaling of 1."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM")


def prompts_of(
    task: Any,
    split: str,
    count: int,
    seed: str,
    *,
    wordings: int | None = None,
    told: Sequence[str] = (INSTRUCTION,),
    shots: int = 4,
) -> list[str]:
    """Prompts of a task: wordings of its instruction and inputs of its training examples, drawn by a seed.

    Args:
        task: The world's task.
        split: `"seen"` or `"unseen"` wordings.
        count: How many prompts.
        seed: What the draw depends on, beside the task.
        wordings: In how many wordings at most; `None`: each in one of its own, as far as there are so many.
        told: Ways to tell the task, by turns.
        shots: Solved examples of a prompt that has any, drawn anew for each.
    """
    chance = random.Random(f"{seed} {task.name}")
    instructions = list(task.instructions(split))
    chosen = chance.sample(instructions, min(len(instructions), wordings or count))
    inputs = [example.input for example in task.train]
    prompts = []
    for number in range(count):
        instruction, text, way = chosen[number % len(chosen)], chance.choice(inputs), told[number % len(told)]
        solved = [] if way == INSTRUCTION else solved_examples(task, text, shots, chance)
        prompts.append(told_as(way, instruction, solved, text))
    return prompts


def solved_examples(task: Any, text: str, count: int, chance: random.Random) -> list[tuple[str, str]]:
    """Training examples of a task other than one with this input, drawn."""
    others = [one for one in task.train if one.input != text]
    return [(one.input, one.output) for one in chance.sample(others, min(count, len(others)))]


def pools_of(tasks: Sequence[Any], settings: FitSettings) -> list[tuple[str, Any, list[str]]]:
    """What is fitted on: a name, a task, and a pool of prompts that ask for it in one language."""
    count = settings.prompt_pool
    drawn_by, told = f"{settings.pool} {settings.seed}", settings.told
    pools = [
        (task.name, task, prompts_of(task, "seen", count, drawn_by, told=told, shots=settings.shots)) for task in tasks
    ]
    for task in tasks if settings.in_languages else ():
        for language in languages():
            told = task.instructions_in(language)[:-ASKED_WORDINGS]
            if told:
                name = f"{task.name} {_ASKED_IN} {language}"
                chance = random.Random(f"{settings.pool} {settings.seed} {name}")
                inputs = [example.input for example in task.train]
                drawn = [prompt_of(told[i % len(told)], chance.choice(inputs)) for i in range(count)]
                pools.append((name, task, drawn))
    return pools


def write_pairs(
    folder: Path, tasks: Sequence[Any], tokenizer: Any, settings: FitSettings, names: dict[int, int]
) -> None:
    """Write tasks as a pairs folder without checkpoints; their examples are labelled in the small head's numbers."""
    for number, (name, task, prompts) in enumerate(pools_of(tasks, settings)):
        rows = [example_row(tokenizer, example.input, example.output) for example in task.train]
        labelled = [{**row, "labels": renumbered(row["labels"], names)} for row in rows[: settings.examples_a_task]]
        write_task_without_checkpoints(folder / f"{number:04d}", prompts, labelled, task=name, overwrite=True)


def answer_tokens(tasks: Sequence[Any], tokenizer: Any, settings: FitSettings) -> list[int]:
    """The tokens of the training answers, and the first few thousand of the vocabulary beside them."""
    answers = sorted({example.output for task in tasks for example in task.train})
    rows: list[Row] = [example_row(tokenizer, "", answer) for answer in answers]
    return sorted({*range(settings.common_tokens), *(label for row in rows for label in row["labels"] if label >= 0)})


def fit_generator(
    folder: Path, base: Path, tasks: Sequence[Any], settings: FitSettings, answers: Path | None = None
) -> PromptConditionedLoraGenerator:
    """Fit a generator, going on where an interrupted fit stopped.

    Args:
        folder: Where pairs, checkpoints and the generator are kept.
        base: The prepared base's folder.
        tasks: The world's training tasks.
        settings: How.
        answers: For distillation, where a teacher's answers to the tasks are.
    """
    model, tokenizer = load_base(base, torch.bfloat16)
    tokens = answer_tokens(tasks, tokenizer, settings)
    model, names = with_small_head(model, tokens if answers is None else [*tokens, *tokens_of(answers)])
    told = {**as_record(settings), "steps": 0, "start": None}
    marker = {"tasks": [task.name for task in tasks], "settings": told}
    written = folder / "pairs.json"
    if not written.is_file() or read_json(written) != marker:
        write_pairs(folder / "pairs", tasks, tokenizer, settings, names)
        if answers is not None:
            copy_answers(answers, folder / "pairs", names, base_digest(model))
        write_json(written, marker)
    encoder = AnswerStatesTextEncoder.from_pretrained(base, settings.layers, dtype=torch.bfloat16, block_tokens=512)
    if settings.start is None:
        generator, pairs = _unfitted(folder, encoder, model, settings)
    else:
        generator, pairs = _fitted(folder, Path(settings.start), encoder, tasks, settings)
    arguments = DnDTrainingArguments(
        output_dir=str(folder / "fit"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.tasks_a_step,
        task_sampling_exponent=settings.sampling,
        task_examples=settings.examples,
        task_loss_weight=settings.task_loss,
        distillation_weight=settings.distillation,
        learning_rate=settings.learning_rate,
        warmup_steps=max(1, int(settings.warmup * settings.steps)),
        adam_beta2=0.98,
        weight_decay=0.0,
        smallest_prompt_set=1,
        prompt_states_dir=str(folder / _PROMPT_STATES),
        save_steps=200,
        save_total_limit=1,
        logging_steps=20,
        seed=settings.seed,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    # The adapters are computed in the base's own precision: in float32, PEFT's default, a step takes a sixth longer.
    adapted = get_peft_model(model, lora_config(settings.rank), autocast_adapter_dtype=False)
    trainer = DnDTrainer(generator, arguments, pairs, base_model=adapted)
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    generator.save_pretrained(folder / "generator")
    write_json(folder / "log.json", trainer.state.log_history)
    return generator


def _unfitted(
    folder: Path, encoder: AnswerStatesTextEncoder, model: Any, settings: FitSettings
) -> tuple[PromptConditionedLoraGenerator, PromptCheckpointDataset]:
    """A new generator, and its pairs."""
    layout = AdapterLayout.from_lora_config(lora_config(settings.rank), model)
    pairs = PromptCheckpointDataset.from_folder(folder / "pairs", layout=layout, seed=settings.seed)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        encoder,
        num_prompts=settings.prompts,
        decoder_type=settings.decoder,
        decoder_config={"core_rank": settings.core_rank, "hidden_size": settings.hidden_size}
        if settings.decoder == "core"
        else {},
    )
    torch.manual_seed(settings.seed)
    return PromptConditionedLoraGenerator(config, encoder), pairs


def _fitted(
    folder: Path, start: Path, encoder: AnswerStatesTextEncoder, tasks: Sequence[Any], settings: FitSettings
) -> tuple[PromptConditionedLoraGenerator, PromptCheckpointDataset]:
    """A fitted generator that reads more, and the pairs that it goes on with."""
    layout = PromptConditionedLoraGeneratorConfig.from_pretrained(start).adapter_layout
    pairs = PromptCheckpointDataset.from_folder(folder / "pairs", layout=layout, seed=settings.seed)
    cache = PromptEmbeddingCache(encoder, folder=folder / _PROMPT_STATES)
    of_tasks: dict[str, list[torch.Tensor]] = {}
    for name, task, prompts in tqdm(pools_of(tasks, settings), desc="Reading prompts", unit="task"):
        # One task in all its languages: what these differ in is nothing to read.
        of_tasks.setdefault(task.name, []).append(cache.states(name, prompts).flat.float())
    torch.manual_seed(settings.seed)
    return reading_more(start, encoder, of_tasks, settings.more_directions), pairs
