# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Fitting a generator to prompt-checkpoint pairs, with transformers' `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput

from .adapter import GeneratedAdapter
from .conditioning import TEXT_ENCODER_FOLDER
from .data import PromptCheckpointCollator, PromptCheckpointDataset, task_balanced_grids, token_spread
from .errors import LayoutError
from .evaluation import score_generated
from .files import write_text
from .losses import add_noise, masked_mse
from .model_card import CARD_NAME, may_write_card
from .modeling import PromptConditionedLoraGenerator
from .sentence_transformer import SentenceTransformerTextEncoder
from .text_encoder import PromptEmbeddingCache
from .tokenizer import weight_statistics
from .training_args import DnDTrainingArguments


logger = logging.getLogger(__name__)


class DnDTrainer(Trainer):
    """Fits a [`PromptConditionedLoraGenerator`] to prompt-checkpoint pairs.

    At every step each checkpoint of the batch meets prompts of its task drawn afresh (arXiv 2506.16406, section 2.2:
    random re-pairing), and the decoder is moved towards that checkpoint by the weighted mean squared error on
    normalised tokens. What is drawn depends on the seed, the epoch and the checkpoint alone, so that a resumed run
    draws what an uninterrupted one would have drawn.

    Before the first step the normalisation statistics are taken from the training pairs, unless the generator has some
    already, and the prompts of all tasks are read by the text encoder once, unless that is being fitted too.

    Args:
        model: The generator.
        args: The arguments.
        train_dataset: The training pairs.
        eval_dataset: Pairs of held-out tasks.
        adapter_scorer: `(task name, adapter) -> score`, larger is better: what adapters generated for the held-out
            tasks are worth. Evaluation then reports the mean score, and beside it the mean score of adapters generated
            from another held-out task's prompts, because an error in weights says little of either.
        callbacks: As for `Trainer`.
        optimizers: As for `Trainer`.

    Raises:
        LayoutError: If a data set's adapters do not have the generator's layout.
    """

    args: DnDTrainingArguments

    def __init__(
        self,
        model: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments | None = None,
        train_dataset: PromptCheckpointDataset | None = None,
        eval_dataset: PromptCheckpointDataset | None = None,
        *,
        adapter_scorer: Callable[[str, GeneratedAdapter], float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = DnDTrainingArguments(output_dir="generator") if args is None else args
        for what, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            _check_layout(model, dataset, what)
        self.generator = model
        self.pairs = train_dataset
        self.adapter_scorer = adapter_scorer
        self.embeddings = PromptEmbeddingCache(model.text_encoder, read=model.read_states)
        self._collator = PromptCheckpointCollator(
            self.embeddings,
            model.weight_tokenizer,
            num_prompts=model.config.num_prompts,
            max_length=model.config.max_prompt_length,
            encode=model.config.freeze_text_encoder,
        )
        self._valid_mask = model.weight_tokenizer.valid_mask()
        self._token_weight: torch.Tensor | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=self._collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=_compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the generator; arguments as for `Trainer.train`, `resume_from_checkpoint` for one."""
        self._prepare()
        output = super().train(*args, **kwargs)
        self.generator.config.measured.update(
            {
                "training tasks": len(self.pairs.tasks) if self.pairs else 0,
                "training checkpoints": len(self.pairs) if self.pairs else 0,
                "steps": self.state.global_step,
                "seconds of fitting": round(output.metrics["train_runtime"], 1),
                "training loss": output.training_loss,
            }
        )
        return output

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the generator on held-out tasks.

        Args:
            eval_dataset: Their pairs; those given to the trainer by default.
            ignore_keys: As for `Trainer`.
            metric_key_prefix: What the metrics' names begin with.

        Returns:
            `eval_loss`: the mean squared error of the normalised tokens, unweighted; `eval_mean_adapter_loss`: the
            same for the mean training adapter, which a generator must stay below; with an `adapter_scorer` also
            `eval_score` and `eval_shuffled_score`; and times.
        """
        self._prepare()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        _check_layout(self.generator, dataset, "eval_dataset")
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.adapter_scorer is not None and isinstance(dataset, PromptCheckpointDataset):
            prompts = {task: dataset.prompts(task) for task in dataset.tasks}
            scores = score_generated(self.generator, prompts, self.adapter_scorer, seed=self.args.seed)
            scores = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
            self.log(scores)
            metrics.update(scores)
        timing = ("_runtime", "_per_second")
        self.generator.config.measured.update(
            {name: value for name, value in metrics.items() if name != "epoch" and not name.endswith(timing)}
        )
        return metrics

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The paper's weighted mean squared error between the decoded and the checkpoints' normalised tokens."""
        condition = {name: value for name, value in inputs.items() if name != "target_tokens"}
        target = self.generator.normalization.normalize(inputs["target_tokens"])
        if model.training:
            if "condition_states" in condition:
                condition["condition_states"] = add_noise(condition["condition_states"], self.args.condition_noise)
            target = add_noise(target, self.args.target_noise)
        tokens = model(**condition)
        weight = None if self._token_weight is None else self._token_weight.to(tokens.device)
        loss = masked_mse(tokens, target, self._valid_mask.to(tokens.device), weight)
        return (loss, tokens) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """One batch of evaluation; the predictions are each checkpoint's error and that of the mean adapter."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = model(**{name: value for name, value in inputs.items() if name != "target_tokens"})
            target = self.generator.normalization.normalize(inputs["target_tokens"])
        valid = self._valid_mask.to(tokens.device)
        errors = torch.stack(
            [
                torch.stack([masked_mse(guess[None], truth[None], valid) for guess in (tokens[i], tokens[i] * 0)])
                for i, truth in enumerate(target)
            ]
        )
        # Trainer calls compute_metrics only where there are labels.
        return errors[:, 0].mean(), errors, torch.zeros(len(errors), device=errors.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(dataset), seed) if isinstance(dataset, PromptCheckpointDataset) else None

    def _prepare(self) -> None:
        pairs, generator = self.pairs, self.generator
        if pairs is not None and not generator.normalization.fitted and generator.config.normalization != "none":
            generator.normalization.set_statistics(
                *weight_statistics(generator.weight_tokenizer, task_balanced_grids(pairs, generator.weight_tokenizer))
            )
        if pairs is not None:
            generator.normalization.fitted.fill_(True)
        if pairs is not None and self._token_weight is None and self.args.loss_weighting != "none":
            spread = token_spread(pairs, generator.weight_tokenizer, generator.normalization)
            self._token_weight = spread.weights(self.args.loss_weighting)
        if self._collator.encode:
            for dataset in (pairs, self.eval_dataset):
                if isinstance(dataset, PromptCheckpointDataset):
                    self._collator.warm_up(dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # As Trainer does, but the arguments go beside the weights as JSON rather than as a pickle.
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        write_text(folder / "training_args.json", self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_text_encoder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_text_encoder(str(self.state.best_model_checkpoint))

    def _load_text_encoder(self, checkpoint: str) -> None:
        # A text encoder that is fitted too is saved beside the weights, in a folder of its own.
        if not self.generator.config.freeze_text_encoder:
            saved = SentenceTransformerTextEncoder.from_pretrained(str(Path(checkpoint, TEXT_ENCODER_FOLDER)))
            self.generator.text_encoder.module.load_state_dict(saved.module.state_dict())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the generator's own card, with what was measured, unless there is one edited by hand."""
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero() and may_write_card(folder):
            write_text(folder / CARD_NAME, self.generator.model_card())


class EpochSampler(Sampler[tuple[int, int]]):
    """All indices of a data set in random order, each with the number of the epoch.

    With the epoch in hand the data set can draw anew at every visit and needs no state of its own, whatever process it
    lives in.

    Args:
        size: Length of the data set.
        seed: Seed of the order; each epoch has its own.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        epoch = self.epoch
        return ((epoch, i) for i in torch.randperm(self.size, generator=order).tolist())


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return {"mean_adapter_loss": float(np.asarray(prediction.predictions)[:, 1].mean())}


def _check_layout(model: PromptConditionedLoraGenerator, dataset: Any, what: str) -> None:
    if isinstance(dataset, PromptCheckpointDataset):
        difference = model.config.adapter_layout.difference(dataset.layout)
        if difference is not None:
            raise LayoutError(
                f"{what} holds adapters of another layout than the generator (first) writes: {difference}. Build the "
                "generator's configuration from these pairs, or use pairs of the same LoRA configuration and base."
            )
