# SPDX-License-Identifier: Apache-2.0
"""`fit`, `distil`, `evaluate` and `card`: from pairs to a generator, its report and its card, by the command alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.constants import TASK_PROMPTS
from support.rows import rows_of

from peft_dnd import PromptConditionedLoraGenerator, write_task_without_checkpoints
from peft_dnd.cli.console import CommandError
from peft_dnd.cli.evaluate import _by_labels, _by_loss
from peft_dnd.evaluation import EvaluationReport


pytest_plugins = ("support.several_bases",)

QUICK = ("--max-steps", "2", "--batch-size", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def fitted(collected: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator that `fit` fitted to three of the four collected tasks."""
    from peft_dnd.cli.app import main

    folder = tmp_path_factory.mktemp("fitted") / "generator"
    options = ["--held-out", "law", "--num-prompts", "4", "--set", "generator.max_prompt_length=16", "-q"]
    arguments = ["fit", "--pairs", collected, "-o", folder, "--text-encoder", encoder_folder, *QUICK, *options]
    assert main([str(argument) for argument in arguments]) == 0
    return folder


def test_fits_a_generator(run, fitted: Path, encoder_folder, collected) -> None:
    generator = PromptConditionedLoraGenerator.from_pretrained(fitted)
    assert generator.config.num_prompts == 4 and generator.config.adapter_layout.max_rank == 2
    assert {"training loss", "eval_loss", "eval_mean_adapter_loss"} <= set(generator.config.measured)
    assert run("inspect", fitted, "--json").facts["knows_its_tasks"] is True
    start = ("fit", "--pairs", collected, "-o", fitted, "--text-encoder", encoder_folder, *QUICK)
    ran = run(*start)
    assert ran.code == 1 and "--overwrite" in ran.err
    ran = run(*start, "--resume", "--output", fitted.parent / "other")
    assert ran.code == 1 and "no checkpoint" in ran.err


def test_a_fit_that_was_cut_off_goes_on(run, collected, encoder_folder, tmp_path) -> None:
    folder = tmp_path / "generator"
    start = ("fit", "--pairs", collected, "-o", folder, "--text-encoder", encoder_folder, "--batch-size", "4")
    start = (*start, "--device", "cpu", "--set", "training.save_steps=2", "--json", "--quiet")
    assert run(*start, "--max-steps", "2").code == 0
    ran = run(*start, "--max-steps", "4", "--resume")
    assert ran.code == 0, ran.err
    assert ran.facts["measured"]["steps"] == 4


def test_a_generator_goes_on_with_new_tasks(run, fitted, collected, encoder_folder, tmp_path) -> None:
    start = ("fit", "--update", fitted, "--pairs", collected, "--set", "tasks=[law]", *QUICK, "--json", "-q")
    ran = run(*start, "-o", tmp_path / "next")
    assert ran.code == 0, ran.err
    assert (ran.facts["revision"], ran.facts["training_tasks"]) == (2, ["law"])
    assert "revisions" not in ran.facts["measured"]
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "next")
    assert again.config.num_prompts == 4  # as it was
    wrong = run(*start, "-o", tmp_path / "other", "--text-encoder", encoder_folder)
    assert wrong.code == 1 and "leave yours out" in wrong.err and not (tmp_path / "other").exists()
    typo = run("fit", "--update", tmp_path / "nothing", "--pairs", collected, "-o", tmp_path / "other", *QUICK)
    assert typo.code == 1 and "nothing" in typo.err
    inside = run("fit", "--update", fitted, "--pairs", collected, "-o", fitted, *QUICK)
    assert inside.code == 1 and "--overwrite" in inside.err


def test_goes_on_with_new_tasks_on_the_bases_own_loss(run, base_folder, encoder_folder, tmp_path) -> None:
    for folder, names in (("pairs", ("art", "geo")), ("new", ("law", "med"))):
        for name in names:
            write_task_without_checkpoints(tmp_path / folder / name, TASK_PROMPTS[name], rows_of(name))
    loss = ("--set", "training.task_loss_weight=1", "--base", base_folder, *QUICK, "-q")
    first = ("fit", "--pairs", tmp_path / "pairs", "-o", tmp_path / "g", "--text-encoder", encoder_folder, *loss)
    ran = run(*first)
    assert ran.code == 1 and "--set lora.r=8" in ran.err
    # The pairs are tiny: a tenth of them has no room for rows.
    room = ("--set", "training.replay_store_share=1.0")
    ran = run(*first, "--set", "lora.r=2", *room)
    assert ran.code == 0, ran.err
    start = ("fit", "--update", tmp_path / "g", "--pairs", tmp_path / "new", "-o", tmp_path / "next")
    for wrong, words in (
        ((*QUICK, "--set", "training.task_loss_weight=1"), "--base"),
        ((*QUICK, "--base", base_folder), "would not be used"),
        (QUICK, "have no checkpoints to fit to"),
        ((*loss, "--set", "lora.r=4"), "leave yours out"),
        ((*loss, "--base", tmp_path / "g"), "is a generator's folder"),
        ((*loss, "--update", base_folder), "no generator"),
    ):
        ran = run(*start, *wrong)
        assert ran.code == 1 and words in ran.err and len(ran.err) < 500, (wrong, ran.err)
        assert not (tmp_path / "next").exists()
    forgetful = ("--set", "training.replay_share=0", "--max-steps", "40", "--learning-rate", "0.05")
    ran = run(*start, *loss[:-1], *forgetful, "--set", "training.most_points_lost=0.0", "--push-to-hub", "me/next")
    assert ran.code == 1 and "Nothing was uploaded" in ran.err and (tmp_path / "next" / "config.json").is_file()
    ran = run(*start, *loss, *room, "--overwrite", "--json", "--set", "training.most_points_lost=null")
    assert ran.code == 0, ran.err
    assert (ran.facts["revision"], ran.facts["replayed_tasks"]) == (2, 2)
    assert set(ran.facts["points_lost"]) == {"art", "geo"}


