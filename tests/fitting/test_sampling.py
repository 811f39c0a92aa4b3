# SPDX-License-Identifier: Apache-2.0
"""In what order and how often items come, where tasks are as unequal as a hundred to one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.fitting import fitting_arguments

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_task_without_checkpoints,
)
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.fitting.inputs import EpochSampler, TemperedSampler


TASKS = ["rare"] * 2 + ["common"] * 200 + ["usual"] * 98


def drawn(sampler: EpochSampler, epochs: int = 1) -> list[list[tuple[int, int]]]:
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (0.0, {"rare": 100.0, "common": 100.0, "usual": 100.0}),
        (0.5, {"rare": 300 * 1.414 / 25.456, "common": 300 * 14.142 / 25.456, "usual": 300 * 9.899 / 25.456}),
        (1.0, {"rare": 2.0, "common": 200.0, "usual": 98.0}),
    ],
)
def test_tasks_come_in_proportion_to_a_power_of_their_size(exponent: float, expected: dict[str, float]) -> None:
    epochs = drawn(TemperedSampler(TASKS, exponent, seed=3), 40)
    assert {len(items) for items in epochs} == {len(TASKS)}
    counts = [Counter(TASKS[number] for _, number in items) for items in epochs]
    for task, share in expected.items():
        assert all(abs(count[task] - share) < 1 for count in counts)  # in every epoch
        assert sum(count[task] for count in counts) / 40 == pytest.approx(share, rel=0.02, abs=0.1)  # and in the mean


def test_no_visit_is_like_another() -> None:
    (items,) = drawn(TemperedSampler(TASKS, 0.0, seed=0))
    assert len(set(items)) == len(items)  # an item's seed follows from both numbers
    rare = Counter(number for _, number in items if number < 2)
    assert rare == {0: 50, 1: 50}
    common = [number for _, number in items if 2 <= number < 202]
    assert len(set(common)) == 100  # none comes again before all have come


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = drawn(TemperedSampler(TASKS, 0.3, seed=1), 2)
    assert first != second
    again = TemperedSampler(TASKS, 0.3, seed=1)
    again.set_epoch(1)
    assert list(again) == second
    assert drawn(TemperedSampler(TASKS, 0.3, seed=2))[0] != first
    names = [TASKS[number] for _, number in first]
    assert names != sorted(names)  # tasks are mixed


@pytest.fixture
def generator(pairs: PromptCheckpointDataset, encoder_folder: Path) -> PromptConditionedLoraGenerator:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(pairs, str(encoder_folder), num_prompts=3)
    return PromptConditionedLoraGenerator(config)


def arguments(folder: Path, exponent: float | None) -> DnDTrainingArguments:
    return fitting_arguments(folder, task_sampling_exponent=exponent, per_device_train_batch_size=1, max_steps=12)


def test_a_fit_sees_rare_tasks_as_often_as_it_is_told(
    pairs: PromptCheckpointDataset, generator: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    few = pairs._task(pairs.tasks[0])
    many = pairs._task(pairs.tasks[1])
    unequal = PromptCheckpointDataset(
        [
            type(few)(**{**vars(few), "checkpoints": few.checkpoints[:1]}),
            type(many)(**{**vars(many), "checkpoints": many.checkpoints * 11}),
        ]
    )
    size = len(unequal)
    seen = {}
    for exponent in (1.0, 0.0):
        trainer = DnDTrainer(generator, arguments(tmp_path, exponent), unequal)
        items = list(trainer._get_train_sampler())
        seen[exponent] = Counter(unequal[item]["task"] for item in items)[few.name] / size
    assert seen == {1.0: 1 / size, 0.0: pytest.approx(0.5, abs=1 / size)}
    trainer.train()


@pytest.mark.parametrize(
    ("exponent", "rare"), [(None, 0.5), (0.0, 0.5), (0.5, 1 / 11), (1.0, 1 / 101)], ids=["default", "0", "0.5", "1"]
)
def test_without_checkpoints_a_tasks_rows_are_counted(
    pairs: PromptCheckpointDataset,
    generator: PromptConditionedLoraGenerator,
    tmp_path: Path,
    exponent: float | None,
    rare: float,
) -> None:
    row = {"input_ids": [1], "labels": [1]}
    rows = {"common": [row] * 100, "rare": [row]}
    for task, some in rows.items():
        write_task_without_checkpoints(tmp_path / "pairs" / task, ["law"], some)
    bare = PromptCheckpointDataset.from_folder(tmp_path / "pairs", layout=pairs.layout)
    trainer = DnDTrainer(generator, arguments(tmp_path, exponent), pairs)
    sampler = trainer._sampler_of(bare)
    seen = Counter(bare[item]["task"] for items in drawn(sampler, 202) for item in items)
    assert seen["rare"] / seen.total() == pytest.approx(rare, abs=0.01)


def test_with_checkpoints_the_default_takes_each_once(
    pairs: PromptCheckpointDataset, generator: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    sampler = DnDTrainer(generator, arguments(tmp_path, None), pairs)._sampler_of(pairs)
    assert sorted(number for _, number in sampler) == list(range(len(pairs)))


@pytest.mark.parametrize("exponent", [-0.1, 1.5])
def test_impossible_exponents_are_refused(tmp_path: Path, exponent: float) -> None:
    with pytest.raises(GeneratorConfigError, match="task_sampling_exponent must be from 0 to 1"):
        arguments(tmp_path, exponent)
