# SPDX-License-Identifier: Apache-2.0
"""Classes of prompts that a generator refuses, told by examples and the generator's own reading of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import PolicyError
from .bounds import FALSE_ALARMS, FEWEST_TASKS, check_false_alarms, upper_bound
from .prompt_space import PromptSpace


# Texts -> where they lie, float32 (n, C), of length 1, as the text encoder has it.
Read = Callable[[Sequence[str]], Tensor]
# A prompt -> the texts by which it is judged.
Views = Callable[[str], Sequence[str]]
_MOST_OF_A_CLASS = 1024
_MOST_ALLOWED = 4096
_ROWS_AT_ONCE = 1024
_NUMBERS = ("threshold", "usual", "between_tasks", "within_tasks", "caught")


@dataclass(frozen=True)
class RefusedClass:
    """A class of prompts that is refused.

    Attributes:
        name: What it is called in refusals and on the card.
        threshold: The score above which a prompt is of the class; see [`RefusedPrompts.scores`].
        usual: The mean score of the training tasks' prompts.
        between_tasks: How far the mean of a task's prompts may be above it, however many they are.
        within_tasks: How far a single prompt's may be besides; that of n falls with the root of n.
        examples: From how many examples it is known.
        caught: The share of the examples that would be refused if they were not among them themselves.
    """

    name: str
    threshold: float
    usual: float
    between_tasks: float
    within_tasks: float
    examples: int
    caught: float

    def mean_threshold(self, count: int) -> float:
        """The mean score above which so many prompts are of the class together, though none may be by itself."""
        return max(0.0, self.usual + sqrt(self.between_tasks**2 + self.within_tasks**2 / count))


@dataclass(frozen=True, eq=False)
class RefusedPrompts:
    """What is kept of examples of refused classes, and of prompts that are welcome.

    Attributes:
        classes: The classes.
        points: Where each class's examples lie in the space, float16 (n, K).
        allowed: Where prompts of the training tasks lie there, float16 (m, K).
        space: The space in which prompts are compared, learned from the training tasks.
        tasks: On how many training tasks the thresholds were calibrated.
        false_alarms: The probability with which prompts of a new task of the training tasks' kind are refused, for
            each class.
    """

    classes: tuple[RefusedClass, ...]
    points: tuple[Tensor, ...]
    allowed: Tensor
    space: PromptSpace
    tasks: int
    false_alarms: float

    @classmethod
    def fit(
        cls,
        examples: Mapping[str, Sequence[str]],
        allowed: Mapping[str, Sequence[str]],
        read: Read,
        views: Views,
        *,
        false_alarms: float = FALSE_ALARMS,
    ) -> RefusedPrompts:
        """Take examples of the classes, and derive their thresholds.

        Prompts are compared in the [`PromptSpace`][peft_dnd.policy.prompt_space.PromptSpace] of the training tasks, in
        which what the prompts of one task differ in counts for little.

        Each training task in turn is taken for new, and its prompts' scores noted. The threshold for a prompt is the
        [`upper_bound`][peft_dnd.policy.bounds.upper_bound] of the tasks' highest, at half of `false_alarms`. The other
        half goes to the mean score of all prompts, which tells far paraphrases of a class where no single one gives it
        away: that of n prompts may be above the tasks' mean by t sqrt(s² (1 + 1 / T) + w² / n), with s the deviation
        of the T tasks' means, w that of prompts within tasks and t the quantile of Student's distribution. Both are 0
        at the least.

        Args:
            examples: Class -> prompts of it, two or more.
            allowed: Training task -> its prompts, of three tasks or more; none of them of a refused class.
            read: Reads texts.
            views: Gives the texts by which a prompt is judged.
            false_alarms: See the class.

        Raises:
            PolicyError: If there are too few examples or tasks.
        """
        check_false_alarms(false_alarms)
        if not examples or len(allowed) < FEWEST_TASKS:
            raise PolicyError(
                f"Refused classes need examples, and the prompts of {FEWEST_TASKS} training tasks or more to be told "
                f"from; got {len(examples)} class(es) and {len(allowed)} task(s)."
            )
        few = [name for name, prompts in examples.items() if len(set(prompts)) < 2]
        if few:
            raise PolicyError(
                f"The refused class {few[0]!r:.80} needs two different examples at least; a few dozen do."
            )
        tasks = [
            _Texts.of(prompts[: _share(_MOST_ALLOWED, len(allowed))], read, views) for prompts in allowed.values()
        ]
        classes = {
            name: _Texts.of(list(dict.fromkeys(prompts))[:_MOST_OF_A_CLASS], read, views)
            for name, prompts in examples.items()
        }
        space = PromptSpace.fit([task.points for task in tasks], [one.points for one in classes.values()])
        tasks = [task.placed(space) for task in tasks]
        found = []
        points = []
        welcome = torch.cat([task.points for task in tasks])
        for name, texts in classes.items():
            kept = texts.placed(space)
            seen = [task.scores(kept.points, _others(tasks, number)).double() for number, task in enumerate(tasks)]
            found.append(_derived(name, seen, kept.scores_left_out(welcome), false_alarms))
            points.append(_distinct(kept.points))
        return cls(tuple(found), tuple(points), _distinct(welcome), space, len(tasks), false_alarms)

    def scores(self, prompts: Sequence[str], read: Read, views: Views) -> Tensor:
        """How much more prompts are like the examples of each class than like the training tasks' prompts.

        A text's score is its cosine similarity in the space to the nearest example less that to the nearest prompt of
        a training task, and a prompt's the highest of the texts by which it is judged.

        Args:
            prompts: Prompts.
            read: Reads texts.
            views: Gives the texts by which a prompt is judged.

        Returns:
            (n, number of classes), float32, from -2 to 2.
        """
        given = _Texts.of(prompts, read, views)
        if given.points.shape[1] != self.space.width:
            raise PolicyError(
                f"The policy's refused classes were read with states of width {self.space.width}, and this text "
                f"encoder's have {given.points.shape[1]}. Use the text encoder that the policy was made with."
            )
        given, allowed = given.placed(self.space), self.allowed.float()
        return torch.stack([given.scores(points.float(), allowed) for points in self.points], 1)

    def refused(self, prompts: Sequence[str], read: Read, views: Views) -> dict[str, int]:
        """The classes that any prompt is of, or all of them together, and how many are; empty if none is.

        Returns:
            Class -> number of prompts, the largest first; all of them where only their mean gives them away.
        """
        counts = {}
        for one, scores in zip(self.classes, self.scores(prompts, read, views).T, strict=True):
            above = int((scores > one.threshold).sum())
            if above or float(scores.mean()) > one.mean_threshold(len(scores)):
                counts[one.name] = above or len(scores)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows of it: all but where the texts lie."""
        classes = {
            one.name: {name: value for name, value in asdict(one).items() if name != "name"} for one in self.classes
        }
        return {"classes": classes, "tasks": self.tasks, "false_alarms": self.false_alarms}

    def tensors(self) -> dict[str, Tensor]:
        """The rest, under the names of the policy's file."""
        named = {f"refused.{number}": points for number, points in enumerate(self.points)}
        space = {"refused.axes": self.space.axes, "refused.scales": self.space.scales}
        return {**named, "refused.allowed": self.allowed, **space}

    @classmethod
    def from_parts(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RefusedPrompts:
        """Rebuild it from what `to_dict` and `tensors` gave.

        Raises:
            KeyError: Or `TypeError` or `ValueError`, if a part is missing or of another form.
        """
        classes = tuple(
            RefusedClass(str(name), examples=int(facts["examples"]), **{one: float(facts[one]) for one in _NUMBERS})
            for name, facts in data["classes"].items()
        )
        points = tuple(tensors[f"refused.{number}"] for number in range(len(classes)))
        allowed = tensors["refused.allowed"]
        space = PromptSpace(tensors["refused.axes"], tensors["refused.scales"])
        if not space.is_usable():
            raise ValueError("the space of the prompts is none")
        width = space.axes.shape[1]
        for found in (*points, allowed):
            usable = found.dim() == 2 and found.is_floating_point() and found.shape[-1] == width and len(found)
            if not usable or not torch.isfinite(found.float()).all():
                raise ValueError("points are not of one width, or not finite")
        if not classes or not all(isfinite(getattr(one, name)) for one in classes for name in _NUMBERS):
            raise ValueError("no class, or a threshold that is no number")
        return cls(classes, points, allowed, space, int(data["tasks"]), float(data["false_alarms"]))


@dataclass(frozen=True, eq=False)
class _Texts:
    """The views of some prompts, one prompt's behind the other's: where they lie, and how many each prompt has."""

    points: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, prompts: Sequence[str], read: Read, views: Views) -> _Texts:
        seen = [views(prompt) for prompt in prompts]
        distinct = list(dict.fromkeys(text for texts in seen for text in texts))
        place = {text: number for number, text in enumerate(distinct)}
        points = read(distinct).detach().float().cpu()
        return cls(points[[place[text] for texts in seen for text in texts]], [len(texts) for texts in seen])

    def placed(self, space: PromptSpace) -> _Texts:
        """The same in a space."""
        return replace(self, points=space.place(self.points))

    def scores(self, examples: Tensor, allowed: Tensor) -> Tensor:
        """Each prompt's score, (n,)."""
        rows = self.points.split(_ROWS_AT_ONCE)
        margins = torch.cat([(part @ examples.T).amax(1) - (part @ allowed.T).amax(1) for part in rows])
        return torch.stack([part.amax() for part in margins.split(self.sizes)])

    def scores_left_out(self, allowed: Tensor) -> Tensor:
        """Each prompt's score if it were not among these itself, (n,)."""
        owner = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        similarity = (self.points @ self.points.T).masked_fill(owner[:, None] == owner, -1.0)
        margins = similarity.amax(1) - (self.points @ allowed.T).amax(1)
        return torch.stack([part.amax() for part in margins.split(self.sizes)])


