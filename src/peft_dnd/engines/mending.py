# SPDX-License-Identifier: Apache-2.0
"""Writing an adapter so that an engine understands it: one rank and scaling for all modules, names of another class.

What comes out is the same update, in a form that engines with less than PEFT's own reading of it take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..adapters.generated_adapter import GeneratedAdapter
from ..adapters.layout import LoraModule
from ..errors import LayoutError


def with_one_rank(adapter: GeneratedAdapter) -> GeneratedAdapter:
    """The same update with one rank and one scaling for all modules, so that no `rank_pattern` is needed.

    Smaller matrices get rows of zeros in A and columns of zeros in B, which add nothing. Where scalings differ, B
    takes up the quotient of its own and the most frequent one: its numbers are rounded once more in its dtype, those
    of the other modules stay as they are.

    Args:
        adapter: Any adapter.

    Returns:
        The adapter itself if its modules are alike already.
    """
    layout = adapter.layout
    layout.check_plain_lora("What the engines read")
    rank = layout.max_rank
    scaling = Counter(map(layout.scaling, layout.modules)).most_common(1)[0][0]
    if all(module.rank == rank and layout.scaling(module) == scaling for module in layout.modules):
        return adapter
    state_dict = adapter.state_dict()
    modules = []
    for module in layout.modules:
        tensor_a, tensor_b = module.tensors
        factor = layout.scaling(module) / scaling
        state_dict[tensor_a.key] = _padded(state_dict[tensor_a.key], rank, axis=0)
        state_dict[tensor_b.key] = _padded(state_dict[tensor_b.key] * factor, rank, axis=1)
        modules.append(
            replace(
                module,
                shape_a=(rank, *module.shape_a[1:]),
                shape_b=(module.shape_b[0], rank, *module.shape_b[2:]),
                alpha=scaling * rank,
            )
        )
    return GeneratedAdapter(
        replace(layout, modules=tuple(modules), use_rslora=False), state_dict, dict(adapter.provenance)
    )


def renamed_modules(adapter: GeneratedAdapter, names: Mapping[str, str]) -> GeneratedAdapter:
    """The same matrices under the names that the modules have in another class of the base.

    Args:
        adapter: Any adapter.
        names: Name of a module in the adapter -> its name in the served class; what is not in it keeps its name. See
            [`match_modules`][peft_dnd.adapters.matching.match_modules].

    Raises:
        LayoutError: If a name is of no module of the adapter, or two modules would have one name.
    """
    layout = adapter.layout
    unknown = sorted(names.keys() - {module.name for module in layout.modules})
    if unknown:
        raise LayoutError(f"The adapter has no module {unknown[0]!r}, which was to be renamed.")
    state_dict, renamed = adapter.state_dict(), {}
    modules: dict[str, LoraModule] = {}
    for module in layout.modules:
        there = replace(module, name=names.get(module.name, module.name))
        if there.name in modules:
            raise LayoutError(f"Two modules of the adapter would both be {there.name!r}. Give each a name of its own.")
        modules[there.name] = there
        for old, new in zip(module.tensors, there.tensors, strict=True):
            renamed[new.key] = state_dict[old.key]
    # Suffixes or a pattern that found the old names may find others, or none, among the new ones.
    layout = replace(layout, modules=tuple(modules.values()), target_modules=None)
    return GeneratedAdapter(layout, renamed, dict(adapter.provenance))


def _padded(matrix: torch.Tensor, rank: int, *, axis: int) -> torch.Tensor:
    missing = list(matrix.shape)
    missing[axis] = rank - matrix.shape[axis]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim=axis)
