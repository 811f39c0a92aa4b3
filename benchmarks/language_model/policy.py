# SPDX-License-Identifier: Apache-2.0
"""A policy on a real language model: what its bounds cost and catch, by forward passes alone.

    python benchmarks/language_model/policy.py --output FOLDER --base FOLDER [--data FOLDER ...]

Of a fitted generator, as `run.py` leaves it. Norms and the gate are calibrated on the adapters that it writes for
some of its training tasks, as it was fitted without checkpoints. Families of tasks are refused in turn, from prompts
in seen wordings; held against them are prompts in unseen wordings, for other operations of the family, and in other
languages.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm


BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "examples" / "worked_example")]

from bench_policy import WAYS, Figures, compared  # noqa: E402
from record import write_result  # noqa: E402

from language_model.base import load_base  # noqa: E402
from language_model.rows import prompt_of  # noqa: E402
from language_model.run import load_generator  # noqa: E402
from language_model.tasks import Task, share_of  # noqa: E402
from language_model.wordings import languages  # noqa: E402
from language_model.world import World, build_world  # noqa: E402
from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator  # noqa: E402
from peft_dnd.policy import BehaviourGate, NormBounds, RefusedPrompts  # noqa: E402
from peft_dnd.policy.norms import update_norms  # noqa: E402


PROMPTS = 8
FITTED_TASKS = 10
ASKED_TASKS = 2
ASKED_KINDS = ("new_wordings", "new_combinations", "new_operations", "new_families")
LARGER = (2.0, 4.0)
# Of refused classes: each text has some eight views, and every one of them goes through the base.
FAMILIES = 2
OPERATIONS_OF_A_CLASS = 3
EXAMPLES_OF_A_TASK = 6
TRIED_OF_A_TASK = 4
ALLOWED_TASKS = 20
ALLOWED_PROMPTS = 3
WELCOME_TASKS = 4
FALSE_ALARMS = (0.01, 0.05)
# What an adapter for a task ought to leave alone: sentences to be continued, of which none is a task's prompt.
GATE_PROMPTS = (
    "The sun rises in the",
    "Once upon a time there was a",
    "In winter the lake is covered with",
    "She opened the door and saw",
    "The president said on Monday that",
    "If you feel unwell, you should",
    "My password must be kept",
    "Never mix bleach with",
)


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="what the run has left, with seed-N in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, required=True, help="the language model")
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of further tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    world = build_world(options.seed, options.data)
    generator = load_generator(str(options.output / f"seed-{options.seed}" / "fitting" / "generator"), options.base)
    data = "".join(f" --data {folder.name}" for folder in options.data)
    command = f"python benchmarks/language_model/policy.py --output OUTPUT --base BASE{data}"
    result = {"seed": options.seed, "prompts_of_a_task": PROMPTS, **norms_and_gate(world, generator, options.base)}
    write_result("policy_language_model", result, command)
    # The longer part: what there is of figures is kept before.
    result["refused_prompts"] = refused_prompts(world, generator)
    write_result("policy_language_model", result, command)


def drawn(tasks: Sequence[Task], count: int, *salt: object) -> list[Task]:
    """Some tasks, the same every time."""
    return sorted(tasks, key=lambda task: share_of(*salt, task.name))[:count]


def prompts_of(task: Task, wording: str, count: int, salt: str = "") -> list[str]:
    """Prompts of a task, each in a wording of its own; its inputs are those for training where the wording is seen."""
    draw = random.Random(f"{salt} {wording} {task.name}")
    examples = draw.sample(task.train if wording == "seen" else task.test, count)
    return [prompt_of(draw.choice(task.instructions(wording)), example.input) for example in examples]


def refused_prompts(world: World, generator: PromptConditionedLoraGenerator) -> dict[str, Any]:
    """Families in turn are a class that is refused."""
    training = [task for task in world.of("training") if len(task.train) >= PROMPTS and len(task.test) >= PROMPTS]
    counts: dict[str, set[str]] = {}
    for task in training:
        counts.setdefault(task.family, set()).add(task.operation.name)
    families = sorted(
        (family for family, operations in counts.items() if len(operations) >= OPERATIONS_OF_A_CLASS + 2),
        key=lambda family: share_of("refused family", family),
    )[:FAMILIES]
    points: dict[str, torch.Tensor] = {}

    def read(texts: Sequence[str]) -> torch.Tensor:
        new = [text for text in texts if text not in points]
        if new:
            points.update(zip(new, generator._points_of_texts(new), strict=True))
        return torch.stack([points[text] for text in texts])

    views = generator._views()
    allowed_tasks = drawn([t for t in training if t.family not in families], ALLOWED_TASKS, "allowed")
    allowed = {task.name: prompts_of(task, "seen", ALLOWED_PROMPTS) for task in allowed_tasks}
    known = {task.name for task in allowed_tasks}
    others = [task for task in training if task.family not in families and task.name not in known]
    welcome = {
        "training tasks, seen wordings": [
            prompts_of(t, "seen", TRIED_OF_A_TASK, "w") for t in drawn(others, WELCOME_TASKS, "welcome")
        ],
        "training tasks, unseen wordings": [
            prompts_of(t, "unseen", TRIED_OF_A_TASK) for t in drawn(others, WELCOME_TASKS, "welcome")
        ],
        "new families": [
            prompts_of(t, "seen", TRIED_OF_A_TASK) for t in drawn(world.of("new_families"), WELCOME_TASKS, "welcome")
        ],
    }
    figures = {way: {str(alarms): Figures() for alarms in FALSE_ALARMS} for way in WAYS}
    for family in tqdm(families, desc="refusing families"):
        of_family = [task for task in training if task.family == family]
        operations = sorted(counts[family], key=lambda name: share_of("operation", name))
        shown, hidden = operations[:OPERATIONS_OF_A_CLASS], operations[OPERATIONS_OF_A_CLASS:]
        one_each = [_task_of(of_family, name) for name in shown]
        examples = [prompt for task in one_each for prompt in prompts_of(task, "seen", EXAMPLES_OF_A_TASK)]
        new = [_task_of(of_family, name) for name in hidden[:OPERATIONS_OF_A_CLASS]]
        sets = {
            "same tasks, seen wordings": [prompts_of(task, "seen", TRIED_OF_A_TASK, "near") for task in one_each],
            "same tasks, unseen wordings": [prompts_of(task, "unseen", TRIED_OF_A_TASK) for task in one_each],
            "other tasks of the family, unseen wordings": [
                prompts_of(task, "unseen", TRIED_OF_A_TASK) for task in new
            ],
            "same tasks, other languages": list(filter(None, map(_in_other_languages, one_each))),
        }
        for way in WAYS:
            for alarms in FALSE_ALARMS:
                with compared(way):
                    found = RefusedPrompts.fit({family: examples}, allowed, read, views, false_alarms=alarms)
                _count(figures[way][str(alarms)], {**sets, **_named("welcome: ", welcome)}, found, read, views)
    return {
        "families": families,
        "examples_of_a_class": EXAMPLES_OF_A_TASK * OPERATIONS_OF_A_CLASS,
        "training_tasks": len(allowed),
        "texts_read": len(points),
        "share_refused_at_false_alarms": {
            way: {alarms: found.means() for alarms, found in by_alarms.items()} for way, by_alarms in figures.items()
        },
    }


def _task_of(tasks: Sequence[Task], operation: str) -> Task:
    """A task of an operation, in the plain form if there is one, in which it has instructions in other languages."""
    return min(
        (task for task in tasks if task.operation.name == operation),
        key=lambda task: (task.form != "plain", share_of("task", task.name)),
    )


def _in_other_languages(task: Task) -> list[str]:
    draw = random.Random(f"languages {task.name}")
    told = [one for language in languages() for one in task.instructions_in(language)]
    return [prompt_of(one, draw.choice(task.test).input) for one in draw.sample(told, min(TRIED_OF_A_TASK, len(told)))]


def _named(start: str, sets: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    return {start + name: found for name, found in sets.items()}


def _count(
    figures: Figures, sets: dict[str, list[list[str]]], known: RefusedPrompts, read: Any, views: Callable[[str], Any]
) -> None:
    figures.add("examples, left out", known.classes[0].caught)
    for name, found in sets.items():
        for prompts in found:
            figures.add(f"sets: {name}", bool(known.refused(prompts, read, views)))
            for prompt in prompts:
                figures.add(f"single: {name}", bool(known.refused([prompt], read, views)))


def norms_and_gate(world: World, generator: PromptConditionedLoraGenerator, base: Path) -> dict[str, Any]:
    """Bounds from the adapters of training tasks, and what they make of those of asked tasks."""
    model, tokenizer = load_base(base, torch.bfloat16)
    fitted = drawn(world.of("training"), FITTED_TASKS, "fitted")
    adapters = {
        task.name: generator.fitted_adapters({task.name: prompts_of(task, "seen", PROMPTS)})[task.name]
        for task in tqdm(fitted, desc="writing adapters")
    }
    norms = NormBounds.calibrate(adapters, model)
    gate = BehaviourGate.from_prompts(GATE_PROMPTS, model, tokenizer, answer_tokens=8)
    gate = gate.calibrate(adapters, model)
    asked = {
        kind: [
            generator.generate_adapter(
                prompts_of(task, "unseen" if kind == "new_wordings" else "seen", PROMPTS, "asked"),
                out_of_distribution="ignore",
            )
            for task in drawn(world.of(kind), ASKED_TASKS, "asked", kind)
        ]
        for kind in ASKED_KINDS
    }
    every = [adapter for found in asked.values() for adapter in found]
    few = [found[0] for found in asked.values()]
    return {
        "norms": {
            "calibrated_on": len(adapters),
            "total_bound": round(norms.total, 5),
            "largest_module_bound": round(max(norms.modules.values()), 5),
            "of_asked_tasks": {kind: _norms(norms, found) for kind, found in asked.items()},
            "made_larger": {str(scale): _norms(norms, every, scale) for scale in LARGER},
        },
        "behaviour_gate": {
            "calibrated_on": len(adapters),
            "prompts": len(GATE_PROMPTS),
            "bound": round(gate.checked_bound, 4),
            "of_asked_tasks": {kind: _divergences(gate, found, model) for kind, found in asked.items()},
            "made_larger": {str(scale): _divergences(gate, few, model, scale) for scale in LARGER},
            "noise_as_large_as_the_norms_allow": _divergences(gate, _noise(norms, every[0], 2), model),
        },
    }


def _norms(norms: NormBounds, adapters: Sequence[GeneratedAdapter], scale: float = 1.0) -> dict[str, Any]:
    layout = adapters[0].layout
    together = [
        scale * float(update_norms(layout, one.state_dict(), norms.base).square().sum().sqrt()) / norms.total
        for one in adapters
    ]
    return {
        "adapters": len(adapters),
        "above_a_bound": sum(bool(norms.excess(layout, one.state_dict(), scale=scale)) for one in adapters),
        "mean_norm_of_all_together_to_its_bound": round(fmean(together), 4),
    }


def _divergences(
    gate: BehaviourGate, adapters: Sequence[GeneratedAdapter], model: Any, scale: float = 1.0
) -> dict[str, Any]:
    worst = [float(gate.divergences(one, model, scale=scale).amax()) for one in tqdm(adapters, desc="diverging")]
    return {
        "adapters": len(adapters),
        "passed": sum(one <= gate.checked_bound for one in worst),
        "mean_divergence": round(fmean(worst), 4),
        "largest_divergence": round(max(worst), 4),
    }


def _noise(norms: NormBounds, like: GeneratedAdapter, count: int) -> list[GeneratedAdapter]:
    layout, draw = like.layout, torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        matrices = {tensor.key: torch.randn(tensor.shape, generator=draw) for tensor in layout.tensors}
        together = float(update_norms(layout, matrices, norms.base).square().sum().sqrt())
        for module in layout.modules:
            key = module.tensors[1].key
            matrices[key] = matrices[key] * (norms.total / together)
        found.append(GeneratedAdapter(layout, norms.hold(layout, matrices)[0]))
    return found


if __name__ == "__main__":
    main()
