# SPDX-License-Identifier: Apache-2.0
"""Revisions of a generator: what each update added, what it changed on earlier tasks, and if it lost too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ..errors import CorruptFileError, RegressionError


# Under this name a configuration's `measured` holds the records of its revisions, the oldest first.
REVISIONS = "revisions"
MOST_POINTS_LOST = 2.0
_MOST_IN_CARD = 20


@dataclass(frozen=True)
class Revision:
    """What one fit of a generator did.

    Attributes:
        number: 1 for the first fit.
        added: The tasks that it was fitted to.
        steps: For how many optimiser steps.
        replayed: How many earlier tasks were replayed from the store meanwhile.
        before: Earlier task in the store -> the points it had before the update.
        after: The same tasks, and those that were added -> their points after it.
        measure: What points are, in words.
    """

    number: int
    added: tuple[str, ...]
    steps: int
    replayed: int = 0
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    measure: str = ""

    @property
    def lost(self) -> dict[str, float]:
        """Earlier task -> the points that it lost, negative where it gained; the greatest loss first."""
        lost = {task: before - self.after[task] for task, before in self.before.items() if task in self.after}
        return dict(sorted(lost.items(), key=lambda item: -item[1]))

    @property
    def mean_lost(self) -> float:
        """The mean of `lost`; 0 without earlier tasks."""
        return fmean(self.lost.values()) if self.lost else 0.0


def revisions(measured: Mapping[str, Any]) -> list[Revision]:
    """The revisions that a configuration's `measured` tells of, the oldest first.

    Raises:
        CorruptFileError: If a record is none.
    """
    try:
        return [Revision(**{**record, "added": tuple(record["added"])}) for record in measured.get(REVISIONS, [])]
    except (TypeError, KeyError, AttributeError) as error:
        raise CorruptFileError(
            f"The generator's configuration has no readable record of its revisions ({error!r:.200}). Remove "
            f"{REVISIONS!r} from 'measured' in its config.json."
        ) from error


def points_below_best(known: Sequence[Revision]) -> dict[str, float]:
    """How far the earlier tasks are below the best that they had in any revision: what many small losses come to.

    Args:
        known: The revisions, the oldest first. Of those before the last one such are looked at as measured points the
            same way.

    Returns:
        Task that the last revision judged -> the points that it is below its best; the furthest first. Empty if the
        last revision is the first.
    """
    if not known or not known[-1].lost:
        return {}
    last = known[-1]
    judged = [scores for one in known if one.measure == last.measure for scores in (one.before, one.after)]
    below = {task: max(scores[task] for scores in judged if task in scores) - last.after[task] for task in last.lost}
    return dict(sorted(below.items(), key=lambda item: -item[1]))


def add_revision(measured: dict[str, Any], revision: Revision) -> None:
    """Write down a revision in a configuration's `measured`."""
    measured[REVISIONS] = [*measured.get(REVISIONS, []), {**asdict(revision), "added": list(revision.added)}]


def check_regression(measured: Mapping[str, Any], most_points_lost: float = MOST_POINTS_LOST) -> None:
    """Make sure that a generator's last update did not lose too much on the tasks that it was fitted to before.

    Only tasks of the replay store are judged, as they were when the update was done: see [`Revision`].

    Args:
        measured: The `measured` of its configuration.
        most_points_lost: How many points the earlier tasks may have lost in their mean, of 100.

    Raises:
        RegressionError: If they lost more.
        CorruptFileError: If a record is none.
    """
    known = revisions(measured)
    if not known or known[-1].mean_lost <= most_points_lost:
        return
    last = known[-1]
    worst, points = next(iter(last.lost.items()))
    raise RegressionError(
        f"Revision {last.number} of this generator lost {last.mean_lost:.1f} points on the {len(last.lost)} earlier "
        f"tasks of its store, {points:.1f} on {worst!r}; {most_points_lost:g} are allowed. Fit the update again from "
        "the generator as it was before, for more steps or with a larger replay_share or the earlier tasks' pairs; or "
        "publish it all the same with most_points_lost=None."
    )


def revisions_section(measured: Mapping[str, Any]) -> str:
    """The part of a model card that tells of a generator's revisions; empty if it is the first."""
    known = revisions(measured)
    if len(known) < 2:
        return ""
    rows = [
        f"| {one.number} | {_listed(one.added)} | {one.steps} | {one.replayed} | {_before_and_after(one)} |"
        for one in known
    ]
    head = "| revision | fitted to | steps | replayed | earlier tasks before | after | most lost |"
    table = "\n".join([head, "| ---: | --- | ---: | ---: | ---: | ---: | --- |", *rows])
    last = known[-1]
    changed = [
        f"| {task} | {last.before[task]:.1f} | {last.after[task]:.1f} |" for task in [*last.lost][:_MOST_IN_CARD]
    ]
    parts = ["## Revisions", table]
    below = points_below_best(known)
    if below and len(known) > 2:
        worst, points = next(iter(below.items()))
        parts.append(
            f"Below the best that they had in any revision the earlier tasks are now by {fmean(below.values()):.1f} "
            f"points in the mean, {worst} by {points:.1f}."
        )
    if changed:
        parts += [
            f"The last update, on the {len(changed)} of {len(last.lost)} earlier tasks that lost most, in points: "
            f"{last.measure}.",
            "\n".join(["| task | before | after |", "| --- | ---: | ---: |", *changed]),
        ]
    return "\n\n".join(parts)


def _before_and_after(one: Revision) -> str:
    if not one.lost:
        return " | | "
    worst, points = next(iter(one.lost.items()))
    before, after = (fmean(scores[task] for task in one.lost) for scores in (one.before, one.after))
    return f"{before:.1f} | {after:.1f} | {points:.1f} on {worst}"


def _listed(tasks: Sequence[str], most: int = 5) -> str:
    named = ", ".join(tasks[:most])
    return named if len(tasks) <= most else f"{named} and {len(tasks) - most} more"
