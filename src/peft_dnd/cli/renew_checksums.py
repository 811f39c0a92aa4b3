# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd renew-checksums`: the checksums of a generator's folder taken anew, after an edit on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import CommandError, Json, Quiet, report


def renew_checksums(
    generator: Annotated[Path, typer.Argument(help="Folder of the generator.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take the checksums of a generator's folder anew, after its weights or settings were edited on purpose.

    What is in the folder now counts as right from then on; `inspect` says beforehand what differs.

    Example:
      peft-dnd inspect generator
      peft-dnd renew-checksums generator
    """
    if not generator.is_dir():
        raise CommandError(
            f"{str(generator)!r} is no folder here, and checksums are renewed in one. Download the generator first "
            f"(hf download {generator} --local-dir FOLDER), or check the spelling."
        )
    from peft_dnd.generator import renew_checksums as renew

    file = renew(generator)
    facts = {"generator": str(generator), "checksums": str(file)}
    report(facts, f"What is in {str(generator)!r} now counts as right, by {file}", as_json=as_json, quiet=quiet)
