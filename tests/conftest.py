# SPDX-License-Identifier: Apache-2.0
"""Tiny models, built from their configurations: no test needs the network or a GPU."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from support.constants import LORA_CONFIG, TASK_PROMPTS, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from peft_dnd import (
    AdapterLayout,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.pairs.writer import PairWriter
from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder


# The matrices here are tiny: threads would only wait for one another, and badly where cores are shared.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def base_model() -> nn.Module:
    """A grouped-query Llama of two layers; take `fresh_base` to change one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def fresh_base(base_model: nn.Module) -> Callable[[], nn.Module]:
    """Makes copies of the base model."""
    return lambda: copy.deepcopy(base_model)


@pytest.fixture
def lora_config() -> LoraConfig:
    """Rank 3 on all linear layers."""
    return copy.deepcopy(LORA_CONFIG)


@pytest.fixture(scope="session")
def layout(base_model: nn.Module) -> AdapterLayout:
    """The layout of `lora_config` on `base_model`."""
    return AdapterLayout.from_lora_config(LORA_CONFIG, base_model)


@pytest.fixture
def trained_like(fresh_base: Callable[[], nn.Module], lora_config: LoraConfig) -> Callable[[int], nn.Module]:
    """Makes `PeftModel`s whose A and B are drawn from a seed, so that neither is zero."""

    def make(seed: int = 0) -> nn.Module:
        model = get_peft_model(fresh_base(), copy.deepcopy(lora_config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model

    return make


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random sentence-transformers model of width 16 with a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"##{c}" for c in "abcdefgh"), *"abcdefgh"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=32)
    SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"


@pytest.fixture
def encoder(encoder_folder: Path) -> SentenceTransformerTextEncoder:
    """That encoder, frozen."""
    return SentenceTransformerTextEncoder.from_pretrained(encoder_folder)


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory, layout: AdapterLayout) -> Path:
    """Four tasks of three checkpoints each: a random adapter a task, and a little jitter a checkpoint."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {t.key: torch.randn(t.shape, generator=generator) * scale for t in layout.tensors}

    common = draw(0.1)
    for task, prompts in TASK_PROMPTS.items():
        own = draw(0.05)
        writer = PairWriter(folder / task, prompts, layout)
        writer.begin()
        for step in (8, 9, 10):
            jitter = draw(0.002)
            writer.add({key: common[key] + own[key] + jitter[key] for key in common}, step)
        writer.close()
    return folder


@pytest.fixture
def pairs(pairs_folder: Path) -> PromptCheckpointDataset:
    """The four tasks' pairs."""
    return PromptCheckpointDataset.from_folder(pairs_folder)


@pytest.fixture(scope="session")
def generator_config(layout: AdapterLayout, encoder_folder: Path) -> PromptConditionedLoraGeneratorConfig:
    """A small generator's configuration: 4 prompts of 16 tokens."""
    return PromptConditionedLoraGeneratorConfig.from_adapters(
        layout,
        str(encoder_folder),
        num_prompts=4,
        max_prompt_length=16,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3, "zero_init_output": False},
    )


@pytest.fixture(scope="session")
def generator(generator_config: PromptConditionedLoraGeneratorConfig) -> PromptConditionedLoraGenerator:
    """A generator with random weights that passes for fitted; not to be changed."""
    torch.manual_seed(0)
    model = PromptConditionedLoraGenerator(copy.deepcopy(generator_config)).eval()
    shape = model.weight_tokenizer.grid_shape
    model.normalization.set_statistics(torch.randn(shape) * 0.1, torch.full((shape[0],), 0.1))
    return model


@pytest.fixture(scope="session")
def generator_folder(generator: PromptConditionedLoraGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That generator, saved."""
    folder = tmp_path_factory.mktemp("generators") / "generator"
    generator.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words to numbers below 50, the vocabulary of the tiny base."""
    words = ["<unk>", "<pad>", "</s>", *WORDS, *(f"w{number}" for number in range(50 - 3 - len(WORDS)))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    found.chat_template = (
        "{% for m in messages %}{{ m['content'] }} . {% endfor %}{% if add_generation_prompt %}answer{% endif %}"
    )
    return found
