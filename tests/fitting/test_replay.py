# SPDX-License-Identifier: Apache-2.0
"""A generator goes on with new tasks: what it knew stays, what became of it is told, and a loss is held back."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparing import bytes_below
from support.fitting import fitting_arguments
from support.hub_state import HubServer
from transformers import TrainerCallback

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.errors import CorruptFileError, GeneratorConfigError, RegressionError
from peft_dnd.evaluation import score_store
from peft_dnd.fitting.inputs import TemperedSampler
from peft_dnd.generator import MOST_POINTS_LOST, Revision, check_regression, revisions
from peft_dnd.generator.revision_history import REVISIONS, add_revision, points_below_best, revisions_section
from peft_dnd.pairs.replay_store import STORE_NAME


pytest_plugins = ("support.hub_server",)

EARLY, LATE = ("art", "geo"), ("law", "med")
Make = Callable[..., PromptConditionedLoraGenerator]


def arguments(folder: Path, **changes: Any) -> DnDTrainingArguments:
    settings = {
        "max_steps": 60,
        "replay_store_share": 1.0,  # the pairs are tiny here
        **changes,
    }
    return fitting_arguments(folder, **settings)


@pytest.fixture(scope="module")
def parts(pairs_folder: Path) -> tuple[PromptCheckpointDataset, PromptCheckpointDataset]:
    return PromptCheckpointDataset.from_folder(pairs_folder).split(LATE)


@pytest.fixture(scope="module")
def fitted(
    parts: tuple[PromptCheckpointDataset, PromptCheckpointDataset],
    encoder_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> PromptConditionedLoraGenerator:
    """Fitted on the early tasks."""
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        parts[0],
        str(encoder_folder),
        num_prompts=3,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3},
    )
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config)
    DnDTrainer(generator, arguments(tmp_path_factory.mktemp("fit"), max_steps=150), parts[0]).train()
    return generator


@pytest.fixture(scope="module")
def folder(fitted: PromptConditionedLoraGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That generator, saved."""
    folder = tmp_path_factory.mktemp("generators") / "generator"
    fitted.save_pretrained(folder)
    return folder


def test_an_update_keeps_what_was_known_and_without_replay_it_is_lost(
    fitted: PromptConditionedLoraGenerator, folder: Path, parts: Any, tmp_path: Path
) -> None:
    before = score_store(fitted)
    assert set(before) == set(EARLY) and min(before.values()) > 80
    lost = {}
    for share in (0.5, 0.0):
        generator = PromptConditionedLoraGenerator.from_pretrained(folder)
        DnDTrainer(generator, arguments(tmp_path, replay_share=share), parts[1]).train()
        (first, last) = revisions(generator.config.measured)
        assert (first.number, first.added, first.before, first.lost) == (1, EARLY, {}, {})
        assert (last.number, last.added, last.steps) == (2, LATE, 60)
        assert last.replayed == (2 if share else 0)
        assert last.before == pytest.approx(before, abs=0.01)
        after = score_store(generator)
        assert set(after) == {*EARLY, *LATE}  # the store has the new tasks too
        assert last.after == pytest.approx(after, abs=0.01)
        assert min(after[task] for task in LATE) > 50
        assert generator.replay_store is not None
        assert generator.replay_store.num_bytes <= generator.replay_store.pairs_bytes
        lost[share] = last.mean_lost
    assert MOST_POINTS_LOST < lost[0.5] < lost[0.0] / 8  # two tasks fitted for a few steps are no more than a start


def test_its_former_self_teaches_what_the_store_has_no_adapter_of(
    fitted: PromptConditionedLoraGenerator, parts: Any, tmp_path: Path
) -> None:
    lost = {}
    for targets in ("checkpoints", "former_self"):
        generator = copy.deepcopy(fitted)
        store = generator.replay_store
        assert store is not None
        if targets == "checkpoints":
            generator.replay_store = replace(
                store, tasks={name: replace(task, adapter=None) for name, task in store.tasks.items()}
            )
        DnDTrainer(generator, arguments(tmp_path, replay_targets=targets), parts[1]).train()
        last = revisions(generator.config.measured)[-1]
        lost[targets] = last.mean_lost
        kept = generator.replay_store
        assert kept is not None
        assert [kept.tasks[name].adapter is None for name in EARLY] == [targets == "checkpoints"] * 2
        assert min(last.before.values()) > (99 if targets == "checkpoints" else 80)  # itself, or the task's adapter
    assert all(value < 25 for value in lost.values())  # without replay it is 270


