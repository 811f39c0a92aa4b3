# SPDX-License-Identifier: Apache-2.0
"""Adapters as GGUF files, which llama.cpp and Ollama put on a base in that format."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout, LoraModule
from ..errors import BaseModelMismatchError, CorruptFileError, EngineError, LayoutError
from ..storage.files import PathLike, staged_file
from ..storage.hub import hub_id


# llama.cpp's architectures whose adapters were compared with PEFT in it. Its converters reorder weights of some others
# in ways of their own, where an adapter that was merely renamed would be silently wrong.
_PERMUTED = frozenset({"llama"})  # rows of q and k, from halves to neighbours that are rotated together
_AS_THEY_ARE = frozenset({"gemma2", "gemma3", "qwen2", "qwen3"})
# Of single values in a header, each of which the reader keeps: a vocabulary of 250,000 words takes a million.
_MOST_READS = 1 << 23
SUPPORTED_ARCHITECTURES = tuple(sorted(_PERMUTED | _AS_THEY_ARE))


@dataclass(frozen=True)
class GgufBase:
    """What a base is to llama.cpp, as far as an adapter needs it.

    Attributes:
        name: How the user calls it.
        architecture: llama.cpp's name of its architecture.
        num_blocks: How many layers it has.
        num_heads: Query heads.
        num_key_value_heads: Key heads.
        shapes: Tensor name -> (out_features, in_features), where they are known.
    """

    name: str
    architecture: str
    num_blocks: int
    num_heads: int
    num_key_value_heads: int
    shapes: dict[str, tuple[int, ...]] | None = None


def write_gguf(adapter: GeneratedAdapter, file: PathLike, base: PathLike, *, architecture: str | None = None) -> None:
    """Write an adapter as a GGUF file: `llama-cli --lora`, or `ADAPTER` in an Ollama Modelfile.

    Tensors are in float32 and called `blk.N.attn_q.weight.lora_a` and so on. llama.cpp scales each by
    `adapter.lora.alpha` over its rank; where that is not the adapter's own scaling (rank-stabilised LoRA, several
    alphas) B takes up the quotient.

    Args:
        adapter: The adapter.
        file: The file to write.
        base: The base: its GGUF file, against whose tensors the adapter is then checked; or folder or Hub id of the
            model that it was converted from, of which the configuration is read.
        architecture: llama.cpp's name of the architecture, where the configuration's name for it is another: `"llama"`
            for Mistral models.

    Raises:
        EngineError: If the `gguf` package is missing, or the architecture is none that is known to come out right.
        LayoutError: If the adapter holds more than linear layers.
        BaseModelMismatchError: If the base has no such tensor, or one of another shape.
        CorruptFileError: If the base's file is no GGUF.
    """
    gguf = _gguf()
    found = read_gguf_base(base, architecture)
    tensors = _tensors(adapter, found)
    layout = adapter.layout
    with staged_file(file) as staged:
        writer = gguf.GGUFWriter(staged, found.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(layout))
        name = hub_id(layout.base_model_name_or_path)
        if name is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, name)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{name}")
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def read_gguf_base(base: PathLike, architecture: str | None = None) -> GgufBase:
    """Read what a base is to llama.cpp, from its GGUF file or from its configuration.

    Args:
        base: File, folder or Hub id.
        architecture: As in [`write_gguf`].

    Raises:
        EngineError: If the `gguf` package is missing, there is no such base, or its architecture is none that is known
            to come out right.
        CorruptFileError: If the file is no GGUF.
    """
    path = Path(base)
    found = _from_file(path) if path.is_file() else _from_config(str(base), architecture)
    if found.architecture not in SUPPORTED_ARCHITECTURES:
        raise EngineError(
            f"The base {str(base)!r} is of the architecture {found.architecture!r}. Adapters were compared with PEFT "
            f"in llama.cpp for {', '.join(SUPPORTED_ARCHITECTURES)} alone. Where llama.cpp has another name for it "
            "(llama for Mistral models, say), name that one; otherwise convert the adapter with llama.cpp's own "
            "convert_lora_to_gguf.py."
        )
    return found


def _from_file(path: Path) -> GgufBase:
    try:
        reader = _read_within_bounds(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        architecture = str(fields["general.architecture"])
        heads = fields[f"{architecture}.attention.head_count"]
        return GgufBase(
            str(path),
            architecture,
            int(fields[f"{architecture}.block_count"]),
            _one(heads),
            _one(fields.get(f"{architecture}.attention.head_count_kv", heads)),
            {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors},
        )
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise CorruptFileError(f"{str(path)!r} is no readable GGUF file of a model ({error!r:.300}).") from error


def _read_within_bounds(path: Path) -> Any:
    """The `gguf` package's reader, which a count that lies does not keep busy until all memory is used."""
    gguf = _gguf()

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """It takes what it asks for beyond the file's end for an empty array, and goes on."""

        reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            self.reads += 1
            if self.reads > _MOST_READS:
                raise ValueError("its header says more than that of any model")
            found = super()._get(offset, dtype, count, *rest, **named)
            if len(found) < int(count):
                raise ValueError(f"it ends within what its header says to be at byte {offset}")
            return found

    return Reader(path)


