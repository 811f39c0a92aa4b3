# SPDX-License-Identifier: Apache-2.0
"""llama.cpp itself, with converted adapters on tiny bases, gives PEFT's logits: `make test-engines`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_dnd import AdapterLayout, GeneratedAdapter
from peft_dnd.engines import SUPPORTED_ARCHITECTURES, write_gguf


pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(find_spec("xllamacpp") is None, reason="llama.cpp is not installed: make test-engines"),
]

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
IDS = [5, 9, 90, 41, 7, 7, 63, 12, 0, 33, 18, 2]
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, "llama"),
    "mistral": (MistralConfig, MistralForCausalLM, "llama"),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2"),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen3"),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, "gemma2"),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, "gemma3"),
}


def base_of(kind: str) -> PreTrainedModel:
    config_class, model_class, _ = KINDS[kind]
    sizes = {key: value for key, value in SIZES.items() if kind != "qwen2" or key != "head_dim"}
    own: dict[str, Any] = {"tie_word_embeddings": False} if kind == "llama" else {}
    if kind.startswith("gemma"):
        # llama.cpp takes their GELU from a table in half precision, so that large states differ more.
        own = {"query_pre_attn_scalar": 32, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **own})).eval()
    with torch.no_grad():  # biases and norms that say something
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


def adapter_for(base: PreTrainedModel, config: LoraConfig) -> GeneratedAdapter:
    layout = AdapterLayout.from_lora_config(config, base)
    draw = torch.Generator().manual_seed(1)
    return GeneratedAdapter(layout, {t.key: torch.randn(t.shape, generator=draw) * 0.15 for t in layout.tensors})


def logits_in_llama_cpp(base: Path, adapter: Path | None, ids: Sequence[int]) -> torch.Tensor:
    """All positions' logits, (length, vocabulary)."""
    ffi, lib = _llama_cpp()
    model = lib.llama_model_load_from_file(str(base).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL, f"llama.cpp does not read {base}"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_threads, settings.n_threads_batch = (
        64,
        64,
        64,
        1,
        1,
    )
    settings.type_k = settings.type_v = settings.flash_attn_type = 0  # float32, in place of float16
    context = lib.llama_init_from_model(model, settings)
    assert context != ffi.NULL
    if adapter is not None:
        lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
        assert lora != ffi.NULL, f"llama.cpp does not read {adapter}"
        assert (
            lib.llama_set_adapters_lora(
                context, ffi.new("struct llama_adapter_lora *[]", [lora]), 1, ffi.new("float[]", [1.0])
            )
            == 0
        )
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert lib.llama_decode(context, batch) == 0
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    found = torch.tensor([ffi.unpack(lib.llama_get_logits_ith(context, place), size) for place in range(len(ids))])
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return found


@cache
def _llama_cpp() -> tuple[Any, Any]:
    """llama.cpp's C functions, from the library in one package, as the other declares them for the same version.

    The second package has a library as well, for a glibc that few machines have yet.
    """
    library = next(Path(str(find_spec("xllamacpp").origin)).parent.glob("xllamacpp*.so"))
    from llama_cpp_py_sync._cffi_bindings import get_ffi

    ffi = get_ffi()
    lib = ffi.dlopen(str(library))
    lib.llama_backend_init()
    return ffi, lib


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_peft(kind: str, tmp_path: Path) -> None:
    from support.gguf_bases import write_base

    base, architecture = base_of(kind), KINDS[kind][2]
    base.save_pretrained(tmp_path / "base")
    write_base(base, tmp_path / "base.gguf", architecture)
    before = logits_of(base)
    told = logits_in_llama_cpp(tmp_path / "base.gguf", None, IDS)
    largest = {"the base by itself": float((told - before).abs().max())}
    plain = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    uneven = LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"k_proj": 9, "up_proj": 2},
        target_modules=["q_proj", "k_proj", "up_proj"],
        task_type="CAUSAL_LM",
    )
    for name, config in (("plain", plain), ("uneven", uneven)):
        adapter = adapter_for(base_of(kind), config)
        adapter.save_pretrained(tmp_path / name)
        write_gguf(adapter, tmp_path / f"{name}.gguf", tmp_path / "base", architecture=architecture)
        write_gguf(adapter, tmp_path / "by-file.gguf", tmp_path / "base.gguf")
        assert (tmp_path / "by-file.gguf").read_bytes() == (tmp_path / f"{name}.gguf").read_bytes()
        expected = logits_of(PeftModel.from_pretrained(base_of(kind), str(tmp_path / name)).eval())
        found = logits_in_llama_cpp(tmp_path / "base.gguf", tmp_path / f"{name}.gguf", IDS)
        largest[name] = float((found - expected).abs().max())
        assert (expected - before).abs().max() > 0.1, "the adapter says something"
    print(f"{kind}: largest differences of logits {largest}")
    assert max(largest.values()) < 1e-2


def test_every_architecture_that_is_let_through_is_tried() -> None:
    assert {architecture for _, _, architecture in KINDS.values()} == set(SUPPORTED_ARCHITECTURES)
