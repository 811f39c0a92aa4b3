# SPDX-License-Identifier: Apache-2.0
"""Run one of the paper's experiments.

    python examples/recipes/run.py examples/recipes/common-sense-leave-one-out.yaml --output runs/common-sense
    python examples/recipes/run.py examples/recipes/common-sense-leave-one-out.yaml --output runs/smoke --smoke

1. Tune a LoRA on each training set and keep its last checkpoints; one on each held-out set, only to compare with.
2. Fit a generator, for each variation that the recipe names.
3. Write the held-out sets' adapters from their prompts, and score them beside all that they must be compared with.

What is finished is kept: the same command goes on where it was interrupted. Recipes with the same base and the same
tuning share their tuned adapters through --tuned. With --smoke everything is tiny and local.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fitting import fit_generator
from recipe import Recipe, RecipeError, Variation, load_recipe
from rows import Example, load_examples
from scoring import RecipeScorer, overhead_table, shots_table
from tuning import Tuner, load_base, load_processor, reads_images

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.evaluation import EvaluationReport, HeldOutTask, evaluate_generator, leave_one_out
from peft_dnd.generator import PaperSettings
from peft_dnd.pairs import uncollected
from peft_dnd.storage.files import read_json, write_json, write_text


logger = logging.getLogger("recipes")

TUNING_SECONDS = "tuning_seconds.json"
# What is timed of these names belongs to one recipe alone.
OWN = ("fitting/", "scoring/")


def main(arguments: list[str] | None = None) -> None:
    """Run a recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the recipe's YAML file")
    parser.add_argument("--output", type=Path, required=True, help="where everything goes")
    parser.add_argument("--tuned", type=Path, help="where tuned adapters go; by default into the output")
    parser.add_argument("--smoke", action="store_true", help="tiny models and local data: does the recipe run at all?")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of its settings at every call
    try:
        recipe = load_recipe(options.recipe)
        tuned = options.tuned or options.output
        if options.smoke:
            from smoke import stand_ins

            swapped = stand_ins(recipe, tuned)
        else:
            swapped = nullcontext(recipe)
        with swapped as recipe:
            Experiment(recipe, options.output, tuned).run()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from error


