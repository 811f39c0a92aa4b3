# SPDX-License-Identifier: Apache-2.0
"""World 1: Text-to-LoRA's decoder family, fitted to the worked example's pairs and judged by the whole protocol.

    python benchmarks/worked_example/text_to_lora.py --seed 0

Runs the worked example first, or starts from what an earlier run of it left in --output. The decoder is fitted with
the steps, batches and learning rate of the example's own generator, which stands beside it in the report. What the
report says of conditioning, prompts of another task among it, is of Text-to-LoRA's. Neither its size nor anything else
of it was chosen by results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


BENCHMARKS = Path(__file__).parent.parent
EXAMPLE = BENCHMARKS.parent / "examples" / "worked_example"
# This folder's run.py and the example's are of one name: the example's is the one that is meant here.
sys.path[:0] = [str(EXAMPLE), str(BENCHMARKS), str(BENCHMARKS / "hard_world")]

from fitting import fit_generator, train_on_all_tasks  # noqa: E402
from judging import judge  # noqa: E402
from record import write_result  # noqa: E402
from rivals import MULTI_TASK  # noqa: E402
from run import FITTING_SETTINGS, GENERATOR_SETTINGS  # noqa: E402
from stages import Progress, Stage  # noqa: E402
from world import build_world  # noqa: E402

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator  # noqa: E402


NAME = "text_to_lora"
TEXT_TO_LORA: dict[str, Any] = {
    "config": {
        **GENERATOR_SETTINGS,
        "decoder_type": "text_to_lora",
        "decoder_config": {"latent_size": 64, "head_in_size": 64},
    },
    "fitting": FITTING_SETTINGS,
}
STAGES = {
    "multi_task": Stage("training one LoRA on all training tasks", ("multi_task",)),
    NAME: Stage("fitting: text_to_lora", (f"{NAME}-fitting", NAME)),
}


def main() -> None:
    """Fit it, judge it, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    options = parser.parse_args()
    torch.set_num_threads(1)

    example = [sys.executable, str(EXAMPLE / "run.py"), "--seed", str(options.seed), "--output", str(options.output)]
    subprocess.run(example, check=True)
    folder = options.output / f"seed-{options.seed}"
    world = build_world(options.seed)
    pairs = PromptCheckpointDataset.from_folder(folder / "pairs", tasks=[task.name for task in world.training_tasks])

    progress = Progress(folder, STAGES, record="text-to-lora-seconds.json")
    train_on_all_tasks(world, progress, MULTI_TASK)
    generators = {
        "generator": fit_generator(NAME, TEXT_TO_LORA, pairs, progress, world.seed),
        "set_transformer": PromptConditionedLoraGenerator.from_pretrained(folder / "generator"),
    }
    seconds = {
        "fitting: generator": progress.seconds["fitting: text_to_lora"],
        "fitting: set_transformer": Progress(folder).seconds["fitting the generator"],
    }
    report = judge(world, folder, pairs, generators, seconds)
    result = {"seed": options.seed, **report.to_dict(include_scores=False), "seconds": seconds}
    result["parameters"] = {name: each.num_parameters() for name, each in generators.items()}
    result["settings"] = TEXT_TO_LORA
    command = f"python benchmarks/worked_example/text_to_lora.py --seed {options.seed}"
    write_result(f"world_1_text_to_lora_seed_{options.seed}", result, command)


if __name__ == "__main__":
    main()
