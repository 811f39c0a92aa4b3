# SPDX-License-Identifier: Apache-2.0
"""Labels, teachers and decoders at equal examples: python benchmarks/language_model/objectives.py --seed 0.

On a part of the world, each generator is fitted for as many steps of as many rows: on labelled examples, on what a
teacher answers to the same inputs, or on both; and with other decoders on labelled examples. All are asked the same
questions of held-out tasks. One teacher is the bare base with the instruction and four solved examples in its window.
The other is one LoRA for all training tasks with the instruction in its window, `adapter.safetensors` in the folder
that `run.py` calls `multi_task`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base  # noqa: E402
from language_model.compare import means  # noqa: E402
from language_model.fitting import FitSettings, lora_config  # noqa: E402
from language_model.judging import FEW, WITH_EXAMPLES, Size, draw_questions, score_all  # noqa: E402
from language_model.parts import Part  # noqa: E402
from language_model.rivals import MULTI_TASK  # noqa: E402
from language_model.rows import BOTH, INSTRUCTION  # noqa: E402
from language_model.rows import EXAMPLES as SOLVED_EXAMPLES  # noqa: E402
from language_model.sampled_head import with_head  # noqa: E402
from language_model.small_fits import above_one, fitted, found_in, parser_of, path_of, prepared  # noqa: E402
from language_model.teachers import ask_teacher  # noqa: E402
from peft_dnd.storage.files import read_json, read_safetensors, write_json  # noqa: E402


logger = logging.getLogger("language_model")

EXAMPLES, LORA = "examples", "lora"
# A step has as many rows in all: of one kind, or half and half.
ROWS, HALF = 4, 2
STEPS = 170
# Training inputs of a task, the same for labels and teachers.
INPUTS = 24
# Prompts of a task in each way of telling it.
PROMPTS_A_WAY = 8
SOLVED = {EXAMPLES: FEW, LORA: 0}
# Once for all variants, and each of them.
KNOWN, ASKED = ("base", "in_context"), ("generated", "shuffled")


@dataclass(frozen=True)
class Variant:
    """What is fitted to, and by whom.

    Attributes:
        teacher: Whose answers are distilled; `None`: nobody's.
        labels: Whether labelled examples are fitted to as well, or alone.
        decoder: The decoder's family.
        told: What the prompts say of the task.
    """

    teacher: str | None = None
    labels: bool = True
    decoder: str = "core"
    told: tuple[str, ...] = (INSTRUCTION,)

    @property
    def asked(self) -> tuple[str, ...]:
        return ASKED if self.told == (INSTRUCTION,) else (*ASKED, *WITH_EXAMPLES)

    def settings(self, seed: int, steps: int) -> FitSettings:
        both = self.labels and self.teacher is not None
        return replace(
            FitSettings(),
            seed=seed,
            steps=steps,
            examples=HALF if both else ROWS,
            examples_a_task=INPUTS,
            decoder=self.decoder,
            told=self.told,
            prompt_pool=PROMPTS_A_WAY * len(self.told),
            task_loss=float(self.labels),
            distillation=float(self.teacher is not None),
        )


# The first is what the others are held against.
VARIANTS = {
    "labels": Variant(),
    "teacher with examples": Variant(EXAMPLES, labels=False),
    "teacher with a LoRA": Variant(LORA, labels=False),
    "labels and teacher with a LoRA": Variant(LORA),
    "labels, set_transformer": Variant(decoder="set_transformer"),
    "labels, text_to_lora": Variant(decoder="text_to_lora"),
    "labels, all ways of telling": Variant(told=(INSTRUCTION, SOLVED_EXAMPLES, BOTH)),
}


def main() -> None:
    """Fit and ask what is asked for, and report on all that is there."""
    parser = parser_of(__doc__, STEPS)
    parser.add_argument("--multi-task", type=Path, required=True, help="the folder with the LoRA for all tasks")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="fit no others in this run")
    options = parser.parse_args()
    base, part = prepared(options)
    folder = options.output / f"objectives-{options.seed}"
    for name in options.only or VARIANTS:
        fit_and_ask(options, part, base, folder, name)
    found = found_in(folder, list(VARIANTS))
    first = next(iter(found))
    result = {
        "training_tasks": len(part.of("training")),
        "steps": options.steps,
        "rows a step": FitSettings().tasks_a_step * ROWS,
        "inputs of a task": INPUTS,
        "variants": found,
        f"above {first}": above_one(found, first),
    }
    command = f"python benchmarks/language_model/objectives.py --seed {options.seed} --steps {options.steps}"
    write_result(f"language_model_objectives_seed_{options.seed}", result, command)


def fit_and_ask(options: argparse.Namespace, part: Part, base: Path, folder: Path, name: str) -> None:
    """Fit one variant and ask it, unless that is done."""
    variant, where = VARIANTS[name], path_of(folder, name).parent
    if path_of(folder, name).is_file():
        return
    logger.info("%s", name)
    answers = None if variant.teacher is None else teacher_answers(options, part, base, folder, variant.teacher)
    settings = variant.settings(options.seed, options.steps)
    contest, facts = fitted(where / "fitting", base, part.of("training"), settings, answers)
    questions = draw_questions(part, Size(), options.seed)
    known = score_all(contest, questions, folder / "known", KNOWN)
    scored = {
        kind: {**known[kind], **of}
        for kind, of in score_all(contest, questions, where / "scores", variant.asked).items()
    }
    found = {
        **facts,
        "kinds": {kind: {key: means(of["scores"]) for key, of in rows.items()} for kind, rows in scored.items()},
    }
    if answers is not None:
        found["teacher"] = read_json(answers / "teacher.json")
    write_json(path_of(folder, name), found)


def teacher_answers(options: argparse.Namespace, part: Part, base: Path, folder: Path, name: str) -> Path:
    """A teacher's answers to the training inputs, asked for if need be."""
    answers = folder / f"answers-{name}"
    if (answers / "teacher.json").is_file():
        return answers
    model, tokenizer = load_base(base, torch.bfloat16)
    teacher: Any = with_head(model)
    if name == LORA:
        teacher = get_peft_model(teacher, lora_config(MULTI_TASK.rank), autocast_adapter_dtype=False)
        set_peft_model_state_dict(teacher, read_safetensors(options.multi_task / "adapter.safetensors"))
    began = time.perf_counter()
    right = ask_teacher(
        answers, teacher, tokenizer, part.of("training"), inputs=INPUTS, shots=SOLVED[name], seed=options.seed
    )
    write_json(answers / "teacher.json", {"right": right, "seconds": round(time.perf_counter() - began, 1)})
    return answers


if __name__ == "__main__":
    main()
