# SPDX-License-Identifier: Apache-2.0
"""The worked example never goes on with what was made from something that is no longer there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from peft_dnd.storage.files import write_json


STAGES_FILE = Path(__file__).parents[2] / "examples" / "worked_example" / "stages.py"
ORDER = ("base", "pairs", "trained", "generator", "adapters", "scores")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("worked_example_stages", STAGES_FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def work(stages: ModuleType, folder: Path, stage: str, seconds: float) -> dict[str, float]:
    progress = stages.Progress(folder, clock=iter([0.0, seconds]).__next__)
    with progress.working_on(stage):
        pass
    return progress.seconds


def finished_run(stages: ModuleType, folder: Path) -> None:
    for stage in ORDER:
        for product in stages.STAGES[stage].products:
            write_json(folder / product if product.endswith(".json") else folder / product / "a" / "file.json", {})
        work(stages, folder, stage, 1.0)


@pytest.mark.parametrize(
    ("removed", "kept"),
    [
        ("base", set()),
        ("pairs", {"base", "trained"}),
        ("trained", {"base", "pairs", "generator", "adapters"}),
        ("generator", {"base", "pairs", "trained"}),
        ("adapters", {"base", "pairs", "trained", "generator"}),
        ("scores", {"base", "pairs", "trained", "generator", "adapters"}),
    ],
)
def test_what_is_made_again_takes_along_what_followed(
    stages: ModuleType, tmp_path: Path, removed: str, kept: set[str]
) -> None:
    finished_run(stages, tmp_path)
    for product in stages.STAGES[removed].products:
        (tmp_path / product).rename(tmp_path.parent / f"old-{tmp_path.name}-{product}")
    work(stages, tmp_path, removed, 5.0)
    left = {name for name in ORDER if all((tmp_path / product).exists() for product in stages.STAGES[name].products)}
    assert left == kept
    # What was taken is told for what is there, and counted once.
    assert stages.Progress(tmp_path).seconds == {
        **{stages.STAGES[name].seconds: 1.0 for name in kept},
        stages.STAGES[removed].seconds: 5.0,
    }


def test_an_interrupted_stage_goes_on(stages: ModuleType, tmp_path: Path) -> None:
    finished_run(stages, tmp_path)
    seconds = work(stages, tmp_path, "pairs", 5.0)  # one of its tasks is missing
    assert (tmp_path / "pairs" / "a" / "file.json").is_file()
    assert seconds[stages.STAGES["pairs"].seconds] == 6.0
    assert not (tmp_path / "generator").exists()


def test_what_was_made_with_other_settings_is_refused(stages: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):
        stages.Progress(tmp_path).check_settings({"steps": 1})
    with pytest.raises(SystemExit, match="other settings"):
        stages.Progress(tmp_path).check_settings({"steps": 2})
