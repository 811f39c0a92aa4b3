# SPDX-License-Identifier: Apache-2.0
"""Tiny bases as GGUF files, written as llama.cpp's own converter writes models of these architectures."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import PreTrainedModel


# Names whose norms transformers adds 1 to when they run, and llama.cpp's converter when it writes.
_NORMS_FROM_ONE = ("gemma2", "gemma3")


def write_base(model: PreTrainedModel, file: Path, architecture: str) -> None:
    """Write a language model in float32, without a vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if architecture in _NORMS_FROM_ONE:
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    else:
        writer.add_rope_freq_base(10_000.0)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        there = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        writer.add_tensor(there, _as_written(name, tensor, architecture, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _head_size(config: object) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _as_written(name: str, tensor: torch.Tensor, architecture: str, config: object) -> torch.Tensor:
    tensor = tensor.detach().float()
    if architecture in _NORMS_FROM_ONE and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads is not None:
        rows = torch.arange(len(tensor)).reshape(heads, 2, -1).transpose(1, 2).flatten()
        return tensor[rows].contiguous()
    return tensor.contiguous()