def test_the_replayed_share_is_that_which_was_asked_for(
    fitted: PromptConditionedLoraGenerator, parts: Any, tmp_path: Path
) -> None:
    trainer = DnDTrainer(copy.deepcopy(fitted), arguments(tmp_path, replay_share=0.25), parts[1])
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, TemperedSampler) and trainer.replay is not None
    items = list(sampler)
    trainer.replay.prepare()
    counts = Counter(trainer.replay.pairs[item]["task"] for item in items)
    assert counts == {"law": 3, "med": 3, "art": 1, "geo": 1} and len(sampler) == 8
    visits = [item for item in items if trainer.replay.pairs.item_tasks[item[1]] in LATE]
    assert {epoch for epoch, _ in visits} == {0} and len(set(visits)) == 6  # each new checkpoint once an epoch


def test_what_is_in_the_new_pairs_is_not_replayed(
    fitted: PromptConditionedLoraGenerator, parts: Any, pairs: PromptCheckpointDataset, tmp_path: Path
) -> None:
    assert DnDTrainer(copy.deepcopy(fitted), arguments(tmp_path), pairs).replay is None
    assert DnDTrainer(copy.deepcopy(fitted), arguments(tmp_path, replay_share=0.0), parts[1]).replay is None
    (law, _) = parts[1].split(["med"])
    trainer = DnDTrainer(copy.deepcopy(fitted), arguments(tmp_path), law)
    assert trainer.replay is not None and trainer.replay.tasks == EARLY


def test_a_resumed_update_is_that_which_was_never_cut_off(folder: Path, parts: Any, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 5

    settings: dict[str, Any] = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "condition_noise": 1e-2}

    def trainer(name: str, *callbacks: TrainerCallback) -> DnDTrainer:
        generator = PromptConditionedLoraGenerator.from_pretrained(folder)
        return DnDTrainer(generator, arguments(tmp_path / name, **settings), parts[1], callbacks=list(callbacks))

    whole, resumed = trainer("whole"), trainer("cut")
    whole.train()
    trainer("cut", Stop()).train()
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=True)
    for name, tensor in whole.generator.state_dict().items():
        assert torch.equal(tensor, resumed.generator.state_dict()[name]), name
    assert revisions(whole.generator.config.measured) == revisions(resumed.generator.config.measured)


