# SPDX-License-Identifier: Apache-2.0
"""The held-out protocol: which adapter every row holds, what the figures are, and what is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from sklearn.linear_model import Ridge
from torch import nn

from peft_dnd import (
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    write_task_without_checkpoints,
)
from peft_dnd.errors import EvaluationError, PromptError
from peft_dnd.evaluation import (
    EvaluationReport,
    HeldOutTask,
    RidgeBaseline,
    evaluate_generator,
    junk_prompts,
    leave_one_out,
    shuffled_tasks,
)
from peft_dnd.evaluation.baselines import mean_embedding
from peft_dnd.evaluation.costs import measured


INPUTS = torch.arange(24).reshape(6, 4)
HELD_OUT = {
    "law": ["what is the law ?", "tax law please", "a court ?"],
    "geo": ["what is a river ?", "capital please"],
}


def scorer(model: nn.Module, task: str) -> list[float]:
    """A number for each of six inputs that every weight of the adapter has a part in."""
    logits = model(INPUTS).logits[:, -1].double()
    return (logits * (1 + len(task))).std(-1).tolist()


@pytest.fixture
def training(pairs: PromptCheckpointDataset) -> PromptCheckpointDataset:
    return pairs


def held_out(**adapters: GeneratedAdapter) -> dict[str, HeldOutTask]:
    return {f"new {name}": HeldOutTask(lines, adapters.get(name)) for name, lines in HELD_OUT.items()}


def expected(adapter: GeneratedAdapter, base: nn.Module, task: str) -> tuple[float, ...]:
    model = adapter.load_into(base)
    with torch.no_grad():
        return tuple(scorer(model.eval(), task))


def test_every_row_scores_the_adapter_it_names(
    generator: PromptConditionedLoraGenerator,
    training: PromptCheckpointDataset,
    fresh_base: Callable[[], nn.Module],
) -> None:
    def own(seed: int) -> GeneratedAdapter:
        draw = torch.Generator().manual_seed(seed)
        return GeneratedAdapter(
            training.layout, {t.key: torch.randn(t.shape, generator=draw) * 0.1 for t in training.layout.tensors}
        )

    ceilings = {"law": own(1), "geo": own(2)}
    report = evaluate_generator(
        generator,
        fresh_base(),
        training,
        held_out(**ceilings),
        scorer,
        in_context_scorer=lambda model, task: [7.0] * 6,
        multi_task_adapter=lambda: own(3),
        other_generators={"itself": generator},
        seed=5,
    )
    assert not report.not_measured
    assert list(report.rows)[:3] == ["base", "in_context", "training_adapters_mean"]
    scores = report.scores
    assert scores is not None
    with torch.no_grad():
        assert scores["base"]["new law"] == tuple(scorer(fresh_base(), "new law"))
    assert scores["in_context"]["new geo"] == (7.0,) * 6

    def same(row: str, task: str, adapter: GeneratedAdapter) -> None:
        assert scores is not None
        assert scores[row][task] == pytest.approx(expected(adapter, fresh_base(), task), abs=1e-12), row

    average = GeneratedAdapter(training.layout, training.mean_state_dict())
    for task, prompts in ((f"new {name}", lines) for name, lines in HELD_OUT.items()):
        other = "new geo" if task == "new law" else "new law"
        same("average_weights", task, average)
        same("multi_task", task, own(3))
        same("generated", task, generator.generate_adapter(prompts, seed=5))
        same("generated_by_itself", task, generator.generate_adapter(prompts, seed=5))
        same("shuffled", task, generator.generate_adapter(HELD_OUT[other.removeprefix("new ")], seed=5))
        same("trained", task, ceilings[task.removeprefix("new ")])
        nearest = report.details["nearest"][task]
        same("nearest", task, GeneratedAdapter(training.layout, training.state_dict(nearest)))
        ridge = RidgeBaseline.fit(training, generator.text_encoder)
        same("ridge", task, ridge.write(generator.text_encoder, prompts))
        each = [
            expected(GeneratedAdapter(training.layout, training.state_dict(name)), fresh_base(), task)
            for name in training.tasks
        ]
        assert scores["training_adapters_mean"][task] == pytest.approx(np.mean(each, 0))
        assert np.mean(scores["training_adapters_best"][task]) == pytest.approx(np.max(np.mean(each, 1)))
    junk = junk_prompts(3, seed="5 new law")
    same("junk", "new law", generator.generate_adapter(junk, seed=5))
    same("constant", "new geo", generator.generate_adapter(report.details["constant"]["prompts"], seed=5))
    assert report.costs["adapter_bytes"] == 4 * training.layout.num_parameters
    assert report.costs["seconds_to_generate"] > 0


def test_the_base_is_given_back_as_it_was(
    generator: PromptConditionedLoraGenerator,
    training: PromptCheckpointDataset,
    fresh_base: Callable[[], nn.Module],
    lora_config: object,
) -> None:
    base = fresh_base().train()
    base.model.embed_tokens.weight.requires_grad_(False)  # type: ignore[union-attr]
    before = {name: p.detach().clone() for name, p in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    skip = ["training_adapters_mean", "training_adapters_best", "ridge"]
    first = evaluate_generator(generator, base, training, held_out(), scorer, skip=skip)
    assert base.training and [p.requires_grad for p in base.parameters()] == flags
    after = base.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    again = evaluate_generator(generator, base, training, held_out(), scorer, skip=skip)
    assert again.scores == first.scores and again.rows == first.rows

    def failing(model: nn.Module, task: str) -> list[float]:
        if hasattr(model, "peft_config"):
            raise RuntimeError("scorer failed")
        return [1.0, 2.0]

    with pytest.raises(RuntimeError, match="scorer failed"):
        evaluate_generator(generator, base, training, held_out(), failing, skip=skip)
    assert list(base.state_dict()) == list(before)
    with pytest.raises(EvaluationError, match="adapters in it already"):
        evaluate_generator(generator, get_peft_model(base, lora_config), training, held_out(), scorer)  # type: ignore[arg-type]


def test_what_was_not_given_is_named_not_faked(
    generator: PromptConditionedLoraGenerator, fresh_base: Callable[[], nn.Module]
) -> None:
    one = {"new law": HeldOutTask(HELD_OUT["law"])}
    report = evaluate_generator(generator, fresh_base(), None, one, scorer, skip=["constant"])
    assert list(report.rows) == ["base", "generated", "junk"]
    assert set(report.not_measured) == {
        "in_context",
        "training_adapters_mean",
        "training_adapters_best",
        "average_weights",
        "nearest",
        "ridge",
        "multi_task",
        "shuffled",
        "constant",
        "trained",
    }
    assert report.share_of_gap_closed is None
    assert report.rows["base"].mean.over_tasks is None
    with pytest.raises(EvaluationError, match="no trained_adapter was given for new law"):
        report.row("trained")
    assert "no trained_adapter" in report.to_markdown()


def test_a_generator_that_reads_answers_gets_them(
    generator: PromptConditionedLoraGenerator, base_model: nn.Module
) -> None:
    reader = copy.deepcopy(generator)
    reader.config.condition_text = "prompts_and_answers"
    tasks = {name: HeldOutTask(lines, answers=[f"in {name}"] * len(lines)) for name, lines in HELD_OUT.items()}
    report = evaluate_generator(reader, copy.deepcopy(base_model), None, tasks, scorer)
    assert {"generated", "shuffled", "junk", "constant"} <= set(report.rows)
    assert report.scores is not None
    for row, from_task in (("generated", "law"), ("shuffled", "geo")):
        adapter = reader.generate_adapter(HELD_OUT[from_task], answers=[f"in {from_task}"] * len(HELD_OUT[from_task]))
        assert report.scores[row]["law"] == pytest.approx(expected(adapter, copy.deepcopy(base_model), "law"))
    with pytest.raises(PromptError, match="came without answers"):
        evaluate_generator(reader, copy.deepcopy(base_model), None, held_out(), scorer)


def test_training_tasks_without_adapters_still_lend_their_prompts(
    generator: PromptConditionedLoraGenerator,
    training: PromptCheckpointDataset,
    base_model: nn.Module,
    tmp_path: Path,
) -> None:
    for task in training.tasks:
        write_task_without_checkpoints(tmp_path / task, training.prompts(task), [{"input_ids": [1], "labels": [1]}])
    bare = PromptCheckpointDataset.from_folder(tmp_path, layout=training.layout)
    one = {"new law": HeldOutTask(HELD_OUT["law"])}
    report = evaluate_generator(generator, copy.deepcopy(base_model), bare, one, scorer)
    assert report.not_measured["ridge"] == report.not_measured["average_weights"] == "no training adapters were given"
    assert report.details["shuffled"]["new law"] in training.tasks
    assert len(report.details["constant"]["prompts"]) == len(training.tasks)


def test_mistakes_are_told(
    generator: PromptConditionedLoraGenerator,
    training: PromptCheckpointDataset,
    fresh_base: Callable[[], nn.Module],
) -> None:
    with pytest.raises(EvaluationError, match="both held out and among the training"):
        evaluate_generator(generator, fresh_base(), training, {"law": HeldOutTask(["a"])}, scorer)
    with pytest.raises(EvaluationError, match="no row 'rigde'"):
        evaluate_generator(generator, fresh_base(), training, held_out(), scorer, skip=["rigde"])
    with pytest.raises(EvaluationError, match="no held-out task"):
        evaluate_generator(generator, fresh_base(), training, {}, scorer)
    with pytest.raises(EvaluationError, match="sequence of numbers"):
        evaluate_generator(generator, fresh_base(), None, held_out(), lambda model, task: 1.0)  # type: ignore[arg-type, return-value]


def test_ridge_is_sklearns(pairs: PromptCheckpointDataset, generator: PromptConditionedLoraGenerator) -> None:
    encoder = generator.text_encoder
    baseline = RidgeBaseline.fit(pairs, encoder)
    prompts = ["what is the law of a river ?"]
    x = np.stack([mean_embedding(encoder, pairs.prompts(task)) for task in pairs.tasks])
    states = [pairs.mean_state_dict(task) for task in pairs.tasks]
    strength = baseline.penalty * ((x - x.mean(0)) ** 2).sum() / len(x)
    written = baseline.write(encoder, prompts).state_dict()
    for key in written:
        y = np.stack([state[key].flatten().numpy() for state in states]).astype(np.float64)
        guess = Ridge(alpha=strength).fit(x, y).predict(mean_embedding(encoder, prompts)[None])[0]
        assert written[key].flatten().numpy() == pytest.approx(guess, abs=1e-6)


def test_ridge_chooses_its_penalty_by_what_it_predicts() -> None:
    chance = np.random.default_rng(0)
    x = chance.normal(size=(12, 5))
    from peft_dnd.evaluation.baselines import _left_out_error, _products_of_scaled

    linear = [{"w": torch.tensor(row @ np.ones((5, 7)) + row[0])} for row in x]
    products = _products_of_scaled(linear)
    assert _left_out_error(x, products, 1e-6) < 1e-3 * _left_out_error(x, products, None)
    noise = _products_of_scaled([{"w": torch.tensor(chance.normal(size=7))} for _ in x])
    assert _left_out_error(x, noise, 1e3) < _left_out_error(x, noise, 1e-6)


def test_ridge_writes_the_mean_adapter_where_all_tasks_have_the_same_prompts(
    pairs: PromptCheckpointDataset, generator: PromptConditionedLoraGenerator
) -> None:
    encoder = generator.text_encoder
    alike = [replace(task, prompts=("what is the law ?", "a river")) for task in pairs._tasks.values()]
    training = PromptCheckpointDataset(alike)
    baseline = RidgeBaseline.fit(training, encoder)
    assert set(baseline.errors.values()) == {1.0}  # no better than the mean adapter, and no worse
    written = baseline.write(encoder, ["tax law please"]).state_dict()
    for key, value in training.mean_state_dict().items():
        torch.testing.assert_close(written[key], value)


def test_leave_one_out_refits_and_resumes(
    pairs: PromptCheckpointDataset, generator: PromptConditionedLoraGenerator, base_model: nn.Module, tmp_path: Path
) -> None:
    fitted: list[str] = []

    def fit(training: PromptCheckpointDataset, task: str) -> PromptConditionedLoraGenerator:
        assert task not in training.tasks and len(training.tasks) == len(pairs.tasks) - 1
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(task)
        return generator

    def evaluate(
        fitted_generator: PromptConditionedLoraGenerator, training: PromptCheckpointDataset, task: str
    ) -> EvaluationReport:
        task_of = {task: HeldOutTask(pairs.prompts(task))}
        return evaluate_generator(
            fitted_generator, copy.deepcopy(base_model), training, task_of, scorer, skip=["ridge"], resamples=50
        )

    with pytest.raises(KeyboardInterrupt):
        leave_one_out(pairs, fit, evaluate, folder=tmp_path)
    fitted.insert(0, "so that the rest can be fitted")
    fitted.append("and no interruption")
    report = leave_one_out(pairs, fit, evaluate, folder=tmp_path)
    assert fitted.count(pairs.tasks[0]) == 1 and fitted[-2:] == list(pairs.tasks[2:])
    assert report.tasks == pairs.tasks
    assert EvaluationReport.load(tmp_path) == report
    assert set(report.rows["generated"].by_task) == set(pairs.tasks)
    with pytest.raises(EvaluationError, match="other settings"):
        leave_one_out(pairs, fit, evaluate, folder=tmp_path, settings={"steps": 3})


def test_controls_are_reproducible() -> None:
    assert junk_prompts(4, seed=1) == junk_prompts(4, seed=1) != junk_prompts(4, seed=2)
    tasks = [str(i) for i in range(20)]
    other = shuffled_tasks(tasks, seed=3)
    assert sorted(other.values()) == sorted(tasks) and all(a != b for a, b in other.items())


def test_prompts_are_exchanged_with_another_kind() -> None:
    kinds = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b"}
    tasks = [*kinds, "c"]
    for seed in range(20):
        other = shuffled_tasks(tasks, seed=seed, kinds=kinds)
        assert sorted(other.values()) == sorted(tasks)
        assert all(kinds.get(one, one) != kinds.get(another, another) for one, another in other.items())
    assert len({tuple(sorted(shuffled_tasks(tasks, seed=seed, kinds=kinds).items())) for seed in range(20)}) > 1
    with pytest.raises(EvaluationError, match="3 of 5 held-out tasks are of the kind 'a'"):
        shuffled_tasks(list(kinds), kinds=kinds)


def test_peak_memory_is_seen() -> None:
    with measured() as cost:
        held = torch.ones(50_000_000)
        del held
    if cost.peak_bytes is not None:
        assert 150e6 < cost.peak_bytes < 400e6
