# SPDX-License-Identifier: Apache-2.0
"""Prints what installed packages require, but for what text needs none of: python .ci/engine_requirements.py NAME...

torch is pinned elsewhere; torchaudio, torchvision, torchcodec and numba would bring builds for other versions of it.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement


LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "numba"}

for requirement in map(Requirement, [line for name in sys.argv[1:] for line in requires(name) or []]):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        print(f"{requirement.name}{extras}{requirement.specifier}")
