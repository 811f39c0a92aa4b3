# SPDX-License-Identifier: Apache-2.0
"""Services as real processes: stopped, killed in the midst of work, and two of them with one cache folder."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from support.constants import TASK_PROMPTS
from support.serving import Serving, serving

from peft_dnd import GeneratedAdapter


pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
PROMPTS = TASK_PROMPTS["law"]
TOKEN = "a-token-of-the-tests"


def post(service: Serving, seed: int) -> httpx2.Response | None:
    """Ask for an adapter; `None` if the service is gone."""
    try:
        return service.client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": seed})
    except httpx2.TransportError:
        return None


def check_all(service: Serving, folder: Path) -> list[str]:
    """Ids of all adapters that are kept, each of which must be whole."""
    names, after = [], {}
    while True:
        page = service.client.get("/v1/adapters", params=after).json()
        names += [facts["id"] for facts in page["adapters"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    for name in names:
        with tarfile.open(fileobj=io.BytesIO(service.client.get(f"/v1/adapters/{name}").content)) as tar:
            tar.extractall(folder / name, filter="data")
        assert GeneratedAdapter.from_pretrained(folder / name).num_parameters > 0
    return names


def test_a_service_serves_and_stops_when_it_is_told_to(generator_folder: Path, tmp_path: Path) -> None:
    secret = "what is the secret colour ?"
    with serving(generator_folder, tmp_path / "cache", environment={"PEFT_DND_TOKENS": f"me:{TOKEN}"}) as service:
        service.wait_until_ready()
        assert service.client.get("/v1/tasks").status_code == 401
        service.client.headers["Authorization"] = f"Bearer {TOKEN}"
        found = service.client.post("/v1/adapters", json={"prompts": [secret]})
        assert found.status_code == 201
        environment = Path(f"/proc/{service.process.pid}/cmdline")
        assert not environment.exists() or TOKEN not in environment.read_text()
        assert check_all(service, tmp_path / "read") == [found.json()["id"]]
        assert service.stop() == 0
    lines = [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]
    assert any(line.get("adapter") == found.json()["id"] and line["status"] == 201 for line in lines)
    assert "secret" not in service.log and TOKEN not in service.log and "Traceback" not in service.log
    assert not list((tmp_path / "cache" / "work").iterdir()), "what it worked in is gone"
    provenance = json.loads((tmp_path / "read" / found.json()["id"] / "peft_dnd_provenance.json").read_text())
    assert str(generator_folder) not in json.dumps(provenance)


@pytest.mark.slow
def test_two_processes_with_one_folder_make_nothing_twice(generator_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(generator_folder, cache) as one, serving(generator_folder, cache) as other:
        for service in (one, other):
            service.wait_until_ready()
        asked = [(service, seed) for seed in range(20) for service in (one, other, one)]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda pair: post(*pair), asked))
        assert {answer.status_code for answer in answers} <= {200, 201}
        made = [
            float(line.rpartition(" ")[2])
            for service in (one, other)
            for line in service.client.get("/metrics").text.splitlines()
            if line.startswith("peft_dnd_generation_seconds_count")
        ]
        assert sum(made) == 20, "each was made by one of them"
        ids = {}
        for (_, seed), answer in zip(asked, answers, strict=True):
            assert ids.setdefault(seed, answer.json()["id"]) == answer.json()["id"]
        assert check_all(one, tmp_path / "one") == check_all(other, tmp_path / "other") == sorted(ids.values())
        one.client.put("/v1/tasks/law", json={"prompts": PROMPTS})
        assert other.client.post("/v1/adapters", json={"task": "law"}).json()["id"] == ids[0]
        other.client.delete(f"/v1/adapters/{ids[0]}")
        assert one.client.get(f"/v1/adapters/{ids[0]}").status_code == 404
        assert one.stop() == 0 and post(other, 99).status_code == 201


@pytest.mark.slow
def test_a_stop_in_the_midst_of_requests_ends_those_that_are_there(generator_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # Time enough for all of them, also on a machine that others keep busy.
    with serving(generator_folder, cache, "--max-queue-seconds", "600", "--grace-seconds", "200") as service:
        service.wait_until_ready()
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(post, service, seed) for seed in range(12)]
            while not list((cache / "adapters").iterdir()):
                time.sleep(0.002)
            assert service.stop() == 0
            answers = [answer.result() for answer in asked]
    # What came too late to be accepted found nobody; nothing that was accepted was dropped or refused.
    assert {answer.status_code for answer in answers if answer is not None} == {201}
    assert len({answer.json()["id"] for answer in answers if answer}) == len(list((cache / "adapters").iterdir()))
    assert not list((cache / "work").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("after", [5, 60])
def test_a_kill_in_the_midst_of_100_requests_leaves_no_half(
    generator_folder: Path, tmp_path: Path, after: int
) -> None:
    cache = tmp_path / "cache"
    bounds = ("--max-queue", "200", "--max-requests", "200", "--max-queue-seconds", "600")
    with serving(generator_folder, cache, *bounds) as service:
        service.wait_until_ready()
        with ThreadPoolExecutor(100) as pool:
            asked = [pool.submit(post, service, seed) for seed in range(100)]
            while len(list((cache / "adapters").iterdir())) < after:
                time.sleep(0.002)
            assert service.stop(signal.SIGKILL) == -signal.SIGKILL
            answers = [answer.result() for answer in asked]
    told = {answer.json()["id"] for answer in answers if answer is not None}
    # Of what may be half-written nothing lies where it would be served.
    kept = {path.name for path in (cache / "adapters").iterdir()}
    assert told <= kept and after <= len(kept) < 100
    assert list((cache / "work").iterdir()), "it left its working folder"
    with serving(generator_folder, cache) as again:
        again.wait_until_ready()
        assert set(check_all(again, tmp_path / "read")) == kept
        assert len(list((cache / "work").iterdir())) == 2, "its own, and nothing that the killed one left"
        assert {post(again, seed).status_code for seed in range(100)} == {200, 201}
        assert len(check_all(again, tmp_path / "all")) == 100