def test_a_killed_update_leaves_the_old_generator_whole(
    folder: Path, parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt(signal.SIGTERM)

    place = shutil.copytree(folder, tmp_path / "generator")
    before = bytes_below(place)
    generator = PromptConditionedLoraGenerator.from_pretrained(place)
    with pytest.raises(KeyboardInterrupt):
        DnDTrainer(generator, arguments(place), parts[1], callbacks=[Killed()]).train()
    assert bytes_below(place) == before
    # And in the middle of saving over it, when all but the last file has been written beside it.
    DnDTrainer(generator, arguments(tmp_path, max_steps=2), parts[1]).train()
    monkeypatch.setattr("peft_dnd.generator.modeling.write_checksums", Killed.on_step_end)
    with pytest.raises(KeyboardInterrupt):
        generator.save_pretrained(place)
    assert bytes_below(place) == before
    again = PromptConditionedLoraGenerator.from_pretrained(place)
    assert again.replay_store is not None and set(again.replay_store.tasks) == set(EARLY)


def test_a_damaged_store_stops_an_update_and_not_the_use(folder: Path, parts: Any, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "generator")
    content = bytearray((place / STORE_NAME).read_bytes())
    content[-3] ^= 1
    (place / STORE_NAME).write_bytes(bytes(content))
    generator = PromptConditionedLoraGenerator.from_pretrained(place)
    assert generator.generate_adapter(["a b", "c d"]).state_dict()
    with pytest.raises(CorruptFileError, match=r"is not what was saved.*fit with the pairs of all tasks"):
        DnDTrainer(generator, arguments(tmp_path), parts[1])
    (place / STORE_NAME).unlink()  # the mend that the message names
    mended = PromptConditionedLoraGenerator.from_pretrained(place)
    assert mended.replay_store is None
    assert DnDTrainer(mended, arguments(tmp_path), parts[1]).replay is None


def test_the_store_of_another_generator_is_refused(
    folder: Path, generator_folder: Path, fitted: PromptConditionedLoraGenerator, tmp_path: Path
) -> None:
    place = shutil.copytree(generator_folder, tmp_path / "generator")
    shutil.copy2(folder / STORE_NAME, place / STORE_NAME)
    other = PromptConditionedLoraGenerator.from_pretrained(place)
    with pytest.raises(GeneratorConfigError, match=r"another normalisation.*fit with the pairs of all tasks"):
        _ = other.replay_store
    with pytest.raises(GeneratorConfigError, match="another normalisation"):
        other.replay_store = fitted.replay_store
    other.replay_store = None
    other.save_pretrained(place)
    assert not (place / STORE_NAME).exists()


def test_a_store_is_kept_in_the_folder_and_not_where_it_is_unwanted(
    fitted: PromptConditionedLoraGenerator, folder: Path, tmp_path: Path
) -> None:
    PromptConditionedLoraGenerator.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert bytes_below(tmp_path / "again")[STORE_NAME] == bytes_below(folder)[STORE_NAME]
    fitted.save_pretrained(tmp_path / "again", include_replay_store=False)
    assert not (tmp_path / "again" / STORE_NAME).exists()
    assert PromptConditionedLoraGenerator.from_pretrained(tmp_path / "again").replay_store is None


def test_none_is_kept_where_none_is_wanted(parts: Any, fitted: Any, tmp_path: Path) -> None:
    generator = copy.deepcopy(fitted)
    DnDTrainer(generator, arguments(tmp_path, max_steps=1, replay_store_share=0.0), parts[1]).train()
    assert generator.replay_store is None
    assert revisions(generator.config.measured)[-1].replayed == 2


def lossy(before: float, after: float) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    add_revision(measured, Revision(1, ("art", "geo"), 10))
    scores = {"art": before, "geo": 90.0}
    add_revision(measured, Revision(2, ("law",), 10, 2, scores, {"art": after, "geo": 89.0, "law": 80.0}, "of 100"))
    return measured


def test_what_an_update_lost_is_held_against_what_it_may_lose() -> None:
    check_regression({})
    check_regression(lossy(90.0, 87.5))
    with pytest.raises(
        RegressionError, match=r"Revision 2 .* lost 5\.5 points on the 2 .* 10\.0 on 'art'; 2 are allow"
    ):
        check_regression(lossy(90.0, 80.0))
    check_regression(lossy(90.0, 80.0), most_points_lost=6)
    with pytest.raises(RegressionError):
        check_regression(lossy(90.0, float("-inf")))
    with pytest.raises(CorruptFileError, match="Remove 'revisions' from 'measured'"):
        check_regression({REVISIONS: [{"numero": 1}]})


def test_the_card_says_what_each_update_changed(fitted: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    generator = copy.deepcopy(fitted)
    assert "## Revisions" not in generator.model_card()
    generator.config.measured.update(lossy(90.0, 80.0))
    card = generator.model_card()
    assert "| 2 | law | 10 | 2 | 90.0 | 84.5 | 10.0 on art |" in card
    assert "| art | 90.0 | 80.0 |" in card and "of 100" in card
    generator.save_pretrained(tmp_path)
    assert revisions(json.loads((tmp_path / "config.json").read_text())["measured"]) == revisions(lossy(90.0, 80.0))
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert again.model_card().partition("## Revisions")[2] == card.partition("## Revisions")[2]


def creeping(*measures: str) -> dict[str, Any]:
    """Updates that lose 1.5 points each, measured in some way each."""
    measured: dict[str, Any] = {}
    add_revision(measured, Revision(1, ("art",), 10))
    for number, measure in enumerate(measures):
        before = 90.0 - 1.5 * number
        add_revision(
            measured, Revision(number + 2, (f"t{number}",), 9, 1, {"art": before}, {"art": before - 1.5}, measure)
        )
    return measured


def test_small_losses_add_up_to_one_that_is_told() -> None:
    assert points_below_best(revisions(creeping("x", "x", "x"))) == {"art": 4.5}
    assert points_below_best(revisions(creeping("x", "x", "y"))) == {"art": 1.5}  # other points are not compared
    assert points_below_best(revisions(creeping())) == points_below_best([]) == {}
    check_regression(creeping("x", "x", "x"))
    assert "by 4.5 points in the mean, art by 4.5." in revisions_section(creeping("x", "x", "x"))
    assert "Below the best" not in revisions_section(creeping("x"))


def test_small_losses_that_add_up_are_warned_of(
    folder: Path, parts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Losing(TrainerCallback):
        """Each update makes every task worth 1.5 points less."""

        worth = 0.9

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.worth -= 0.015

    generator, losing = PromptConditionedLoraGenerator.from_pretrained(folder), Losing()
    for pairs in parts[1].split(LATE[1:]):
        assert "together they have" not in caplog.text
        options = {"store_scorer": lambda task, adapter: losing.worth, "callbacks": [losing]}
        DnDTrainer(generator, arguments(tmp_path, max_steps=1), pairs, **options).train()
    assert "together they have: the earlier tasks are 2.5 points below the best" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_update_that_lost_too_much_is_not_published(
    fitted: PromptConditionedLoraGenerator, hub: HubServer, parts: Any, tmp_path: Path
) -> None:
    generator = copy.deepcopy(fitted)
    generator.config.measured.update(lossy(90.0, 80.0))
    name = "me/generator"
    with pytest.raises(RegressionError, match="most_points_lost=None"):
        generator.push_to_hub(name)
    trainer = DnDTrainer(generator, arguments(tmp_path, hub_model_id=name), parts[1])
    with pytest.raises(RegressionError):
        trainer.push_to_hub()
    with pytest.raises(RegressionError):
        generator.save_pretrained(tmp_path / "generator", push_to_hub=True, repo_id=name)
    assert not hub.repos
    generator.push_to_hub(name, most_points_lost=None)
    assert STORE_NAME not in hub.files(name)  # prompts are not published unasked
    generator.push_to_hub(name, most_points_lost=6.0, include_replay_store=True)
    assert STORE_NAME in hub.files(name)
    found = PromptConditionedLoraGenerator.from_pretrained(name, force_download=True)
    assert found.replay_store is not None and set(found.replay_store.tasks) == set(EARLY)


@pytest.mark.parametrize(("judged", "share"), [(True, 0.5), (True, 0.0), (False, 0.5)])
def test_nothing_of_an_update_is_uploaded_before_it_is_judged(
    judged: bool,
    share: float,
    fitted: PromptConditionedLoraGenerator,
    parts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploaded: list[Any] = []
    most = 2.0 if judged else None
    asked = arguments(tmp_path, hub_strategy="checkpoint", most_points_lost=most, replay_share=share)
    trainer = DnDTrainer(copy.deepcopy(fitted), asked, parts[1])
    monkeypatch.setattr(trainer, "_upload", lambda saved, to_resume=None, **given: uploaded.append(to_resume))
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert uploaded == ["last-checkpoint"] if judged else [None, "last-checkpoint"]


def test_points_are_numbers_whatever_was_written(fitted: PromptConditionedLoraGenerator) -> None:
    broken = copy.deepcopy(fitted)
    with torch.no_grad():
        for parameter in broken.decoder.parameters():
            parameter.fill_(torch.nan)
    assert score_store(broken) == dict.fromkeys(EARLY, -1e6)
    assert score_store(fitted, lambda task, adapter: float(task == "art")) == {"art": 100.0, "geo": 0.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay_share", 1.0),
        ("replay_share", -0.1),
        ("replay_store_share", 1.5),
        ("replay_targets", "itself"),
        ("replay_store_prompts", 0),
        ("replay_store_bytes", -1),
        ("most_points_lost", -1.0),
    ],
)
def test_impossible_arguments_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(GeneratorConfigError, match=name):
        arguments(tmp_path, **{name: value})
