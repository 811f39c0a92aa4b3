# SPDX-License-Identifier: Apache-2.0
"""The arguments of `DnDTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..errors import GeneratorConfigError
from ..generator.revision_history import MOST_POINTS_LOST


LOSS_WEIGHTINGS = ("between_task", "within_task", "none")
WEIGHT_LOSSES = ("factors", "delta_weights")
REPLAY_TARGETS = ("auto", "checkpoints", "rows", "former_self")
DISTILLATION_TARGETS = ("probabilities", "answers")


@dataclass
class DnDTrainingArguments(TrainingArguments):
    """Arguments for fitting a generator: those of `transformers.TrainingArguments`, and a few of the method's own.

    These defaults differ from `TrainingArguments`: `learning_rate` is 1e-3, for decoders of a few million parameters,
    which the default family has (the paper's, of a billion, want the 3e-5 that `PaperSettings` gives); and after the
    paper (arXiv 2506.16406) `weight_decay` is 0.1 rather than 0 and `lr_scheduler_type` cosine rather than linear.
    `remove_unused_columns` is False and `label_names` is `["target_tokens"]`, as the pairs need.

    Args:
        loss_weighting: What weighs the tokens in the mean squared error. `"between_task"`: how far a token's weights
            lie apart between tasks, which is what prompts can tell; `"within_task"`: how far they scatter among one
            task's checkpoints, which is the paper's rule; `"none"`: all alike.
        condition_noise: Standard deviation of the noise added to the condition states while fitting.
        target_noise: Standard deviation of the noise added to the normalised target tokens while fitting.
        smallest_prompt_set: For a decoder that reads sets: each item reads any number of prompts from this one to the
            configuration's `num_prompts`, so that the generator learns to do with few. 0: always `num_prompts`.
        prompt_pool_size: How many prompts of each training task are used at all, drawn once by the data set's seed; by
            default all. With as many as the configuration's `num_prompts` every item reads the same ones at every
            step, with more that many are drawn of them.
        task_sampling_exponent: How often a task comes in an epoch, which has as many items as there are checkpoints:
            in proportion to the number of its own to this power. 1: each checkpoint once; 0: all tasks alike, however
            few checkpoints some have; between, as languages are sampled for multilingual models. In a fit without any
            checkpoints a task's examples and teacher's answers are counted instead. `None`: each checkpoint once, and
            without checkpoints all tasks alike.
        mixture_share: How many of the items are mixtures of two tasks, from 0 to 1: a set of prompts of both, whose
            target lies between their adapters, and rows of both in the same shares. A regulariser where tasks are few;
            see [`MixtureCollator`][peft_dnd.pairs.MixtureCollator]. For plain LoRA.
        replay_share: Where a fitted generator goes on: the share of the items that are earlier tasks from its replay
            store, all of them alike. 0: none are replayed, and what is not in the new pairs will be forgotten.
        replay_targets: What replayed tasks are held against. `"checkpoints"`: the mean of each one's checkpoints,
            as the store has it, or, where there was no room for that, what the generator itself wrote before the
            update; `"former_self"`: always the latter; `"rows"`: the loss of the fit on the store's rows, for fits on
            task loss or distillation. `"auto"`: checkpoints in a fit to these, else rows and the former self.
        replay_store_share: How large the replay store that is kept of the fitted tasks may be, in relation to the
            pairs, from 0 to 1. 0: none is kept.
        replay_store_prompts: How many texts it keeps of each task at most.
        replay_store_bytes: How large it may be altogether, whatever the pairs' size; no bound by default.
        most_points_lost: How many points of 100 an update may have lost in the mean over the earlier tasks of the
            store and still be uploaded; `None` turns the check off.
        prompt_states_dir: A folder where what the text encoder gives for the tasks' prompts is kept, so that a run
            that goes on, or another one on the same tasks, need not read them again. Worth its space where the
            encoder is slow: 4 bytes a number, so 1.5 kB a token of all-MiniLM-L6-v2. By default they are kept in
            memory alone.
        weight_loss: What the weight loss is taken on. `"factors"`: the normalised entries of A and B;
            `"delta_weights"`: the updates s B A, module by module relative to how far the training adapters' lie from
            the mean adapter's, in place of `loss_weighting`.
        canonical_targets: Whether the factors of each checkpoint are brought into canonical form first, the same for
            all factors of one update. Checkpoints from one common initialisation do mostly without.
        task_loss_weight: Weight of the task loss, the base model's own loss with the generated adapter in place,
            averaged over the items of a batch. 0 turns it off; above 0 the trainer needs a `base_model`, and the tasks
            need examples.
        task_examples: How many of its task's examples are drawn for each item of a batch.
        task_tokens_per_pass: How many tokens, padding included, the base reads in one pass at most, for all items of a
            batch together; an example longer than that is read alone. It bounds the memory and changes nothing else.
        distillation_weight: Weight of context distillation: how far the base with the generated adapter is from what a
            teacher, the base with the task's text in its window, said (see `distil_task`). 0 turns it off; above 0 the
            trainer needs a `base_model`, and the tasks need a teacher's answers, of which `task_examples` are drawn
            for each item.
        distillation_targets: What of the teacher is distilled. `"probabilities"`: how likely it found the next tokens;
            `"answers"`: its answers alone, as if it had been sure of them. The latter where its doubts are of no use,
            as those of a base with a generated adapter.
        rebuild_steps: How many optimiser steps of weight loss alone come before the task loss: the warm start.
        rebuild_weight: Weight of the weight loss beside the task loss, after those steps. Without task loss it is 1.
        base_gradient_checkpointing: Whether the base's layers are computed again in the backward pass of the task loss
            rather than kept.

    Raises:
        GeneratorConfigError: If one of these values is impossible.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, off for norms and biases."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: pairs have no columns."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["target_tokens"], metadata={"help": "Must stay as it is."}
    )
    loss_weighting: Literal["between_task", "within_task", "none"] = field(
        default="between_task", metadata={"help": f"What weighs the tokens in the loss, one of {LOSS_WEIGHTINGS}."}
    )
    condition_noise: float = field(default=1e-4, metadata={"help": "Noise on the condition states."})
    target_noise: float = field(default=1e-5, metadata={"help": "Noise on the normalised target tokens."})
    smallest_prompt_set: int = field(
        default=1, metadata={"help": "Fewest prompts that an item reads, where the decoder reads sets; 0: no draw."}
    )
    prompt_pool_size: int | None = field(
        default=None, metadata={"help": "How many prompts of each training task are used at all; by default all."}
    )
    task_sampling_exponent: float | None = field(
        default=None,
        metadata={"help": "Tasks come in proportion to their checkpoints, or else examples, to this power, 0 to 1."},
    )
    mixture_share: float = field(
        default=0.0, metadata={"help": "How many items are mixtures of two tasks, 0 to 1; 0: none."}
    )
    replay_share: float = field(
        default=0.5, metadata={"help": "Share of the items that replay earlier tasks; 0: none."}
    )
    replay_targets: Literal["auto", "checkpoints", "rows", "former_self"] = field(
        default="auto", metadata={"help": f"What replayed tasks are held against, one of {REPLAY_TARGETS}."}
    )
    replay_store_share: float = field(
        default=0.1, metadata={"help": "Size of the replay store in relation to the pairs; 0: none is kept."}
    )
    replay_store_prompts: int = field(default=64, metadata={"help": "Most texts of a task in the replay store."})
    replay_store_bytes: int | None = field(default=None, metadata={"help": "Most bytes of the replay store."})
    most_points_lost: float | None = field(
        default=MOST_POINTS_LOST, metadata={"help": "Points that an update may lose and be uploaded; None: any."}
    )
    prompt_states_dir: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps what the text encoder gives, for other runs; default: none."},
    )
    weight_loss: Literal["factors", "delta_weights"] = field(
        default="factors", metadata={"help": f"What the weight loss is taken on, one of {WEIGHT_LOSSES}."}
    )
    canonical_targets: bool = field(
        default=False, metadata={"help": "Whether checkpoints' factors are brought into canonical form."}
    )
    task_loss_weight: float = field(default=0.0, metadata={"help": "Weight of the base's own loss; 0 turns it off."})
    distillation_weight: float = field(default=0.0, metadata={"help": "Weight of context distillation; 0: off."})
    distillation_targets: Literal["probabilities", "answers"] = field(
        default="probabilities", metadata={"help": f"What of the teacher is distilled, one of {DISTILLATION_TARGETS}."}
    )
    task_examples: int = field(default=16, metadata={"help": "Examples of its task that an item draws."})
    task_tokens_per_pass: int = field(default=8192, metadata={"help": "Most tokens in a pass of the base."})
    rebuild_steps: int = field(default=0, metadata={"help": "Steps of weight loss alone before the task loss."})
    rebuild_weight: float = field(default=0.0, metadata={"help": "Weight of the weight loss beside the task loss."})
    base_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Whether to compute the base's layers again in the backward pass."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise GeneratorConfigError(
                f"loss_weighting must be one of {LOSS_WEIGHTINGS}, got {self.loss_weighting!r}."
            )
        for name in ("condition_noise", "target_noise"):
            if getattr(self, name) < 0:
                raise GeneratorConfigError(
                    f"{name} is a standard deviation, so at least 0; got {getattr(self, name)}."
                )
        if self.task_sampling_exponent is not None and not 0 <= self.task_sampling_exponent <= 1:
            raise GeneratorConfigError(
                f"task_sampling_exponent must be from 0 to 1, got {self.task_sampling_exponent}."
            )
        if not 0 <= self.mixture_share <= 1:
            raise GeneratorConfigError(f"mixture_share must be from 0 to 1, got {self.mixture_share}.")
        if not 0 <= self.replay_share < 1:
            raise GeneratorConfigError(f"replay_share must be at least 0 and less than 1, got {self.replay_share}.")
        if not 0 <= self.replay_store_share <= 1:
            raise GeneratorConfigError(f"replay_store_share must be from 0 to 1, got {self.replay_store_share}.")
        if self.replay_targets not in REPLAY_TARGETS:
            raise GeneratorConfigError(f"replay_targets must be one of {REPLAY_TARGETS}, got {self.replay_targets!r}.")
        if self.distillation_targets not in DISTILLATION_TARGETS:
            raise GeneratorConfigError(
                f"distillation_targets must be one of {DISTILLATION_TARGETS}, got {self.distillation_targets!r}."
            )
        if self.replay_targets == "rows" and not (self.task_loss_weight or self.distillation_weight):
            raise GeneratorConfigError(
                "replay_targets='rows' is for fits with task_loss_weight or distillation_weight above 0, which are "
                "taken on rows. Leave it out: a fit to checkpoints replays those."
            )
        if self.weight_loss not in WEIGHT_LOSSES:
            raise GeneratorConfigError(f"weight_loss must be one of {WEIGHT_LOSSES}, got {self.weight_loss!r}.")
        for name in ("task_loss_weight", "distillation_weight", "rebuild_steps", "rebuild_weight"):
            if getattr(self, name) < 0:
                raise GeneratorConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.prompt_pool_size is not None and self.prompt_pool_size < 1:
            raise GeneratorConfigError(f"prompt_pool_size must be at least 1, got {self.prompt_pool_size}.")
        for name in ("replay_store_bytes", "most_points_lost"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise GeneratorConfigError(f"{name} must be at least 0, or None; got {getattr(self, name)}.")
        for name in ("task_examples", "task_tokens_per_pass", "replay_store_prompts"):
            if getattr(self, name) < 1:
                raise GeneratorConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.remove_unused_columns:
            raise GeneratorConfigError("remove_unused_columns must be False: a pair has no columns to remove.")
