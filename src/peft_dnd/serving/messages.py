# SPDX-License-Identifier: Apache-2.0
"""What goes over HTTP: the forms of requests and answers."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import Self

from .generators import GENERATOR_NAME
from .tasks import TASK_NAME, Task, TaskPrompts


# A text with more in it than white space.
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
TaskName = Annotated[str, Field(pattern=TASK_NAME, max_length=128)]
_BASE = "The base that the adapter is for, if the generator has several: one of its `bases`, or its model's Hub id."


class FromPrompts(BaseModel):
    """An adapter from prompts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompts: list[Text] = Field(min_length=1, description="Prompts of the task, unlabelled.")
    answers: list[Text] | None = Field(None, description="Their answers, one each, for a generator that reads them.")
    generator: str | None = Field(
        None, pattern=GENERATOR_NAME, max_length=128, description="Name of the generator; the first by default."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides which prompts are read if there are too many.")
    out_of_distribution: Literal["ignore", "shrink", "mean", "refuse"] = Field(
        "ignore",
        description="What to do if the prompts are unlike those of the tasks that the generator was fitted on.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Score above which they are; by default what those tasks give.",
    )
    base: str | None = Field(None, min_length=1, max_length=256, description=_BASE)

    @model_validator(mode="after")
    def _one_answer_each(self) -> Self:
        if self.answers is not None and len(self.answers) != len(self.prompts):
            raise ValueError(f"there are {len(self.prompts)} prompts and {len(self.answers)} answers")
        return self

    def source(self) -> TaskPrompts:
        """The same without its HTTP."""
        answers = None if self.answers is None else tuple(self.answers)
        rest = self.model_dump(exclude={"prompts", "answers"})
        return TaskPrompts(tuple(self.prompts), answers, **rest)


class FromTask(BaseModel):
    """The adapter of a task that has a name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: TaskName = Field(description="The task's name.")
    base: str | None = Field(
        None, min_length=1, max_length=256, description=f"{_BASE} By default the one that the task was put for."
    )


def _which(body: Any) -> str:
    has_task = "task" in body if isinstance(body, dict) else isinstance(body, FromTask)
    return "task" if has_task else "prompts"


Wanted = Annotated[Annotated[FromPrompts, Tag("prompts")] | Annotated[FromTask, Tag("task")], Discriminator(_which)]


class AdapterFacts(BaseModel):
    """What is known of an adapter."""

    id: str = Field(description="Hash of all that its bytes depend on.", pattern="^[0-9a-f]{64}$")
    size: int = Field(description="Bytes of all its files.")
    files: dict[str, int] = Field(description="Its files, and the bytes of each.")
    generator: str = Field(description="Name of the generator that wrote it.")
    revision: str = Field(description="That one's commit, or `sha256:` and the hash of its files.")
    base_model: str | None = Field(description="The base model that it is for.")
    base: str | None = Field(None, description="What the generator calls that base; null if it has one alone.")
    parameters: int = Field(description="How many numbers it holds.")
    rank: int = Field(description="Its largest rank.")
    prompts: int = Field(description="How many prompts it was made from.")
    prompts_sha256: str = Field(description="Their hash.")
    seed: int = Field(description="The seed.")
    out_of_distribution: float | None = Field(
        description="From 0 to 1: how unlike the prompts are to those that the generator knows; null if unknown."
    )
    out_of_distribution_threshold: float | None = Field(
        None, description="Above which score the prompts count as unlike them; null if unknown."
    )
    shrunk_by: float | None = Field(
        description="By what its deviation from the mean adapter was multiplied, if it was."
    )
    created: datetime = Field(description="When it was made.")

    @classmethod
    def of(cls, facts: dict[str, Any]) -> AdapterFacts:
        """As they lie in the cache folder."""
        return cls(**{**facts, "created": datetime.fromtimestamp(facts["created"], timezone.utc)})


class AdapterList(BaseModel):
    """Adapters in the order of their ids."""

    adapters: list[AdapterFacts]
    next: str | None = Field(description="Give this as `after` for more; null at the end.")


class TaskFacts(BaseModel):
    """A task that has a name."""

    task: str = Field(description="The name.")
    adapter: str | None = Field(description="Id of its adapter; null if none was made yet.")
    prompts_remembered: bool = Field(description="Whether the adapter can be made again from the task's name alone.")
    fixed: bool = Field(description="Whether the operator gave it, so that it cannot be changed.")

    @classmethod
    def of(cls, task: Task) -> TaskFacts:
        """As it lies in the cache folder."""
        return cls(task=task.name, adapter=task.adapter, prompts_remembered=task.source is not None, fixed=task.fixed)


class TaskList(BaseModel):
    """All tasks, by name."""

    tasks: list[TaskFacts]


class PolicyFacts(BaseModel):
    """Of which kinds the bounds of a generator's policy are; what they say of prompts is told by refusals alone."""

    parts: list[str] = Field(
        description="`norms` of updates, modules that are `never_written`, `refused` classes of prompts, a "
        "`classifier` that must be there, a behaviour `gate` on the base."
    )
    gate_checked: bool | None = Field(description="Whether adapters pass the gate here; null if there is none.")
    sha256: str = Field(description="Hash of the policy, which adapters' provenance has too.")


class GeneratorFacts(BaseModel):
    """A generator that is served."""

    generator: str = Field(description="Its name.")
    revision: str = Field(description="Its commit, or `sha256:` and the hash of its files.")
    base_model: str | None = Field(description="The base model that its adapters are for; the first's of several.")
    bases: list[str] = Field(description="What it calls its bases; where there are several, a request names one.")
    reads_answers: bool = Field(description="Whether prompts need answers.")
    tells_out_of_distribution: bool = Field(description="Whether adapters have a score.")
    policy: PolicyFacts | None = Field(description="What the generator's policy bounds; null if it has none.")


class GeneratorList(BaseModel):
    """The generators; the first is taken where none is named."""

    generators: list[GeneratorFacts]


class Health(BaseModel):
    """How the service is."""

    status: Literal["live", "ready"]
