# SPDX-License-Identifier: Apache-2.0
"""What documents take for granted: folders under the names that they use, and values for their names, all tiny."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.generator.configuration import PromptConditionedLoraGeneratorConfig
from peft_dnd.text import HiddenStatesTextEncoder
from support.constants import LORA_CONFIG, TASK_PROMPTS
from support.live_models import TOKENS


ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+?) -->\n\s*)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.S | re.M)


def blocks(page: Path, *kinds: str) -> list[str]:
    """A page's code of some kinds, but for what it says itself is not to be run, and why."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [match["code"] for match in found if match["kind"] in kinds and match["why"] is None]


def name_of(page: Path) -> str:
    """Its path in the checkout."""
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def documented(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_base: Callable[[], nn.Module],
    word_tokenizer: PreTrainedTokenizerFast,
    generator_folder: Path,
    encoder_folder: Path,
    pairs_folder: Path,
) -> Path:
    """The working folder, where what documents have on the Hub or on disk lies under the very names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    generator = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    generator.fit_out_of_distribution(TASK_PROMPTS)
    for folder in ("org/generator", "generator"):
        generator.save_pretrained(folder, include_text_encoder=True)
    generator.save_pretrained("org/generators/qwen-7b", include_text_encoder=True)
    shutil.copytree(encoder_folder, "sentence-transformers/all-MiniLM-L6-v2")
    shutil.copytree(pairs_folder, "pairs")
    base: Any = fresh_base()
    for folder in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"):
        base.save_pretrained(folder)
        word_tokenizer.save_pretrained(folder)
    generator.generate_adapter(TASK_PROMPTS["art"]).save_pretrained("tax-adapter")
    for folder in ("law", "all-tasks"):
        generator.generate_adapter(TASK_PROMPTS["law"]).save_pretrained(f"adapters/{folder}")
    Path("tasks").mkdir()
    for task, prompts in (("law", TASK_PROMPTS["law"]), ("tax", TASK_PROMPTS["geo"])):
        Path("tasks", f"{task}.txt").write_text("\n".join(prompts), encoding="utf-8")
        rows = [json.dumps({"prompt": prompt, "answer": "court"}) for prompt in prompts]
        Path(f"{task}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    shutil.copy("tasks/law.txt", "prompts.txt")
    shutil.copy("law.jsonl", "prompts.jsonl")
    return tmp_path


class Stranger:
    """Stands for what is the reader's own, or of another library, and takes anything."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.given = (args, options)

    def train(self) -> None:
        """Nothing is trained."""


def names_for(fresh_base: Callable[[], nn.Module], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What documents have at hand: the reader's models, prompts and data under the names that they go by."""
    generator = PromptConditionedLoraGenerator.from_pretrained("org/generator")
    adapter = generator.generate_adapter(TASK_PROMPTS["art"])
    pairs = PromptCheckpointDataset.from_folder("pairs")
    law, medicine = TASK_PROMPTS["law"], TASK_PROMPTS["med"]
    return {
        "torch": torch,
        "generator": generator,
        "adapter": adapter,
        "peft_model": adapter.load_into(fresh_base()),
        "model": adapter.load_into(fresh_base()),
        "tokenizer": tokenizer,
        "prompts": law,
        "law_prompts": law,
        "medical_prompts": medicine,
        "questions": law,
        "answers": ["court"] * len(law),
        "pool": [f"what is the law of w{number} ?" for number in range(99)],
        "dataset": Dataset.from_dict({"question": law, "answer": ["court"] * len(law)}),
        "conversations": [[{"role": "user", "content": prompt}] for prompt in law],
        "inputs": {"input_ids": TOKENS[:1], "pad_token_id": 0, "max_new_tokens": 2},
        "batch": {"input_ids": TOKENS[:1].repeat(3, 1), "pad_token_id": 0, "max_new_tokens": 2},
        "labelled_examples": {"input_ids": TOKENS[:2], "labels": TOKENS[:2]},
        "pairs": pairs,
        "tasks": list(pairs.tasks),
        "lora": LoraConfig(r=3),
        "lora_config": LORA_CONFIG,
        "text_encoder": "sentence-transformers/all-MiniLM-L6-v2",
        "arguments": None,
        "token": "a token",
        "SFTTrainer": Stranger,
        "Trainer": Stranger,
    }


def generator_that_reads_states(base: nn.Module, tokenizer: PreTrainedTokenizerFast, layout: Any) -> None:
    """Put a generator that reads a base's hidden states where documents have theirs."""
    encoder = HiddenStatesTextEncoder(base, tokenizer, layer=1, name_or_path="base")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(layout, encoder, num_prompts=4, max_prompt_length=16)
    generator = PromptConditionedLoraGenerator(config, encoder)
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.zeros(shape), torch.ones(shape[0]))
    generator.save_pretrained("org/generator")
