# SPDX-License-Identifier: Apache-2.0
"""World 1: the worked example, judged by the whole protocol, and beside the paper's decoder on the same pairs.

    python benchmarks/worked_example/run.py --seed 0

Runs the worked example first, or starts from what an earlier run of it left in --output. Then it trains one LoRA on
all training tasks, fits the paper's decoder on the pairs, and scores the ten rows of `peft_dnd.evaluation`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch


BENCHMARKS = Path(__file__).parent.parent
EXAMPLE = BENCHMARKS.parent / "examples" / "worked_example"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "hard_world"), str(EXAMPLE)]

from fitting import fit_generator, train_on_all_tasks  # noqa: E402
from judging import judge  # noqa: E402
from record import write_result  # noqa: E402
from rivals import MULTI_TASK, RIVALS  # noqa: E402
from stages import Progress, Stage  # noqa: E402
from world import build_world  # noqa: E402

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator  # noqa: E402


STAGES = {
    "multi_task": Stage("training one LoRA on all training tasks", ("multi_task",)),
    **{name: Stage(f"fitting: {name}", (f"{name}-fitting", name)) for name in RIVALS},
}


def main() -> None:
    """Run the example and the benchmark, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the world's seed")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="the worked example's folder")
    parser.add_argument("--rivals", nargs="*", default=["paper_small"], choices=sorted(RIVALS), help="what to fit too")
    options = parser.parse_args()
    torch.set_num_threads(1)

    example = [sys.executable, str(EXAMPLE / "run.py"), "--seed", str(options.seed), "--output", str(options.output)]
    subprocess.run(example, check=True)
    folder = options.output / f"seed-{options.seed}"
    world = build_world(options.seed)
    pairs = PromptCheckpointDataset.from_folder(folder / "pairs", tasks=[task.name for task in world.training_tasks])

    progress = Progress(folder, STAGES, record="benchmark-seconds.json")
    train_on_all_tasks(world, progress, MULTI_TASK)
    seconds = {"fitting: generator": Progress(folder).seconds["fitting the generator"]}
    generators = {"generator": PromptConditionedLoraGenerator.from_pretrained(folder / "generator")}
    for name in options.rivals:
        generators[name] = fit_generator(name, RIVALS[name], pairs, progress, world.seed)
        seconds[f"fitting: {name}"] = progress.seconds[f"fitting: {name}"]

    report = judge(world, folder, pairs, generators, seconds)
    report.save(folder / "evaluation")
    result = {"seed": options.seed, **report.to_dict(include_scores=False), "seconds": seconds}
    result["parameters"] = {name: each.num_parameters() for name, each in generators.items()}
    result["settings_of"] = {"multi_task": MULTI_TASK, **{name: RIVALS[name] for name in options.rivals}}
    command = f"python benchmarks/worked_example/run.py --seed {options.seed} --rivals {' '.join(options.rivals)}"
    write_result(f"world_1_seed_{options.seed}", result, command.rstrip())


if __name__ == "__main__":
    main()
