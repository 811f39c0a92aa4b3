# SPDX-License-Identifier: Apache-2.0
"""Where a task lies among those that a generator was fitted on, on a plane that can be drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from ..text.out_of_distribution import PromptReference


FITTED = "fitted task"
PROMPT = "prompt of yours"
TASK = "your task"


class TaskMap:
    """The fitted tasks on the two principal axes of where their prompts lie.

    A task's point is the mean of its prompts' points. The plane is for the eye: distances on it are not those that
    [`PromptReference.score`][peft_dnd.text.PromptReference.score] judges by, which counts all dimensions.

    Args:
        reference: What a generator keeps of its fitted tasks' prompts.

    Attributes:
        tasks: Where the fitted tasks lie on the plane, float32 (T, 2).
        kept: The share of what tasks differ in that the two axes show, from 0 to 1.
    """

    def __init__(self, reference: PromptReference) -> None:
        from sklearn.decomposition import PCA

        self._reference = reference
        means = [rows.mean(0) for rows in reference.points.float().split(reference.counts.tolist())]
        self._axes = PCA(2, random_state=0)
        self.tasks: Tensor = torch.from_numpy(self._axes.fit_transform(torch.stack(means).numpy())).float()
        self.kept = float(self._axes.explained_variance_ratio_.sum())

    def place(self, points: Tensor) -> Tensor:
        """Where prompts lie on the plane.

        Args:
            points: Where they lie, (n, C), of length 1; see `peft_dnd.text.out_of_distribution.read_points`.

        Returns:
            float32 (n, 2).
        """
        return torch.from_numpy(self._axes.transform(self._reference.place(points).numpy())).float()

    def rows(self, points: Tensor) -> dict[str, list[float] | list[str]]:
        """The columns of the picture: the fitted tasks, the prompts, and last, so that it lies on top, the task.

        Args:
            points: As in [`place`].

        Returns:
            The columns `"x"`, `"y"` and `"what"`, one of this module's three constants.
        """
        prompts = self.place(points)
        places = torch.cat([self.tasks, prompts, prompts.mean(0, keepdim=True)])
        what = [FITTED] * len(self.tasks) + [PROMPT] * len(prompts) + [TASK]
        return {"x": places[:, 0].tolist(), "y": places[:, 1].tolist(), "what": what}

    def nearest(self, points: Tensor) -> tuple[int, int]:
        """Whose prompts lie nearest: of how many prompts the nearest known one is of the task that most are near to.

        Args:
            points: As in [`place`].

        Returns:
            How many prompts are near that one task, and of how many tasks the nearest prompts are altogether.
        """
        task = torch.repeat_interleave(torch.arange(len(self._reference.counts)), self._reference.counts)
        near = task[(self._reference.place(points) @ self._reference.points.float().T).argmax(1)]
        counted = torch.bincount(near)
        return int(counted.max()), int((counted > 0).sum())
