# SPDX-License-Identifier: Apache-2.0
"""What a policy costs and what it catches, on the worked example: norms, refused prompts and those who get round them.

It needs the worked example as `make demo SEED=0` leaves it: the base, the pairs, the generator and trained adapters.

python benchmarks/bench_policy.py [--demo demo_output/seed-0]
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
import transformers
from policy_attacks import ATTACKS, DISTANT_PARAPHRASES, Attack
from record import ROOT, write_result
from tqdm.auto import tqdm

from peft_dnd import GeneratedAdapter, PromptCheckpointDataset, PromptConditionedLoraGenerator
from peft_dnd.policy import BehaviourGate, GeneratorPolicy, NormBounds, RefusedPrompts, prompt_space
from peft_dnd.policy.norms import TOGETHER, update_norms
from peft_dnd.policy.prompt_space import PromptSpace


sys.path.insert(0, str(ROOT / "examples" / "worked_example"))
from base import as_question, load_base
from tasks import score
from world import ATTRIBUTES, Attribute, Task, World, build_world


SEED = 0
PROMPTS = 16
FALSE_ALARMS = (0.01, 0.05, 0.2)
ATTACKED_CLASSES = ("city", "job", "pet", "fruit")
NOISY_ADAPTERS = 8
TIGHTER = (0.75, 0.5, 0.25)
# How refused prompts are compared with examples: as the library does it, with less added to the variances, and by the
# text encoder's states as they are.
SPACED = "in the space of the training tasks"
LESS_ADDED = "in that space, with a tenth of the mean added to each variance"
AS_THEY_ARE = "by the states as they are"
WAYS = (SPACED, AS_THEY_ARE)


class Bench:
    """The worked example at hand, and its held-out tasks' scores for any adapter."""

    def __init__(self, folder: Path) -> None:
        self.world: World = build_world(SEED)
        self.pairs = PromptCheckpointDataset.from_folder(folder / "pairs")
        self.generator: Any = PromptConditionedLoraGenerator.from_pretrained(folder / "generator")
        self.generator.text_encoder.block_tokens = 256
        self.base, self.tokenizer = load_base(folder / "base")
        self.trained = {t.name: GeneratedAdapter.from_pretrained(folder / "trained" / t.name) for t in self.held_out}
        self.generated = {t.name: self.write(self.world.prompts(t)) for t in self.held_out}
        self._points: dict[str, torch.Tensor] = {}
        self._model = next(iter(self.trained.values())).load_into(load_base(folder / "base")[0])

    @property
    def held_out(self) -> tuple[Task, ...]:
        """The tasks that the generator was not fitted on."""
        return self.world.held_out_tasks

    def write(self, prompts: Sequence[str]) -> GeneratedAdapter:
        """The adapter that the generator writes where no policy is in its way."""
        adapter: GeneratedAdapter = self.generator.generate_adapter(prompts)
        return adapter

    def accuracy(self, adapter: GeneratedAdapter, task: Task) -> float:
        """The share of a task's questions that the base answers exactly with an adapter."""
        adapter.load_into(self._model)
        return score(self._model, self.tokenizer, self.world.scored_examples(task))

    def mean_accuracy(self, adapters: Mapping[str, GeneratedAdapter]) -> float:
        """The mean over the held-out tasks, each with its own adapter."""
        return round(fmean(self.accuracy(adapters[task.name], task) for task in self.held_out), 4)

    def read(self, texts: Sequence[str]) -> torch.Tensor:
        """Where texts lie, each read once."""
        new = [text for text in texts if text not in self._points]
        if new:
            self._points |= zip(new, self.generator._points_of_texts(new), strict=True)
        return torch.stack([self._points[text] for text in texts])


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "demo_output" / "seed-0", help="the worked example's folder"
    )
    parser.add_argument(
        "--new-topics-alone", action="store_true", help="only what becomes of topics that no training task has"
    )
    options = parser.parse_args()
    if not (options.demo / "generator").is_dir():
        parser.error(f"There is no worked example in {options.demo}: make demo SEED=0 makes it.")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(options.demo)
    command = "python benchmarks/bench_policy.py"
    write_result("policy_new_topics", new_topics(bench), f"{command} --new-topics-alone")
    if options.new_topics_alone:
        return
    result = {
        "seed": SEED,
        "prompts_of_a_set": PROMPTS,
        "norms": norms(bench),
        "refused_prompts": refused_prompts(bench),
        "behaviour_gate": behaviour(bench),
    }
    write_result("policy", result, command)