def _derived(name: str, seen: Sequence[Tensor], left_out: Tensor, false_alarms: float) -> RefusedClass:
    """A class's thresholds from the scores of each training task's prompts, and of its own examples."""
    from scipy.special import stdtrit

    count, means = len(seen), torch.stack([scores.mean() for scores in seen])
    # What is nearer to welcome prompts than to the examples is not refused, however strange that is.
    threshold = max(0.0, float(upper_bound(torch.stack([scores.amax() for scores in seen]), false_alarms / 2)))
    within = torch.cat([scores - scores.mean() for scores in seen]).square().mean().sqrt()
    quantile = float(stdtrit(count - 1, 1 - false_alarms / 2))
    found = RefusedClass(
        name,
        threshold,
        float(means.mean()),
        quantile * float(means.std()) * sqrt(1 + 1 / count),
        quantile * float(within),
        len(left_out),
        0.0,
    )
    return replace(found, caught=float((left_out > min(threshold, found.mean_threshold(1))).float().mean()))


def _distinct(points: Tensor) -> Tensor:
    return torch.unique(points.half(), dim=0)


def _others(tasks: Sequence[_Texts], left_out: int) -> Tensor:
    return torch.cat([task.points for number, task in enumerate(tasks) if number != left_out])


def _share(most: int, tasks: int) -> int:
    return max(2, most // (4 * tasks))
