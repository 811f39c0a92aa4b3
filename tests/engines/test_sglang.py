# SPDX-License-Identifier: Apache-2.0
"""SGLang's load-from-tensors, against a stand-in of its HTTP: SGLang itself does not run on processors alone here."""

from __future__ import annotations

import base64
import io
import json
import pickle
import pickletools
from typing import Any

import pytest
import torch
from support.engine_stand_ins import Reply, StandIn

from peft_dnd import GeneratedAdapter
from peft_dnd.engines import load_into_sglang, unload_from_sglang
from peft_dnd.errors import EngineError


LOAD, UNLOAD = "/load_lora_adapter_from_tensors", "/unload_lora_adapter"


@pytest.fixture
def loaded(service: StandIn) -> dict[str, Any]:
    """What the stand-in was given, by name; it answers as SGLang does."""
    found: dict[str, Any] = {}

    def load(body: bytes) -> Reply:
        given = json.loads(body)
        if given["lora_name"] in found:
            refusal = {"success": False, "error_message": f"LoRA adapter {given['lora_name']} already exists"}
            return Reply(400, json.dumps(refusal).encode(), {})
        found[given["lora_name"]] = given
        return Reply(200, b'{"success": true, "error_message": null}', {})

    def unload(body: bytes) -> Reply:
        there = found.pop(json.loads(body)["lora_name"], None) is not None
        return Reply(200 if there else 400, json.dumps({"success": there, "error_message": "no such"}).encode(), {})

    service.answers |= {LOAD: load, UNLOAD: unload}
    return found


def test_tensors_and_configuration_arrive(adapter: GeneratedAdapter, service: StandIn, loaded) -> None:
    load_into_sglang(adapter, service.url, "law", token="secret", tensor_parallel=2, pinned=True)
    given = loaded["law"]
    assert given["serialized_named_tensors"] == [given["serialized_tensors"]] * 2 and given["pinned"] is True
    content = base64.b64decode(given["serialized_tensors"], validate=True)
    tensors = pickle.loads(content)
    expected = adapter.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    config = given["config_dict"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert sorted(config["target_modules"]) == sorted(adapter.peft_config.target_modules)
    assert [asked[2] for asked in service.asked] == ["Bearer secret"]


def test_the_pickle_names_nothing_but_tensors(adapter: GeneratedAdapter, service: StandIn, loaded) -> None:
    load_into_sglang(adapter, service.url, "law")
    content = base64.b64decode(loaded["law"]["serialized_tensors"])
    texts = [str(argument) for code, argument, _ in pickletools.genops(io.BytesIO(content)) if "UNICODE" in code.name]
    modules = {text for text in texts if text.split(".")[0] in ("torch", "collections", "builtins", "peft_dnd")}
    assert modules == {"torch._utils", "torch.storage", "collections"}


def test_one_of_that_name_is_replaced_if_asked(adapter, service, loaded) -> None:
    load_into_sglang(adapter, service.url, "law")
    with pytest.raises(EngineError, match=r"400.*already exists"):
        load_into_sglang(adapter, service.url, "law")
    load_into_sglang(adapter, service.url, "law", replace=True)
    load_into_sglang(adapter, service.url, "med", replace=True)
    assert loaded.keys() == {"law", "med"}
    assert unload_from_sglang(service.url, "law") is True and unload_from_sglang(service.url, "law") is False


def test_what_sglang_may_answer(adapter, service) -> None:
    with pytest.raises(EngineError, match="no endpoint"):
        load_into_sglang(adapter, service.url, "law")
    service.says(LOAD, {"success": False, "error_message": "LoRA is not enabled"})
    with pytest.raises(EngineError, match="LoRA is not enabled"):
        load_into_sglang(adapter, service.url, "law")
    service.says(LOAD, {"detail": "Unauthorized"}, status=401)
    with pytest.raises(EngineError, match=r"401.*Check the token"):
        load_into_sglang(adapter, service.url, "law", token="wrong")
    service.says(UNLOAD, {}, status=500)
    with pytest.raises(EngineError, match="500"):
        unload_from_sglang(service.url, "law")
    with pytest.raises(EngineError, match=r"cannot be reached.*--enable-lora"):
        load_into_sglang(adapter, "http://127.0.0.1:1", "law")
