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

import json
import subprocess
import sys
from pathlib import Path
from statistics import median


RESULT = Path(__file__).parent / "results" / "import.json"
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
    runs = [measure() for _ in range(REPEATS)]
    theirs, ours = (median(run[i] for run in runs) for i in (0, 1))
    result = {
        "command": "python benchmarks/bench_import.py",
        "median_cpu_seconds": {"peft and transformers": theirs, "peft_dnd on top": ours},
        "overhead": round(ours / theirs, 3),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def measure() -> tuple[float, float]:
    """Processor seconds of their imports, and of ours after them."""
    output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    theirs, ours = map(float, output.stdout.split())
    return theirs, ours


if __name__ == "__main__":
    main()