def norms(bench: Bench) -> dict[str, Any]:
    """What bounds cost in accuracy, and what becomes of adapters that were made larger."""
    layout, bounds = bench.pairs.layout, NormBounds.calibrate(bench.pairs, bench.base)
    base = bounds.base

    def held(policy: GeneratorPolicy, adapters: Mapping[str, GeneratedAdapter]) -> dict[str, GeneratedAdapter]:
        return {
            name: GeneratedAdapter(layout, policy.hold(layout, adapter.state_dict())[0])
            for name, adapter in adapters.items()
        }

    def above(adapters: Mapping[str, GeneratedAdapter], scale: float = 1.0) -> int:
        return sum(bool(bounds.excess(layout, a.state_dict(), scale=scale)) for a in adapters.values())

    def share_of_bound(adapters: Mapping[str, GeneratedAdapter]) -> float:
        together = [
            update_norms(layout, a.state_dict(), base).square().sum().sqrt() / bounds.total for a in adapters.values()
        ]
        return round(float(torch.stack(together).mean()), 4)

    policy = GeneratorPolicy(norms=bounds)
    tighter = {}
    for factor in TIGHTER:
        smaller = NormBounds({n: factor * b for n, b in bounds.modules.items()}, factor * bounds.total, base)
        tighter[str(factor)] = bench.mean_accuracy(held(GeneratorPolicy(norms=smaller), bench.generated))
    split = _each_at_its_bound(bench, bounds)
    excess = bounds.excess(layout, split.state_dict())
    down = GeneratorPolicy(norms=bounds, never_written=("*.down_proj",))
    return {
        "total_bound": round(bounds.total, 4),
        "largest_module_bound": round(max(bounds.modules.values()), 4),
        "adapters": len(bench.held_out),
        "accuracy": {
            "base": round(fmean(_accuracy_of_base(bench, task) for task in bench.held_out), 4),
            "generated": bench.mean_accuracy(bench.generated),
            "generated, calibrated bounds": bench.mean_accuracy(held(policy, bench.generated)),
            "generated, calibrated bounds, no down_proj": bench.mean_accuracy(held(down, bench.generated)),
            "generated, bounds times": tighter,
            "trained": bench.mean_accuracy(bench.trained),
            "trained, calibrated bounds": bench.mean_accuracy(held(policy, bench.trained)),
        },
        "norm_of_all_together_to_its_bound": {
            "generated": share_of_bound(bench.generated),
            "trained": share_of_bound(bench.trained),
        },
        "above_a_bound": {
            "generated": above(bench.generated),
            "trained": above(bench.trained),
            "generated, twice as large": above(bench.generated, 2),
            "generated, four times as large": above(bench.generated, 4),
        },
        "split_over_all_modules": {
            "modules_above_their_bound": len(set(excess) - {TOGETHER}),
            "all_together_to_their_bound": round(excess.get(TOGETHER, 0.0), 4),
        },
    }


def _accuracy_of_base(bench: Bench, task: Task) -> float:
    return score(bench.base, bench.tokenizer, bench.world.scored_examples(task))


def _each_at_its_bound(bench: Bench, bounds: NormBounds) -> GeneratedAdapter:
    """An adapter each of whose updates is as large as its own bound allows."""
    layout = bench.pairs.layout
    matrices = next(iter(bench.generated.values())).state_dict()
    found = update_norms(layout, matrices, bounds.base).tolist()
    for module, norm in zip(layout.modules, found, strict=True):
        key = module.tensors[1].key
        matrices[key] = matrices[key] * (0.999 * bounds.modules[module.name] / norm)
    return GeneratedAdapter(layout, matrices)