def test_mistakes_in_a_recipe_are_named(run, collected, encoder_folder, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    common = f"pairs: {collected}\noutput: {tmp_path / 'generator'}\ntext_encoder: {encoder_folder}\n"
    for text, code, words in (
        ("", 1, "names and values"),
        ("pairs: [", 1, "no YAML"),
        ("pairs: x\n", 2, "--output"),
        (common + "trainning: {}\n", 1, "Did you mean 'training'?"),
        (common + "generator: {num_promts: 3}\n", 1, "Did you mean 'num_prompts'?"),
        (common + "training: {loss_weighting: sometimes}\n", 1, "loss_weighting"),
        (common + "training: 3\n", 1, "must hold names and values"),
        (common + "lora: {r: 2}\n", 1, "--base"),
        (common + "held_out: [lw]\n", 1, "'lw'"),
    ):
        recipe.write_text(text, encoding="utf-8")
        ran = run("fit", recipe)
        assert ran.code == code and words in ran.err, (text, ran)
        assert not (tmp_path / "generator").exists()
    assert run("fit", tmp_path / "recip.yaml").err.count("recipe.yaml") == 1
    assert run("fit", "--set", "training.max_steps").code == 2
    for wrong in ("training.max_steps=two", "training.learning_rate=1e-3x", "training.seed=[1]"):
        ran = run("fit", "--pairs", "pairs", "-o", "x", "--text-encoder", "y", "--set", wrong)
        assert ran.code == 1 and f"{wrong[9:].partition('=')[0]} is a number, found" in ran.err


def test_distils_tasks_and_fits_to_them(run, base_folder, encoder_folder, tmp_path) -> None:
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("what is law ?\nwhat is tax ?\n", encoding="utf-8")
    for task, context in (("one", "answer court . "), ("two", "answer doctor . ")):
        options = ("--context", context, "--max-new-tokens", "3", "--top-tokens", "3", "--device", "cpu", "--json")
        ran = run("distil", base_folder, inputs, tmp_path / "pairs" / task, *options)
        assert ran.code == 0, ran.err
        assert ran.facts["inputs"] == 2
    tasks = run("inspect", tmp_path / "pairs", "--json").facts["tasks"]
    assert tasks["one"]["distilled"] == 2 and tasks["one"]["checkpoints"] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pairs: {tmp_path / 'pairs'}\noutput: {tmp_path / 'generator'}\ntext_encoder: {encoder_folder}\n"
        f"base: {base_folder}\nlora: {{r: 2}}\ntraining: {{distillation_weight: 1.0}}\n",
        encoding="utf-8",
    )
    ran = run("fit", recipe, *QUICK, "--json", "-q")
    assert ran.code == 0, ran.err
    assert run("inspect", tmp_path / "generator", "--base", base_folder, "--json").facts["max_rank"] == 2
    options = ("--generator", tmp_path / "generator", "--student", base_folder, *options[2:-1])
    ran = run("distil", base_folder, inputs, tmp_path / "pairs" / "three", "--prompts", inputs, *options)
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "pairs" / "three" / "distillation.json").read_text())
    assert record["teacher"]["adapter"] and record["student"] == record["teacher"]["base"]
    ran = run(
        "distil", base_folder, inputs, tmp_path / "pairs" / "three", *options, "--prompts", inputs, "--top-tokens", "0"
    )
    assert ran.code == 1 and "asked something else: top_tokens was 3 and is 0" in ran.err
    ran = run("distil", base_folder, inputs, tmp_path / "pairs" / "x", *options)
    assert ran.code == 2 and "--prompts" in ran.err
    ran = run("distil", base_folder, inputs, tmp_path / "pairs" / "three")
    assert ran.code == 2 and "--context" in ran.err
    ran = run("distil", base_folder, inputs, tmp_path / "pairs" / "x", "--context-file", tmp_path / "typo")
    assert ran.code == 1 and "typo" in ran.err


