# SPDX-License-Identifier: Apache-2.0
"""The plugin's client and the service itself, over HTTP: they mean the same by names, ids and refusals."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.constants import TASK_PROMPTS

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.engines import ServedAdapters
from peft_dnd.errors import EngineError
from peft_dnd.serving import (
    AdapterCache,
    AdapterService,
    ServedGenerator,
    ServiceLimits,
    TaskPrompts,
    Tokens,
    create_app,
)


TOKEN = "a-token-of-sixteen"


@pytest.fixture
def url(generator: PromptConditionedLoraGenerator, tmp_path: Path) -> Iterator[str]:
    uvicorn = pytest.importorskip("uvicorn")
    limits = ServiceLimits()
    service = AdapterService(
        [ServedGenerator("tiny", generator, "sha256:of-tiny")],
        AdapterCache(tmp_path / "service", limits),
        limits,
        tasks={"law": TaskPrompts(tuple(TASK_PROMPTS["law"]))},
    )
    server = uvicorn.Server(
        uvicorn.Config(create_app(service, Tokens([TOKEN])), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < ends
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)


def test_a_task_of_the_service_and_its_id(url, generator, tmp_path) -> None:
    adapters = ServedAdapters(url, TOKEN, tmp_path / "cache")
    folder = adapters.find("law")
    assert folder is not None
    generator.generate_adapter(TASK_PROMPTS["law"]).save_pretrained(tmp_path / "expected")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    elsewhere = ServedAdapters(url, TOKEN, tmp_path / "another-machine")
    by_id = elsewhere.find(f"dnd:{folder.name}")
    assert by_id is not None and by_id.name == folder.name and by_id != folder
    assert adapters.find("med") is None and adapters.find(f"dnd:{'0' * 64}") is None
    for token in (None, "a-wrong-token-of-more-than-sixteen"):
        with pytest.raises(EngineError, match=r"401.*Check the token"):
            ServedAdapters(url, token, tmp_path / "third").find("law")