def refused_prompts(bench: Bench) -> dict[str, Any]:
    """Each attribute in turn is a class that is refused: what is caught, how it is got round, what that is worth."""
    figures = {way: {str(alarms): Figures() for alarms in FALSE_ALARMS} for way in WAYS}
    useful: dict[str, list[tuple[bool, float]]] = {}
    for attribute in ATTRIBUTES:
        own = next(task for task in bench.held_out if task.attribute is attribute)
        asked = {
            task: [example.prompt for example in bench.world.scored_examples(task)[:PROMPTS]]
            for task in bench.held_out
        }
        others = [prompt for task, prompts in asked.items() if task is not own for prompt in prompts]
        attacked = _attacked(bench.world, attribute.name, asked[own], others)
        for way, alarms in ((way, alarms) for way in WAYS for alarms in FALSE_ALARMS):
            found = figures[way][str(alarms)]
            caught = _judge(bench, attribute, [attribute], alarms, way, found)
            for task, prompts in asked.items():
                if task is not own:
                    found.add("welcome sets", caught(prompts))
                    found.add("welcome prompts", fmean(caught([prompt]) for prompt in prompts))
            for name in ("paraphrases", "distant paraphrases"):
                for prompt in attacked[name]:
                    found.add(f"single {name}", caught([prompt]))
            for name, prompts in attacked.items():
                found.add(f"sets: {name}", caught(prompts))
                if (way, alarms) == (SPACED, FALSE_ALARMS[0]) and attribute.name in ATTACKED_CLASSES:
                    useful.setdefault(name, []).append((caught(prompts), bench.accuracy(bench.write(prompts), own)))
    return {
        "classes": len(ATTRIBUTES),
        "examples_of_a_class": PROMPTS * sum(t.attribute is ATTRIBUTES[0] for t in bench.world.training_tasks),
        "training_tasks": sum(t.attribute is not ATTRIBUTES[0] for t in bench.world.training_tasks),
        "share_refused_at_false_alarms": {
            way: {alarms: found.means() for alarms, found in by_alarms.items()} for way, by_alarms in figures.items()
        },
        "accuracy_on_the_refused_task": {
            name: {
                "sets": len(pairs),
                "without policy": round(fmean(accuracy for _, accuracy in pairs), 4),
                "with policy": round(fmean(0.0 if hit else accuracy for hit, accuracy in pairs), 4),
            }
            for name, pairs in useful.items()
        },
    }


def new_topics(bench: Bench) -> dict[str, Any]:
    """Each attribute in turn is refused, and each other one in turn is a topic that no training task has."""
    figures = {way: Figures() for way in (SPACED, LESS_ADDED, AS_THEY_ARE)}
    tasks = bench.world.training_tasks + bench.held_out
    asked = {
        task: [example.prompt for example in bench.world.scored_examples(task)[:PROMPTS]] for task in bench.held_out
    }
    for refused in tqdm(ATTRIBUTES, desc="new topics"):
        far = _distant(bench.world, refused.name)
        for way, found in figures.items():
            for topic in ATTRIBUTES:
                if topic is refused:
                    continue
                caught = _judge(bench, refused, [refused, topic], FALSE_ALARMS[0], way)
                for task in (task for task in tasks if task.attribute is topic):
                    prompts = asked.get(task) or bench.world.prompts(task)[:PROMPTS]
                    found.add("welcome sets", caught(prompts))
                    found.add("welcome prompts", fmean(caught([prompt]) for prompt in prompts))
                found.add("single distant paraphrases", fmean(caught([prompt]) for prompt in far))
                own = next(prompts for task, prompts in asked.items() if task.attribute is refused)
                found.add("single paraphrases", fmean(caught([prompt]) for prompt in own))
    return {
        "seed": SEED,
        "prompts_of_a_set": PROMPTS,
        "false_alarms": FALSE_ALARMS[0],
        "share_refused": {way: found.means() for way, found in figures.items()},
    }


def _judge(
    bench: Bench,
    refused: Attribute,
    without: Sequence[Attribute],
    alarms: float,
    way: str,
    figures: Figures | None = None,
) -> Callable[[Sequence[str]], bool]:
    """What says whether prompts are refused, to which the training tasks of some attributes are unknown."""
    fitted, views = bench.world.training_tasks, bench.generator._views()
    examples = [p for t in fitted if t.attribute is refused for p in bench.world.prompts(t)[:PROMPTS]]
    allowed = {t.name: bench.world.prompts(t)[:PROMPTS] for t in fitted if t.attribute not in without}
    with compared(way):
        known = RefusedPrompts.fit({refused.name: examples}, allowed, bench.read, views, false_alarms=alarms)
    if figures is not None:
        figures.add("examples, left out", known.classes[0].caught)
    return lambda prompts: bool(known.refused(prompts, bench.read, views))


