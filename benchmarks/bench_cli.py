# SPDX-License-Identifier: Apache-2.0
"""What the command costs: `generate` over the imports that it cannot do without, and `--help`.

python benchmarks/bench_cli.py

Each figure is of a fresh process, and the contestants take turns. Processor seconds are those of the process and of
what it started, with one thread; wall-clock seconds depend on what else the machine does.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from record import ratio, spread, write_result
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig


REPEATS = 7
IMPORTS = "import torch, transformers, sentence_transformers"
DOOR = "import sys, peft_dnd_cli; sys.exit(peft_dnd_cli.main())"


def main() -> None:
    """Measure, print and keep the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_generator(folder)
        (folder / "prompts.txt").write_text("what is the law ?\na court please\n", encoding="utf-8")
        places = [str(folder / part) for part in ("generator", "prompts.txt", "adapter")]
        contestants = {
            "imports": ["-c", IMPORTS],
            "generate": ["-c", DOOR, "generate", *places, "--quiet"],
            "--help": ["-c", DOOR, "--help"],
            "generate --help": ["-c", DOOR, "generate", "--help"],
        }
        cost: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for turn in range(REPEATS + 1):
            for name, arguments in contestants.items():
                found = measure(arguments)
                if turn:  # the first one fills the file system's cache
                    cost[name].append(found)
    processor = {name: [seconds for seconds, _ in found] for name, found in cost.items()}
    wall = {name: [seconds for _, seconds in found] for name, found in cost.items()}
    result = {
        "repeats": REPEATS,
        "cpu_seconds": {name: spread(seconds) for name, seconds in processor.items()},
        "wall_seconds": {name: spread(seconds) for name, seconds in wall.items()},
        "generate_over_imports": ratio(processor["generate"], processor["imports"]),
    }
    write_result("cli", result)


def write_generator(folder: Path) -> None:
    """A tiny generator that passes for fitted, with its text encoder beside it."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "the", "law", "court", "please"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    bert = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(bert).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    reader = SentenceTransformer(
        modules=[Transformer(str(folder / "bert"), max_seq_length=32), Pooling(16)], device="cpu"
    )
    reader.save(str(folder / "encoder"))
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        AdapterLayout.from_lora_config(lora, base), str(folder / "encoder"), num_prompts=4, max_prompt_length=16
    )
    generator = PromptConditionedLoraGenerator(config)
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.zeros(shape), torch.ones(shape[0]))
    generator.save_pretrained(folder / "generator")


def measure(arguments: list[str]) -> tuple[float, float]:
    """Processor and wall-clock seconds of a new Python with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


if __name__ == "__main__":
    main()
