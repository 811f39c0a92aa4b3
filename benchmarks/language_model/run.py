# SPDX-License-Identifier: Apache-2.0
"""A generator for a real language model, from nothing to a record: python benchmarks/language_model/run.py --seed 0.

1. Write the base, Gemma 3 270M, from its package.
2. Fit a generator on the training tasks of the world, from their prompts and examples.
3. Train what it is held against: one LoRA for all training tasks, and each asked task's own.
4. Ask everyone the same questions of held-out tasks, and report.

What is finished is kept: a second run goes on from there. `--small` fits on a part of the world and answers a few
questions side by side.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))
sys.path.append(str(BENCHMARKS.parent / "examples" / "worked_example"))

from record import write_result  # noqa: E402
from stages import Progress, Stage  # noqa: E402

from language_model.base import load_base, prepare_base  # noqa: E402
from language_model.fitting import GOING_ON, FitSettings, as_record, fit_generator  # noqa: E402
from language_model.in_languages import draw_in_languages, language_table, score_in_languages  # noqa: E402
from language_model.judging import ENTRIES, Contest, Questions, Size, draw_questions, score_all  # noqa: E402
from language_model.parts import Part, small_part  # noqa: E402
from language_model.report import costs_of, reports_of, table  # noqa: E402
from language_model.rivals import MULTI_TASK, OWN, Matrices, StoredLoras, lora_layout, multi_task_lora, own_loras  # noqa: E402
from language_model.showing import side_by_side  # noqa: E402
from language_model.timing import steps_in  # noqa: E402
from language_model.world import build_world  # noqa: E402
from peft_dnd import PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402
from peft_dnd.text import AnswerStatesTextEncoder  # noqa: E402


logger = logging.getLogger("language_model")

STAGES = {
    "generator": Stage("fitting the generator", ("fitting",), ("multi_task", "scores")),
    "multi_task": Stage("training one LoRA on all training tasks", ("multi_task",), ("scores",)),
    "own": Stage("training the own LoRAs of the tasks that are asked", ("own",), ("scores",)),
    "scores": Stage("judging", ("scores",)),
}
# Rivals that take long, and whose rows those of some adapters are.
WITHOUT = ("own", "multi_task")
ADAPTERS_OF = {"own": "own", "mean": "own", "multi_task": "multi_task"}
# Of the smaller run: enough to see that it works, without hours for rivals.
SMALL_MINUTES = 10.0
SMALL_SIZE = Size(tasks=6, rows=8)
SMALL_ENTRIES = ("base", "base_instruction", "in_context", "generated", "shuffled")
SHOWN_TASKS = 4


def main() -> None:
    """Run the benchmark."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    name = f"seed-{options.seed}{'-small' if options.small else ''}"
    name += "-further" if options.start else ""
    name += f"-{options.training_tasks}-tasks" if options.training_tasks else ""
    progress = Progress(options.output / name, STAGES)
    try:
        run(options, progress)
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="another seed holds out other tasks and wordings")
    parser.add_argument("--output", type=Path, default=Path("language_model_output"), help="where everything goes")
    parser.add_argument("--data", type=Path, action="append", default=[], help="a folder of further tasks")
    parser.add_argument("--base", type=Path, help="where the base is, or goes; default: in the output folder")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"of fitting; default {FitSettings.steps}")
    length.add_argument("--minutes", type=float, help="of fitting, in place of steps")
    length.add_argument("--generator", help="a fitted generator's folder or Hub id: nothing is fitted")
    parser.add_argument(
        "--start",
        help="a fitted generator's folder that the fit goes on from, on prompts drawn anew, in more languages",
    )
    parser.add_argument("--small", action="store_true", help="a part of the world, no rivals, and a look at answers")
    parser.add_argument("--training-tasks", type=int, help="fit on so many tasks only")
    parser.add_argument(
        "--without", choices=WITHOUT, action="append", default=[], help="a rival that is neither trained nor asked"
    )
    parser.add_argument(
        "--rival-examples",
        type=int,
        help="of the one LoRA for all training tasks; default: as many as the generator's",
    )
    parser.add_argument("--tasks", type=int, default=Size.tasks, help="asked of each kind")
    parser.add_argument("--rows", type=int, default=Size.rows, help="test rows of each task")
    parser.add_argument("--threads", type=int, help="of the processor; default: torch's own choice")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, progress: Progress) -> None:
    progress.check_settings(settings_of(options))
    logger.info("1. Building the world, and the base from its package")
    base = prepare_base(options.base or options.output / "base")
    world = build_world(options.seed, options.data)
    part = small_part(world) if options.small else Part(world, training=options.training_tasks)
    size = SMALL_SIZE if options.small else Size(options.tasks, options.rows)
    questions = draw_questions(part, size, options.seed)
    tasks = part.of("training")
    logger.info("2. A generator for %d training tasks", len(tasks))
    generator, examples_seen = the_generator(options, progress, base, tasks)
    model, tokenizer = load_base(base, torch.bfloat16)
    if options.small:
        look(model, tokenizer, generator, questions, progress)
        return
    rival_examples = options.rival_examples or examples_seen
    contest = rivals(options, progress, model, tokenizer, generator, tasks, questions, rival_examples)
    logger.info("4. Asking %d kinds of held-out task", len(questions))
    with progress.working_on("scores"):
        keys = [key for key, entry in ENTRIES.items() if ADAPTERS_OF.get(entry.adapter) not in options.without]
        found = score_all(contest, questions, progress.folder / "scores", keys)
        asked = draw_in_languages(part, size, options.seed)
        in_languages = score_in_languages(contest, asked, progress.folder / "scores" / "languages")
    reports = reports_of(found)
    result = {
        "seed": options.seed,
        "settings_of": read_json(progress.folder / "settings.json"),
        "examples_seen": examples_seen,
        "rival_examples": None if "multi_task" in options.without else rival_examples,
        "training_tasks": len(tasks),
        "parameters": generator.num_parameters(),
        "costs": costs_of(found, progress.seconds),
        "kinds": reports,
        "in_languages": in_languages,
    }
    write_json(progress.folder / "report.json", result)
    suffix = "_further" if options.start else ""
    suffix += f"_{options.training_tasks}_tasks" if options.training_tasks else ""
    write_result(f"language_model_seed_{options.seed}{suffix}", result, command_of(options))
    logger.info("\n%s\n\n%s", table(reports), language_table(in_languages))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a run's products depend on."""
    return {
        "data": [folder.name for folder in options.data],
        "generator": Path(options.generator).name if options.generator else None,
        "start": Path(options.start).name if options.start else None,
        "steps": options.steps,
        "minutes": options.minutes,
        "training_tasks": options.training_tasks,
        "asked": {"tasks": options.tasks, "rows": options.rows},
        "fitting": {**as_record(fit_settings(options)), "start": None},
        "own": asdict(OWN),
        "multi_task": asdict(MULTI_TASK),
    }


