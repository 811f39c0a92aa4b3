# SPDX-License-Identifier: Apache-2.0
"""Adapters into a running SGLang from memory, through its `/load_lora_adapter_from_tensors`.

Nothing is written to disk, and the server needs no folder in common with this process. It must run with
`--enable-lora`, and a `--max-lora-rank` and `--lora-target-modules` that cover the adapter.

SGLang takes tensors as a pickle, which it reads with a list of what may stand in it. That list has been got round
before (CVE-2026-15969): leave that endpoint open to no one but yourself.

This was tried against a stand-in of SGLang's HTTP alone, as its sources have it, and never against SGLang.
"""

from __future__ import annotations

import base64
import pickle

from ..adapters.generated_adapter import GeneratedAdapter
from ..errors import EngineError
from .http_client import HttpClient
from .mending import with_one_rank


_MEND = "Check the URL, and whether SGLang runs there with --enable-lora."


def load_into_sglang(
    adapter: GeneratedAdapter,
    url: str,
    name: str,
    *,
    token: str | None = None,
    tensor_parallel: int = 1,
    pinned: bool = False,
    replace: bool = False,
) -> None:
    """Load an adapter into a running SGLang, whose requests then name it as `lora_path`, or `model: base:name`.

    Args:
        adapter: The adapter; one of several ranks is sent with one.
        url: Where SGLang is, `http://host:30000`.
        name: What requests call it.
        token: SGLang's `--api-key`, or `--admin-api-key`.
        tensor_parallel: SGLang's `--tp-size`: it wants a copy for each.
        pinned: Whether SGLang keeps it on the GPU.
        replace: Whether one of that name is unloaded first.

    Raises:
        EngineError: If SGLang cannot be reached or refuses; it says why.
    """
    client = HttpClient(url, token, what="SGLang", mend=_MEND)
    if replace:
        unload_from_sglang(url, name, token=token)
    even = with_one_rank(adapter)
    # Bytes of the tensors themselves, not handles of shared memory: these would mean something to a child alone.
    content = base64.b64encode(pickle.dumps(even.state_dict())).decode()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in _config(even).items()}
    body = {
        "lora_name": name,
        "config_dict": config,
        "pinned": pinned,
        # Up to 0.5.8 one text, from 0.5.18 at the latest one for each rank; neither minds what it does not know.
        "serialized_tensors": content,
        "serialized_named_tensors": [content] * tensor_parallel,
    }
    with client.ask("/load_lora_adapter_from_tensors", body) as response:
        if response is None:
            raise EngineError(f"{client.name} has no endpoint for adapters from memory. Use a newer SGLang.")
        facts = client.facts_in(response)
    if facts.get("success") is not True:
        raise EngineError(f"{client.name} refused the adapter {name!r}: {facts.get('error_message')!s:.300}.")


def unload_from_sglang(url: str, name: str, *, token: str | None = None) -> bool:
    """Unload an adapter from a running SGLang.

    Args:
        url: Where SGLang is.
        name: The adapter's name there.
        token: SGLang's `--api-key`, or `--admin-api-key`.

    Returns:
        Whether there was one of that name.

    Raises:
        EngineError: If SGLang cannot be reached, or refuses the token.
    """
    client = HttpClient(url, token, what="SGLang", mend=_MEND)
    with client.ask("/unload_lora_adapter", {"lora_name": name}, not_there=(400,)) as response:
        return response is not None and client.facts_in(response).get("success") is True


def _config(adapter: GeneratedAdapter) -> dict[str, object]:
    return {**adapter.peft_config.to_dict(), "inference_mode": True}
