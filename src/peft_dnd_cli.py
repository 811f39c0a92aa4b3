# SPDX-License-Identifier: Apache-2.0
"""The door of the `peft-dnd` command, beside the library rather than in it.

Importing anything of `peft_dnd` runs its `__init__`, which teaches PEFT and so imports it, torch and transformers:
seconds of work that `--help` and a mistyped option need not wait for. Under this name the files of `peft_dnd/cli` are
imported by themselves; each verb imports the library when it runs.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


# With a path a module is a package: what is imported under this name is looked for there.
__path__ = [str(Path(__file__).with_name("peft_dnd") / "cli")]


def main() -> int:
    """Run the command; see [`peft_dnd.cli.app.main`]."""
    code: int = import_module("peft_dnd_cli.app").main()
    return code
