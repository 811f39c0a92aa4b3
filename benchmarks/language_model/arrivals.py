# SPDX-License-Identifier: Apache-2.0
"""Tasks that come in over time, for a real language model: python benchmarks/language_model/arrivals.py --generator A.

A generator that was fitted on all training tasks of the world goes on with held-out tasks, new combinations of a few
families, some at a time. Its replay store has the training tasks of these families. Tasks are asked for in wordings
that were never fitted on, and the base sees the input alone. What is finished is kept: a second run starts from there.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCHMARKS))

from record import write_result  # noqa: E402

from language_model.base import load_base, prepare_base, with_small_head  # noqa: E402
from language_model.compare import means  # noqa: E402
from language_model.fitting import FitSettings, answer_tokens, lora_config, write_pairs  # noqa: E402
from language_model.judging import Contest, Questions, Size, draw_questions, score_all  # noqa: E402
from language_model.options import parser_of, set_up  # noqa: E402
from language_model.parts import small_part  # noqa: E402
from language_model.rivals import OWN, lora_layout  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.tasks import Task  # noqa: E402
from language_model.world import build_world  # noqa: E402
from peft_dnd import (  # noqa: E402
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.fitting.teacher import base_digest  # noqa: E402
from peft_dnd.generator import revisions  # noqa: E402
from peft_dnd.pairs import ReplayStore, StoreBounds  # noqa: E402
from peft_dnd.pairs.store_update import updated_store  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402


GENTLE = {"max_steps": 30, "learning_rate": 1e-4}
WAYS: dict[str, dict[str, Any]] = {
    "replay": {},
    "rows": {"replay_targets": "rows"},
    "former self": {"replay_targets": "former_self"},
    "new tasks alone": {"replay_share": 0.0},
    # Of more and smaller steps than --steps and --learning-rate say.
    "gentle replay": GENTLE,
    "gentle replay of three quarters": {**GENTLE, "replay_share": 0.75},
    "gentle, new tasks alone": {**GENTLE, "replay_share": 0.0},
}
EARLY, LATE = "new_wordings", "new_combinations"


@dataclass(frozen=True)
class Series:
    """What goes on, and with what.

    Attributes:
        options: The command's.
        base: The base with a small head, which has every task's answers.
        store: What the generator keeps of the early tasks.
        arrivals: The pairs of each arrival.
        contest: Who is asked.
        questions: Kind -> what is asked of its tasks.
    """

    options: argparse.Namespace
    base: Any
    store: ReplayStore | None
    arrivals: Sequence[PromptCheckpointDataset]
    contest: Contest
    questions: dict[str, list[Questions]]

    def measure(self, name: str, generator: PromptConditionedLoraGenerator) -> dict[str, Any]:
        """What a generator's adapters have right."""
        contest = replace(self.contest, generator=generator)
        found = score_all(contest, self.questions, self.options.output / "arrivals" / name, ("generated",))
        return {kind: means(of["generated"]["scores"]) for kind, of in found.items()}

    def go_on(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """One arrival after another, in one way."""
        path = self.options.output / "arrivals" / f"{name}.json"
        if path.is_file():
            found: dict[str, Any] = read_json(path)
            return found
        generator = load_generator(self.options.generator, self.options.base)
        generator.replay_store = self.store
        updates = [self._update(generator, pairs, settings) for pairs in self.arrivals]
        found = {"updates": updates, "kinds": self.measure(name, generator)}
        write_json(path, found)
        return found

    def _update(
        self, generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, settings: dict[str, Any]
    ) -> dict[str, Any]:
        common = {"max_steps": self.options.steps, "learning_rate": self.options.learning_rate}
        arguments = DnDTrainingArguments(
            output_dir=str(self.options.output / "arrivals" / "fit"),
            per_device_train_batch_size=FitSettings.tasks_a_step,
            task_examples=FitSettings.examples,
            task_loss_weight=1.0,
            warmup_steps=3,
            adam_beta2=0.98,
            weight_decay=0.0,
            prompt_states_dir=str(self.options.output / "arrivals" / "prompt_states"),
            save_strategy="no",
            logging_steps=5,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            **(common | settings),
        )
        adapted = get_peft_model(self.base, lora_config(FitSettings.rank), autocast_adapter_dtype=False)
        began = time.process_time()
        DnDTrainer(generator, arguments, pairs, base_model=adapted).train()
        adapted.unload()
        last, store = revisions(generator.config.measured)[-1], generator.replay_store
        assert store is not None
        return {
            "processor seconds": round(time.process_time() - began, 1),
            "points lost on the store, in the mean": round(last.mean_lost, 2),
            "measure": last.measure,
            "store in relation to the pairs": round(store.num_bytes / store.pairs_bytes, 4),
        }


def main() -> None:
    """Go on in each way, and write what became of early and late tasks."""
    options = parse()
    set_up(options)
    options.base = prepare_base(options.base or options.output / "base")
    series = prepare(options)
    before = series.measure("before", load_generator(options.generator, options.base))
    ways = {name: series.go_on(name, WAYS[name]) for name in options.ways}
    result = {
        "early tasks in the store": 0 if series.store is None else len(series.store.tasks),
        "tasks of each arrival": [pairs.tasks for pairs in series.arrivals],
        "before": before,
        "ways": ways,
        "exact match": {
            "before": {kind: round(100 * of["mean"], 1) for kind, of in before.items()},
            **{
                name: {kind: round(100 * of["mean"], 1) for kind, of in found["kinds"].items()}
                for name, found in ways.items()
            },
        },
    }
    command = (
        f"python benchmarks/language_model/arrivals.py --seed {options.seed} --arrivals {options.arrivals} "
        f"--tasks-an-arrival {options.tasks_an_arrival} --steps {options.steps} --asked {options.asked} "
        f"--rows {options.rows} --generator <folder>"
    )
    write_result(f"language_model_arrivals_seed_{options.seed}", result, command)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--generator", required=True, help="folder or Hub id of one fitted by run.py")
    parser.add_argument("--arrivals", type=int, default=3)
    parser.add_argument("--tasks-an-arrival", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25, help="of an update")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--rows", type=int, default=Size.rows, help="test rows of each task")
    parser.add_argument("--asked", type=int, default=32, help="early tasks that are asked")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> Series:
    """Draw what arrives, write its pairs, and make the store that a fit would have left."""
    part = small_part(build_world(options.seed, options.data))
    early = part.of("training")
    late = part.of(LATE)
    drawn = random.Random(f"arrivals {options.seed}").sample(late, len(late))
    size = options.tasks_an_arrival
    arriving = [drawn[start : start + size] for start in range(0, options.arrivals * size, size)]
    names = {task.name for some in arriving for task in some}
    model, tokenizer = load_base(options.base, torch.bfloat16)
    contest = Contest(model, tokenizer, None, lora_layout(model, OWN.rank))  # type: ignore[arg-type]  # set in measure
    base, numbers = with_small_head(
        load_base(options.base, torch.bfloat16)[0], answer_tokens([*early, *late], tokenizer, FitSettings())
    )
    pairs = pairs_of(options, [early, *arriving], tokenizer, numbers)
    asked = draw_questions(part, Size(options.asked, options.rows), options.seed, (EARLY,))
    later = draw_questions(part, Size(len(late), options.rows), options.seed, (LATE,))
    asked[LATE] = [replace(one, wording="unseen") for one in later[LATE] if one.task.name in names]
    return Series(options, base, store_of(options, pairs[0], base), pairs[1:], contest, asked)


def pairs_of(
    options: argparse.Namespace, parts: Sequence[Sequence[Task]], tokenizer: Any, numbers: dict[int, int]
) -> list[PromptCheckpointDataset]:
    """The pairs of parts of the tasks, each in a folder of its own."""
    layout = load_generator(options.generator, options.base).config.adapter_layout
    found = []
    for number, tasks in enumerate(parts):
        folder = options.output / "arrivals" / "pairs" / str(number)
        if not folder.is_dir():
            write_pairs(folder, tasks, tokenizer, FitSettings(), numbers)
        found.append(PromptCheckpointDataset.from_folder(folder, layout=layout))
    return found


def store_of(options: argparse.Namespace, pairs: PromptCheckpointDataset, base: Any) -> ReplayStore | None:
    """What a fit on some pairs leaves in the store: an older one of this generator has left none."""
    generator = load_generator(options.generator, options.base)
    return updated_store(
        None,
        pairs,
        pairs.tasks,
        generator.adapter_packing(),
        generator.config.condition_text,
        StoreBounds(),
        encoder=generator.encoder_probe(),
        rows=("examples",),
        base=base_digest(base),
    )


if __name__ == "__main__":
    main()