def _from_config(base: str, architecture: str | None) -> GgufBase:
    try:
        config: Any = AutoConfig.from_pretrained(base).get_text_config()
    except (OSError, ValueError) as error:
        raise EngineError(
            f"There is no base model at {base!r} ({' '.join(str(error).split()):.300}). Name its GGUF file, or the "
            "folder or Hub id of the model that it was converted from."
        ) from error
    # transformers writes gemma3_text and qwen2 where llama.cpp writes gemma3 and qwen2.
    called = architecture or config.model_type.removesuffix("_text")
    heads = config.num_attention_heads
    return GgufBase(
        base, called, config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads
    )


def _tensors(adapter: GeneratedAdapter, base: GgufBase) -> dict[str, torch.Tensor]:
    gguf, layout = _gguf(), adapter.layout
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture)
    names = gguf.get_tensor_name_map(architecture, base.num_blocks)
    state_dict, alpha = adapter.state_dict(), _alpha(layout)
    tensors: dict[str, torch.Tensor] = {}
    for module in layout.modules:
        if module.kind != "linear" or len(module.shape_a) != 2:
            raise LayoutError(f"Module {module.name!r} is no linear layer: llama.cpp takes adapters of those alone.")
        name = names.get_name(_as_text_model(module.name))
        if name is None:
            raise BaseModelMismatchError(
                f"llama.cpp's architecture {base.architecture!r} with {base.num_blocks} layers has nothing for module "
                f"{module.name!r}. Use the base that the adapter was written for, or a generator for this one."
            )
        matrix_a, matrix_b = (state_dict[tensor.key].float() for tensor in module.tensors)
        matrix_b = matrix_b * (layout.scaling(module) / (alpha / module.rank))
        if base.architecture in _PERMUTED:
            matrix_b = _permuted(matrix_b, module, base)
        _check_shape(module, f"{name}.weight", base)
        tensors[f"{name}.weight.lora_a"] = matrix_a.contiguous()
        tensors[f"{name}.weight.lora_b"] = matrix_b.contiguous()
    return tensors


def _as_text_model(name: str) -> str:
    """A module's name as the name map knows it: of a language model by itself, with `model.` before it."""
    return re.sub(r"^(?:.*\.)?(?=layers\.\d)", "model.", name)


def _permuted(matrix: torch.Tensor, module: LoraModule, base: GgufBase) -> torch.Tensor:
    """The rows of a q or k projection's B in llama.cpp's order; any other as it is.

    transformers rotates the first half of a head with its second, llama.cpp neighbours with one another.
    """
    heads = {"q_proj": base.num_heads, "k_proj": base.num_key_value_heads}.get(module.name.rpartition(".")[2])
    if heads is None:
        return matrix
    rows, rank = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _check_shape(module: LoraModule, name: str, base: GgufBase) -> None:
    if base.shapes is None:
        return
    written, found = (module.shape_b[0], module.shape_a[1]), base.shapes.get(name)
    if found != written:
        what = f"{name!r} of shape {found}" if found else f"no {name!r}"
        raise BaseModelMismatchError(
            f"{base.name!r} has {what}, and the adapter's matrices for it, {module.name!r}, are for {written}. Use "
            "the base that the adapter was written for."
        )


def _alpha(layout: AdapterLayout) -> float:
    """The alpha for which most modules need no change, as llama.cpp divides it by each module's rank."""
    return Counter(layout.scaling(module) * module.rank for module in layout.modules).most_common(1)[0][0]


def _one(heads: Any) -> int:
    if isinstance(heads, list):
        raise ValueError("it has other numbers of heads in every layer")
    return int(heads)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise EngineError("To write GGUF files, install the library for them: pip install gguf") from error
    return gguf
