# SPDX-License-Identifier: Apache-2.0
"""How large adapters and generators become for bases up to 70B, worked out on the meta device: nothing is allocated.

For each base: the adapter of rank 16 on all linear layers, its tokens, and two decoders that read 16 prompts of 64
tokens, both with their default settings: the cascade that is derived where none is given, and the set transformer.

python benchmarks/bench_scale_arithmetic.py
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from record import write_result
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from peft_dnd import AdapterLayout, PromptConditionedLoraGenerator, PromptConditionedLoraGeneratorConfig


# From the config.json of each base.
BASES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {"model_type": "qwen2", "sizes": (896, 4864, 24, 14, 2, 151936, True)},
    "Qwen2.5-1.5B": {"model_type": "qwen2", "sizes": (1536, 8960, 28, 12, 2, 151936, True)},
    "Qwen2.5-7B": {"model_type": "qwen2", "sizes": (3584, 18944, 28, 28, 4, 152064, False)},
    "Qwen2.5-32B": {"model_type": "qwen2", "sizes": (5120, 27648, 64, 40, 8, 152064, False)},
    "Llama-3-70B": {"model_type": "llama", "sizes": (8192, 28672, 80, 64, 8, 128256, False)},
    "Qwen2.5-72B": {"model_type": "qwen2", "sizes": (8192, 29568, 80, 64, 8, 152064, False)},
    # No filling at all, as by default, means narrow tokens here; a little of it means a quarter as many.
    "Qwen2.5-72B, chunk_width=512": {
        "model_type": "qwen2",
        "sizes": (8192, 29568, 80, 64, 8, 152064, False),
        "chunk_width": 512,
    },
}
SIZE_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
DECODERS = ("hyper_convolution", "set_transformer")


def main() -> None:
    """Work out, print and keep the figures."""
    write_result("scale_arithmetic", {"rank": 16, "prompts": [16, 64, 384], "bases": {b: figures(b) for b in BASES}})


def figures(name: str) -> dict[str, Any]:
    """The sizes of a base, its adapter and its generators."""
    base_config = AutoConfig.for_model(
        BASES[name]["model_type"], **dict(zip(SIZE_NAMES, BASES[name]["sizes"], strict=True))
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    layout = AdapterLayout.from_lora_config(LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), base)
    found: dict[str, Any] = {
        "base_parameters": base.num_parameters(),
        "adapter_parameters": layout.num_parameters,
        "adapter_mib_float32": round(4 * layout.num_parameters / 2**20),
    }
    for decoder_type in DECODERS:
        config = PromptConditionedLoraGeneratorConfig(
            layout=layout,
            num_prompts=16,
            chunk_width=BASES[name].get("chunk_width"),
            decoder_type=decoder_type,
        )
        with torch.device("meta"):
            generator = PromptConditionedLoraGenerator(config).requires_grad_(False)
            states = torch.empty(1, *config.condition_shape)
            mask = torch.empty(states.shape[:3], dtype=torch.bool)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generator.decoder(states, mask)
        parameters = [parameter.numel() for parameter in generator.decoder.parameters()]
        found["tokens"] = generator.weight_tokenizer.grid_shape
        found[decoder_type] = {
            "parameters": sum(parameters),
            "gib_bfloat16": round(2 * sum(parameters) / 2**30, 2),
            "largest_parameter_gib_bfloat16": round(2 * max(parameters) / 2**30, 2),
            "decode_tflop_as_written": round(counter.get_total_flops() / 1e12, 2),
        }
    return found


if __name__ == "__main__":
    main()
