# SPDX-License-Identifier: Apache-2.0
"""Prints what the library requires with every `>=` read as `==`: python .ci/oldest.py pyproject.toml [torch version].

The second argument takes torch's place in the list, for a machine that has no build of the oldest one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tomli
from packaging.requirements import Requirement


pyproject, *torch_version = sys.argv[1:]
project = tomli.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
# Of the development tools only those that the tests plug the library into.
hosts = [line for line in project["optional-dependencies"]["dev"] if line.startswith(("datasets", "trl"))]
for requirement in map(Requirement, project["dependencies"] + hosts):
    (floor,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
    if requirement.name == "torch" and torch_version:
        (floor,) = torch_version
    print(f"{requirement.name}=={floor}")
# `datasets` takes any newer one, but from 19 on it wants NumPy 2.
print("pyarrow<19")