class Experiment:
    """A recipe's run.

    Args:
        recipe: The recipe.
        folder: Where all goes that is this recipe's own: `runs/<variation>/`, `scores/`, `report.md`.
        tuned: Where tuned adapters go: `pairs/`, `trained/`, `multi_task/`, `few_shot/`.
    """

    def __init__(self, recipe: Recipe, folder: Path, tuned: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.tuned = tuned
        self.settings = PaperSettings.load(recipe.settings)
        self.tuner = Tuner(recipe.base_model, self.settings, recipe.tuning, recipe.seed, tuned)
        self.seconds: dict[str, float] = {}
        self._examples: dict[str, list[Example]] = {}
        self._base: Any = None

    def run(self) -> None:
        """Do all that is not done yet."""
        self._check_folder()
        trained_on = list(dict.fromkeys(name for v in self.recipe.variations for name in v.training or []))
        held_out = list(dict.fromkeys(name for v in self.recipe.variations for name in v.held_out or []))
        for name in [*trained_on, *held_out]:
            self._examples_of(name)  # a template that does not fit its data set is told of before hours of tuning
        for name in trained_on:
            self._collect(name)
        for name in held_out:
            if name not in trained_on and self.recipe.sets[name].answer is not None:
                self._tune(f"trained/{name}", self._examples_of(name))
        parts = [self._header()]
        for variation in self.recipe.variations:
            logger.info("Variation %s", variation.name)
            report = self._evaluate(variation)
            parts.append(f"# {variation.name}\n\n{report.to_markdown()}")
            if self.recipe.shots is not None:
                parts.append(self._shots(variation, report))
        write_text(self.folder / "report.md", "\n".join(parts))
        logger.info("Report: %s", self.folder / "report.md")

    def _evaluate(self, variation: Variation) -> EvaluationReport:
        folder = self.folder / "runs" / variation.name
        if (folder / "evaluation.json").is_file():
            return EvaluationReport.load(folder)
        pairs = PromptCheckpointDataset.from_folder(
            self.tuned / "pairs", tasks=variation.training, seed=self.recipe.seed
        )
        if self.recipe.leave_one_out:
            return leave_one_out(
                pairs,
                lambda training, task: self._fit(variation, training, folder / f"without-{task}"),
                lambda generator, training, task: self._report(
                    generator, training, [task], folder / f"without-{task}", all_pairs=pairs
                ),
                tasks=variation.held_out,
                folder=folder,
            )
        generator = self._fit(variation, pairs, folder)
        report = self._report(generator, pairs, list(variation.held_out or []), folder)
        report.save(folder)
        return report

    def _fit(
        self, variation: Variation, pairs: PromptCheckpointDataset, folder: Path
    ) -> PromptConditionedLoraGenerator:
        with self._timed(f"fitting/{folder.relative_to(self.folder)}", done=folder / "generator" / "config.json"):
            return fit_generator(self.recipe, variation, pairs, folder / "generator")

    def _report(
        self,
        generator: PromptConditionedLoraGenerator,
        pairs: PromptCheckpointDataset,
        held_out: list[str],
        folder: Path,
        all_pairs: PromptCheckpointDataset | None = None,
    ) -> EvaluationReport:
        tasks = {name: self._held_out(name, all_pairs) for name in held_out}
        for name, task in tasks.items():
            answers = None if generator.config.condition_text == "prompts" else task.answers
            adapter = generator.generate_adapter(task.prompts, answers=answers, seed=self.recipe.seed)
            adapter.save_pretrained(folder / "adapters" / name)
        in_context = self.recipe.evaluation.in_context_examples
        return evaluate_generator(
            generator,
            self._base_model(),
            pairs,
            tasks,
            self._scorer(),
            in_context_scorer=self._scorer(in_context) if in_context else None,
            multi_task_adapter=self._multi_task(pairs),
            fitting_costs={
                "collecting_seconds": self._spent([f"collecting/{name}" for name in pairs.tasks]),
                "fitting_seconds": self._spent([f"fitting/{folder.relative_to(self.folder)}"]),
            },
            skip=self.recipe.evaluation.skip,
            seed=self.recipe.seed,
        )

    def _held_out(self, name: str, pairs: PromptCheckpointDataset | None) -> HeldOutTask:
        examples = self._examples_of(name)[: self.recipe.evaluation.prompts]
        tuned: Any = None
        if pairs is not None:
            tuned = GeneratedAdapter(pairs.layout, pairs.state_dict(name), {})
        elif self.recipe.sets[name].answer is not None:
            tuned = self.tuned / "trained" / name
        answers = [e.answer for e in examples if e.answer is not None]
        return HeldOutTask([e.prompt for e in examples], trained_adapter=tuned, answers=answers or None)

    def _multi_task(self, pairs: PromptCheckpointDataset) -> Path | None:
        tuning = self.recipe.tuning
        steps = tuning.multi_task_steps
        steps = (tuning.steps + tuning.last_steps) * len(pairs.tasks) if steps is None else steps
        if steps == 0:
            return None
        which = hashlib.sha256("\n".join(pairs.tasks).encode()).hexdigest()[:12]
        return self._tune(
            f"multi_task/{which}", [e for name in pairs.tasks for e in self._examples_of(name)], steps=steps
        )

    def _shots(self, variation: Variation, report: EvaluationReport) -> str:
        shots = self.recipe.shots
        assert shots is not None
        measured: dict[str, dict[str, Any]] = {}
        tasks = [name for name in report.tasks if self.recipe.sets[name].answer is not None]
        for number in shots.numbers:
            tuned: dict[str, Any] = {"scores": {}, "seconds": 0.0}
            shown: dict[str, Any] = {"scores": {}, "seconds": 0.0}
            for task in tasks:
                name = f"few_shot/{task}-{number}"
                examples = self._examples_of(task)[:number]
                self._tune(
                    name,
                    examples,
                    steps=max(1, shots.epochs * len(examples)),
                    batch_size=1,
                    learning_rate=shots.learning_rate,
                )
                tuned["scores"][task] = self._scores(task, adapter=self.tuned / name)
                tuned["seconds"] += self.seconds[name] / len(tasks)
                shown["scores"][task] = self._scores(task, shots=number)
                shown["seconds"] += self._seconds_of_examples(task, number) / len(tasks)
            measured[f"few-shot tuning, {number}"] = tuned
            measured[f"in-context learning, {number}"] = shown
        text = f"## Few-shot tuning and in-context learning\n\n{shots_table(measured, report)}"
        if self.recipe.overhead:
            text += f"\n## Overhead\n\n{overhead_table(measured, self._overhead(variation, tasks), report)}"
        return text

    def _scores(self, task: str, *, shots: int | None = None, adapter: Path | None = None) -> list[float]:
        """Scores of the base with examples, or with an adapter."""
        base = self._base_model().eval()
        with torch.no_grad():
            if adapter is None:
                return list(self._scorer(shots)(base, task))
            model = GeneratedAdapter.from_pretrained(adapter).load_into(base).eval()
            scores = list(self._scorer()(model, task))
            model.unload()
            return scores

    def _seconds_of_examples(self, task: str, number: int) -> float:
        """How much longer a question takes with so many examples before it."""
        for shots in (None, number):
            name = f"scoring/{task}-{shots}"
            if name not in self.seconds:
                unscored = replace(self._scorer(shots), folder=self.folder / "timed")
                began = time.perf_counter()
                with torch.no_grad():
                    questions = len(unscored(self._base_model().eval(), task))
                self.seconds[name] = (time.perf_counter() - began) / questions
                self._keep_seconds()
                shutil.rmtree(self.folder / "timed")
        return self.seconds[f"scoring/{task}-{number}"] - self.seconds[f"scoring/{task}-None"]

    def _overhead(self, variation: Variation, tasks: list[str]) -> dict[str, float]:
        folder = f"fitting/runs/{variation.name}"
        tuned = [f"collecting/{t}" if self.recipe.leave_one_out else f"trained/{t}" for t in tasks]
        fits = [name for name in self.seconds if name.startswith(folder)]
        return {
            "collecting": self._spent([f"collecting/{name}" for name in variation.training or []]),
            "fitting": self._spent(fits) / max(1, len(fits)),
            "full-shot tuning": self._spent(tuned) / max(1, len(tuned)),
        }

    def _collect(self, name: str) -> None:
        pairs = self.tuned / "pairs"
        if uncollected([name], pairs):
            logger.info("Tuning on %s and collecting checkpoints", name)
            with self._timed(f"collecting/{name}"):
                self.tuner.collect(self._examples_of(name), pairs / name, self.settings.checkpoints_per_task)

    def _tune(self, name: str, examples: list[Example], **schedule: Any) -> Path:
        folder = self.tuned / name
        if not folder.is_dir():
            logger.info("Tuning %s", name)
            with self._timed(name):
                self.tuner.tune(examples, folder, **schedule)
        return folder

    def _examples_of(self, name: str) -> list[Example]:
        if name not in self._examples:
            self._examples[name] = load_examples(
                self.recipe.sets[name], name, self.recipe.tuning.examples, self.recipe.seed
            )
        return self._examples[name]

    def _base_model(self) -> Any:
        if self._base is None:
            self._base = load_base(self.recipe.base_model, bf16=self.recipe.tuning.bf16)
        return self._base

    def _scorer(self, shots: int | None = None) -> RecipeScorer:
        base = self.recipe.base_model
        return RecipeScorer(self.recipe, load_processor(base), reads_images(base), self.folder / "scores", shots)

    @contextmanager
    def _timed(self, name: str, done: Path | None = None) -> Iterator[None]:
        """Keep how long something took, unless it is done already."""
        was_done = done is not None and done.exists()
        began = time.perf_counter()
        yield
        if not was_done:
            self.seconds[name] = time.perf_counter() - began
            self._keep_seconds()

    def _keep_seconds(self) -> None:
        # What tuning took stays with the tuned adapters, for the other recipes that share them.
        shared = {name: spent for name, spent in self.seconds.items() if not name.startswith(OWN)}
        write_json(self.tuned / TUNING_SECONDS, shared)
        write_json(self.folder / "seconds.json", self.seconds)

    def _spent(self, names: list[str]) -> float:
        return sum(self.seconds.get(name, 0.0) for name in names)

    def _check_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _keep_or_refuse(self.folder / "recipe.json", asdict(self.recipe))
        made_with = {"base": self.recipe.base_model, "settings": self.recipe.settings, "seed": self.recipe.seed}
        _keep_or_refuse(self.tuned / "tuned.json", {**made_with, "tuning": asdict(self.recipe.tuning)})
        for name, data_set in self.recipe.sets.items():
            _keep_or_refuse(self.tuned / "sets" / f"{name}.json", {**asdict(data_set), "scoring": None, "note": ""})
        for path in (self.tuned / TUNING_SECONDS, self.folder / "seconds.json"):
            if path.is_file():
                self.seconds |= read_json(path)

    def _header(self) -> str:
        recipe = self.recipe
        notes = [recipe.note, *(f"{name}: {of.note}" for name, of in recipe.sets.items() if of.note)]
        text = f"{recipe.title}. {recipe.paper}.\n\nBase: {recipe.base_model}. Settings: {recipe.settings}.\n"
        text += "".join(f"\n- {re.sub(chr(10), ' ', note)}" for note in notes if note)
        text += "".join(f"\n- Not covered: {left.what}. {left.why}" for left in recipe.not_covered)
        return f"{text}\n"


def _keep_or_refuse(path: Path, content: Any) -> None:
    content = json.loads(json.dumps(content))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    elif read_json(path) != content:
        raise RecipeError(f"{path.parent} was made by another recipe, or an earlier form of it. Name another folder.")


if __name__ == "__main__":
    main()
