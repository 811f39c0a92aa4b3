# SPDX-License-Identifier: Apache-2.0
"""A world of a few tasks on single words and a base that reads letters, for the language model benchmark's tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from language_model.tasks import Example, Operation, OperationWording, Task
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig
from peft_dnd.text import AnswerStatesTextEncoder


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .\n"
SPECIAL = ("<pad>", "<bos>", "<eos>")
TRAIN = ("apple", "bread", "cloud", "dance", "eagle", "flame", "grass", "house", "inlet", "joker", "knife", "lemon")
TEST = ("mango", "night", "ocean", "paper", "queen", "river", "stone", "tiger")
ANSWERS = {"yes": "yes", "no": "no", "up": "Up", "red": "red"}


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter, and one that begins a text."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<eos>"
    )


def letter_base() -> nn.Module:
    """A Llama of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(LETTERS), max_position_embeddings=512, pad_token_id=0, bos_token_id=1, **sizes
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def constant_task(name: str, answer: str, kind: str = "training") -> Task:
    """A task whose answer is always the same, whatever the input: the least that an adapter must learn."""
    operation = Operation(name, "constants", "word", OperationWording("word", (), ()), lambda: [])
    told = {"seen": [f"Say {answer}.", f"Write {answer}."], "unseen": [f"Put {answer}."]}
    given = tuple(tuple(Example(text, answer) for text in texts) for texts in (TRAIN, TEST))
    return Task(name, operation, (), kind, given, write=lambda task, split, limit: told[split][:limit])


def small_world() -> Any:
    """Four training tasks, two of them asked for in new wordings too, and two new combinations."""
    tasks = {name: constant_task(name, answer) for name, answer in ANSWERS.items()}
    new = [constant_task("ok", "ok", "new_combinations"), constant_task("go", "go", "new_combinations")]
    kinds = {"training": list(tasks.values()), "new_wordings": list(tasks.values()), "new_combinations": new}
    return SimpleNamespace(of=lambda kind: kinds.get(kind, []), seed=0)


def small_layout(base: nn.Module, rank: int = 4) -> AdapterLayout:
    return AdapterLayout.from_lora_config(
        LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"), base
    )


def small_generator(base: nn.Module, tokenizer: Any) -> PromptConditionedLoraGenerator:
    """A generator with random weights that passes for fitted; it reads the base's own states."""
    encoder = AnswerStatesTextEncoder(base, tokenizer, [1, 2], name_or_path="letters")
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        small_layout(base), encoder, num_prompts=3, decoder_type="core", decoder_config={"hidden_size": 16}
    )
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config, encoder).eval()
    shape = generator.weight_tokenizer.grid_shape
    generator.normalization.set_statistics(torch.zeros(shape), torch.full((shape[0],), 0.1))
    return generator
