# SPDX-License-Identifier: Apache-2.0
"""World 1 with adapters of many PEFT methods: how well each method's adapters can be generated, and what they weigh.

    python benchmarks/bench_methods.py --seed 0

Works with what the worked example made, which it runs first where it is not there; LoRA's adapters and generator are
the example's own. For each other method adapters of the 24 training tasks are trained and collected, a generator is
fitted to them with the example's settings, the same for all methods, and the adapters that it writes for the 8
held-out tasks are scored, beside those that were trained on them and what needs no generator. The learning rate of a
method's adapters is the one of `LEARNING_RATES` that does best on one training task; nothing of the generator is
chosen. What has been made is kept in --output: a second run starts from there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm


BENCHMARKS = Path(__file__).parent
EXAMPLE = BENCHMARKS.parent / "examples" / "worked_example"
sys.path[:0] = [str(BENCHMARKS), str(EXAMPLE)]

from base import load_base  # noqa: E402
from example_generators import exact_matches, fit, new_generator  # noqa: E402
from record import write_result  # noqa: E402
from run import FITTING_SETTINGS, GENERATOR_SETTINGS  # noqa: E402
from tasks import SETTINGS, score, train_adapter  # noqa: E402
from world import Task, World, build_world  # noqa: E402

from peft_dnd import (  # noqa: E402
    CheckpointCollector,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
)
from peft_dnd.evaluation import nearest_tasks  # noqa: E402
from peft_dnd.pairs import uncollected  # noqa: E402
from peft_dnd.storage.files import read_json, staged_directory, write_json  # noqa: E402


_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# All adapt every linear layer, where the method adapts layers; sizes are those that people use, for so small a base.
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "LoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 16, "target_modules": _LINEAR}),
    "IA3": (peft.IA3Config, {"target_modules": _LINEAR, "feedforward_modules": ["down_proj"]}),
    "VeRA": (peft.VeraConfig, {"r": 64, "target_modules": _LINEAR}),
    "LoHa": (peft.LoHaConfig, {"r": 4, "alpha": 8, "target_modules": _LINEAR}),
    "DoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 16, "target_modules": _LINEAR, "use_dora": True}),
    "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 8, "target_modules": _LINEAR}),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 8}),
    "LoKr": (peft.LoKrConfig, {"r": 4, "alpha": 8, "target_modules": _LINEAR}),
    "tuned norms": (peft.LNTuningConfig, {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 200, "scaling": 100.0, "target_modules": _LINEAR}),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 8}),
}
LEARNING_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class Bench:
    """Makes a method's adapters, pairs and generator, scores these, and keeps the figures.

    Args:
        world: The world.
        folder: What the worked example made for its seed.
        method: One of `METHODS`.
    """

    def __init__(self, world: World, folder: Path, method: str) -> None:
        self.world = world
        self.base = folder / "base"
        kept = folder / "methods" / method.replace(" ", "-")
        self.folder = folder if method == "LoRA" else kept
        self.method = method
        self.path = kept / "figures.json"
        self.prompt_states = kept.parent / "prompt-states"
        self.figures: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}

    def keep(self, name: str, measure: Callable[[], Any]) -> Any:
        """Measure something, unless it has been, and keep it."""
        if name not in self.figures:
            value = measure()
            self.figures[name] = round(value, 4) if isinstance(value, float) else value
            write_json(self.path, self.figures)
        return self.figures[name]

    def run(self) -> dict[str, Any]:
        """Do all that there is to do for the method."""
        if self.method == "LoRA":
            self.keep("learning rate", lambda: SETTINGS["learning_rate"])
        else:
            self.keep("learning rates", self._scores_by_learning_rate)
            self.keep("learning rate", self._best_learning_rate)
        pairs = self._collect()
        generator = self._fit(pairs)
        adapters = {
            task.name: generator.generate_adapter(self.world.prompts(task), seed=self.world.seed)
            for task in self.world.held_out_tasks
        }
        names = list(adapters)
        others = dict(zip(names, [*names[1:], names[0]], strict=True))
        mean = GeneratedAdapter(pairs.layout, pairs.mean_state_dict(), {})
        asked = {task.name: self.world.prompts(task) for task in self.world.held_out_tasks}
        nearest = nearest_tasks(generator.text_encoder, asked, {name: pairs.prompts(name) for name in pairs.tasks})
        ways: Mapping[str, Callable[[Task], GeneratedAdapter]] = {
            "generated": lambda task: adapters[task.name],
            "shuffled": lambda task: adapters[others[task.name]],
            "nearest": lambda task: GeneratedAdapter(pairs.layout, pairs.mean_state_dict(nearest[task.name]), {}),
            "mean adapter": lambda _: mean,
        }
        for way, adapter_for in ways.items():
            self.keep(way, lambda adapter_for=adapter_for: self._score(adapter_for))
        self.keep("trained", self._score_trained)
        self.keep("generator's parameters", generator.num_parameters)
        self.keep("adapter's parameters", lambda: pairs.layout.num_parameters)
        self.keep("adapter's bytes", lambda: _bytes(adapters[names[0]]))
        return self.figures

    def _config(self) -> PeftConfig:
        kind, settings = METHODS[self.method]
        return kind(task_type="CAUSAL_LM", **settings)

    def _train(self, task: Task, rate: float, callbacks: Iterable[Any] = ()) -> PeftModel:
        examples = self.world.training_examples(task)
        settings = {**SETTINGS, "learning_rate": rate}
        return train_adapter(self.base, examples, self.world.seed, list(callbacks), settings, self._config())

    def _scores_by_learning_rate(self) -> dict[str, float]:
        _, tokenizer = load_base(self.base)
        task = self.world.training_tasks[0]
        asked = self.world.scored_examples(task)
        return {str(rate): score(self._train(task, rate), tokenizer, asked) for rate in LEARNING_RATES}

    def _best_learning_rate(self) -> float:
        """The one with the best score; of several the smallest."""
        scores = self.figures["learning rates"]
        return float(max(scores, key=lambda rate: (scores[rate], -float(rate))))

    def _collect(self) -> PromptCheckpointDataset:
        tasks = {task.name: task for task in self.world.training_tasks}
        folder = self.folder / "pairs"
        for name in uncollected(tasks, folder):
            collector = CheckpointCollector(
                folder / name, prompts=self.world.prompts(tasks[name]), last=SETTINGS["checkpoints"]
            )
            self._train(tasks[name], self.figures["learning rate"], [collector])
        return PromptCheckpointDataset.from_folder(folder, tasks=list(tasks))

    def _fit(self, pairs: PromptCheckpointDataset) -> PromptConditionedLoraGenerator:
        target = self.folder / "generator"
        if not (target / "config.json").is_file():
            generator = new_generator(pairs, self.world.seed)
            states = {"prompt_states_dir": str(self.prompt_states)}
            seconds = fit(generator, pairs, self.folder / "fitting", self.world.seed, **states)
            self.keep("processor seconds of fitting", lambda: seconds)
            generator.save_pretrained(target)
        return PromptConditionedLoraGenerator.from_pretrained(target)

    def _score(self, adapter_for: Callable[[Task], GeneratedAdapter]) -> float:
        """Mean exact match on the held-out tasks."""
        return fmean(exact_matches(self.base, self.world, self.world.held_out_tasks, adapter_for).values())

    def _score_trained(self) -> float:
        """The same of adapters that were trained on the held-out tasks, as stock PEFT loads them."""
        scores = []
        for task in self.world.held_out_tasks:
            folder = self.folder / "trained" / task.name
            if not folder.is_dir():
                model = self._train(task, self.figures["learning rate"])
                with staged_directory(folder) as staged:
                    model.save_pretrained(staged)
            base, tokenizer = load_base(self.base)
            model = PeftModel.from_pretrained(base, folder)
            scores.append(score(model, tokenizer, self.world.scored_examples(task)))
        return fmean(scores)


def _bytes(adapter: GeneratedAdapter) -> int:
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(Path(folder) / "adapter")
        return (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size


def main() -> None:
    """Measure each method and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="what to measure")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder = options.output / f"seed-{options.seed}"
    if not (folder / "generator" / "config.json").is_file():
        example = [sys.executable, str(EXAMPLE / "run.py"), "--seed", str(options.seed)]
        subprocess.run([*example, "--output", str(options.output)], check=True)
    world = build_world(options.seed)
    figures = {}
    for method in tqdm(options.methods, desc="methods"):
        figures[method] = Bench(world, folder, method).run()
    facts = {
        "seed": options.seed,
        "settings": {method: settings for method, (_, settings) in METHODS.items() if method in figures},
        "generator": {**GENERATOR_SETTINGS, **FITTING_SETTINGS},
        "methods": figures,
    }
    write_result("methods", facts, f"python benchmarks/bench_methods.py --seed {options.seed}")


if __name__ == "__main__":
    main()
