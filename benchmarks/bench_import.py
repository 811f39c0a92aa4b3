# Copyright 2026 The peft_dnd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
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
