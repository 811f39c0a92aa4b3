# SPDX-License-Identifier: Apache-2.0
"""`AdapterPool`: the adapters of many tasks on one base model, a few of them in it at a time."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..adapters.matching import warn_if_other_base
from ..errors import AdapterPoolError, LayoutError, did_you_mean
from ..generator.modeling import PromptConditionedLoraGenerator
from ..text.out_of_distribution import check_action
from .places import Places


# What PEFT calls the base model without any adapter, in `adapter_names`.
PLAIN_BASE = "__base__"


class _Task:
    """A task of a pool, and what its adapter is made from. Two are the same only if they are one object."""

    def __init__(
        self,
        name: str,
        prompts: tuple[str, ...] = (),
        answers: tuple[str, ...] | None = None,
        given: GeneratedAdapter | None = None,
    ) -> None:
        self.name = name
        self.prompts = prompts
        self.answers = answers
        self.given = given
        self._made: weakref.ref[GeneratedAdapter] | None = None

    @property
    def adapter(self) -> GeneratedAdapter | None:
        """The adapter, if it was given, or someone still holds what was made."""
        return self.given or (self._made() if self._made is not None else None)

    def remember(self, adapter: GeneratedAdapter) -> None:
        """Find this adapter again for as long as someone holds it."""
        self._made = weakref.ref(adapter)


class AdapterPool:
    """The adapters of many tasks on one base model, a few of them in the model at a time.

    The model gets places for `size` adapters, all at once, so that its structure never changes afterwards. A task that
    has none of them when it is asked for takes that of the task which was used longest ago: its matrices are copied
    over the other's. They are written by the generator, unless the adapter was given or is still in memory.

    Tasks are used within a `with` block, in any thread. One block runs at a time, because which adapter a model uses
    is a matter of the whole model; adapters for others are generated meanwhile. Blocks may stand inside one another.
    In asyncio do not await within a block: have a thread run it, with `asyncio.to_thread`.

        pool = AdapterPool(base_model, generator, size=8)
        pool.add("law", law_prompts)
        with pool.use("law") as model:
            model.generate(**inputs)
        with pool.for_rows(["law", "medicine", "law"]) as names:   # each row of a batch with its own adapter
            pool.model.generate(**batch, adapter_names=names)

    Args:
        model: The base model, or a `PeftModel`, not yet compiled. A base model is wrapped; `pool.model` is the result.
        generator: Writes the adapters of tasks that are added as prompts.
        layout: Without a generator: the layout of the adapters that will be added.
        size: How many adapters are in the model at once. Each takes `layout.num_parameters` numbers on the model's
            device, in float32 as PEFT has them.
        kept: How many generated adapters stay in main memory besides, the last ones used, so that their return to the
            model needs no generating.
        max_rank: Adapters of any rank up to this one, and any alpha, may be added, if they adapt the same modules.
            PEFT's `prepare_model_for_compiled_hotswap` makes room for them. `None`: just the layout's.
        seed: As in [`PromptConditionedLoraGenerator.generate_adapter`].
        out_of_distribution: As there: what to do about prompts that do not belong.
        threshold: As there.

    Attributes:
        counts: How often a task was in the model already (`"hits"`), was put into it (`"swaps"`), and had to be
            generated for that (`"generated"`).

    Raises:
        AdapterPoolError: If neither generator nor layout is given, or `size`, `kept` or `max_rank` is impossible.
        BaseModelMismatchError: If adapters of the layout do not fit the base model, which is left untouched; or the
            model is one that PEFT cannot switch row by row: compiled, mixed, or with transformers' own adapters.
        LayoutError: If the model has another pool's places.
    """

    def __init__(
        self,
        model: nn.Module,
        generator: PromptConditionedLoraGenerator | None = None,
        *,
        layout: AdapterLayout | None = None,
        size: int = 8,
        kept: int = 0,
        max_rank: int | None = None,
        seed: int = 0,
        out_of_distribution: str | None = None,
        threshold: float | None = None,
    ) -> None:
        if generator is not None:
            layout = generator.config.adapter_layout
        if layout is None:
            raise AdapterPoolError("A pool needs a generator, or the layout of the adapters that it is to hold.")
        check_action(out_of_distribution, threshold)
        _check_sizes(size, kept, max_rank, layout)
        self._generator = generator
        self._options: dict[str, Any] = {
            "seed": seed,
            "out_of_distribution": out_of_distribution,
            "threshold": threshold,
        }
        self._places = Places(model, layout, size, max_rank)
        self._free = list(self._places.names)
        self._num_kept = kept
        self.counts: Counter[str] = Counter(hits=0, swaps=0, generated=0)
        self._tasks: dict[str, _Task] = {}
        # Both with the one used longest ago first.
        self._resident: OrderedDict[_Task, str] = OrderedDict()
        self._kept: OrderedDict[_Task, GeneratedAdapter] = OrderedDict()
        self._in_use: Counter[_Task] = Counter()
        # The asyncio tasks whose blocks are open, or `None`, from the outermost in.
        self._open: list[object] = []
        # Taken in this order, if more than one: generating, running, state. `_in_use` and `_open` change under
        # `_running` alone.
        self._running = threading.RLock()
        # A text encoder that reads prompts with the very base model switches its adapters off meanwhile.
        self._generating = self._running if _reads_with(generator, self.model) else threading.RLock()
        self._state = threading.Lock()

    @property
    def model(self) -> PeftModel:
        """The model with the pool's adapters in it."""
        return self._places.model

    @property
    def size(self) -> int:
        """How many adapters are in the model at once."""
        return len(self._places.names)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks, in the order in which they were added."""
        with self._state:
            return tuple(self._tasks)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the tasks whose adapters are in the model now, the one used longest ago first."""
        with self._state:
            return tuple(task.name for task in self._resident if self._tasks.get(task.name) is task)

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def add(self, task: str, prompts: Sequence[str], *, answers: Sequence[str] | None = None) -> None:
        """Add a task, or replace it: its adapter is generated when it is first used.

        Args:
            task: Its name.
            prompts: Its unlabelled prompts.
            answers: Their answers, for a generator that reads them.

        Raises:
            AdapterPoolError: If the pool has no generator.
            PromptError: If there are no prompts, or empty ones; or answers are missing, or given and not read.
            PromptTypeError: If they are not strings.
        """
        if self._generator is None:
            raise AdapterPoolError(
                f"Task {task!r} cannot be added as prompts: the pool has no generator. Make it with one, or use "
                "add_adapter."
            )
        self._generator.condition_texts(prompts, answers, seed=self._options["seed"])
        self._put(_Task(task, tuple(prompts), None if answers is None else tuple(answers)))

    def add_adapter(self, task: str, adapter: GeneratedAdapter) -> None:
        """Add a task, or replace it, with an adapter at hand; the pool holds it in main memory.

        Args:
            task: Its name.
            adapter: The adapter. `GeneratedAdapter.from_pretrained` reads one that was saved, also a trained one.

        Raises:
            LayoutError: If its layout is not the pool's.
        """
        difference = self._places.difference(adapter.layout)
        if difference is not None:
            raise LayoutError(
                f"The adapter of task {task!r} does not go into this pool; first is the pool's layout, second the "
                f"adapter's: {difference}. Make a pool for its layout"
                + (", or with max_rank if only ranks and alphas differ." if self._places.max_rank is None else ".")
            )
        warn_if_other_base(self.model, adapter.layout)
        self._put(_Task(task, given=adapter))

    def remove(self, task: str) -> None:
        """Forget a task. A block that is using it is not disturbed.

        Raises:
            AdapterPoolError: If there is no such task.
        """
        with self._state:
            self._forget(self._find(task))

    @contextmanager
    def use(self, task: str | None) -> Iterator[PeftModel]:
        """Within this block the model has the adapter of a task.

        Args:
            task: The task; `None` for the base model without an adapter.

        Returns:
            A context that gives `pool.model`.

        Raises:
            AdapterPoolError: If there is no such task, or all places are taken by blocks around this one.
            OutOfDistributionError: If the prompts do not belong, and that is to be refused.
        """
        with self._holding([] if task is None else [task]) as names, self._places.switched(names.get(task or "")):
            yield self.model

    @contextmanager
    def for_rows(self, tasks: Iterable[str | None]) -> Iterator[list[str]]:
        """Within this block the model has the adapters of several tasks, to be used row by row.

        Args:
            tasks: The task of each row; `None` for the base model without an adapter. Not more different ones than
                `size`.

        Returns:
            A context that gives a name for each row: PEFT's `adapter_names`, for `pool.model(...)` and
            `pool.model.generate(...)` in eval mode.

        Raises:
            AdapterPoolError: If there is no such task, or there are more than places.
            OutOfDistributionError: If prompts do not belong, and that is to be refused.
        """
        rows = list(tasks)
        asked = [task for task in dict.fromkeys(rows) if task is not None]
        with self._holding(asked) as names, self._places.switched(self._places.active or self._places.names[0]):
            # Whichever is active, one has to be: PEFT passes over the names where all are disabled.
            yield [PLAIN_BASE if task is None else names[task] for task in rows]

    @contextmanager
    def _holding(self, names: Sequence[str]) -> Iterator[dict[str, str]]:
        """Have the adapters of tasks in the model, and the model for this thread alone; gives task -> adapter_name."""
        with self._state:
            tasks = [self._find(name) for name in names]
        if len(tasks) > self.size:
            raise AdapterPoolError(
                f"The pool holds {self.size} adapters at once, and {len(tasks)} are asked for: {', '.join(names)}. "
                "Ask for fewer, or make it with a larger size."
            )
        made = self._take_the_model(tasks)
        owner = _asyncio_task()
        mixed = bool(self._open) and self._open[-1] is not owner
        self._open.append(owner)
        try:
            if mixed:
                raise AdapterPoolError(
                    "Another asyncio task of this thread is within a block of this pool, and would find this one's "
                    "adapter when it goes on. Do not await within a block: run it whole with asyncio.to_thread."
                )
            self._in_use.update(tasks)
            taken = len(+self._in_use)
            if taken > self.size:
                raise AdapterPoolError(
                    f"The pool holds {self.size} adapters at once, and blocks that stand inside one another use "
                    f"{taken}. End the outer ones first, or make it with a larger size."
                )
            yield {task.name: self._place(task, made.get(task)) for task in tasks}
        finally:
            if not mixed:
                self._in_use.subtract(tasks)
            self._open.pop()
            self._running.release()

    def _take_the_model(self, tasks: Sequence[_Task]) -> dict[_Task, GeneratedAdapter]:
        """Wait for the model, with the adapters in hand of those tasks that are not in it."""
        made: dict[_Task, GeneratedAdapter] = {}
        while True:
            # Made before the model is taken, so that others can use it meanwhile. One that was there may be gone by
            # the time it is this thread's turn; that one is made then, and so on, each at most once.
            for task in self._missing(tasks, made):
                adapter = self._adapter_of(task)
                if adapter is not None:
                    made[task] = adapter
            self._running.acquire()
            if not self._missing(tasks, made):
                return made
            self._running.release()

    def _missing(self, tasks: Sequence[_Task], made: dict[_Task, GeneratedAdapter]) -> list[_Task]:
        with self._state:
            return [task for task in tasks if task not in self._resident and task not in made]

    def _adapter_of(self, task: _Task) -> GeneratedAdapter | None:
        """The adapter of a task, generated if need be; `None` if it has come into the model while this waited."""
        adapter = task.adapter
        if task.given is None:
            if adapter is None:
                with self._generating:
                    # Who made it meanwhile may be done with it: then it is in the model, and nobody holds it.
                    adapter = task.adapter
                    if adapter is None and self._missing([task], {}):
                        adapter = self._generate(task)
            if adapter is not None:
                self._keep(task, adapter)
        return adapter

    def _generate(self, task: _Task) -> GeneratedAdapter:
        assert self._generator is not None
        adapter = self._generator.generate_adapter(task.prompts, answers=task.answers, **self._options)
        task.remember(adapter)
        with self._state:
            self.counts["generated"] += 1
        return adapter

    def _keep(self, task: _Task, adapter: GeneratedAdapter) -> None:
        with self._state:
            if self._tasks.get(task.name) is not task:
                return
            self._kept[task] = adapter
            self._kept.move_to_end(task)
            while len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)

    def _place(self, task: _Task, adapter: GeneratedAdapter | None) -> str:
        """Make sure that a task's adapter is in the model, and say under which name."""
        with self._state:
            if task in self._resident:
                self._resident.move_to_end(task)
                self.counts["hits"] += 1
                return self._resident[task]
            if not self._free:
                oldest = next(other for other in self._resident if not self._in_use[other])
                self._free.append(self._resident.pop(oldest))
            name = self._free[-1]
        assert adapter is not None
        self._places.write(name, adapter)  # if it is interrupted, the place counts as free
        with self._state:
            self._free.remove(name)
            self._resident[task] = name
            self.counts["swaps"] += 1
        return name

    def _find(self, name: str) -> _Task:
        if name not in self._tasks:
            raise AdapterPoolError(
                f"The pool has no task {name!r}; it has {len(self._tasks)}.{did_you_mean(name, self._tasks)} Add it "
                "first, with add or add_adapter."
            )
        return self._tasks[name]

    def _put(self, task: _Task) -> None:
        if not isinstance(task.name, str) or not task.name:
            raise AdapterPoolError(f"A task's name must be a string that is not empty, got {task.name!r}.")
        with self._state:
            if task.name in self._tasks:
                self._forget(self._tasks[task.name])
            self._tasks[task.name] = task

    def _forget(self, task: _Task) -> None:
        del self._tasks[task.name]
        self._kept.pop(task, None)
        if task in self._resident:  # its place is the next to be taken, once no block uses it
            self._resident.move_to_end(task, last=False)


def _check_sizes(size: int, kept: int, max_rank: int | None, layout: AdapterLayout) -> None:
    for name, value, least in (("size", size, 1), ("kept", kept, 0), ("max_rank", max_rank, layout.max_rank)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise AdapterPoolError(f"An AdapterPool's {name} must be a whole number, at least {least}; got {value!r}.")


def _asyncio_task() -> object:
    """The asyncio task that is running in this thread; `None` if there is none."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _reads_with(generator: PromptConditionedLoraGenerator | None, model: nn.Module) -> bool:
    """Whether a generator's text encoder is, or holds, a part of a model."""
    parts = {id(part) for part in model.modules()}
    return generator is not None and any(id(part) in parts for part in generator.text_encoder.module.modules())
