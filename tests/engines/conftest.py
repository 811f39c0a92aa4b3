# SPDX-License-Identifier: Apache-2.0
"""Stand-ins: of vLLM's two classes that the plugin meets, and of `peft-dnd serve` over HTTP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.engine_stand_ins import LoRARequest, StandIn

from peft_dnd import GeneratedAdapter


@pytest.fixture
def vllm_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The resolvers that are registered with a stand-in of vLLM."""
    found: dict[str, Any] = {}
    registry = type("Registry", (), {"register_resolver": staticmethod(found.__setitem__)})
    for name, content in {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolverRegistry": registry},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.fixture
def service() -> Iterator[StandIn]:
    stand_in = StandIn()
    thread = threading.Thread(target=stand_in.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()


@pytest.fixture
def adapter(generator) -> GeneratedAdapter:
    return generator.generate_adapter(["what is the law ?"])


@pytest.fixture
def adapter_files(adapter: GeneratedAdapter, tmp_path: Path) -> dict[str, bytes]:
    adapter.save_pretrained(tmp_path / "sent")
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "sent").iterdir())}
