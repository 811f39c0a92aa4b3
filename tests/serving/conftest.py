# SPDX-License-Identifier: Apache-2.0
"""A service around the tiny generator, with a cache folder of its own, and a client that speaks HTTP to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.constants import TASK_PROMPTS

from peft_dnd import PromptConditionedLoraGenerator
from peft_dnd.serving import AdapterCache, AdapterService, ServedGenerator, ServiceLimits, Tokens, create_app


Serve = Callable[..., TestClient]


@pytest.fixture(scope="session")
def served(generator: PromptConditionedLoraGenerator) -> ServedGenerator:
    """The tiny generator, which cannot tell what does not belong."""
    return ServedGenerator("tiny", generator, "sha256:of-tiny", "sha256:of-its-encoder")


@pytest.fixture(scope="session")
def discerning(generator: PromptConditionedLoraGenerator) -> ServedGenerator:
    """One that can."""
    able = copy.deepcopy(generator)
    able.fit_out_of_distribution({task: TASK_PROMPTS[task] for task in ("law", "med", "geo")})
    return ServedGenerator("discerning", able, "sha256:of-discerning")


@pytest.fixture
def serve(served: ServedGenerator, tmp_path: Path) -> Iterator[Serve]:
    """Starts a service with its bounds, tokens and whatever else it takes, and gives a client of it."""
    with ExitStack() as stack:

        def start(
            *generators: ServedGenerator, folder: Path | None = None, tokens: Tokens | None = None, **options: Any
        ) -> TestClient:
            named, remembered = options.pop("named", None), options.pop("remember_prompts", False)
            hosts = options.pop("hosts", None)
            limits = ServiceLimits(**options)
            cache = AdapterCache(folder or tmp_path / "cache", limits)
            service = AdapterService(generators or (served,), cache, limits, tasks=named, remember_prompts=remembered)
            return stack.enter_context(
                TestClient(create_app(service, tokens, hosts=hosts), raise_server_exceptions=False)
            )

        yield start
