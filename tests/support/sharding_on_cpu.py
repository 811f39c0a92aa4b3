# SPDX-License-Identifier: Apache-2.0
"""Runs a script with FSDP, or DeepSpeed, in force on CPUs, where accelerate turns both off (as of 1.15).

    torchrun --nproc-per-node 2 tests/support/sharding_on_cpu.py SCRIPT ARGUMENTS

All else, sharding included, is what it is on GPUs; the processes talk by gloo.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


_initialize = AcceleratorState.__init__
_choose_backend = PartialState._prepare_backend


def _initialize_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def _choose_gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str | None, DistributedType]:
    backend, kind = _choose_backend(self, *args, **kwargs)
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    return ("gloo" if backend is None and uses_deepspeed else backend), kind


if __name__ == "__main__":
    AcceleratorState.__init__ = _initialize_with_fsdp
    PartialState._prepare_backend = _choose_gloo
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
