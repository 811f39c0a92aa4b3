# SPDX-License-Identifier: Apache-2.0
"""What a trainer uploads: the whole generator, nothing that only this machine knows, and no pickle of arguments."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from support.hub_state import OWNER, HubServer

from peft_dnd import (
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.generator.summary import SUMMARY_NAME
from peft_dnd.storage.cards import GENERATED_MARK
from peft_dnd.text.out_of_distribution import REFERENCE_NAME


pytest_plugins = ("support.hub_server",)

PLAIN = {"checksums.json", "config.json", "model.safetensors", "README.md", REFERENCE_NAME, SUMMARY_NAME}
PICKLES = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


@dataclass
class Commit:
    """One upload: its files with their contents, and the arguments it came with."""

    files: dict[str, bytes]
    given: dict[str, Any]

    @property
    def texts(self) -> str:
        plain = [name for name in self.files if not name.endswith((".safetensors", ".pt", ".pth"))]
        return "\n".join(self.files[name].decode() for name in plain)

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@dataclass
class Hub:
    """Stands for the Hub. Where it is `slow`, what is uploaded in the background takes until the end of the fit."""

    slow: bool = False
    most_at_once: int = 0
    commits: list[Commit] = field(default_factory=list)
    _waiting: list[Callable[[], None]] = field(default_factory=list)

    def upload(self, *, folder_path: str, run_as_future: bool = False, **given: Any) -> Any:
        def commit() -> None:
            folder = Path(folder_path)
            found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
            names = filter_repo_objects(found, ignore_patterns=given.get("ignore_patterns"))
            self.commits.append(Commit({name: (folder / name).read_bytes() for name in names}, given))

        if not run_as_future:
            commit()
            return SimpleNamespace(oid="c0ffee")
        future: Future[Any] = Future()

        def finish() -> None:
            commit()
            future.set_result(SimpleNamespace(oid="c0ffee"))

        self._waiting.append(finish)
        if not self.slow:
            self.finish()
        return future

    def finish(self) -> None:
        self.most_at_once = max(self.most_at_once, len(self._waiting))
        while self._waiting:
            self._waiting.pop(0)()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub()
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **given: SimpleNamespace(repo_id=repo_id))
    # transformers 5.1 has the function in its trainer's module.
    create_repo = "transformers.trainer.create_repo"
    monkeypatch.setattr(create_repo, lambda name, **given: SimpleNamespace(repo_id=name), raising=False)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: stub.upload(token=self.token, **given))

    def wait(trainer: DnDTrainer) -> None:
        stub.finish()
        finish_push(trainer)

    finish_push = DnDTrainer._finish_current_push
    monkeypatch.setattr(DnDTrainer, "_finish_current_push", wait)
    return stub


Make = Callable[..., DnDTrainer]


@pytest.fixture
def make_trainer(pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path) -> Make:
    """Trainers of two steps, with a checkpoint after each, whose text encoder and base are folders of this machine."""

    def make(carried: bool = False, freeze: bool = True, **changes: Any) -> DnDTrainer:
        config = PromptConditionedLoraGeneratorConfig.from_adapters(
            pairs, str(encoder_folder), num_prompts=3, freeze_text_encoder=freeze, text_encoder_in_folder=carried
        )
        config.base_model_name_or_path = str(tmp_path / "base")
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
        settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "push_to_hub": True}
        settings |= {"hub_model_id": "me/generator", "hub_token": "t", **changes}
        args = DnDTrainingArguments(output_dir=str(tmp_path / "out"), **settings)
        return DnDTrainer(PromptConditionedLoraGenerator(config), args, pairs)

    return make


def same(first: PromptConditionedLoraGenerator, second: PromptConditionedLoraGenerator) -> bool:
    """Whether two generators have the same weights and read prompts alike."""
    prompts = ["what is tax law ?", "a court please"]
    read = [generator.eval().encode_prompts(prompts)[0] for generator in (first, second)]
    one, other = first.state_dict(), second.state_dict()
    return set(one) == set(other) and all(one[key].equal(other[key]) for key in one) and read[0].equal(read[1])


@pytest.mark.filterwarnings("ignore:The generator's:UserWarning")
class TestWhileFitting:
    def test_a_generator_without_its_text_encoder(self, make_trainer: Make, hub: Hub, tmp_path: Path) -> None:
        trainer = make_trainer()
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        trainer.train()
        assert [commit.given["commit_message"][-6:] for commit in hub.commits] == ["step 1", "step 2"]
        for commit in hub.commits:
            assert set(commit.files) == PLAIN
            assert str(tmp_path) not in commit.texts and str(trainer.generator.config.text_encoder) not in commit.texts
            assert commit.given["token"] == "t" and commit.given["repo_id"] == "me/generator"
            assert commit.given["path_in_repo"] is None
        # Here the names are right, and stay.
        assert trainer.generator.config.text_encoder is not None
        here = json.loads((tmp_path / "out" / "checkpoint-2" / "config.json").read_text())
        assert here["text_encoder"] == trainer.generator.config.text_encoder
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"notes.txt", "checkpoint-1", "checkpoint-2"}

    @pytest.mark.parametrize("freeze", [True, False])
    def test_a_text_encoder_that_is_carried_goes_along(
        self, make_trainer: Make, hub: Hub, freeze: bool, tmp_path: Path
    ) -> None:
        trainer = make_trainer(carried=freeze, freeze=freeze)
        trainer.train()
        last = hub.commits[-1]
        assert set(last.files) > {*PLAIN - {"README.md"}, "text_encoder/modules.json"}
        assert not any(name.endswith((".bin", ".pt", ".pth")) for name in last.files)
        assert str(tmp_path) not in last.texts
        loaded = PromptConditionedLoraGenerator.from_pretrained(last.write(tmp_path / "fetched"))
        assert same(loaded, trainer.generator)
        assert "in `text_encoder/`" in last.files["README.md"].decode()

    def test_what_is_uploaded_slowly_is_what_was_saved(self, make_trainer: Make, hub: Hub, tmp_path: Path) -> None:
        hub.slow = True
        trainer = make_trainer(save_total_limit=1)
        trainer.train()
        weights = (tmp_path / "out" / "checkpoint-2" / "model.safetensors").read_bytes()
        assert not (tmp_path / "out" / "checkpoint-1").exists()
        # The second save found the first upload under way, and left it at that.
        assert [set(commit.files) for commit in hub.commits] == [PLAIN]
        assert hub.commits[0].files["model.safetensors"] != weights
        assert not list((tmp_path / "out").glob("_hub_upload_*"))

    def test_always_means_always(self, make_trainer: Make, hub: Hub) -> None:
        hub.slow = True
        trainer = make_trainer(hub_always_push=True)
        trainer.train()
        assert len(hub.commits) == hub.most_at_once == 2
        assert len(trainer.push_in_progress.jobs) == 2 and trainer.push_in_progress.is_done()

    def test_nothing_before_the_end(self, make_trainer: Make, hub: Hub) -> None:
        make_trainer(hub_strategy="end").train()
        assert not hub.commits

    @pytest.mark.parametrize(("strategy", "place"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", None)])
    def test_a_checkpoint_to_resume_from(
        self, make_trainer: Make, hub: Hub, strategy: str, place: str | None, tmp_path: Path
    ) -> None:
        trainer = make_trainer(hub_strategy=strategy, hub_revision="dev")
        trainer.train()
        first = hub.commits[:2]
        assert [commit.given["path_in_repo"] for commit in first] == [None, place or "checkpoint-1"]
        assert all(commit.given["revision"] == "dev" for commit in first)
        assert set(first[0].files) == PLAIN
        assert set(first[1].files) == PLAIN | PICKLES | {"trainer_state.json"}
        assert json.loads(first[1].files["config.json"])["layout"]["base_model_name_or_path"] is None

        fetched = first[1].write(tmp_path / "checkpoint-1")
        resumed = make_trainer(push_to_hub=False)
        resumed.train(resume_from_checkpoint=str(fetched))
        assert same(resumed.generator, trainer.generator)


class TestAtTheEnd:
    @pytest.mark.filterwarnings("ignore:The generator's:UserWarning")
    def test_as_the_generator_itself_would(self, make_trainer: Make, local_hub: HubServer, tmp_path: Path) -> None:
        trainer = make_trainer(carried=True, hub_strategy="end", hub_token=OWNER)
        trainer.train()
        trainer.generator.push_to_hub("me/generator")
        own = local_hub.files("me/generator")
        # What another program left, or an earlier generator in other parts, must not be read in its place.
        left = local_hub.fetch("me/generator", tmp_path / "left")
        for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
            (left / name).write_text("left")
        local_hub.put("me/generator", left)
        result = trainer.push_to_hub(commit_message="done", tags="ours")
        repo = local_hub.repos["models", "me/generator"]
        assert result.oid == repo.branches["main"] and repo.messages[-1] == "done"
        ours = local_hub.files("me/generator")
        assert ours["README.md"].decode() == own["README.md"].decode()
        assert {name: ours.get(name) == content for name, content in own.items()} == dict.fromkeys(own, True)
        assert ours.keys() == own.keys()
        assert not any(str(tmp_path).encode() in content for content in ours.values())
        assert (
            b'generator="me/generator"' in ours["README.md"] or b'from_pretrained("me/generator")' in ours["README.md"]
        )
        # What lies here is whole, and for here.
        assert (tmp_path / "out" / "training_args.json").is_file()
        assert json.loads((tmp_path / "out" / "config.json").read_text())["text_encoder"] is not None
        assert not list((tmp_path / "out").glob("_hub_upload_*"))

    @pytest.mark.filterwarnings("ignore:The generator's:UserWarning")
    def test_what_others_left_in_the_folder_stays_here(self, make_trainer: Make, hub: Hub, tmp_path: Path) -> None:
        trainer = make_trainer(hub_strategy="end")
        for name in ("training_args.bin", "report.json", "text_encoder/modules.json", "_hub_upload_old/config.json"):
            (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "out" / name).write_text(str(tmp_path))
        trainer.train()
        trainer.push_to_hub(token="other", revision="dev", blocking=False)
        assert set(hub.commits[0].files) == PLAIN
        assert hub.commits[0].given["token"] == "other" and hub.commits[0].given["revision"] == "dev"
        make_trainer()
        assert not list((tmp_path / "out").glob("_hub_upload_*"))

    @pytest.mark.filterwarnings("ignore:The generator's:UserWarning")
    def test_a_card_that_someone_edited_goes_along(self, make_trainer: Make, hub: Hub, tmp_path: Path) -> None:
        trainer = make_trainer(max_steps=1)
        trainer.save_model()
        card = tmp_path / "out" / "README.md"
        card.write_text(card.read_text().replace(GENERATED_MARK, "My words."))
        hub.commits.clear()
        trainer.train()
        trainer.push_to_hub()
        assert [b"My words." in commit.files["README.md"] for commit in hub.commits] == [True, True]

    @pytest.mark.filterwarnings("ignore:The generator's base model:UserWarning")
    def test_says_what_others_will_lack_once(self, make_trainer: Make, hub: Hub) -> None:
        with pytest.warns(UserWarning, match="text encoder is"):
            trainer = make_trainer(max_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.train()
            trainer.push_to_hub()
        trainer = make_trainer(push_to_hub=False, max_steps=1)
        trainer.train()
        with pytest.warns(UserWarning, match="text encoder is"):
            trainer.push_to_hub()
