# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter is what its provenance says: written by that generator from those prompts.

The adapter is made again and compared, number by number. "The same" means: no further apart than rounding can bring
two honest adapters, which differ where a weight begins at another address in memory, or another number of threads or
another processor adds up in another order. How far that is, is found for each tensor as in
[`rounding`][peft_dnd.generator.rounding]. A change of a single weight by more than this is seen; a smaller one is not,
and does to the base what running on another machine does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import GeneratorConfigError
from ..text.out_of_distribution import shrinkage
from ..text.prompt_shapes import PromptsLike
from ..text.prompts import prompts_digest
from .familiarity import Fallback
from .fingerprint import generator_sha256
from .modeling import PromptConditionedLoraGenerator
from .rounding import rounding_tolerances
from .streaming import StreamedLoraGenerator


# The score is a mean of distances between prompts' states, which an encoder in half precision gives to three digits.
_SCORE_TOLERANCE = 0.02
_NEEDED = ("prompts_sha256", "seed")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: `"provenance"`, `"prompts"`, `"generator"`, `"layout"`, `"score"`, `"fallback"` or `"weights"`.
        passed: Whether it is as it should be; `None` if that cannot be told.
        said: What was found, in words.
    """

    what: str
    passed: bool | None
    said: str


@dataclass(frozen=True)
class Verification:
    """What came out.

    Attributes:
        checks: What was looked at, in order. After one that fails beyond repair the rest is left out.
        differences: Tensor -> the largest difference between the adapter and the one made again.
        tolerances: Tensor -> how large it may be: rounding of the generator, and of the adapter's own dtype.
    """

    checks: tuple[Check, ...]
    differences: Mapping[str, float]
    tolerances: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether the adapter was made again and is the same, and nothing else speaks against it."""
        weights = [check for check in self.checks if check.what == "weights"]
        return bool(weights) and all(check.passed is not False for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]


def verify_adapter(
    adapter: GeneratedAdapter,
    generator: PromptConditionedLoraGenerator,
    prompts: PromptsLike,
    *,
    answers: PromptsLike | None = None,
) -> Verification:
    """Make an adapter again, and say whether it is the same.

    Args:
        adapter: The adapter, with its provenance.
        generator: The generator that is said to have written it, loaded in the dtype that the provenance names.
        prompts: The prompts that it is said to be made from, in their order.
        answers: Their answers, if the generator reads them.

    Returns:
        The checks and their outcome; see [`Verification.passed`].

    Raises:
        PromptError: If the prompts cannot be used.
        GeneratorConfigError: If the generator is a streamed one, whose weights cannot be varied.
    """
    if isinstance(generator, StreamedLoraGenerator):
        raise GeneratorConfigError(
            "Verifying varies the generator's weights, which a streamed one does not hold. Load it with "
            "PromptConditionedLoraGenerator.from_pretrained."
        )
    kept = dict(adapter.provenance)
    missing = [name for name in _NEEDED if name not in kept]
    if missing:
        said = (
            f"It does not say {' and '.join(missing)}: the adapter was not saved by GeneratedAdapter.save_pretrained."
        )
        return Verification((Check("provenance", False, said),), {}, {})
    generator = _of_base(generator, adapter)
    texts = generator.condition_texts(prompts, answers, seed=kept["seed"])
    checks = [_prompts_check(texts, kept), _generator_check(generator, kept)]
    difference = adapter.layout.difference(generator.config.adapter_layout)
    if difference is not None:
        checks.append(Check("layout", False, f"The generator writes other adapters: {difference}."))
    if any(check.passed is False for check in checks if check.what != "generator"):
        return Verification(tuple(checks), {}, {})
    # An adapter that was drawn towards the mean one is drawn as far again, whatever becomes of the score by rounding.
    fallback = Fallback("ignore", None, float(kept.get("shrunk_by", 1.0)))

    def write() -> dict[str, Tensor]:
        return generator._generate_one(texts, kept["seed"], fallback).state_dict()

    again = generator._generate_one(texts, kept["seed"], fallback)
    checks += _score_checks(again, kept)
    made = again.state_dict()
    on_cpu = kept.get("device", "cpu") == "cpu" == torch.device(generator.device).type
    rounding = rounding_tolerances(generator, write, made, on_cpu=on_cpu)
    differences, tolerances = _compared(adapter.state_dict(), made, rounding)
    return Verification((*checks, _weights_check(differences, tolerances)), differences, tolerances)


