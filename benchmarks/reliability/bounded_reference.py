# SPDX-License-Identifier: Apache-2.0
"""What becomes of the out-of-distribution score where the fitted tasks' prompts are kept within fewer bytes.

    python benchmarks/reliability/bounded_reference.py --output FOLDER --base FOLDER [--data FOLDER ...]

Of the language model's world, from what a judged run of `language_model/run.py` has left: the prompts of the adapters
of `results/reliability_language_model.json` are scored again, by all that the generator has kept and by as much of it
as there is room for in some numbers of bytes. Forward passes of the base alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from language_model.judging import Size, draw_questions  # noqa: E402
from language_model.parts import Part  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.world import build_world  # noqa: E402
from record import RESULTS, write_result  # noqa: E402
from reliability_of_language_model import WORDINGS  # noqa: E402
from strange_prompts import strange_prompts  # noqa: E402

from peft_dnd.storage.files import read_json  # noqa: E402
from peft_dnd.text.out_of_distribution import PromptReference, read_points  # noqa: E402


STRANGE_SETS = 2
MEBIBYTES = (None, 4, 2)


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="what the world's run has left, with seed-N in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, required=True, help="the language model")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of further tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder = options.output / f"seed-{options.seed}"
    generator = load_generator(str(folder / "fitting" / "generator"), options.base)
    whole = generator.prompt_reference
    assert whole is not None
    asked, shares, size = _asked(folder, options.seed, options.data, generator)
    strange = _strange(generator, size)
    known = {str(number): rows for number, rows in enumerate(whole.points.float().split(whole.counts.tolist()))}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in generator.decoder.parameters())
    references = {"all": whole}
    for mebibytes in MEBIBYTES:
        most = int(0.1 * weights) if mebibytes is None else mebibytes * 2**20
        bounded = PromptReference.fit(known, most_bytes=most)
        assert bounded is not None
        references["a tenth of the weights" if mebibytes is None else f"{mebibytes} MiB"] = bounded
    scores = {name: [one.score(points) for points in asked] for name, one in references.items()}
    result: dict[str, Any] = {
        "tasks": len(known),
        "prompts": len(whole.points),
        "width": whole.points.shape[1],
        "weights_bytes": weights,
        "adapters": len(asked),
        "strange_sets": {kind: len(sets) for kind, sets in strange.items()},
    }
    for name, one in references.items():
        odd = {kind: [one.score(points) for points in sets] for kind, sets in strange.items()}
        every = [score for found in odd.values() for score in found]
        result[name] = {
            "directions": one.points.shape[1],
            "bytes": _bytes_of(one),
            "threshold": round(one.threshold(size), 4),
            "rank_correlation_with_share_of_gap_closed": round(
                float(spearmanr([-score for score in scores[name]], shares).statistic), 4
            ),
            "share_of_gap_closed": _at_threshold(scores[name], shares, one.threshold(size)),
            "largest_change_of_a_score": round(float(np.abs(np.subtract(scores[name], scores["all"])).max()), 4),
            "decisions_changed": sum(
                (new > one.threshold(size)) != (old > whole.threshold(size))
                for new, old in zip(scores[name], scores["all"], strict=True)
            ),
            "area_under_curve_against_strange_text": round(
                float(roc_auc_score([0] * len(asked) + [1] * len(every), [*scores[name], *every])), 4
            ),
            "strange_above_threshold": round(fmean(score > one.threshold(size) for score in every), 4),
        }
    data = "".join(f" --data {folder.name}" for folder in options.data)
    command = "python benchmarks/reliability/bounded_reference.py --output OUTPUT --base BASE"
    write_result("bounded_reference", result, command + data)


def _asked(folder: Path, seed: int, data: list[Path], generator: Any) -> tuple[list[torch.Tensor], list[float], int]:
    """Where the prompts of each adapter lie, what share of the gap it closed, and how many prompts each has."""
    settings = read_json(folder / "settings.json")
    part = Part(build_world(seed, data), training=settings["training_tasks"])
    drawn = draw_questions(part, Size(**settings["asked"]), seed)
    by_task = {asked.task.name: (kind, asked) for kind, found in drawn.items() for asked in found}
    points, shares, seen = [], [], set()
    for point in read_json(RESULTS / "reliability_language_model.json")["points"]:
        if point["share_of_gap_closed"] is None:
            continue
        _, asked = by_task[point["task"]]
        other = list(WORDINGS.values())[point["task"] in seen]  # they stand there in this order
        seen.add(point["task"])
        prompts = asked.prompts[asked.other if other else asked.wording]
        points.append(read_points(*generator.encode_prompts(prompts)))
        shares.append(point["share_of_gap_closed"])
    return points, shares, max(map(len, points))


def _strange(generator: Any, size: int) -> dict[str, list[torch.Tensor]]:
    words = ["what", "is", "the", "capital", "of", "country", "name", "word", "sentence", "answer", "in", "write"]
    texts = strange_prompts(STRANGE_SETS * size, words, seed=0)
    return {
        kind: [
            read_points(*generator.encode_prompts([f"{line}\n" for line in lines[start : start + size]]))
            for start in range(0, len(lines) - size + 1, size)
        ]
        for kind, lines in texts.items()
    }


def _at_threshold(scores: list[float], shares: list[float], threshold: float) -> dict[str, float | int | None]:
    below = [share for share, score in zip(shares, scores, strict=True) if score <= threshold]
    above = [share for share, score in zip(shares, scores, strict=True) if score > threshold]
    return {
        "adapters_below": len(below),
        "below": round(fmean(below), 4) if below else None,
        "adapters_above": len(above),
        "above": round(fmean(above), 4) if above else None,
    }


def _bytes_of(reference: PromptReference) -> int:
    with tempfile.TemporaryDirectory() as folder:
        reference.save(Path(folder, "reference.safetensors"))
        return Path(folder, "reference.safetensors").stat().st_size


if __name__ == "__main__":
    main()
