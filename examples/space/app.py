# SPDX-License-Identifier: Apache-2.0
"""A Space in which visitors drop prompts on generators: what `peft-dnd demo` shows, set up by the Space's variables.

`GENERATORS` names Hub ids, apart by blanks; without it the folder `generator` beside this file is shown. `BASE` names
the base to try adapters on, where it is not what the generators name.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft_dnd.cli.demo import page_of


HERE = Path(__file__).parent
GENERATORS = os.environ.get("GENERATORS", "").split() or [str(HERE / "generator")]

page = page_of(GENERATORS, base=os.environ.get("BASE") or None)
demo = page.build()

if __name__ == "__main__":
    page.launch()
