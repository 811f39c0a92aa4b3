# SPDX-License-Identifier: Apache-2.0
"""`collect`: adapters trained from files alone, into pairs that a generator can be fitted to."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset
from peft_dnd.cli.bases import example_of


def test_collects_pairs_of_one_start(collected: Path, task_files: Path) -> None:
    pairs = PromptCheckpointDataset.from_folder(collected)
    assert pairs.tasks == ("art", "geo", "law", "med") and pairs.layout.max_rank == 2
    for task in pairs.tasks:
        assert [path.stem for path in pairs.checkpoints(task)] == [f"step-{step:08d}" for step in (2, 3, 4)]
        assert len(pairs.examples(task)) == 6
    assert pairs.prompts("law")[0] == "what court is law ?" and pairs.answers("law") == ("court",) * 6


def test_training_teaches_the_answers(collected: Path, base_folder: Path) -> None:
    pairs = PromptCheckpointDataset.from_folder(collected)

    def loss(model) -> float:
        with torch.no_grad():
            rows = [pairs.examples("law")[number] for number in range(6)]
            return sum(float(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss) for row in rows)

    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    before = loss(base)
    adapted = GeneratedAdapter(pairs.layout, pairs.state_dict("law")).load_into(base).eval()
    assert loss(adapted) < before


def test_complete_tasks_are_passed_over_and_a_recipe_does_the_same(
    run, collected: Path, base_folder: Path, task_files: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in collected.rglob("*") if path.is_file()}
    recipe = tmp_path / "recipe.yaml"
    tasks = "".join(f"  {task}: {task_files / task}.jsonl\n" for task in ("art", "geo", "law", "med"))
    recipe.write_text(
        f"base: {base_folder}\noutput: {collected}\ntasks:\n{tasks}lora: {{r: 2}}\nlast: 3\n"
        "training: {max_steps: 4, learning_rate: 1e-2}\n",
        encoding="utf-8",
    )
    ran = run("collect", recipe, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert ran.facts["collected"] == [] and len(ran.facts["complete_before"]) == 4
    assert {path: path.stat().st_mtime_ns for path in collected.rglob("*") if path.is_file()} == before
    ran = run("collect", recipe, "--device", "cpu", "--output", tmp_path / "pairs", "--json")
    assert ran.code == 0, ran.err
    one, other = (PromptCheckpointDataset.from_folder(folder) for folder in (collected, tmp_path / "pairs"))
    for task in one.tasks:
        assert all(torch.equal(a, other.state_dict(task)[key]) for key, a in one.state_dict(task).items())


def test_mistakes_are_named_before_anything_is_trained(run, base_folder, task_files, tmp_path) -> None:
    law = f"law={task_files / 'law.jsonl'}"
    start = ("collect", "--base", base_folder, "-o", tmp_path / "pairs", "--device", "cpu")
    for options, code, words in (
        ((), 2, "--task"),
        (("--task", "law.jsonl"), 2, "TASK=FILE"),
        (("--task", "law=typo.jsonl"), 1, "typo.jsonl"),
        (("--task", law, "--answer-column", "answr"), 1, "Did you mean 'answer'?"),
        (("--task", law, "--set", "lora.alpa=2"), 1, "unknown setting 'alpa'"),
        (("--task", law, "--set", "trainin.max_steps=2"), 1, "Did you mean 'training'?"),
        (("--task", law, "--set", "training.learning_rte=2"), 1, "Did you mean 'learning_rate'?"),
        (("--task", law, "--set", "training.save_strategy=sometimes"), 1, "sometimes"),
        (("--task", law, "--set", "lora.target_modules=[nothing]", "--max-steps", "1"), 1, "nothing"),
        (("--task", law, "--set", "max_length=2"), 1, "nothing is left of the answer"),
    ):
        ran = run(*start, *options)
        assert ran.code == code and words in ran.err, (options, ran)
        assert not (tmp_path / "pairs").exists()


def test_examples_alone_need_no_training(run, collected, base_folder, encoder_folder, task_files, tmp_path) -> None:
    (tmp_path / "law.txt").write_text("what is asked of law ?\n", encoding="utf-8")
    law, art = f"law={task_files / 'law.jsonl'}", f"art={task_files / 'art.jsonl'}"
    start = ("collect", "--base", base_folder, "-o", tmp_path / "pairs", "--examples-only", "--json")
    told = ("--prompts", f"law={tmp_path / 'law.txt'}")
    for wrong, words in (
        (("--max-steps", "3"), "'training' is about training"),
        (("--rank", "2"), "'lora' is about training"),
        (("--set", "max_length=2"), "nothing is left of the answer"),
    ):
        ran = run(*start, "--task", law, *wrong)
        assert ran.code == 1 and words in ran.err and not (tmp_path / "pairs").exists()
    ran = run(*start, "--task", law, *told)
    assert ran.code == 0 and ran.facts["collected"] == ["law"], ran.err
    ran = run(*start, "--task", law, "--task", art)
    assert ran.code == 0 and (ran.facts["collected"], ran.facts["complete_before"]) == (["art"], ["law"])

    trained = PromptCheckpointDataset.from_folder(collected)
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs", layout=trained.layout)
    assert pairs.tasks == ("art", "law") and not pairs.checkpoints("law")
    assert pairs.prompts("law") == ("what is asked of law ?",) and pairs.answers("law") is None
    assert pairs.answers("art") == trained.answers("art")
    rows = range(len(trained.examples("law")))
    assert [pairs.examples("law")[row] for row in rows] == [trained.examples("law")[row] for row in rows]

    ran = run(
        *("fit", "--pairs", tmp_path / "pairs", "-o", tmp_path / "generator", "--text-encoder", encoder_folder),
        *("--base", base_folder, "--set", "training.task_loss_weight=1", "--set", "lora.r=2"),
        *("--max-steps", "1", "--device", "cpu", "-q"),
    )
    assert ran.code == 0, ran.err


def test_an_example_is_the_question_as_it_is_asked_and_the_loss_on_the_answer(base_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    row = example_of(tokenizer, "what is law ?", "court", 64)
    asked = tokenizer("what is law ?\n")["input_ids"]
    end = [*tokenizer("court")["input_ids"], tokenizer.eos_token_id]
    assert row == {"input_ids": asked + end, "labels": [-100] * len(asked) + end}
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    row = example_of(tokenizer, "what is law ?", "court", 64)
    asked = tokenizer("user what is law ? . assistant ", add_special_tokens=False)["input_ids"]
    assert row["input_ids"][: len(asked)] == asked and row["labels"][: len(asked)] == [-100] * len(asked)
    assert tokenizer.decode(row["input_ids"][len(asked) :]) == "court ."
