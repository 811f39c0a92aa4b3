# SPDX-License-Identifier: Apache-2.0
"""One run of the held-out protocol: which adapter each row holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from random import Random
from statistics import fmean, median
from typing import Any, cast

from torch import nn
from transformers.utils import logging as transformers_logging

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import PromptError
from ..pairs.dataset import PromptCheckpointDataset
from ..text.encoder import TextEncoder
from ..text.prompts import check_prompts
from .baselines import RidgeBaseline, nearest_tasks
from .bench import AdapterSource, Scorer, ScoringBench, adapter_of
from .controls import constant_prompts, junk_prompts, shuffled_tasks
from .costs import Cost, adapter_bytes, measured, module_bytes
from .held_out import AdapterGenerator, HeldOutTask, held_out_texts, training_texts, write_adapter


_NO_ADAPTERS = "no training adapters were given"


class ProtocolRun:
    """One run of the protocol: fills in the rows one after another.

    Args:
        bench: The base model, ready to be scored.
        tasks: Name -> held-out task.
        pairs: The training pairs, if there are any.
        skip: Keys of rows to leave out.
        seed: Of generation, junk and shuffling.

    Attributes:
        scores: Row -> task -> a score for each example.
        not_measured: Row -> why it is missing.
        costs: Of generation.
        details: How rows came about.
    """

    def __init__(
        self,
        bench: ScoringBench,
        tasks: Mapping[str, HeldOutTask],
        pairs: PromptCheckpointDataset | None,
        skip: Collection[str],
        seed: int,
    ) -> None:
        self.bench = bench
        self.tasks = tasks
        self.pairs = pairs
        self.prompted = {} if pairs is None else {name: pairs.prompts(name) for name in pairs.tasks}
        # Fitted by task loss alone, a task may have no checkpoints.
        self.adapted = () if pairs is None else tuple(name for name in pairs.tasks if pairs.checkpoints(name))
        self.skip = skip
        self.seed = seed
        self.prompts = {
            task: check_prompts(held_out.prompts, f"the prompts of task {task!r}") for task, held_out in tasks.items()
        }
        # Now rather than when its turn comes: tasks that cannot be exchanged should fail before hours of scoring.
        kinds = {name: task.kind for name, task in tasks.items() if task.kind is not None}
        exchange = len(tasks) > 1 and "shuffled" not in skip
        self.exchanged = shuffled_tasks(list(tasks), seed=seed, kinds=kinds) if exchange else {}
        self.scores: dict[str, dict[str, tuple[float, ...]]] = {}
        self.not_measured: dict[str, str] = {}
        self.costs: dict[str, Any] = {}
        self.details: dict[str, Any] = {}

    def base(self, in_context_scorer: Scorer | None) -> None:
        """Rows 1 and 2, before the base is touched."""
        if self._wanted("base"):
            self.scores["base"] = {task: self.bench.score_base(task) for task in self._bar("base")}
        if self._wanted("in_context", in_context_scorer, "no in_context_scorer was given"):
            self.scores["in_context"] = {
                task: self.bench.score_base(task, in_context_scorer) for task in self._bar("in_context")
            }

    def training_adapters(self) -> None:
        """Row 3: each training adapter on each held-out task."""
        keys = ("training_adapters_mean", "training_adapters_best")
        wanted = [key for key in keys if self._wanted(key, self.adapted or None, _NO_ADAPTERS)]
        if not wanted:
            return
        by_adapter = {
            name: self.bench.score(self._last_checkpoint(name), list(self.tasks))
            for name in transformers_logging.tqdm(self.adapted, desc="training adapters")
        }
        means = {name: {task: fmean(s) for task, s in of.items()} for name, of in by_adapter.items()}
        best = {task: max((of[task], name) for name, of in means.items())[1] for task in self.tasks}
        rows = {
            "training_adapters_mean": {
                task: tuple(fmean(scores) for scores in zip(*(of[task] for of in by_adapter.values()), strict=True))
                for task in self.tasks
            },
            "training_adapters_best": {task: by_adapter[best[task]][task] for task in self.tasks},
        }
        self.scores.update({key: rows[key] for key in wanted})
        self.details["training_adapters"] = means
        self.details["training_adapters_best"] = best

    def average_weights(self) -> None:
        """Row 4."""
        if self._wanted("average_weights", self.adapted or None, _NO_ADAPTERS):
            adapter = GeneratedAdapter(self._training.layout, self._training.mean_state_dict())
            self.scores["average_weights"] = self.bench.score(adapter, list(self.tasks))

    def from_prompts(self, encoder: TextEncoder | None) -> None:
        """Rows 5 and 6, which need no generator but a text encoder."""
        reason = "no text encoder was given" if self.adapted else _NO_ADAPTERS
        nearest, ridge = (self._wanted(key, encoder if self.adapted else None, reason) for key in ("nearest", "ridge"))
        if encoder is None or not self.adapted:
            return
        if nearest:
            found = nearest_tasks(encoder, self.prompts, {name: self.prompted[name] for name in self.adapted})
            self.details["nearest"] = found
            self._score_each("nearest", lambda task: self._last_checkpoint(found[task]))
        if ridge and len(self.adapted) < 3:
            self.not_measured["ridge"] = "it needs at least 3 training tasks with adapters"
        elif ridge:
            baseline = RidgeBaseline.fit(self._training, encoder)
            self.details["ridge"] = {
                "penalty": baseline.penalty,
                "left_out_error": {f"{penalty:g}": error for penalty, error in baseline.errors.items()},
            }
            self._score_each("ridge", lambda task: baseline.write(encoder, self.prompts[task]))

    def multi_task(self, source: AdapterSource | None) -> None:
        """Row 7."""
        if self._wanted("multi_task", source, "no multi_task_adapter was given") and source is not None:
            self.scores["multi_task"] = self.bench.score(adapter_of(source), list(self.tasks))

    def generated(self, generator: AdapterGenerator) -> None:
        """Row 8."""
        if self._wanted("generated"):
            self.costs.update(self._generate_and_score("generated", generator))

    def other(self, key: str, generator: AdapterGenerator) -> None:
        """Another generator's row 8."""
        if self._wanted(key):
            self.costs[key] = self._generate_and_score(key, generator)

    def controls(self, generator: AdapterGenerator, constant: Sequence[str] | None) -> None:
        """Rows 9: the generator with prompts that are not the task's."""
        if self._wanted("shuffled"):
            self._shuffled(generator)
        if self._wanted("junk"):
            junk = {t: junk_prompts(len(p), seed=f"{self.seed} {t}") for t, p in self.prompts.items()}
            try:
                self._score_each("junk", lambda task: write_adapter(generator, junk[task], seed=self.seed))
            except PromptError as error:  # word vectors, for one, know none of it
                self.not_measured["junk"] = f"the generator refuses junk ({error})"
        if self._wanted("constant"):
            lines = list(constant or constant_prompts(training_texts(generator, self.pairs), seed=self.seed))
            self.details["constant"] = {"prompts": lines[:8], "number": len(lines)}
            adapter = write_adapter(generator, lines, seed=self.seed)
            self.scores["constant"] = self.bench.score(adapter, list(self.tasks))

    def ceiling(self) -> None:
        """Row 10."""
        sources = {task: held_out.trained_adapter for task, held_out in self.tasks.items()}
        lacking = [task for task, source in sources.items() if source is None]
        reason = f"no trained_adapter was given for {', '.join(lacking[:3])}" + (" and others" * (len(lacking) > 3))
        if self._wanted("trained", None if lacking else sources, reason):
            given = {task: source for task, source in sources.items() if source is not None}
            self._score_each("trained", lambda task: adapter_of(given[task]))

    def _shuffled(self, generator: AdapterGenerator) -> None:
        texts = held_out_texts(generator, self.tasks, seed=self.seed)
        training = training_texts(generator, self.pairs)
        if len(self.tasks) > 1:
            from_task = self.exchanged
        elif training:
            # The task's name goes into the draw, so that over a leave-one-out it is not always the same other task.
            (task,) = self.tasks
            place = int(Random(f"{self.seed} {task}").random() * len(training))
            from_task = {task: list(training)[place]}
        else:
            self.not_measured["shuffled"] = "there is no other task"
            return
        self.details["shuffled"] = from_task
        others = {**training, **texts}
        self._score_each("shuffled", lambda task: write_adapter(generator, others[from_task[task]], seed=self.seed))

    def _generate_and_score(self, key: str, generator: AdapterGenerator) -> dict[str, Any]:
        module = generator if isinstance(generator, nn.Module) else None
        device = next((parameter.device for parameter in module.parameters()), None) if module is not None else None
        encoder = getattr(generator, "text_encoder", None)  # loaded here, so that no task's time has it
        texts = held_out_texts(generator, self.tasks, seed=self.seed)
        costs: dict[str, Cost] = {}
        sizes: dict[str, int] = {}

        def write(task: str) -> GeneratedAdapter:
            with measured(device) as costs[task]:
                adapter = write_adapter(generator, texts[task], seed=self.seed)
            sizes[task] = adapter_bytes(adapter)
            return adapter

        self._score_each(key, write)
        peaks = [cost.peak_bytes for cost in costs.values() if cost.peak_bytes is not None]
        return {
            "seconds_to_generate": median(cost.seconds for cost in costs.values()),
            "seconds_by_task": {task: cost.seconds for task, cost in costs.items()},
            "peak_bytes_to_generate": max(peaks, default=None),
            "adapter_bytes": max(sizes.values()),
            "generator_bytes": None if module is None else module_bytes(module),
            "text_encoder_bytes": None if encoder is None else module_bytes(encoder.module),
        }

    @property
    def _training(self) -> PromptCheckpointDataset:
        return cast(PromptCheckpointDataset, self.pairs)

    def _last_checkpoint(self, name: str) -> GeneratedAdapter:
        return GeneratedAdapter(self._training.layout, self._training.state_dict(name))

    def _score_each(self, key: str, write: Callable[[str], GeneratedAdapter]) -> None:
        self.scores[key] = {task: self.bench.score(write(task), [task])[task] for task in self._bar(key)}

    def _wanted(self, key: str, given: object = True, reason: str = "") -> bool:
        if key in self.skip:
            self.not_measured[key] = "left out by the caller"
        elif given is None:
            self.not_measured[key] = reason
        return key not in self.not_measured

    def _bar(self, key: str) -> Iterable[str]:
        bar: Iterable[str] = transformers_logging.tqdm(list(self.tasks), desc=key.replace("_", " "))
        return bar