def _of_base(generator: PromptConditionedLoraGenerator, adapter: GeneratedAdapter) -> PromptConditionedLoraGenerator:
    """Of a generator of several bases the part that writes such adapters, or else the whole."""
    bases: list[PromptConditionedLoraGenerator] = [
        generator.for_base(name) for name in (generator.config.base_names if generator.config.bases else ())
    ]
    fitting = [one for one in bases if adapter.layout.difference(one.config.adapter_layout) is None]
    named = adapter.layout.base_model_name_or_path
    fitting.sort(key=lambda one: one.config.adapter_layout.base_model_name_or_path != named)
    return fitting[0] if fitting else generator


def _prompts_check(texts: tuple[str, ...], kept: Mapping[str, Any]) -> Check:
    found, expected = prompts_digest(texts), str(kept["prompts_sha256"])
    if found == expected:
        return Check("prompts", True, f"These {len(texts)} prompts are those that it names.")
    count = kept.get("num_prompts")
    return Check(
        "prompts",
        False,
        f"These {len(texts)} prompts have the SHA-256 {found[:16]}..., and it names {expected[:16]}... of {count} "
        "prompts. Give the same ones in the same order.",
    )


def _generator_check(generator: PromptConditionedLoraGenerator, kept: Mapping[str, Any]) -> Check:
    expected, found = kept.get("generator_sha256"), generator_sha256(generator)
    if expected is None:
        return Check("generator", None, "It does not name the generator's SHA-256: an earlier version wrote it.")
    if found is None:
        return Check("generator", None, "The generator's weights are here in part only, so that they have no SHA-256.")
    if found is None:
        return Check("generator", None, "The generator's weights are here in part only, so they have no SHA-256.")
    if found == expected:
        return Check("generator", True, f"The generator is the one that it names, {found[:16]}...")
    dtype = str(generator.dtype).removeprefix("torch.")
    hint = f" It was loaded in {dtype}, and then in {kept['dtype']}." if kept.get("dtype", dtype) != dtype else ""
    return Check(
        "generator",
        False,
        f"The generator has the SHA-256 {found[:16]}..., and it names {str(expected)[:16]}...{hint}",
    )


def _score_checks(again: GeneratedAdapter, kept: Mapping[str, Any]) -> list[Check]:
    """Whether the score is the one that was kept, and what was done above the threshold follows from it."""
    named, found = kept.get("out_of_distribution"), again.out_of_distribution
    if named is None or found is None:
        said = "It names no score." if named is None else "The generator keeps nothing of its fitted tasks' prompts."
        return [Check("score", None, said)]
    alike = abs(named - found) <= _SCORE_TOLERANCE
    checks = [Check("score", alike, f"Its out-of-distribution score is {named:.3f}, and made again {found:.3f}.")]
    action, threshold = kept.get("out_of_distribution_action"), kept.get("out_of_distribution_threshold")
    if action is not None and threshold is not None:
        factor, asked = float(kept.get("shrunk_by", 1.0)), {"shrink": shrinkage(named, threshold), "mean": 0.0}
        follows = abs(factor - asked.get(action, 1.0)) < 1e-6 and (action == "none" or named > threshold)
        done = "nothing was done" if action == "none" else f"the adapter got {action!r}, a factor of {factor:.3g}"
        said = f"With a threshold of {threshold:.3g} {done}."
        checks.append(Check("fallback", follows, said))
    return checks


def _compared(
    adapter: Mapping[str, Tensor], made: Mapping[str, Tensor], rounding: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    differences, tolerances = {}, {}
    for key, tensor in adapter.items():
        differences[key] = float((tensor.double() - made[key].double()).abs().max())
        # It may have been brought to another dtype since.
        eps = torch.finfo(tensor.dtype).eps
        tolerances[key] = rounding[key] + eps * float(made[key].abs().max())
    return differences, tolerances


def _weights_check(differences: Mapping[str, float], tolerances: Mapping[str, float]) -> Check:
    worst = max(differences, key=lambda key: differences[key] - tolerances[key])
    beyond = [key for key in differences if not differences[key] <= tolerances[key]]
    if beyond:
        said = (
            f"{len(beyond)} of {len(differences)} tensors are others: {worst!r} differs by {differences[worst]:.2g}, "
            f"and rounding explains {tolerances[worst]:.2g}."
        )
        return Check("weights", False, said)
    largest = max(differences.values())
    said = (
        f"All {len(differences)} tensors are the same: the largest difference is {largest:.2g}, and rounding explains "
        f"{min(tolerances.values()):.2g} to {max(tolerances.values()):.2g}."
    )
    return Check("weights", True, said)
