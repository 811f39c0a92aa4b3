# SPDX-License-Identifier: Apache-2.0
"""What `import peft_dnd` costs over importing PEFT and transformers.

python benchmarks/bench_import.py
"""

from __future__ import annotations

import subprocess
import sys

from record import ratio, spread, write_result


REPEATS = 7
SCRIPT = """
import time
began = time.process_time()
import peft, transformers
middle = time.process_time()
import peft_dnd
print(middle - began, time.process_time() - middle)
"""


def main() -> None:
    """Measure, print and keep the figures: processor seconds, each in a fresh process."""
    measure()
    theirs, ours = zip(*(measure() for _ in range(REPEATS)), strict=True)
    result = {
        "repeats": REPEATS,
        "cpu_seconds": {"peft and transformers": spread(theirs), "peft_dnd on top": spread(ours)},
        "overhead": ratio(ours, theirs),
    }
    write_result("import", result)


def measure() -> tuple[float, float]:
    """Processor seconds of their imports, and of ours after them."""
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    theirs, ours = map(float, output.stdout.split())
    return theirs, ours


if __name__ == "__main__":
    main()
