# SPDX-License-Identifier: Apache-2.0
"""The protocol's report: its figures and intervals, how it is kept, merged and shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from peft_dnd import DnDTrainer, DnDTrainingArguments, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.errors import EvaluationError
from peft_dnd.evaluation import EvaluationReport, Resampling


SCORES = {
    "base": {"a": [0, 0, 0, 1], "b": [0, 1, 0, 0, 0, 0]},
    "shuffled": {"a": [0, 0, 1, 0], "b": [0, 0, 0, 0, 0, 0]},
    "junk": {"a": [0, 0, 0, 0], "b": [1, 1, 1, 0, 0, 0]},
    "generated": {"a": [1, 0, 1, 1], "b": [1, 1, 1, 0, 0, 1]},
    "trained": {"a": [1, 1, 1, 1], "b": [1, 1, 1, 1, 1, 1]},
}


def test_figures_by_hand() -> None:
    report = EvaluationReport.from_scores(SCORES)
    assert report.rows["generated"].mean.value == pytest.approx((3 / 4 + 4 / 6) / 2)
    base, generated = (1 / 4 + 1 / 6) / 2, (3 / 4 + 4 / 6) / 2
    assert report.share_of_gap_closed is not None and report.conditioning_gain is not None
    assert report.share_of_gap_closed.value == pytest.approx((generated - base) / (1 - base))
    assert report.share_of_gap_closed_by_task["a"].value == pytest.approx((3 / 4 - 1 / 4) / (1 - 1 / 4))
    # Of the two controls junk is better on the mean, shuffled on task a.
    assert report.conditioning_gain.value == pytest.approx(generated - 1 / 4)
    assert report.conditioning_gain_by_task["a"].value == pytest.approx(3 / 4 - 1 / 4)
    assert report.rows["base"].margin is not None
    assert report.rows["base"].margin.value == pytest.approx(generated - base)
    assert report.rows["base"].margin_by_task["b"].value == pytest.approx(1 / 2)
    assert report.rows["trained"].mean.over_examples == (1.0, 1.0)


def test_intervals_cover_as_often_as_they_say() -> None:
    chance = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        draws = {"generated": {t: (chance.random(60) < 0.6).astype(float) for t in "ab"}}
        report = EvaluationReport.from_scores(draws, resampling=Resampling(0.8, 300, seed))
        low, high = report.rows["generated"].mean.over_examples or (0, 0)
        covered += low <= 0.6 <= high
    assert 0.7 < covered / 200 < 0.9


def test_differences_are_paired_and_task_intervals_are_wider() -> None:
    chance = np.random.default_rng(1)
    tasks = [f"t{i}" for i in range(6)]
    base = {task: chance.random(40) + 3 * i for i, task in enumerate(tasks)}
    report = EvaluationReport.from_scores({"base": base, "generated": {t: s + 0.01 for t, s in base.items()}})
    margin, mean = report.rows["base"].margin, report.rows["base"].mean
    assert margin is not None and margin.over_examples == pytest.approx((0.01, 0.01))
    assert margin.over_tasks == pytest.approx((0.01, 0.01))
    assert mean.over_examples is not None and mean.over_tasks is not None
    assert np.ptp(mean.over_tasks) > 5 * np.ptp(mean.over_examples)
    assert report.clearly_above("base") is False
    assert EvaluationReport.from_scores(SCORES).clearly_above("trained") is False


def test_undefined_figures_are_absent() -> None:
    flat = {"base": {"a": [1, 1]}, "generated": {"a": [1, 0]}, "trained": {"a": [0, 1]}}
    report = EvaluationReport.from_scores(flat)
    assert report.share_of_gap_closed is None and report.conditioning_gain is None
    single = EvaluationReport.from_scores({"base": {"a": [1.0], "b": [0.0]}})
    assert single.rows["base"].mean.over_examples is None
    assert single.rows["base"].mean.over_tasks == (0.0, 1.0)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ({}, "no scores"),
        ({"base": {"a": [1, 2]}, "generated": {"b": [1, 2]}}, "same tasks"),
        ({"base": {"a": [1, 2]}, "generated": {"a": [1]}}, "1 scores for task 'a'"),
        ({"base": {"a": [float("nan")]}}, "not all finite"),
    ],
)
def test_scores_that_do_not_belong_together(scores: dict[str, dict[str, list[float]]], what: str) -> None:
    with pytest.raises(EvaluationError, match=what):
        EvaluationReport.from_scores(scores)


def test_saving_and_reading_back(tmp_path: Path) -> None:
    report = EvaluationReport.from_scores(
        SCORES, not_measured={"ridge": "why not"}, costs={"seconds_to_generate": 0.1}, settings={"x": [1, 2.5]}
    )
    report.save(tmp_path)
    assert EvaluationReport.load(tmp_path) == report
    assert "[1.0, 0.0, 1.0, 1.0]" in (tmp_path / "evaluation.json").read_text()
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "evaluation.md").read_text()
    assert "why not" in text and "| 10 |" in text
    report.save(tmp_path, include_scores=False)
    brief = EvaluationReport.load(tmp_path)
    assert brief.scores is None and brief.rows == report.rows
    with pytest.raises(EvaluationError, match="hold their per-example scores"):
        EvaluationReport.merge([brief])


def test_merging_equals_one_report_on_all() -> None:
    def only(task: str) -> EvaluationReport:
        return EvaluationReport.from_scores(
            {row: {task: of[task]} for row, of in SCORES.items()}, costs={"seconds_to_generate": len(task)}
        )

    merged = EvaluationReport.merge([only("a"), only("b")])
    assert merged.rows == EvaluationReport.from_scores(SCORES).rows
    assert merged.costs["seconds_to_generate"] == 1
    partly = EvaluationReport.from_scores({"base": {"c": [1, 0]}})
    both = EvaluationReport.merge([only("a"), partly])
    assert list(both.rows) == ["base"] and "some of the tasks" in both.not_measured["generated"]
    with pytest.raises(EvaluationError, match="different tasks"):
        EvaluationReport.merge([only("a"), only("a")])


def test_the_model_card_shows_the_rows(generator_folder: Path, pairs: PromptCheckpointDataset, tmp_path: Path) -> None:
    generator = PromptConditionedLoraGenerator.from_pretrained(generator_folder)
    report = EvaluationReport.from_scores(SCORES, not_measured={"ridge": "why not"})
    arguments = DnDTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    trainer = DnDTrainer(generator, arguments, train_dataset=pairs)
    trainer.add_evaluation(report)
    assert EvaluationReport.load(tmp_path) == report
    generator.save_pretrained(tmp_path / "saved")
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "saved")
    for card in ((tmp_path / "README.md").read_text(), again.model_card()):
        for row in report.rows.values():
            low, high = row.mean.over_examples or (0, 0)
            assert f"| {row.number} | {row.label} | {row.mean.value:.3f} [{low:.3f}, {high:.3f}] |" in card
        assert report.share_of_gap_closed is not None
        assert f"is closed: {report.share_of_gap_closed.value:.3f}" in card and "why not" in card
    trainer.train()
    assert "untouched base" not in generator.model_card()  # that was another generator's
