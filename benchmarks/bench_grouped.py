# SPDX-License-Identifier: Apache-2.0
"""Task loss of a batch of tasks: item by item, in passes that all adapters share, and the base without any adapter.

A step is forward and backward with respect to all matrices of 8 tasks x 8 examples of about 20 tokens, of which the
last few are labelled, with LoRA of rank 8 on all linear layers. The base without adapters is what nothing goes below:
the same rows in one pass, its head at the labelled places alone, and a backward pass down to the embedded tokens.
Contestants take turns, ratios are those of each round's pair, and on a processor what is counted are the seconds that
it spends on this process, so that figures stand on a machine that others keep busy; its load is in the record.

    python benchmarks/bench_grouped.py                                # a small Llama from a configuration
    python benchmarks/bench_grouped.py --base FOLDER --name gemma     # a transformers model's folder
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from record import ratio, spread, take_turns, write_result
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_dnd import AdapterLayout
from peft_dnd.fitting.chosen_places import head_of, logits_at_places
from peft_dnd.fitting.rows import LABEL_PADDING, Pass, Rows
from peft_dnd.fitting.task_loss import TaskLoss
from peft_dnd.pairs.collator import ExampleCollator


TASKS = 8
EXAMPLES = 8
LENGTHS = (14, 26)
LABELS = (2, 5)


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a causal language model")
    parser.add_argument("--name", default="llama", help="what the result is called")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = make_base(options.base, getattr(torch, options.dtype)).to(options.device)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    layout = AdapterLayout.from_lora_config(lora, base)
    batches = draw_batches(base.config.vocab_size)
    contestants, losses = make_contestants(base, layout, batches)
    loads = [os.getloadavg()[0]]
    seconds = take_turns(contestants, options.repeats, time.process_time if options.device == "cpu" else None)
    loads.append(os.getloadavg()[0])
    result = {
        "base": options.base.name if options.base else "a Llama of 4 layers of width 256",
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "tasks": TASKS,
        "examples_a_task": EXAMPLES,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "labels": sum(int((batch["labels"] != LABEL_PADDING).sum()) for batch in batches),
        "adapter_parameters": layout.num_parameters,
        "load_average": [round(load, 2) for load in loads],
        "repeats": options.repeats,
        "clock": "processor time of this process" if options.device == "cpu" else "time passed",
        "losses_differ_by": losses,
        "seconds": {name: {key: round(v, 4) for key, v in spread(taken).items()} for name, taken in seconds.items()},
        "times_as_long_as_grouped": {
            name: ratio(taken, seconds["grouped"]) for name, taken in seconds.items() if name != "grouped"
        },
        "grouped_times_as_long_as_the_base_alone": ratio(seconds["grouped"], seconds["base_without_adapters"]),
    }
    write_result(f"grouped_{options.name}", result, command(options))


def command(options: argparse.Namespace) -> str:
    """What runs it again, without a path of this machine."""
    given = f"--base {options.base.name} " if options.base else ""
    return (
        f"python benchmarks/bench_grouped.py {given}--name {options.name} --dtype {options.dtype} "
        f"--device {options.device} --threads {options.threads} --repeats {options.repeats}"
    )


def make_base(folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """The base of a folder, or a small one from a configuration."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8192, max_position_embeddings=128, **sizes)).to(dtype)


def draw_batches(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """A batch of random examples for each task, the last tokens of each labelled."""
    chance = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(TASKS):
        rows = []
        for _ in range(EXAMPLES):
            length = int(torch.randint(*LENGTHS, (), generator=chance))
            labels = int(torch.randint(*LABELS, (), generator=chance))
            ids = torch.randint(5, vocabulary, (length,), generator=chance).tolist()
            rows.append({"input_ids": ids, "labels": [LABEL_PADDING] * (length - labels) + ids[-labels:]})
        batches.append(ExampleCollator()(rows))
    return batches


def make_contestants(
    base: nn.Module, layout: AdapterLayout, batches: list[dict[str, torch.Tensor]]
) -> tuple[dict[str, Callable[[], Any]], float]:
    """A step in each way; and by how much the losses of the first two differ at most."""
    chance = torch.Generator().manual_seed(1)
    matrices = {
        t.key: (torch.randn(TASKS, *t.shape, generator=chance) * t.long_size**-0.5).to(base.device).requires_grad_()
        for t in layout.tensors
    }
    grouped, apart = (TaskLoss(base, layout) for _ in range(2))

    def item_by_item() -> torch.Tensor:
        return torch.stack([grouped({k: v[i] for k, v in matrices.items()}, batch) for i, batch in enumerate(batches)])

    def step(losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        found = losses()
        torch.autograd.grad(found.mean(), list(matrices.values()))
        return found.detach()

    difference = (step(lambda: grouped.losses(matrices, batches)) - step(item_by_item)).abs().max().item()
    apart.losses(matrices, batches)
    if not (grouped.shares_passes and apart.shares_passes):
        raise SystemExit("This base's loss is taken item by item: there is nothing to compare.")
    apart.base._groups = False
    return {
        "item_by_item": lambda: step(item_by_item),
        "item_by_item_head_at_labels": lambda: step(lambda: apart.losses(matrices, batches)),
        "grouped": lambda: step(lambda: grouped.losses(matrices, batches)),
        "base_without_adapters": without_adapters(base, batches),
    }, difference


def without_adapters(base: nn.Module, batches: list[dict[str, torch.Tensor]]) -> Callable[[], Any]:
    """A step of the base alone on the rows of all tasks."""
    base.requires_grad_(False).eval()
    base.config.use_cache = False
    embedded: list[torch.Tensor] = []
    at = [nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=LABEL_PADDING) != LABEL_PADDING for batch in batches]
    one: Pass = next(Rows(batches, at, pad_token_id=0, masks=True).passes(10**6, 10**6)).to(base.device)
    targets = one.batch["labels"][one.row, one.places.column + 1]

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded[:] = [output.detach().requires_grad_()]
        return embedded[0]

    def step() -> None:
        handle = base.get_input_embeddings().register_forward_hook(keep)
        logits = logits_at_places(base, one, head_of(base))
        handle.remove()
        torch.autograd.grad(nn.functional.cross_entropy(logits, targets), embedded)

    return step


if __name__ == "__main__":
    main()
