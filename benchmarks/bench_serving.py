# SPDX-License-Identifier: Apache-2.0
"""The service under load: wrk sends it requests within its bounds, then more than they allow.

python benchmarks/bench_serving.py

Needs wrk (`apt-get install wrk`) and `pip install "peft-dnd[serve]"`. The generator is a tiny one, so that the figures
are the service's own: HTTP, queue, cache folder with its renames and flushes. Of ten requests four want a new adapter,
three one that is there, two read one, one lists. What is refused beyond the bounds must be so by 429 alone, and memory
must stay flat.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
from bench_cli import write_generator
from record import write_result


DOOR = [sys.executable, "-c", "import sys, peft_dnd_cli; sys.exit(peft_dnd_cli.main())"]
PORT = 8377
URL = f"http://127.0.0.1:{PORT}"
LOAD = Path(__file__).parent / "serving_load.lua"
# The bounds: what is kept turns over several times, and more ask at once than may.
BOUNDS = {"--max-requests": 48, "--max-queue": 24, "--max-queue-per-client": 24, "--max-cache-adapters": 500}
WITHIN, BEYOND = 16, 96
KNOWN = 50
GROWTH = 1.05
# What a patient client allows; who answers later than that has answered nobody.
CLIENT_SECONDS = 60


def main() -> None:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="how many beyond the bounds; within a tenth")
    requests = parser.parse_args().requests
    if shutil.which("wrk") is None:
        print("Left out: this needs wrk, a load generator (apt-get install wrk).", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as process:
        known = [make(f"known {number}") for number in range(KNOWN)]
        load(process, requests // 20, BEYOND, "warm", known)  # buffers and caches fill, which is no growth
        memory = Memory(process)
        within = load(process, requests // 10, WITHIN, "within", known)
        beyond = load(process, requests, BEYOND, "beyond", known)
        resident = memory.stop()
        kept = {"adapters": len(list((Path(name) / "cache" / "adapters").iterdir())), "bound": 500}
    result = {
        "bounds": BOUNDS,
        "within_bounds": {"connections": WITHIN, **within},
        "beyond_bounds": {"connections": BEYOND, **beyond},
        "resident_mib": resident,
        "kept": kept,
    }
    write_result("serving", result)
    check(within, beyond, resident, kept)


def check(within: dict[str, Any], beyond: dict[str, Any], resident: dict[str, float], kept: dict[str, int]) -> None:
    """End with an error if the service did not keep what is promised."""
    faults = []
    if set(within["statuses"]) - {"200", "201"}:
        faults.append(f"within its bounds it answered {within['statuses']}")
    if set(beyond["statuses"]) - {"200", "201", "429"} or "429" not in beyond["statuses"]:
        faults.append(f"beyond its bounds it answered {beyond['statuses']}")
    if within["socket_errors"] or beyond["socket_errors"]:
        faults.append("connections broke")
    if resident["end"] > GROWTH * resident["start"]:
        faults.append(f"memory grew: {resident}")
    if kept["adapters"] > kept["bound"]:
        faults.append(f"too much is kept: {kept}")
    if faults:
        sys.exit("; ".join(faults))


def make(prompt: str) -> str:
    """Have an adapter made; its id."""
    answer = httpx2.post(f"{URL}/v1/adapters", json={"prompts": [prompt, "what is the law ?"]}, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["id"])


def load(
    process: subprocess.Popen[bytes], requests: int, connections: int, seed: str, known: list[str]
) -> dict[str, Any]:
    """Have wrk send so many requests over so many connections at once.

    Seconds are those that passed, and depend on what else the machine does; the service's processor seconds do not.
    """
    wait_until_idle()  # what the load before left behind is not of this one
    command = [
        "wrk",
        "--threads",
        "1",
        "--connections",
        str(connections),
        "--duration",
        "1h",
        "--timeout",
        f"{CLIENT_SECONDS}s",
    ]
    command += ["--script", str(LOAD), URL, "--", str(requests), seed, *known]
    began = processor_seconds(process)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as wrk:
        assert wrk.stdout is not None and wrk.stderr is not None
        for line in wrk.stderr:  # wrk itself goes by time alone: the script says when it has had all answers
            if line.startswith("ALL ANSWERED"):
                wrk.send_signal(signal.SIGINT)
        printed = wrk.stdout.read()
    spent = processor_seconds(process) - began
    (found_line,) = re.findall(r"^RESULT (.*)$", printed, flags=re.MULTILINE)
    found = dict(part.split("=") for part in found_line.split())
    statuses = {name: int(value) for name, value in found.items() if name.isdigit()}
    seconds = float(found["seconds"])
    print(f"{seed}: {found_line}", file=sys.stderr)
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "socket_errors": int(found["socket_errors"]),
        "p50_ms": int(found["p50_us"]) / 1000,
        "p99_ms": int(found["p99_us"]) / 1000,
        "max_ms": int(found["max_us"]) / 1000,
        "seconds": seconds,
        "cpu_ms_a_request": round(1000 * spent / sum(statuses.values()), 3),
        "requests_a_second": round(sum(statuses.values()) / seconds, 1),
    }


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """What the processor has spent on a process until now."""
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)


class Memory:
    """Watches how much memory a process holds, in MiB."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._stopped = psutil.Process(process.pid), threading.Event()
        self._seen = [self._now()]
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Watch no more: what it held at the start, at most, and at the end."""
        self._stopped.set()
        self._thread.join()
        seen = [round(value, 1) for value in (*self._seen, self._now())]
        return {"start": seen[0], "most": max(seen), "end": seen[-1]}

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            self._seen.append(self._now())

    def _now(self) -> float:
        return float(self._process.memory_info().rss) / 2**20


@contextmanager
def served(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service of a tiny generator, as a process."""
    write_generator(folder)
    arguments = ["serve", "--generator", f"tiny={folder / 'generator'}", "--cache", str(folder / "cache"), "--quiet"]
    arguments += ["--port", str(PORT), "--device", "cpu", *(str(part) for bound in BOUNDS.items() for part in bound)]
    process = subprocess.Popen([*DOOR, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_until_ready(process)
        yield process
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            sys.exit("It did not stop as it should.")
    finally:
        process.kill()


def wait_until_idle() -> None:
    """Wait until the service works on nothing but the question whether it does."""
    while not re.search(r"^peft_dnd_requests_in_work 1\.0$", httpx2.get(f"{URL}/metrics").text, flags=re.MULTILINE):
        time.sleep(0.1)


def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    """Wait until the service answers."""
    while process.poll() is None:
        try:
            if httpx2.get(f"{URL}/health/ready").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    sys.exit("The service did not start.")


if __name__ == "__main__":
    main()