def test_evaluates_beside_all_rivals_and_writes_the_card(run, fitted, collected, base_folder, tmp_path) -> None:
    report = tmp_path / "report"
    options = ("--base", base_folder, "--held-out", "law", "--device", "cpu", "--json", "-q")
    ran = run("evaluate", fitted, collected, report, *options)
    assert ran.code == 0, ran.err
    rows = ran.facts["rows"]
    assert {"base", "generated", "shuffled", "trained", "nearest", "ridge", "average_weights"} <= set(rows)
    assert rows["trained"]["mean"]["value"] > rows["base"]["mean"]["value"]
    assert ran.facts["settings"]["scored_by"] == "loss"
    assert EvaluationReport.load(report).tasks == ("law",)
    folder = tmp_path / "generator"
    shutil.copytree(fitted, folder)
    ran = run("card", folder, "--write", "--evaluation", report)
    assert ran.code == 0, ran.err
    assert "On held-out tasks" in (folder / "README.md").read_text(encoding="utf-8")
    assert "On held-out tasks" in run("card", folder).out


def test_evaluates_a_generator_of_several_bases_on_the_one_that_it_is_given(
    run, fitted, collected, base_folder, layouts, tmp_path
) -> None:
    generator = PromptConditionedLoraGenerator.from_pretrained(fitted)
    generator.add_base(layouts["wide"], name="wide")
    generator.save_pretrained(tmp_path / "several")
    options = ("--base", base_folder, "--held-out", "law", "--device", "cpu", "--json", "-q", "--skip", "ridge")
    found = [
        run("evaluate", one, collected, tmp_path / f"report-{one.name}", *options)
        for one in (fitted, tmp_path / "several")
    ]
    assert [ran.code for ran in found] == [0, 0], found[1].err
    first, second = (ran.facts["rows"]["generated"]["mean"]["value"] for ran in found)
    assert second == pytest.approx(first)


def test_evaluates_by_answers(run, fitted, collected, base_folder, task_files, tmp_path) -> None:
    start = ("evaluate", fitted, collected, tmp_path / "report", "--base", base_folder, "--held-out", "law")
    options = ("--by", "answers", "--max-new-tokens", "2", "--device", "cpu", "--json", "--skip", "ridge")
    ran = run(*start, *options, "--examples", task_files, "--shots", "2", "--max-examples", "3")
    assert ran.code == 0, ran.err
    assert "in_context" in ran.facts["rows"] and ran.facts["not_measured"]["ridge"]
    scores = json.loads((tmp_path / "report" / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    assert len(scores["base"]["law"]) == 3 and set(scores["base"]["law"]) <= {0.0, 1.0}
    ran = run(*start, "--examples", task_files, "--json", "--device", "cpu")
    assert ran.code == 0 and ran.facts["settings"]["scored_on"] == "examples given apart"
    for wrong, code, words in (
        (("--by", "answers"), 2, "--examples"),
        (("--by", "labels"), 1, "--by loss"),
        (("--examples", tmp_path / "typo"), 1, "typo"),
        (("--held-out", "lw"), 1, "lw"),
        (("--shots", "2"), 2, "--by answers"),
    ):
        ran = run(*start, "--device", "cpu", *wrong)
        assert ran.code == code and words in ran.err, (wrong, ran)


def test_the_card_of_an_adapter_and_one_that_was_edited(run, generator, pairs_folder, tmp_path) -> None:
    folder = tmp_path / "adapter"
    adapter = generator.generate_adapter(["what is the law ?"])
    adapter.save_pretrained(folder)
    written = (folder / "README.md").read_text(encoding="utf-8")
    assert run("card", folder).out == written + "\n" and run("card", folder, "--json").facts["card"] == written
    (folder / "README.md").write_text("my own", encoding="utf-8")
    ran = run("card", folder, "--write")
    assert ran.code == 1 and "edited by hand" in ran.err
    assert (folder / "README.md").read_text(encoding="utf-8") == "my own"
    assert run("card", folder, "--write", "--force").code == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == written
    assert run("card", folder, "--force").code == 2
    assert run("card", pairs_folder).code == 1


def test_scores_labels_of_a_classifying_base() -> None:
    rows = {
        "law": [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 0}, {"input_ids": [4], "labels": 1}]
    }

    class Base(torch.nn.Linear):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.stack([torch.tensor([0.0, float(row[0] < 4)]) for row in input_ids]))

    assert _by_labels(rows, batch_size=2)(Base(1, 1), "law") == [1.0, 0.0, 0.0]
    with pytest.raises(CommandError, match="one label each"):
        _by_labels({"law": [{"input_ids": [1], "labels": [1]}]}, batch_size=2)


def test_scores_the_loss_of_each_example_by_itself(base_model) -> None:
    rows = {
        "law": [{"input_ids": [5, 9, 2, 4], "labels": [-100, -100, 2, 4]}, {"input_ids": [7, 3], "labels": [-100, 3]}]
    }
    with torch.no_grad():
        found = _by_loss(rows, batch_size=2)(base_model, "law")
        expected = [
            -float(base_model(**{name: torch.tensor([value]) for name, value in row.items()}).loss)
            for row in rows["law"]
        ]
    assert found == pytest.approx(expected, rel=1e-4)
