# SPDX-License-Identifier: Apache-2.0
"""Whether a task's prompts are like those of the tasks that a generator was fitted on.

The strangeness of a prompt is its cosine distance to the nearest prompt of the fitted tasks, and that of a prompt set
the mean over its prompts (nearest neighbours as in arXiv 2204.06507, with one neighbour). What is usual is learned by
leaving out each fitted task in turn and measuring it against all others, as if it were new: score and threshold both
come from that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil, sqrt

import torch
from torch import Tensor

from ..errors import CorruptFileError, GeneratorConfigError, did_you_mean
from ..storage.files import PathLike, read_safetensors, read_safetensors_metadata, write_safetensors
from .token_states import TokenStates


REFERENCE_NAME = "prompt_reference.safetensors"
ACTIONS = ("ignore", "warn", "shrink", "mean", "refuse")
# Of new tasks like the fitted ones, the share that the default threshold takes for unlike them.
FALSE_ALARMS = 0.05
FEWEST_TASKS = 3
_MOST_PER_TASK = 128
_MOST_ALTOGETHER = 8192
_ROWS_AT_ONCE = 1024
_FEWEST_AXES = 16
_TASKS = "tasks"


class OutOfDistributionWarning(UserWarning):
    """A generator was given prompts that are unlike those of the tasks that it was fitted on."""


def prompt_points(states: TokenStates) -> Tensor:
    """Where prompts lie: the mean of each one's token states, of length 1, float32 (n, C)."""
    return torch.nn.functional.normalize(states.mean(), dim=1)


def read_points(states: Tensor, mask: Tensor) -> Tensor:
    """The same for the states that a decoder reads, (N, L, C) with mask (N, L); repeated prompts count once."""
    used = mask.any(1)
    counts = mask[used].sum(1, keepdim=True)
    means = (states[used].float() * mask[used][..., None]).sum(1) / counts
    return torch.unique(torch.nn.functional.normalize(means, dim=1), dim=0)


