# SPDX-License-Identifier: Apache-2.0
"""What fitting costs: the set transformer against the paper's decoder, on the pairs and with the settings of a world.

    python benchmarks/cost_of_fitting.py --world worked_example --folder demo_output/seed-0
    python benchmarks/cost_of_fitting.py --world hard_world --folder hard_world_output/seed-0

Processor seconds, which other load on the machine changes little: some steps of each decoder in turn, in one process,
and from the median step all steps of its settings. Before them come statistics of the weights and reading the prompts,
which is the same for all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import ratio, spread, write_result
from transformers import TrainerCallback


BENCHMARKS = Path(__file__).parent
EXAMPLE = BENCHMARKS.parent / "examples" / "worked_example"
# Both benchmarks and the example have a `run`: it is the example's that is wanted.
sys.path[:0] = [str(EXAMPLE), str(BENCHMARKS / "hard_world"), str(BENCHMARKS / "worked_example")]

from fitting import SETTINGS, fit  # noqa: E402
from rivals import RIVALS  # noqa: E402
from run import FITTING_SETTINGS, GENERATOR_SETTINGS  # noqa: E402

from peft_dnd import PromptCheckpointDataset  # noqa: E402


WORLDS: dict[str, dict[str, dict[str, Any]]] = {
    "worked_example": {"generator": {"config": GENERATOR_SETTINGS, "fitting": FITTING_SETTINGS}, **RIVALS},
    "hard_world": SETTINGS,
}
STEPS = 12
# The first steps have to find memory and to load what is loaded when it is used.
WARM_UP = 2
ROUNDS = 2


class Clock(TrainerCallback):
    """Processor seconds at the beginning of each step."""

    def __init__(self) -> None:
        self.began = [time.process_time()]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began.append(time.process_time())


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="what the world's run left")
    options = parser.parse_args()
    if not (options.folder / "pairs").is_dir():
        raise SystemExit(
            f"{options.folder} holds no pairs. Run the world's own run.py first, and name its seed's folder."
        )
    torch.set_num_threads(1)
    pairs = PromptCheckpointDataset.from_folder(options.folder / "pairs", keep_in_memory=True)

    world = WORLDS[options.world]
    all_steps: dict[str, list[float]] = {name: [] for name in world}
    before: list[float] = []
    parameters = {}
    for _ in range(ROUNDS):
        for name, settings in world.items():
            clock = Clock()
            parameters[name] = fit_some_steps(settings, pairs, clock)
            start, *steps = clock.began
            before.append(steps[0] - start)
            all_steps[name].append(median(_differences(steps[WARM_UP:])) * settings["fitting"]["max_steps"])
    together = {name: [median(before) + seconds for seconds in spent] for name, spent in all_steps.items()}
    result = {
        "training_tasks": len(pairs.tasks),
        "before_the_first_step": _rounded(spread(before)),
        "all_steps": {name: _rounded(spread(seconds)) for name, seconds in all_steps.items()},
        "steps": {name: settings["fitting"]["max_steps"] for name, settings in world.items()},
        "batch": {name: settings["fitting"]["per_device_train_batch_size"] for name, settings in world.items()},
        "parameters_of_the_decoder": parameters,
        "generator_over": {
            name: {
                "all_steps": ratio(all_steps["generator"], all_steps[name]),
                "together": ratio(together["generator"], together[name]),
                "parameters": round(parameters["generator"] / parameters[name], 3),
            }
            for name in world
            if name != "generator"
        },
    }
    output = "demo_output" if options.world == "worked_example" else f"{options.world}_output"
    command = f"python benchmarks/cost_of_fitting.py --world {options.world} --folder {output}/{options.folder.name}"
    write_result(f"fitting_{options.world}", result, command)


def fit_some_steps(settings: dict[str, Any], pairs: PromptCheckpointDataset, clock: Clock) -> int:
    """The first steps of a fit; how many parameters are fitted."""
    fewer = {**settings, "fitting": {**settings["fitting"], "max_steps": WARM_UP + STEPS}}
    with tempfile.TemporaryDirectory() as output:
        generator = fit(fewer, pairs, Path(output), seed=0, callbacks=[clock])
    return sum(parameter.numel() for parameter in generator.decoder.parameters())


def _differences(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
