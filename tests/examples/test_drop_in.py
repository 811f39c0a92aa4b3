# SPDX-License-Identifier: Apache-2.0
"""The drop-in examples, each run on tiny models as its own text says."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from support.constants import TASK_PROMPTS
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator


FOLDER = Path(__file__).parents[2] / "examples" / "drop_in"
README = FOLDER.parent / "README.md"
DOMAINS = {
    "court": ["the law of the court", "what is tax law ?", "a court please", "law , please", "what is the court ?"],
    "health": ["the medicine of a doctor", "what is medicine ?", "doctor please", "a doctor ?", "medicine , please"],
    "land": ["what is a river ?", "the capital please", "river , please", "the colour of a river", "a capital ?"],
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"drop_in_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which trainers stay on the processor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.fixture
def base_folder(here: Path, fresh_base: Callable[[], nn.Module], word_tokenizer: PreTrainedTokenizerFast) -> str:
    """The tiny base and its tokenizer, as a user has them."""
    base: Any = fresh_base()
    base.save_pretrained("base")
    word_tokenizer.save_pretrained("base")
    return "base"


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_table_has_every_example() -> None:
    linked = set(re.findall(r"\(drop_in/([\w.]+)\)", README.read_text(encoding="utf-8")))
    assert linked == {path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb")}
    folders = {path.name for path in FOLDER.parent.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(re.findall(r"^\| \[`(\w+)`\]\(\1\)", README.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_commands_in_the_table_s_file_are_the_scripts_own() -> None:
    """Every option that the file names is one of the script."""
    (block,) = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    for script, options in re.findall(r"^python (\w+)\.py (.*?)(?: < .*)?$", block, flags=re.MULTILINE):
        found = example(script).parse(options.split())
        assert found.__dict__


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("sft_with_collector", "--model base --tasks nowhere --pairs pairs"),
        ("generate_and_serve", "--model base --generator GENERATOR --tasks nowhere"),
        ("adapt_embeddings", "fit --model base --domains nowhere --pairs pairs --output out"),
    ],
)
def test_a_folder_that_is_not_there_is_named(
    script: str, options: str, base_folder: str, generator_folder: Path
) -> None:
    with pytest.raises(SystemExit, match=r"There is no .* file in nowhere"):
        example(script).main(options.replace("GENERATOR", str(generator_folder)).split())


@pytest.mark.parametrize("given", [True, False])
def test_one_line_is_changed_in_training(
    base_folder: str, generator_folder: Path, here: Path, given: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(here / "train.txt", [" ".join(lines) for lines in TASK_PROMPTS.values()])
    write_lines(here / "prompts.txt", TASK_PROMPTS["law"])
    new = ["--generator", str(generator_folder), "--prompts", "prompts.txt"] if given else []
    sizes = ["--block-size", "8", "--epochs", "1", "--batch-size", "4"]
    found = example("run_clm").main(
        ["--model", base_folder, "--train-file", "train.txt", "--output", "adapter", *sizes, *new]
    )
    assert "adapter in adapter" in capsys.readouterr().out
    assert found["after"] > 0 and found["before"] > 0
    layout = GeneratedAdapter.from_pretrained("adapter").layout
    assert layout.max_rank == (3 if given else 8), "the generator decides"
    with pytest.raises(SystemExit):
        example("run_clm").main(["--model", "base", "--train-file", "t", "--output", "o", "--generator", "g"])


def test_from_trl_to_a_pushed_generator(
    base_folder: str, encoder_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("trl")
    for task, prompts in list(TASK_PROMPTS.items())[:3]:
        rows = [json.dumps({"prompt": prompt, "completion": f" {task}"}) for prompt in prompts]
        write_lines(here / "tasks" / f"{task}.jsonl", rows)
    collect = ["--model", base_folder, "--tasks", "tasks", "--pairs", "pairs", "--rank", "2", "--steps", "3"]
    collect += ["--checkpoints", "2", "--batch-size", "2"]
    example("sft_with_collector").main(collect)
    assert capsys.readouterr().out.count("2 checkpoints in") == 3
    pairs = PromptCheckpointDataset.from_folder("pairs")
    assert pairs.tasks == ("geo", "law", "med") and len(pairs) == 6
    example("sft_with_collector").main(collect)
    assert capsys.readouterr().out == "", "what is complete is passed over"

    pushed = []
    monkeypatch.setattr(PromptConditionedLoraGenerator, "push_to_hub", lambda *args, **options: pushed.append(args[1]))
    fitting = ["--pairs", "pairs", "--held-out", "med", "--output", "generator", "--push", "me/generator"]
    figures = example("fit_and_push").main(
        [*fitting, "--text-encoder", str(encoder_folder), "--steps", "2", "--batch-size", "2"]
    )
    assert figures["eval_loss"] > 0 and pushed == ["me/generator"]
    generator = PromptConditionedLoraGenerator.from_pretrained("generator")
    assert generator.generate_adapter(TASK_PROMPTS["med"]).layout.difference(pairs.layout) is None


def test_serving_answers_each_line_with_its_own_task_s_adapter(
    base_folder: str, generator: Any, generator_folder: Path, here: Path, base_model: nn.Module, capsys: Any
) -> None:
    for task, prompts in TASK_PROMPTS.items():
        write_lines(here / "tasks" / f"{task}.txt", prompts)
    asked = [{"task": task, "question": "what is the law ?"} for task in ("law", "med", "law", "geo")]
    lines = [*map(json.dumps, asked), '{"task": "lav", "question": "?"}', "no JSON", "[]"]
    options = ["--model", base_folder, "--generator", str(generator_folder), "--tasks", "tasks", "--size", "2"]
    example("generate_and_serve").main([*options, "--max-new-tokens", "4"], io.StringIO("\n".join(lines)))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 7 and [row["task"] for row in found[:4]] == ["law", "med", "law", "geo"]
    assert found[0]["answer"] == found[2]["answer"]
    assert "Did you mean 'law'" in found[4]["error"] and found[5]["line"] == "no JSON" and "error" in found[6]


def test_an_embedding_model_adapts_to_a_new_domain(encoder_folder: Path, here: Path, capsys: Any) -> None:
    for name, texts in list(DOMAINS.items())[:2]:
        write_lines(here / "domains" / f"{name}.txt", texts)
    write_lines(here / "land.txt", DOMAINS["land"])
    script = example("adapt_embeddings")
    model = ["--model", str(encoder_folder)]
    sizes = ["--rank", "2", "--steps", "3", "--checkpoints", "2", "--fitting-steps", "2"]
    script.main(["fit", *model, "--domains", "domains", "--pairs", "pairs", "--output", "generator", *sizes])
    assert PromptCheckpointDataset.from_folder("pairs").tasks == ("court", "health")
    script.main(["adapt", *model, "--generator", "generator", "--text", "land.txt", "--output", "adapted"])
    assert re.search(r"loss on 2 texts that were not read: [\d.]+ without, [\d.]+ with", capsys.readouterr().out)

    adapted = SentenceTransformer(str(encoder_folder), device="cpu")
    plain = adapted.encode(DOMAINS["land"])
    adapted.load_adapter("adapted")
    if Version(version("transformers")) >= Version("5.6"):  # older ones leave an encoder's adapter unread
        assert abs(adapted.encode(DOMAINS["land"]) - plain).max() > 1e-4
    again = PromptConditionedLoraGenerator.from_pretrained("generator").generate_adapter(DOMAINS["land"][::2])
    stored = GeneratedAdapter.from_pretrained("adapted")
    assert all(torch.equal(stored.state_dict()[key], matrix) for key, matrix in again.state_dict().items())


def test_the_notebook_runs_from_top_to_bottom(base_folder: str, generator_folder: Path, here: Path) -> None:
    notebook = json.loads((FOLDER / "prompts_to_adapter.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "saved without outputs"
    text = "\n\n".join("".join(cell["source"]) for cell in cells)
    for old, new in (
        ("demo_output/seed-0/generator", str(generator_folder)),
        ("demo_output/seed-0/base", base_folder),
        ("Sirkelo", "law"),
    ):
        assert old in text
        text = text.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(text, "prompts_to_adapter.ipynb", "exec"), names)
    assert isinstance(names["stock"], PeftModel)
    assert names["pool"].counts["generated"] == 2
    assert [*names["answers"]] == [*names["TASKS"]]