def fit_settings(options: argparse.Namespace) -> FitSettings:
    """How it is fitted, but for the steps."""
    settings = replace(FitSettings(), seed=options.seed)
    return replace(settings, start=options.start, **GOING_ON) if options.start else settings


def the_generator(
    options: argparse.Namespace, progress: Progress, base: Path, tasks: Sequence[Any]
) -> tuple[PromptConditionedLoraGenerator, int]:
    """The generator, fitted if need be, and on how many examples it was."""
    settings = fit_settings(options)
    a_step = settings.tasks_a_step * settings.examples
    if options.generator:
        generator = load_generator(options.generator, base)
        return generator, int(generator.config.measured.get("steps", settings.steps)) * a_step
    folder = progress.folder / "fitting"
    if not (folder / "generator" / "config.json").is_file():
        with progress.working_on("generator"):
            steps = steps_of(options, folder / "steps.json", base, tasks, settings)
            logger.info("Fitting for %d steps", steps)
            fit_generator(folder, base, tasks, replace(settings, steps=steps))
    generator = load_generator(str(folder / "generator"), base)
    before = PromptConditionedLoraGeneratorConfig.from_pretrained(options.start).measured if options.start else {}
    return generator, (int(generator.config.measured["steps"]) + int(before.get("steps", 0))) * a_step


def steps_of(options: argparse.Namespace, path: Path, base: Path, tasks: Sequence[Any], settings: FitSettings) -> int:
    """How many steps are asked for; of minutes, how many go into them here, found out once."""
    minutes = options.minutes or (SMALL_MINUTES if options.small and not options.steps else None)
    if minutes is None:
        return int(options.steps or settings.steps)
    if not path.is_file():
        write_json(path, {"minutes": minutes, "steps": steps_in(minutes, base, tasks, settings)})
    return int(read_json(path)["steps"])


