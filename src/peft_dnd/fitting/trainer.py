# SPDX-License-Identifier: Apache-2.0
"""Fitting a generator to prompt-checkpoint pairs, with transformers' `Trainer`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput

from ..adapters.generated_adapter import GeneratedAdapter
from ..decoders import CenteredDecoder
from ..errors import GeneratorConfigError
from ..evaluation import EvaluationReport, StoreScorer, score_generated
from ..generator.checksums import checked_meanwhile
from ..generator.configuration import TEXT_ENCODER_FOLDER
from ..generator.model_card import EVALUATION
from ..generator.modeling import PromptConditionedLoraGenerator
from ..pairs.collator import ExamplesBesidePairs
from ..pairs.dataset import PromptCheckpointDataset
from ..pairs.several_bases import CollatorOfBases, PairsOfBases
from ..storage.cards import CARD_NAME, may_write_card
from ..storage.files import write_text
from ..storage.processes import agree, check_sharding, separate_noise
from ..text.out_of_distribution import FEWEST_TASKS
from ..text.sentence_transformer_encoder import SentenceTransformerTextEncoder
from .arguments import DnDTrainingArguments
from .inputs import EpochSampler, TemperedSampler, check_kinds, rows_of_tasks, use_one_gpu, with_mixtures
from .losses import add_noise
from .objective import LOSSES
from .replay import Replay, StoreKeeper
from .several_bases import SupervisionOfBases, sampler_of_bases, split_off
from .sides import FittingSides
from .stored_rows import StoredRows
from .task_loss import LossFunction
from .uploads import UploadingTrainer


logger = logging.getLogger(__name__)

# Of a generator of several bases, for each base by its name.
Datasets = PromptCheckpointDataset | Mapping[str, PromptCheckpointDataset]


class DnDTrainer(UploadingTrainer):
    """Fits a [`PromptConditionedLoraGenerator`] to prompt-checkpoint pairs.

    At every step each checkpoint of the batch meets prompts of its task drawn afresh (arXiv 2506.16406, section 2.2:
    random re-pairing), and the decoder is moved towards that checkpoint by the weighted mean squared error on
    normalised tokens. What is drawn depends on the seed, the epoch and the checkpoint alone, so that a resumed run
    draws what an uninterrupted one would have drawn.

    With a `base_model` and `args.task_loss_weight` above 0 the generator is also, or only, moved by the base's own
    loss on examples of the item's task; see [`TaskLoss`]. Such a fit needs no checkpoints: without any the generator
    starts from the adapter that the base model brings along.

    Before the first step the normalisation statistics are taken from the training pairs, unless the generator has some
    already, and the prompts of all tasks are read by the text encoder once, unless that is being fitted too. A frozen
    text encoder does so where it is, which is the CPU for one that the library loaded. With many prompts and a GPU,
    call `generator.text_encoder.module.to("cuda")` before fitting, and `.to("cpu")` afterwards: that is faster, and
    the states differ by about 1e-5 from those that the generator will read on the CPU, which is why it is not done
    unasked.

    A generator that was fitted before goes on: the pairs are new tasks, and those before them are replayed from the
    store in the generator's folder, as `args.replay_share` and `args.replay_targets` say, so that they are not
    forgotten. Every fit brings the store up to date, and adds a [`Revision`] to the generator's card: what became of
    the earlier tasks.

    On a machine with several GPUs one process fits on the first of them. Start one process for each GPU to use them
    all: `torchrun --nproc_per_node=N fit.py`.

    With `args.push_to_hub` the generator is uploaded as its own `push_to_hub` does, with the text encoder if it is
    carried and without names of this machine's folders; nothing else of the output folder is. Only the folder that
    `hub_strategy="checkpoint"` or `"all_checkpoints"` adds, for resuming, holds pickles: the optimiser's state and the
    like, as `Trainer` writes them.

    Args:
        model: The generator.
        args: The arguments.
        train_dataset: The training pairs; for a generator of several bases a dictionary, base's name -> its pairs.
        eval_dataset: Pairs of held-out tasks, likewise.
        adapter_scorer: `(task name, adapter) -> score`, larger is better: what adapters generated for the held-out
            tasks are worth. Evaluation then reports the mean score, and beside it the mean score of adapters generated
            from another held-out task's prompts, because an error in weights says little of either.
        base_model: The frozen base, for task loss: a plain model, or a `PeftModel` whose active adapter has the
            generator's layout. It is not changed. Of several bases a dictionary; so is `token_weight`.
        task_collator: Makes the base's batch of a list of examples, rows of `examples.jsonl`; an [`ExampleCollator`]
            by default, which pads lists of numbers.
        task_loss_function: `(model, batch) -> loss` for bases whose forward gives none; `model(**batch).loss` by
            default. It must compute with the model that it is given, which has the generated adapter in place.
        token_weight: What each token weighs in the weight loss, (N_w,), in place of what `args.loss_weighting` gives;
            [`published_token_weights`] reads it from a released generator's file.
        store_scorer: `(task name, adapter) -> score` from 0 to 1, larger is better: what an update is judged by on the
            tasks of the generator's store, in place of the distance between written and stored adapters.
        callbacks: As for `Trainer`.
        optimizers: As for `Trainer`.

    Raises:
        LayoutError: If a data set's adapters do not have the generator's layout.
        BaseModelMismatchError: If that layout does not fit the base model.
        PairsFolderError: If a task lacks the examples or the checkpoints that the loss needs.
        GeneratorConfigError: If task loss is asked for without a base model.
    """

    args: DnDTrainingArguments
    objective: Any

    def __init__(
        self,
        model: PromptConditionedLoraGenerator,
        args: DnDTrainingArguments | None = None,
        train_dataset: Datasets | None = None,
        eval_dataset: Datasets | None = None,
        *,
        adapter_scorer: Callable[[str, GeneratedAdapter], float] | None = None,
        base_model: nn.Module | Mapping[str, nn.Module] | None = None,
        task_collator: Callable[[Sequence[Mapping[str, Any]]], Any] | None = None,
        task_loss_function: LossFunction | None = None,
        token_weight: torch.Tensor | None = None,
        store_scorer: StoreScorer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = DnDTrainingArguments(output_dir="generator") if args is None else args
        check_kinds(model, args, train_dataset, eval_dataset)
        use_one_gpu(args)
        sides = FittingSides(model, args)
        train_dataset = sides.pairs(train_dataset, "train_dataset", args.prompt_pool_size)
        eval_dataset = sides.pairs(eval_dataset, "eval_dataset")
        if adapter_scorer is not None and model.config.bases:
            raise GeneratorConfigError(
                "An adapter_scorer is for one base. Score each by a trainer of generator.for_base(name)."
            )
        # A store is of one base's adapters: several have none, and in a head's own fit nothing else changes.
        alone = isinstance(train_dataset, PromptCheckpointDataset) and model.whole is None
        new_pairs: Any = train_dataset if alone else None
        sides.build(base_model, task_loss_function, token_weight, task_collator)
        stored_rows = StoredRows(sides.objective, sides.row_collators, args) if alone and sides.row_collators else None
        read = sides.embeddings if model.config.freeze_text_encoder else None
        self.replay = Replay.of(model, args, new_pairs, stored_rows, read)
        if self.replay is not None:
            train_dataset = self.replay.pairs
        self.generator = model
        self.pairs: Any = train_dataset
        self.adapter_scorer = adapter_scorer
        self._sides = sides
        self._projection = getattr(model.decoder, "length_projection", None)
        if self._projection is not None:
            self._projection.noise = args.condition_noise  # where the paper's code adds it
        self.embeddings = sides.embeddings
        self._store_keeper = StoreKeeper(model, args, new_pairs, self.replay, store_scorer, stored_rows, read)
        self.objective = sides.objective
        data_collator: Any = with_mixtures(sides.collator, train_dataset, args, model)
        self._eval_data_collator: Any = sides.eval_collator
        if args.ddp_find_unused_parameters is None and model.config.freeze_text_encoder and not model.config.bases:
            args.ddp_find_unused_parameters = False  # every parameter of a decoder has a part in every loss
        if args.push_to_hub:
            model.names_for_others()  # warns now, rather than when all is fitted, of what others will lack
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=self._metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        check_sharding(args, plugin, fits_text_encoder=not model.config.freeze_text_encoder)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the generator; arguments as for `Trainer.train`, `resume_from_checkpoint` for one."""
        self._prepare()
        self._keep_prompts()
        self._store_keeper.begin()
        self.generator.config.measured.pop(EVALUATION, None)  # it was of the generator as it was before
        separate_noise(self.args)
        with self.generator.head_alone():  # if it shares the rest with other bases
            output = super().train(*args, **kwargs)
        if not self.generator.config.freeze_text_encoder:
            self._keep_prompts()  # as they are read now
        self._name_data()
        self.generator.config.measured.update(
            {
                "training tasks": len(self.pairs.tasks) if self.pairs else 0,
                "training checkpoints": self.pairs.num_checkpoints if self.pairs else 0,
                "steps": self.state.global_step,
                "seconds of fitting": round(output.metrics["train_runtime"], 1),
                "training loss": output.training_loss,
            }
        )
        self._store_keeper.end(self.state.global_step)
        return output

    def _name_data(self) -> None:
        """Have the generator's card name the data set on the Hub that it was fitted to, if it was to one."""
        if self.pairs is not None and self.pairs.hub_id is not None:
            config = self.generator.config
            known = config.card_metadata.get("datasets", [])
            known = [known] if isinstance(known, str) else known
            if self.pairs.hub_id not in known:
                config.card_metadata["datasets"] = [*known, self.pairs.hub_id]
            config.measured["training data"] = f"{self.pairs.hub_id} at {self.pairs.hub_commit}"

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
            `eval_loss`: the weight loss, with all tokens weighing alike; `eval_mean_adapter_loss`: the
            same for the mean training adapter, which a generator must stay below; with an `adapter_scorer` also
            `eval_score` and `eval_shuffled_score`; and times. With task loss `eval_loss` is the sum of both losses by
            their weights after the warm start, and they stand apart in `eval_weight_loss`, if there are checkpoints,
            and `eval_task_loss`, beside `eval_mean_adapter_task_loss`. Of several bases these are the means over all
            items, and each base's own stand beside them, `eval_<base>_loss` for one.
        """
        self._prepare()
        dataset = self._sides.pairs(self.eval_dataset if eval_dataset is None else eval_dataset, "eval_dataset")
        metrics = super().evaluate(dataset, ignore_keys, metric_key_prefix)
        if self.adapter_scorer is not None and isinstance(dataset, PromptCheckpointDataset):
            prompts = {task: dataset.prompts(task) for task in dataset.tasks}
            # In every process, as sharded weights need; but what follows from scores must follow in all alike.
            scores = agree(score_generated(self.generator, prompts, self.adapter_scorer, seed=self.args.seed))
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
        """The loss of a batch: weight loss, task loss, or both, by the arguments and the step.

        See [`FittingObjective`].
        """
        condition, supervision = split_off(inputs)
        if model.training and self._projection is None:
            for of_base in condition.get("by_base", {"": condition}).values():
                if "condition_states" in of_base:
                    of_base["condition_states"] = add_noise(of_base["condition_states"], self.args.condition_noise)
        if self.replay is not None:
            supervision = self.replay.supervised(supervision, condition)
        tokens = model(**condition)
        loss = self.objective.loss(tokens, supervision, self.state.global_step)
        return (loss, tokens) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """One batch of evaluation; the predictions are each item's losses, beside those of the mean adapter."""
        condition, supervision = split_off(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self.objective.item_losses(model(**condition), supervision)
        known = supervision.known(len(losses), losses.device)
        labels = known.float()
        if isinstance(supervision, SupervisionOfBases):
            labels = torch.cat([labels, supervision.base_numbers(self.generator.config.base_names).to(labels)], 1)
        # A loss of batches would count the items of a last, smaller one more; that of all items is taken in the end.
        loss = self.objective.total(losses, known) if prediction_loss_only else None
        # Trainer calls compute_metrics only where there are labels.
        return loss, losses, labels

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        items = torch.from_numpy(np.asarray(prediction.predictions))
        labels = torch.from_numpy(np.asarray(prediction.label_ids))
        known, numbers = labels[:, :3] > 0, labels[:, 3:]
        metrics = self._means(items, known)
        for number, name in enumerate(self.generator.config.base_names if numbers.numel() else ()):
            of_base = numbers[:, 0] == number
            if of_base.any():
                own = self._means(items[of_base], known[of_base])
                metrics |= {f"{name}_{key}": value for key, value in own.items()}
        return metrics

    def _means(self, items: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
        """The loss and its parts over some items."""
        means = {}
        for column, name in enumerate(LOSSES):
            has = known[:, column // 2]
            # Without task loss the weight loss is the loss itself.
            if has.any() and not (name == "weight_loss" and self.objective.task_loss is None):
                means[name] = items[has, column].mean().item()
        return {"loss": self.objective.total(items, known).item(), **means}

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Batches for evaluation, of `num_prompts` prompts each; `smallest_prompt_set` is for fitting alone."""
        with self._reading_whole_sets():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """Batches for prediction; as for evaluation."""
        with self._reading_whole_sets():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _reading_whole_sets(self) -> Iterator[None]:
        fitting, self.data_collator = self.data_collator, self._eval_data_collator
        try:
            yield
        finally:
            self.data_collator = fitting

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[tuple[int, int]] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PairsOfBases):
            return sampler_of_bases(dataset, self._sampler_of)
        return self._sampler_of(dataset) if isinstance(dataset, PromptCheckpointDataset) else None

    def _sampler_of(self, pairs: PromptCheckpointDataset) -> EpochSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        exponent = self.args.task_sampling_exponent
        replayed = self.replay if self.replay is not None and pairs is self.replay.pairs else None
        if exponent is None and replayed is None:
            return EpochSampler(len(pairs), seed)
        old, share = (frozenset[str](), 0.0) if replayed is None else (frozenset(replayed.tasks), replayed.share)
        sizes = None if exponent is None else rows_of_tasks(pairs, old)
        power = 1.0 if exponent is None else exponent
        return TemperedSampler(pairs.item_tasks, power, seed, sizes=sizes, replayed=old, share=share)

    def _prepare(self) -> None:
        if self.replay is not None:
            self.replay.prepare()
            self.objective.replay_spread = self.replay.spread
        if self.pairs is not None:
            self.objective.prepare(self.pairs, self._some_batches)
        reading = self._sides.reading
        if reading.encode:
            for collator, dataset in ((reading, self.pairs), (self._sides.eval_reading, self.eval_dataset)):
                if isinstance(dataset, PromptCheckpointDataset | PairsOfBases):
                    collator.warm_up(dataset)
            decoder = self.generator.decoder
            if self.pairs is not None and isinstance(decoder, CenteredDecoder) and not decoder.centered:
                decoder.center_on(reading.states_of_tasks(self.pairs))

    def _some_batches(self) -> Any:
        collator: Any = self._eval_data_collator
        return collator.some(self.pairs) if isinstance(collator, ExamplesBesidePairs | CollatorOfBases) else []

    def _keep_prompts(self) -> None:
        if self.pairs is not None and len(self.pairs.tasks) >= FEWEST_TASKS:
            embeddings = self.embeddings if self.generator.config.freeze_text_encoder else None
            self.generator.fit_out_of_distribution(self.pairs, embeddings=embeddings)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # As Trainer does, but the arguments go beside the weights as JSON rather than as a pickle.
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        write_text(folder / "training_args.json", self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with checked_meanwhile(resume_from_checkpoint, Path(resume_from_checkpoint)):
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

    def add_evaluation(self, report: EvaluationReport) -> None:
        """Write the held-out protocol's report into the output folder and, from now on, the generator's model card."""
        report.attach_to(self.generator)
        if self.is_world_process_zero():
            report.save(str(self.args.output_dir))
        self.create_model_card()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the generator's own card, with what was measured, unless there is one edited by hand."""
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero() and may_write_card(folder):
            write_text(folder / CARD_NAME, self.generator.model_card())