@dataclass(frozen=True, eq=False)
class PromptReference:
    """What a generator keeps of its fitted tasks' prompts, to tell whether new ones are like them.

    Make one with [`fit`][PromptReference.fit].

    Attributes:
        points: Where the fitted tasks' prompts lie, float16 (n, K), at most 128 of each task and 8192 altogether; K is
            C, or the number of axes.
        distances: How far each is from the nearest prompt of another task, float32 (n,).
        counts: How many there are of each task, int64 (T,).
        tasks: The tasks' names; empty where an earlier version of the library has kept none.
        axes: Where all of C would take too many bytes, the directions by which the points are kept, float16 (C, K).
    """

    points: Tensor
    distances: Tensor
    counts: Tensor
    tasks: tuple[str, ...] = ()
    axes: Tensor | None = None
    # (prompts, false alarms) -> the threshold, which takes a while with thousands of tasks.
    _thresholds: dict[tuple[int, float], float] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def fit(cls, points: Mapping[str, Tensor], *, most_bytes: int | None = None) -> PromptReference | None:
        """Take the prompts of the fitted tasks.

        Where the points would take more than `most_bytes` they are kept by their K principal directions alone (those
        of the singular value decomposition, not centred), as many as there is room for. What a new prompt has in other
        directions adds nothing to its likeness to a known one, which has next to nothing there.

        Args:
            points: Task -> where its prompts lie, (n, C), of length 1; of more than [`prompts_kept`] the first count.
            most_bytes: How many bytes the points may take, with no fewer than 16 directions; `None` sets no bound.

        Returns:
            `None` if there are fewer than three tasks: then nothing can be known of how tasks differ.
        """
        if len(points) < FEWEST_TASKS:
            return None
        kept = [rows[: prompts_kept(len(points))].detach().float().cpu() for rows in points.values()]
        counts = torch.tensor([len(rows) for rows in kept])
        joined = torch.cat(kept)
        axes = _principal_axes(joined, most_bytes)
        joined = joined if axes is None else joined @ axes.float()
        task = torch.repeat_interleave(torch.arange(len(kept)), counts)
        distances = [
            _nearest(rows, joined, own[:, None] == task)
            for rows, own in zip(joined.split(_ROWS_AT_ONCE), task.split(_ROWS_AT_ONCE), strict=True)
        ]
        return cls(joined.half(), torch.cat(distances), counts, tuple(points), axes)

    def place(self, points: Tensor) -> Tensor:
        """Prompts as `points` holds the fitted tasks': along the axes, if there are any.

        Args:
            points: Where the prompts lie, (n, C), of length 1.

        Returns:
            float32 (n, K), on the CPU.

        Raises:
            GeneratorConfigError: If they are of another width.
        """
        rows, width = points.detach().float().cpu(), (self.points.T if self.axes is None else self.axes).shape[0]
        if rows.shape[1] != width:
            raise GeneratorConfigError(
                f"The prompts' states have width {rows.shape[1]}, those of the fitted tasks {width}. Use the text "
                "encoder that the generator was fitted with."
            )
        return rows if self.axes is None else rows @ self.axes.float()

    def strangeness(self, points: Tensor) -> float:
        """The mean distance of prompts to the nearest prompt of a fitted task, from 0 to 2.

        Args:
            points: Where the prompts lie, (n, C), of length 1.
        """
        rows, known = self.place(points), self.points.float()
        return float(torch.cat([_nearest(part, known) for part in rows.split(_ROWS_AT_ONCE)]).mean())

    def nearest_tasks(self, points: Tensor) -> dict[str, float]:
        """The fitted tasks that prompts lie nearest to.

        Args:
            points: Where the prompts lie, (n, C), of length 1.

        Returns:
            Name of a task, `"task 7"` where no name is known -> the share of the prompts whose nearest known prompt is
            one of its; the largest share first, together 1.
        """
        rows, known = self.place(points), self.points.float()
        nearest = torch.cat([(part @ known.T).argmax(1) for part in rows.split(_ROWS_AT_ONCE)])
        task = torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)[nearest]
        found = torch.bincount(task, minlength=len(self.counts))
        order = found.argsort(descending=True, stable=True)[: int((found > 0).sum())].tolist()
        return {self.tasks[i] if self.tasks else f"task {i}": int(found[i]) / len(rows) for i in order}

    def score(self, points: Tensor) -> float:
        """How strange prompts are, as a probability: with which a new task of the fitted tasks' kind would be less so.

        For prompts of new tasks like the fitted ones it is spread evenly from 0 to 1, so that one in twenty of them
        is above 0.95; for others it is near 1. Between tasks, strangeness is taken for normally distributed with the
        fitted tasks' mean and deviation, of which one knows only so much from T tasks (Student's t with T - 1 degrees
        of freedom); within a task a prompt's deviation is one of those seen, divided by the square root of the number
        of prompts. Few tasks, or few prompts, therefore give scores further from 1.

        Args:
            points: Where the prompts lie, (n, C), of length 1; any number from 1.

        Returns:
            A number from 0 to 1.
        """
        return self._score(self.strangeness(points), len(points))

    def threshold(self, count: int, false_alarms: float = FALSE_ALARMS) -> float:
        """The score above which so many prompts are unlike those of the fitted tasks, by conformal prediction.

        If a new task is exchangeable with the T fitted ones, and each of these T + 1 is measured against the others,
        the new one is as likely to have any rank of strangeness, however that is distributed; so the chance that it is
        stranger than the k-th least strange of the others, k = ceil((T + 1) (1 - false_alarms)), is at most
        `false_alarms` (full conformal prediction, arXiv 2107.07511). The fitted tasks are measured here, each with so
        many of its prompts, without the new one among the others, which can only raise their distances and hence the
        threshold: it is the score of the k-th of them. Tasks of which fewer prompts are kept than are asked for vary
        more, which raises it too. With fewer than 1 / `false_alarms` - 1 tasks there is no such k, and the threshold
        is what the score claims for itself: 1 - `false_alarms`.

        Args:
            count: How many prompts there are, at least 1.
            false_alarms: The share of new tasks like the fitted ones that may be above it, between 0 and 1.

        Returns:
            A number from 0 to 1.

        Raises:
            GeneratorConfigError: If a number is out of range.
        """
        if count < 1 or not 0 < false_alarms < 1:
            raise GeneratorConfigError(
                f"A threshold is for at least 1 prompt and a share of false alarms between 0 and 1, got {count} and "
                f"{false_alarms}."
            )
        key = (count, false_alarms)
        if key not in self._thresholds:
            self._thresholds[key] = self._threshold(count, false_alarms)
        return self._thresholds[key]

    def _threshold(self, count: int, false_alarms: float) -> float:
        rank = ceil((len(self.counts) + 1) * (1 - false_alarms) - 1e-9)
        if rank > len(self.counts):
            return 1 - false_alarms
        draw = random.Random(f"prompts of tasks left out {count}")
        left_out = sorted(
            float(own[draw.sample(range(len(own)), min(count, len(own)))].mean())
            for own in self.distances.split(self.counts.tolist())
        )
        return self._score(left_out[rank - 1], count)

    def _score(self, strangeness: float, count: int) -> float:
        from scipy.special import stdtr

        tasks = len(self.counts)
        own = self.distances.double().split(self.counts.tolist())
        means = torch.stack([distances.mean() for distances in own])
        within = torch.cat([distances - mean for distances, mean in zip(own, means, strict=True)])
        # Tasks that are all equally strange leave no deviation to divide by.
        between = max(float(means.std()), 1e-4) * sqrt(1 + 1 / tasks)
        excess = strangeness - means.mean() - within / sqrt(count)
        return float(stdtr(tasks - 1, (excess / between).numpy()).mean())

    def save(self, path: PathLike) -> None:
        """Write it to a safetensors file."""
        tensors = {"points": self.points, "distances": self.distances, "counts": self.counts}
        if self.axes is not None:
            tensors["axes"] = self.axes
        write_safetensors(path, tensors, (_TASKS, json.dumps(self.tasks)))

    @classmethod
    def load(cls, path: PathLike) -> PromptReference:
        """Read what `save` wrote.

        Raises:
            CorruptFileError: If the file is unreadable or something else.
        """
        found = read_safetensors(path)
        if set(found) - {"axes"} == {"points", "distances", "counts"} and _belong_together(**found):
            with suppress(ValueError):
                tasks = json.loads(read_safetensors_metadata(path).get(_TASKS, "[]"))
                if isinstance(tasks, list) and len(tasks) in (0, len(found["counts"])):
                    return cls(**found, tasks=tuple(map(str, tasks)))
        raise CorruptFileError(
            f"{str(path)!r} does not hold the prompts of fitted tasks. Remove it, and fit them again with "
            "generator.fit_out_of_distribution(pairs)."
        )


