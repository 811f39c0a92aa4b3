# SPDX-License-Identifier: Apache-2.0
"""`peft-dnd renew-checksums`: the checksums of a generator's folder taken anew, after an edit on purpose."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import Json, Quiet, report


def renew_checksums(
    generator: Annotated[str, typer.Argument(help="Folder of the generator.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Take the checksums of a generator's folder anew, after its weights or settings were edited on purpose.

    What is in the folder now counts as right from then on; `inspect` says beforehand what differs.

    Example:
      peft-dnd inspect generator
      peft-dnd renew-checksums generator
    """
    from peft_dnd.generator import renew_checksums as renew

    file = renew(generator)
    facts = {"generator": generator, "checksums": str(file)}
    report(facts, f"What is in {generator!r} now counts as right, by {file}", as_json=as_json, quiet=quiet)
