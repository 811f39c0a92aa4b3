# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: a request for `model: dnd:<id>`, or a task's name, finds the adapter, or has it made.

vLLM asks it where no model or adapter of the name is loaded, if `VLLM_ALLOW_RUNTIME_LORA_UPDATING=true`. The
environment says where adapters come from:

| variable | is |
| --- | --- |
| `PEFT_DND_SERVICE_URL` | a `peft-dnd serve` to ask, `http://host:port` |
| `PEFT_DND_SERVICE_TOKEN` | the bearer token that it wants |
| `PEFT_DND_GENERATOR` | or a generator, folder or Hub id, to generate with in vLLM's own process |
| `PEFT_DND_TASKS` | and a folder with a file of prompts for each task: `law.txt`, one a line, or `law.jsonl` |
| `PEFT_DND_CACHE` | folder to keep adapters in; `$XDG_CACHE_HOME/peft_dnd/engines` by default |
| `PEFT_DND_BASE` | the base that adapters record, where the served one goes by another name |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from ..adapters.lora import ADAPTER_CONFIG_NAME
from ..adapters.matching import own_name
from ..errors import EngineError, PeftDndError
from ..storage.files import read_json
from .kept_adapters import default_cache, parse_name
from .served_adapters import ServedAdapters
from .task_folder import TaskFolder


logger = logging.getLogger(__name__)


class AdapterSource(Protocol):
    """Where adapters come from: a service, or a folder of tasks."""

    def find(self, name: str) -> Path | None:
        """The folder of the adapter that a name means; `None` if there is none."""


class AdapterResolver:
    """What vLLM asks for adapters that it does not have yet; a `vllm.lora.resolver.LoRAResolver`.

    Args:
        source: Where they come from.
        base: The base that they record, where the served one goes by another name; otherwise the last component of
            the two names must be the same.
    """

    def __init__(self, source: AdapterSource, base: str | None = None) -> None:
        self._source, self._base = source, base

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Find the adapter of a name, fetching or generating it where needed.

        Args:
            base_model_name: What vLLM was told to serve.
            lora_name: The `model` of a request.

        Returns:
            A `vllm.lora.request.LoRARequest`; `None` if there is no such adapter, or it is for another base, which is
            logged. Its id depends on the name and the adapter alone, so that it is the same in every process.

        Raises:
            PeftDndError: If a name that begins with `dnd:` cannot be looked up. Any other name may be another
                resolver's: there the error is logged.
        """
        from vllm.lora.request import LoRARequest

        parsed = parse_name(lora_name)
        if parsed is None:
            return None
        try:
            folder = await asyncio.to_thread(self._source.find, lora_name)
        except (PeftDndError, OSError) as error:
            if parsed.ours:
                raise
            logger.error("whether there is an adapter %r cannot be told: %s", lora_name, error)
            return None
        if folder is None or not self._is_for(base_model_name, folder, lora_name):
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=stable_id(lora_name, folder.name), lora_path=str(folder))

    def _is_for(self, served: str, folder: Path, lora_name: str) -> bool:
        recorded = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
        expected = self._base or served
        if not recorded or own_name(recorded) == own_name(expected):
            return True
        logger.error(
            "The adapter %r is for the base %r and %r is served: it is refused. If the two are the same model, set "
            "PEFT_DND_BASE=%s.",
            lora_name,
            recorded,
            served,
            recorded,
        )
        return False


def stable_id(lora_name: str, adapter_id: str) -> int:
    """A number for an adapter under a name, from 1 to 2^63 - 1: by chance the same for no two.

    >>> stable_id("law", "0" * 64) == stable_id("law", "0" * 64) != stable_id("law", "1" * 64)
    True
    """
    digest = sha256(f"{lora_name}\0{adapter_id}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 1) or 1


def source_from(environment: Mapping[str, str]) -> AdapterSource:
    """Where adapters come from, as the environment says.

    Raises:
        EngineError: If it says nothing, half of it, or two places.
    """
    url, generator = environment.get("PEFT_DND_SERVICE_URL"), environment.get("PEFT_DND_GENERATOR")
    tasks = environment.get("PEFT_DND_TASKS")
    cache = environment.get("PEFT_DND_CACHE") or default_cache(environment)
    if url and generator:
        raise EngineError("PEFT_DND_SERVICE_URL and PEFT_DND_GENERATOR are both set. Adapters come from one of them.")
    if url:
        return ServedAdapters(url, environment.get("PEFT_DND_SERVICE_TOKEN") or None, cache)
    if not generator:
        raise EngineError("Neither PEFT_DND_SERVICE_URL nor PEFT_DND_GENERATOR says where adapters come from.")
    if not tasks:
        raise EngineError(
            "PEFT_DND_GENERATOR is set and PEFT_DND_TASKS is not: name the folder with a file of prompts a task."
        )
    return TaskFolder(generator, tasks, cache)


def register(environment: Mapping[str, str]) -> None:
    """Register a resolver with vLLM.

    Args:
        environment: The variables of the table above.

    Raises:
        EngineError: As in [`source_from`].
    """
    from vllm.lora.resolver import LoRAResolverRegistry

    resolver = AdapterResolver(source_from(environment), environment.get("PEFT_DND_BASE") or None)
    LoRAResolverRegistry.register_resolver("peft_dnd", resolver)