@contextmanager
def compared(way: str) -> Iterator[None]:
    """Within this context refused prompts are compared in one of the ways."""
    if way == LESS_ADDED:
        with patch.object(prompt_space, "_ADDED", 0.1):
            yield
    elif way == AS_THEY_ARE:
        with patch.object(PromptSpace, "fit", _as_it_is):
            yield
    else:
        yield


class _AsItIs(PromptSpace):
    """The space of the text encoder's own states."""

    def place(self, points: torch.Tensor) -> torch.Tensor:
        """Where texts lie: where they lay."""
        return points.float()


def _as_it_is(tasks: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> PromptSpace:
    return _AsItIs(torch.empty(tasks[0].shape[1], 0).half(), torch.ones(1))


class Figures:
    """Shares by name, each with how many it is the mean of."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}

    def add(self, name: str, share: float) -> None:
        """Take one more."""
        self._found.setdefault(name, []).append(float(share))

    def means(self) -> dict[str, dict[str, float]]:
        """What they are in the mean."""
        return {name: {"of": len(shares), "share": round(fmean(shares), 4)} for name, shares in self._found.items()}


def _distant(world: World, attribute: str) -> list[str]:
    texts = DISTANT_PARAPHRASES[attribute]
    return [text.format(name=world.people[number % len(world.people)]) for number, text in enumerate(texts)]


def _attacked(world: World, attribute: str, prompts: list[str], others: list[str]) -> dict[str, list[str]]:
    attacks: Mapping[str, Attack] = ATTACKS
    found = {name: attack(prompts, others) for name, attack in attacks.items()}
    return {**found, "distant paraphrases": _distant(world, attribute)}


def behaviour(bench: Bench) -> dict[str, Any]:
    """The gate, its bound from adapters of training tasks: whom it lets through, what it sees of edits."""
    asked = [as_question(bench.world.questions(person)[0]) for person in bench.world.people]
    gate = BehaviourGate.from_prompts(asked, bench.base, bench.tokenizer, answer_tokens=8)
    fitted = bench.generator.fitted_adapters({t.name: bench.world.prompts(t) for t in bench.world.training_tasks})
    bounds = {
        "trained": gate.calibrate(bench.pairs, bench.base).checked_bound,
        "generated": gate.calibrate(fitted, bench.base).checked_bound,
    }
    layout, norms_ = bench.pairs.layout, NormBounds.calibrate(bench.pairs, bench.base)
    draw = torch.Generator().manual_seed(SEED)

    def noise(share: float) -> GeneratedAdapter:
        matrices = {tensor.key: torch.randn(tensor.shape, generator=draw) for tensor in layout.tensors}
        norm = update_norms(layout, matrices, norms_.base)
        factor = share * norms_.total / float(norm.square().sum().sqrt())
        for module in layout.modules:
            key = module.tensors[1].key
            matrices[key] = matrices[key] * factor
        matrices, _ = norms_.hold(layout, matrices)
        return GeneratedAdapter(layout, matrices)

    def facts(adapters: Sequence[GeneratedAdapter], scale: float = 1.0) -> dict[str, Any]:
        worst = [float(gate.divergences(adapter, bench.base, scale=scale).amax()) for adapter in adapters]
        return {
            "adapters": len(adapters),
            "mean_divergence": round(fmean(worst), 4),
            "largest_divergence": round(max(worst), 4),
            "passed_by_bound_of": {name: sum(one <= bound for one in worst) for name, bound in bounds.items()},
        }

    generated = list(bench.generated.values())
    return {
        "prompts": len(gate.tokens),
        "bound_of": {name: round(bound, 4) for name, bound in bounds.items()},
        "generated": facts(generated),
        "trained": facts(list(bench.trained.values())),
        "generated, made larger": {str(scale): facts(generated, scale) for scale in (1.5, 2.0, 4.0)},
        "noise within the norms": {
            str(share): facts([noise(share) for _ in range(NOISY_ADAPTERS)]) for share in (0.25, 0.5, 1.0)
        },
    }


if __name__ == "__main__":
    main()
