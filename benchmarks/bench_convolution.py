# SPDX-License-Identifier: Apache-2.0
"""The hyper-convolution layers of a published cascade, against the same formula written plainly with `conv2d`.

Layer by layer, so that one of them is in memory at a time: both take turns on the same random weights and states, and
must agree. `--threads 1 2` runs each number of threads in a process of its own.

python benchmarks/bench_convolution.py --threads 1 2 --dtypes float32 bfloat16
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from record import write_result

from peft_dnd import PaperSettings
from peft_dnd.decoders import HyperConvolutionLayer


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", default="common-sense-0.5b")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=2, help="a layer takes seconds, so there is no untimed round")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.settings, options.threads[0], options.dtypes[0], options.rounds)))
        return
    runs = []
    for threads, dtype in itertools.product(options.threads, options.dtypes):
        command = [sys.executable, __file__, "--child", "--settings", options.settings, "--threads", str(threads)]
        command += ["--dtypes", dtype, "--rounds", str(options.rounds)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    threads = "_".join(map(str, options.threads))
    name = f"convolution_{options.settings}_threads_{threads}"
    write_result(name, {"settings": options.settings, "seed": 0, "runs": runs})


def measure(settings: str, threads: int, dtype_name: str, rounds: int) -> dict[str, Any]:
    """Seconds of every layer of a cascade, both ways."""
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype_name)
    decoder = PaperSettings.load(settings).generator["decoder_config"]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # the weights of the largest layer would not fit twice
    layers = []
    with torch.no_grad():
        for in_shape, out_shape in itertools.pairwise(decoder["cascade"]):
            layer = HyperConvolutionLayer(in_shape, out_shape, decoder["kernel_size"]).eval()
            states = torch.randn(1, *in_shape)
            contestants = {"ours": partial(layer, states), "plain": partial(plain, layer, states)}
            layers.append({"from": in_shape, "to": out_shape, **take_turns(contestants, rounds)})
            print(layers[-1], file=sys.stderr)
    totals = {
        name: [sum(turn) for turn in zip(*(layer[name] for layer in layers), strict=True)]
        for name in ("ours", "plain", "ours_processor", "plain_processor")
    }
    return {
        "threads": threads,
        "dtype": dtype_name,
        "rounds": rounds,
        "seconds": totals,  # those of the processor add up over the cores, and do not count others' use of it
        "times_faster": _ratios(totals["plain"], totals["ours"]),
        "times_less_processor": _ratios(totals["plain_processor"], totals["ours_processor"]),
        "largest_difference_in_standard_deviations": max(layer["difference"] for layer in layers),
        "layers": layers,
    }


def take_turns(contestants: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, Any]:
    """Seconds of each turn, and how far apart the results are."""
    seconds: dict[str, list[float]] = {f"{name}{kind}": [] for kind in ("", "_processor") for name in contestants}
    for _ in range(rounds):
        found = {}
        for name, run in contestants.items():
            began, began_processor = time.perf_counter(), time.process_time()
            found[name] = run()
            seconds[name].append(round(time.perf_counter() - began, 3))
            seconds[f"{name}_processor"].append(round(time.process_time() - began_processor, 3))
    ours, plain_one = found["ours"].float(), found["plain"].float()
    difference = (ours - plain_one).abs().max() / plain_one.std()
    tolerance = 1e-4 if torch.get_default_dtype() == torch.float32 else 0.1
    assert difference < tolerance, f"the two differ by {difference}"
    return {**seconds, "difference": float(f"{difference:.2g}")}


def _ratios(of: list[float], to: list[float]) -> list[float]:
    return [round(one / other, 2) for one, other in zip(of, to, strict=True)]


def plain(layer: HyperConvolutionLayer, states: torch.Tensor) -> torch.Tensor:
    """The layer's formula, each convolution by `conv2d`."""

    def convolve(x: torch.Tensor, name: str) -> torch.Tensor:
        part = getattr(layer, name)
        return F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)

    x = layer.norm(states)
    wide = convolve(convolve(x.permute(0, 3, 2, 1), "width_first_width").permute(0, 2, 3, 1), "width_first_height")
    high = convolve(x.transpose(1, 2), "height_first_height").permute(0, 3, 1, 2)
    high = torch.tanh(convolve(high, "height_first_width"))
    z = convolve((wide.transpose(1, 2) + high.permute(0, 3, 2, 1) + layer.bias) / 3, "prompt_axis")
    return states + z if layer.residual else z


if __name__ == "__main__":
    main()
