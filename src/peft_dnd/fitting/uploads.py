# SPDX-License-Identifier: Apache-2.0
"""What a trainer uploads to the Hub while it fits a generator, and when it is done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import PushInProgress

from ..generator.configuration import TEXT_ENCODER_FOLDER, PromptConditionedLoraGeneratorConfig
from ..generator.model_card import generator_card
from ..generator.modeling import PromptConditionedLoraGenerator
from ..generator.revision_history import check_regression
from ..generator.summary import SUMMARY_NAME, renew_sizes
from ..pairs.replay_store import STORE_NAME
from ..storage.cards import CARD_NAME, may_write_card
from ..storage.checksums import CHECKSUMS_NAME, Checksums
from ..storage.hub import GENERATOR_FILES
from ..text.out_of_distribution import REFERENCE_NAME
from .arguments import DnDTrainingArguments


# Never uploaded: they name this machine's folders, resuming does not read them, and one is a pickle.
_ARGUMENTS = (TRAINING_ARGS_NAME, "training_args.json")
_STAGED = "_hub_upload_"


class UploadingTrainer(Trainer):
    """A `Trainer` that uploads a generator as its own `push_to_hub` does, rather than its output folder.

    That is the configuration without names of this machine's folders, the weights, the model card, the prompts kept
    of the fitted tasks, and the text encoder, if it is carried. Nothing else of the output folder is uploaded, the
    training arguments least of all. When and where to is decided as by `Trainer`, by `hub_strategy` and the other
    arguments for the Hub; an update of a fitted generator only when it is done, unless `most_points_lost` is `None`.

    With `hub_strategy="checkpoint"` or `"all_checkpoints"` the checkpoint's folder is uploaded besides, for resuming:
    of an update that is not judged yet too, and with its replay store, which holds prompts and examples. The states of
    the optimiser, the schedule and the random numbers in it are pickles, as `Trainer` writes them, and
    `trainer_state.json` may name folders of this machine. Use another strategy for what others are to load.
    """

    args: DnDTrainingArguments
    generator: PromptConditionedLoraGenerator
    replay: Any = None
    _store_keeper: Any
    push_in_progress: Any = None

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository; arguments as for `Trainer.init_hf_repo`."""
        if self.is_world_process_zero():
            for left in Path(str(self.args.output_dir)).glob(f"{_STAGED}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the generator into the output folder and upload it, as the generator's own `push_to_hub` would.

        Args:
            commit_message: What the commit says.
            blocking: Whether to return only when all is uploaded.
            token: Access token; `args.hub_token` by default.
            revision: Branch to commit to; `args.hub_revision` by default.
            private: Whether a new repository is private; `args.hub_private_repo` by default.
            kwargs: Passed to `create_model_card`.

        Returns:
            The Hub's description of the commit, or with `blocking=False` a future of it; `None` in all processes
            but the first.

        Raises:
            DestinationError: If the output folder is no place to save to.
            SavingError: If saving fails.
            HfHubHTTPError: If the Hub refuses the upload.
            RegressionError: If the generator's last update lost more than `args.most_points_lost`.
        """
        if self.args.most_points_lost is not None:
            check_regression(self.generator.config.measured, self.args.most_points_lost)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:  # args.push_to_hub is off
            if private is not None:
                self.args.hub_private_repo = private  # transformers 5.1 takes it from there alone
            self.init_hf_repo(token=token)
        self.create_model_card(**kwargs)
        self.save_model(_internal_call=True)  # in every process, as sharded weights need
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(
            Path(str(self.args.output_dir)),
            commit_message=commit_message,
            token=token,
            revision=self.args.hub_revision if revision is None else revision,
            run_as_future=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {when}"
        checkpoint = Path(checkpoint_folder)
        common: dict[str, Any] = {"token": args.hub_token, "revision": args.hub_revision, "run_as_future": True}
        # What becomes of the earlier tasks is judged when an update is done, and nothing of it is published before.
        unjudged = self._store_keeper.judging and args.most_points_lost is not None
        jobs = [] if unjudged else [self._upload(checkpoint, commit_message=message, **common)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            message += ", checkpoint"
            jobs.append(self._upload(checkpoint, to_resume=place, commit_message=message, **common))
        if not jobs:
            return
        if busy and self.push_in_progress is not None:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # it takes a list

    def _upload(self, saved: Path, *, to_resume: str | None = None, run_as_future: bool, **commit: Any) -> Any:
        """Upload the generator that was saved in a folder; or all of the folder, to a place of that name."""
        token = commit.pop("token")
        staged = self._stage(saved, whole=to_resume is not None)
        api: Any = HfApi(token=token)
        try:
            job = api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=str(staged),
                path_in_repo=to_resume,
                run_as_future=run_as_future,
                ignore_patterns=[TRAINING_ARGS_NAME],
                # What an earlier upload left must not be read beside this one, or in its place.
                delete_patterns=list(GENERATOR_FILES) if to_resume is None else None,
                **commit,
            )
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        if run_as_future:
            job.add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))
        else:
            shutil.rmtree(staged, ignore_errors=True)
        return job

    def _public_card(self, config: PromptConditionedLoraGeneratorConfig) -> str:
        size = self.generator.num_decoder_parameters()
        return generator_card(
            config, num_parameters=size, measured=self.generator.config.measured, name=self.hub_model_id
        )

    def _stage(self, saved: Path, *, whole: bool) -> Path:
        """A folder of what is uploaded, which stays as it is while the upload runs and checkpoints come and go."""
        output = Path(str(self.args.output_dir))
        output.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=output))
        config = PromptConditionedLoraGeneratorConfig.from_pretrained(saved)

        def left_out(folder: str, names: Iterable[str]) -> list[str]:
            if Path(folder) != saved:
                return []
            return [name for name in names if name in _ARGUMENTS or not (whole or _of_generator(name, config))]

        try:
            shutil.copytree(saved, staged, ignore=left_out, copy_function=_link_or_copy, dirs_exist_ok=True)
            with warnings.catch_warnings():
                if self.args.push_to_hub:  # what others will lack was said when the trainer was made
                    warnings.simplefilter("ignore", UserWarning)
                names = self.generator.names_for_others()
            _rename(config, names, staged / CONFIG_NAME)
            if not whole:
                _forget_store(staged)
            renew_sizes(staged)
            if not may_write_card(output):
                (staged / CARD_NAME).unlink(missing_ok=True)
                shutil.copy2(output / CARD_NAME, staged / CARD_NAME)
            elif not whole:
                (staged / CARD_NAME).unlink(missing_ok=True)  # a link, as it may be: the saved card stays as it is
                (staged / CARD_NAME).write_text(self._public_card(config), encoding="utf-8")
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return staged


def _of_generator(name: str, config: PromptConditionedLoraGeneratorConfig) -> bool:
    """Whether a file or folder is one of those that `save_pretrained` writes for this configuration."""
    if name == TEXT_ENCODER_FOLDER:
        return config.text_encoder_in_folder
    weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in (CONFIG_NAME, CARD_NAME, CHECKSUMS_NAME, REFERENCE_NAME, SUMMARY_NAME)


def _forget_store(folder: Path) -> None:
    """Take the replay store, which stays here, out of a folder's checksums."""
    checksums = Checksums.read(folder)
    if checksums is not None and STORE_NAME in checksums.files:
        files = {name: value for name, value in checksums.files.items() if name != STORE_NAME}
        replace(checksums, files=files).write(folder)


def _rename(config: PromptConditionedLoraGeneratorConfig, names: Mapping[str, Any], path: Path) -> None:
    """Change a configuration's names in its file, of which all else stays as it was saved."""
    before = config.to_dict()
    for name, value in names.items():
        setattr(config, name, value)
    changed = {key: value for key, value in config.to_dict().items() if value != before.get(key)}
    content = json.loads(path.read_text(encoding="utf-8")) | changed
    path.unlink()  # a link: the file of which it is one must not change
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
    return target