def load_generator(name: str, base: Path) -> PromptConditionedLoraGenerator:
    """A generator of a folder or the Hub, which reads prompts by the base that is here."""
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(name)
    encoder = None
    if config.text_encoder_layers is not None:
        encoder = AnswerStatesTextEncoder.from_pretrained(
            base, config.text_encoder_layers, dtype=torch.bfloat16, block_tokens=512
        )
    generator: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(
        name, text_encoder=encoder
    )
    return generator


def rivals(
    options: argparse.Namespace,
    progress: Progress,
    model: Any,
    tokenizer: Any,
    generator: PromptConditionedLoraGenerator,
    tasks: Sequence[Any],
    questions: Mapping[str, Sequence[Questions]],
    examples_seen: int,
) -> Contest:
    """Everyone who is asked, trained if need be."""
    folder, seed = progress.folder, options.seed
    asked = {one.task.name: one.task for of in questions.values() for one in of}
    logger.info("3. The own LoRAs of %d tasks, and one LoRA for all training tasks", len(asked))

    def own() -> StoredLoras:
        return own_loras(model, tokenizer, list(asked.values()), folder / "own", training=OWN, seed=seed)

    def multi_task() -> Matrices:
        where = folder / "multi_task"
        return multi_task_lora(
            model, tokenizer, tasks, where, examples_seen=examples_seen, training=MULTI_TASK, seed=seed
        )

    done = folder / "own" / "finished.json"
    if not done.is_file() and "own" not in options.without:
        with progress.working_on("own"):
            own()
            write_json(done, {"tasks": len(asked)})
    if not (folder / "multi_task" / "adapter.safetensors").is_file() and "multi_task" not in options.without:
        with progress.working_on("multi_task"):
            multi_task()
    return Contest(
        model=model,
        tokenizer=tokenizer,
        generator=generator,
        own=None if "own" in options.without else own(),
        own_layout=lora_layout(model, OWN.rank),
        multi_task={} if "multi_task" in options.without else multi_task(),
        multi_task_layout=lora_layout(model, MULTI_TASK.rank),
        mean_of=[one.task.name for one in questions["new_wordings"]],
    )


def look(
    model: Any,
    tokenizer: Any,
    generator: PromptConditionedLoraGenerator,
    questions: Mapping[str, Sequence[Questions]],
    progress: Progress,
) -> None:
    """Score the generator and the base, and show a few answers."""
    contest = Contest(model=model, tokenizer=tokenizer, generator=generator, own_layout=lora_layout(model, OWN.rank))
    with progress.working_on("scores"):
        found = score_all(contest, questions, progress.folder / "scores", SMALL_ENTRIES)
    reports = reports_of(found)
    write_json(progress.folder / "report.json", {"kinds": reports, "costs": costs_of(found, progress.seconds)})
    kinds = [kind for kind in ("new_combinations", "new_wordings") if kind in questions]
    shown = [one for kind in kinds for one in questions[kind][: SHOWN_TASKS // 2]]
    logger.info("%s", side_by_side(model, tokenizer, generator, shown))
    logger.info("\n%s\n\nGenerator: %s", table(reports), progress.folder / "fitting" / "generator")


def command_of(options: argparse.Namespace) -> str:
    """What runs it again, without a path of this machine."""
    parts = ["python benchmarks/language_model/run.py", f"--seed {options.seed}"]
    parts += [f"--data {folder.name}" for folder in options.data]
    parts += [f"--steps {options.steps}"] if options.steps else []
    parts += [f"--minutes {options.minutes}"] if options.minutes else []
    parts += [f"--generator {Path(options.generator).name}"] if options.generator else []
    parts += [f"--start {Path(options.start).name}"] if options.start else []
    parts += [f"--rival-examples {options.rival_examples}"] if options.rival_examples else []
    parts += [f"--without {name}" for name in options.without]
    parts += [f"--training-tasks {options.training_tasks}"] if options.training_tasks else []
    return " ".join([*parts, f"--tasks {options.tasks}", f"--rows {options.rows}"])


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    logger.info("%.0f seconds", time.perf_counter() - began)
