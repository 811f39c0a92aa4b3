# SPDX-License-Identifier: Apache-2.0
"""What an adapter is, in a few values that JSON knows: for those who look at one without loading it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .layout import AdapterLayout


def layout_facts(layout: AdapterLayout) -> dict[str, Any]:
    """How many modules of which kinds and ranks a layout has, and how many parameters."""
    if not layout.modules:
        return {
            "method": layout.method,
            "tensors": len(layout.tensors),
            "task_type": layout.task_type,
            "adapter_parameters": layout.num_parameters,
        }
    ranks = Counter(module.rank for module in layout.modules)
    kinds = Counter(module.name.rpartition(".")[2] for module in layout.modules)
    return {
        "modules": len(layout.modules),
        "module_kinds": dict(sorted(kinds.items())),
        "max_rank": layout.max_rank,
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "use_rslora": layout.use_rslora,
        "task_type": layout.task_type,
        "adapter_parameters": layout.num_parameters,
    }
