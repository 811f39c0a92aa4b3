# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter, which may have been edited since, is within a generator's policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import AdapterLayout
from ..errors import LayoutError, PeftDndError, PolicyError
from ..storage.files import PathLike
from .norms import TOGETHER, update_norms
from .policy import GeneratorPolicy


# Adapters are stored in half precision too, whose rounding moves a norm by less than that.
SLACK = 5e-3


@dataclass(frozen=True)
class PolicyCheck:
    """What was found of an adapter.

    Attributes:
        problems: What is not within the policy, in words; empty if nothing is.
        not_checked: What could not be looked at, and why.
    """

    problems: tuple[str, ...]
    not_checked: tuple[str, ...]


def check_adapter(
    adapter: GeneratedAdapter | PathLike,
    policy: GeneratorPolicy,
    layouts: Sequence[AdapterLayout],
    base_model: nn.Module | None = None,
) -> PolicyCheck:
    """Hold an adapter against a policy: its modules, its norms as its own configuration scales them, its behaviour.

    An edit that stays within all bounds is not seen; only making the adapter again from its prompts shows that.

    Args:
        adapter: The adapter, or its folder or Hub id.
        policy: The policy.
        layouts: The layout of the adapters that the generator writes, for each of its bases.
        base_model: The base, for the behaviour gate.

    Raises:
        FileNotFoundError: If there is no adapter.
        CorruptFileError: If it cannot be read.
        BaseModelMismatchError: If the base is none for such adapters.
    """
    not_checked = ["the prompts, which an adapter does not hold"] if policy.refused or policy.classifier else []
    problems = []
    if isinstance(adapter, str | os.PathLike):
        unread = [path.name for path in Path(adapter).glob("adapter_model*") if path.suffix != ".safetensors"]
        problems += [
            f"it has the file {name!r} beside, which some programs load in place of its weights" for name in unread
        ]
        try:
            adapter = GeneratedAdapter.from_pretrained(adapter)
        except LayoutError as error:
            return PolicyCheck((*problems, f"it is none that a generator wrote: {error}"), tuple(not_checked))
    difference = _difference(layouts, adapter.layout)
    if difference:
        problems.append(f"it is unlike what the generator (the first) writes: {difference}")
    if adapter.layout.modules:
        problems += _written(adapter, policy) + _above(adapter, policy)
    elif policy.norms or policy.never_written:
        problems.append(f"it is a {adapter.layout.method} adapter, which the policy's norms do not bound")
    made_under = (adapter.provenance.get("policy") or {}).get("sha256")
    if made_under != policy.sha256:
        problems.append(
            "by its provenance it was made under no policy"
            if made_under is None
            else "it was made under another policy"
        )
    if policy.gate is not None and base_model is None:
        not_checked.append("the behaviour gate, which needs the base")
    elif policy.gate is not None and base_model is not None:
        try:
            policy.gate.check(adapter, base_model)
        except PolicyError as error:
            problems.append(str(error))
        except PeftDndError as error:
            problems.append(f"the behaviour gate cannot be checked: {error}")
    return PolicyCheck(tuple(problems), tuple(not_checked))


def _difference(layouts: Sequence[AdapterLayout], found: AdapterLayout) -> str | None:
    """In what a layout differs from all of these; told of that for its own base, if one is called so."""
    differences = [layout.difference(found) for layout in layouts]
    if None in differences:
        return None
    name = found.base_model_name_or_path
    own = [number for number, layout in enumerate(layouts) if layout.base_model_name_or_path == name]
    return differences[own[0] if own else 0]


def _written(adapter: GeneratedAdapter, policy: GeneratorPolicy) -> list[str]:
    names = [module.name for module in adapter.layout.modules]
    norms = dict(zip(names, update_norms(adapter.layout, adapter.state_dict(), {}).tolist(), strict=True))
    written = [name for name in policy.unwritten(adapter.layout) if norms[name] > 0]
    return [f"it writes to {name!r}, which the generator never does" for name in written]


def _above(adapter: GeneratedAdapter, policy: GeneratorPolicy) -> list[str]:
    if policy.norms is None:
        return []
    above = policy.norms.excess(adapter.layout, adapter.state_dict(), slack=SLACK)
    words = []
    for name, factor in above.items():
        what = "the updates of all modules together are" if name == TOGETHER else f"the update of {name!r} is"
        words.append(f"{what} {factor:.3g} times as large as the policy allows")
    return words