def _principal_axes(points: Tensor, most_bytes: int | None) -> Tensor | None:
    """The directions by which points can be kept within so many bytes, float16 (C, K); `None` if all of them can."""
    rows, width = points.shape
    if most_bytes is None or 2 * rows * width <= most_bytes:
        return None
    return principal_axes(points, max(most_bytes // (2 * (rows + width)), _FEWEST_AXES)).half()


def principal_axes(points: Tensor, count: int) -> Tensor:
    """The principal directions of points (n, C), not centred: at most `count` of them, float32 (C, K)."""
    with torch.random.fork_rng(devices=[]):  # what is drawn in fitting must not depend on it
        torch.manual_seed(0)
        return torch.svd_lowrank(points.float(), q=min(count, *points.shape))[2]


def _belong_together(points: Tensor, distances: Tensor, counts: Tensor, axes: Tensor | None = None) -> bool:
    shaped = points.dim() == 2 and distances.dim() == counts.dim() == 1 and len(points) == len(distances)
    if not shaped or counts.dtype != torch.int64 or not (points.is_floating_point() and distances.is_floating_point()):
        return False
    if axes is not None and (axes.dim() != 2 or not axes.is_floating_point() or axes.shape[1] != points.shape[1]):
        return False
    floats = (points, distances) if axes is None else (points, distances, axes)
    finite = all(bool(torch.isfinite(one.float()).all()) for one in floats)
    # Each count by itself, since their sum may overflow.
    counted = len(counts) >= FEWEST_TASKS and bool(((counts > 0) & (counts <= len(points))).all())
    return finite and counted and int(counts.sum()) == len(points)


def prompts_kept(tasks: int) -> int:
    """How many prompts are kept of each of so many tasks, at most.

    >>> prompts_kept(7), prompts_kept(1000)
    (128, 8)
    """
    return max(1, min(_MOST_PER_TASK, _MOST_ALTOGETHER // tasks))


def shrinkage(score: float, threshold: float) -> float:
    """By which factor a generated adapter's deviation from the mean adapter is multiplied.

    1 up to the threshold; beyond it, it falls in proportion to what is left of the score to 1.

    Args:
        score: See [`PromptReference.score`].
        threshold: From 0 to 1.

    >>> shrinkage(0.9, 0.95), round(shrinkage(0.975, 0.95), 6), shrinkage(1.0, 0.95), shrinkage(1.0, 1.0)
    (1.0, 0.5, 0.0, 1.0)
    """
    return 1.0 if score <= threshold else (1 - score) / (1 - threshold)


def check_action(action: str | None, threshold: float | None) -> None:
    """Check what is to be done about prompts that do not belong; `None` leaves it to the generator.

    Raises:
        GeneratorConfigError: If there is no such action, or the threshold is impossible.
    """
    if action is not None and action not in ACTIONS:
        known = ", ".join(map(repr, ACTIONS))
        raise GeneratorConfigError(
            f"out_of_distribution must be one of {known}, got {action!r}.{did_you_mean(str(action), ACTIONS)}"
        )
    if threshold is not None and (
        isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1
    ):
        raise GeneratorConfigError(
            f"A threshold is at least 0 and less than 1, or None for the one that the fitted tasks give; got "
            f"{threshold!r}."
        )


def _nearest(rows: Tensor, known: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Cosine distance of each row to the nearest known one that is not hidden from it."""
    similarity = rows @ known.T
    if hidden is not None:
        similarity = similarity.masked_fill(hidden, -1.0)
    return 1 - similarity.amax(1).clamp(-1, 1)
