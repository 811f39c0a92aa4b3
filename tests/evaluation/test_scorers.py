# SPDX-License-Identifier: Apache-2.0
"""Scorers: labels, written answers, and the lm-evaluation-harness."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from peft_dnd.errors import EvaluationError
from peft_dnd.evaluation import AnswerScorer, HarnessScorer, LabelScorer


WORDS = ["<pad>", "</s>", "<unk>", "red", "blue", "green", "sky", "grass", "what", "is", "?"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def test_labels_are_scored_as_sklearn_does() -> None:
    labels = ["a", "a", "a", "b", "c", "c"]
    found = ["a", "b", "a", "b", "a", "c"]
    model = nn.Identity()
    plain = LabelScorer(lambda model, task: found, {"t": labels})(model, "t")
    assert sum(plain) / 6 == accuracy_score(labels, found)
    balanced = LabelScorer(lambda model, task: found, {"t": labels}, balanced=True)(model, "t")
    assert sum(balanced) / 6 == pytest.approx(balanced_accuracy_score(labels, found))
    with pytest.raises(EvaluationError, match="5 predictions"):
        LabelScorer(lambda model, task: found[:5], {"t": labels})(model, "t")


def test_answers_are_what_the_model_writes(base_model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    questions = ["what is sky ?", "grass", "what ? is red ?"]
    right = []
    for question in questions:
        ids = torch.tensor([tokenizer(question + "\n").input_ids])
        written = base_model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        right.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    examples = [*zip(questions, right, strict=True), ("sky", "never this")]
    scorer = AnswerScorer(tokenizer, {"t": examples}, max_new_tokens=3, batch_size=2)
    assert scorer(base_model, "t") == [1.0, 1.0, 1.0, 0.0]
    assert tokenizer.padding_side == "right"


def test_examples_stand_before_each_question(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = AnswerScorer(tokenizer, {"t": [("what is sky ?", "blue")]})
    pool = {"t": [("grass ?", "green"), ("sky ?", "blue"), ("red ?", "red")]}
    shots = scorer.with_examples(pool, 2, seed=1)
    assert shots.shots == scorer.with_examples(pool, 2, seed=1).shots
    (first, second) = (shots.shots or {})["t"]
    text = shots.text("t", "what is sky ?")
    assert text == f"{first[0]}\n{first[1]}\n{second[0]}\n{second[1]}\nwhat is sky ?\n"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    text = shots.text("t", "what is sky ?")
    assert text == (
        f"<user>{first[0]}<assistant>{first[1]}<user>{second[0]}<assistant>{second[1]}<user>what is sky ?<assistant>"
    )
    with pytest.raises(EvaluationError, match="5 in-context examples"):
        scorer.with_examples(pool, 5)


def harness_task(folder: Path) -> dict[str, Any]:
    rows = [
        {"question": "what is sky ?", "choices": ["red", "blue"], "answer": 1},
        {"question": "what is grass ?", "choices": ["green", "red"], "answer": 0},
        {"question": "sky ?", "choices": ["green", "blue", "red"], "answer": 1},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def likeliest(model: nn.Module, tokenizer: PreTrainedTokenizerFast, question: str, choices: list[str]) -> int:
    scores = []
    for choice in choices:
        ids = torch.tensor([tokenizer(f"{question} {choice}").input_ids])
        with torch.no_grad():
            scores.append(float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]]))
    return max(range(len(choices)), key=scores.__getitem__)


def test_the_harness_scores_each_example(
    trained_like: Callable[[int], nn.Module],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task, base_model = harness_task(tmp_path), trained_like(0).eval()
    scorer = HarnessScorer(
        tokenizer, {"t": task}, batch_size=2, task_manager=tasks.TaskManager(include_defaults=False)
    )
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = [float(likeliest(base_model, tokenizer, r["question"], r["choices"]) == r["answer"]) for r in rows]
    assert scorer(base_model, "t") == expected
    assert len(scorer.with_examples(1)(base_model, "t")) == 3
    with pytest.raises(EvaluationError, match="gives the metrics"):
        HarnessScorer(tokenizer, {"t": task}, metric="rouge", task_manager=scorer.task_manager)(base_model, "t")


def test_the_harness_samples_are_read_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [
        {"doc_id": 1, "filter": "none", "metrics": ["acc", "f1"], "acc": 1.0, "f1": (1, 2)},
        {"doc_id": 0, "filter": "none", "metrics": ["acc", "f1"], "acc": 0.0, "f1": (1, 2)},
        {"doc_id": 0, "filter": "strict", "metrics": ["acc", "f1"], "acc": 1.0, "f1": (1, 2)},
        {"doc_id": 1, "filter": "strict", "metrics": ["acc", "f1"], "acc": 1.0, "f1": (1, 2)},
    ]
    assert HarnessScorer(tokenizer, {})._values("t", samples) == [0.0, 1.0]
    assert HarnessScorer(tokenizer, {}, filter_name="strict")._values("t", samples) == [1.0, 1.0]
    with pytest.raises(EvaluationError, match="no number for each example"):
        HarnessScorer(tokenizer, {}, metric="f1")._values("t", samples)


def test_without_the_harness_the_command_is_told(
    base_model: nn.Module, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refusing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ImportError, match="pip install 'peft-dnd"):
        HarnessScorer(tokenizer, {"t": "arc_easy"})(base_model, "t")
    with pytest.raises(EvaluationError, match="no harness task for 'u'"):
        HarnessScorer(tokenizer, {"t": "arc_easy"})(base_model, "u")
