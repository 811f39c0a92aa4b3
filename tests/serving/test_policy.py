# SPDX-License-Identifier: Apache-2.0
"""A generator with a policy behind HTTP: what is refused, in which words, and that no prompt is in them."""

from __future__ import annotations

import copy
import json
import logging

import pytest
from support.constants import TASK_PROMPTS

from peft_dnd.policy import BehaviourGate, GeneratorPolicy
from peft_dnd.serving import JsonFormatter, ServedGenerator, TaskPrompts


@pytest.fixture
def guarded(generator) -> ServedGenerator:
    own = copy.deepcopy(generator)
    own.set_prompt_classifier(lambda texts: ["health" if "doctor" in text else None for text in texts])
    own.set_policy(GeneratorPolicy(classifier="words"))
    return ServedGenerator("guarded", own, "sha256:of-guarded")


def test_refused_prompts_are_forbidden_and_in_no_log(serve, guarded, caplog) -> None:
    client = serve(guarded)
    with caplog.at_level(logging.INFO):
        answer = client.post("/v1/adapters", json={"prompts": TASK_PROMPTS["med"]})
    assert answer.status_code == 403 and answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (
        problem["reason"] == "refused_prompts" and "'health'" in problem["detail"] and problem["title"] == "Forbidden"
    )
    lines = [JsonFormatter().format(record) for record in caplog.records]
    assert any(json.loads(line).get("classes") == {"health": 2} for line in lines)
    assert not any(prompt in "".join([*lines, answer.text]) for prompt in TASK_PROMPTS["med"])
    assert client.get("/v1/adapters").json()["adapters"] == []
    named = client.put("/v1/tasks/clinic", json={"prompts": TASK_PROMPTS["med"]})
    assert named.status_code == 403 and client.get("/v1/tasks/clinic").status_code == 404
    assert client.post("/v1/adapters", json={"prompts": TASK_PROMPTS["law"]}).status_code == 201
    description = client.get("/openapi.json").json()
    assert "403" in description["paths"]["/v1/adapters"]["post"]["responses"]
    assert "reason" in description["components"]["schemas"]["ProblemDetails"]["properties"]


def test_an_adapter_that_fails_the_gate_is_not_kept(serve, generator, base_model, word_tokenizer) -> None:
    own = copy.deepcopy(generator)
    gate = BehaviourGate.from_prompts(TASK_PROMPTS["geo"], base_model, word_tokenizer, bound=1e-9, answer_tokens=2)
    own.set_policy(GeneratorPolicy(gate=gate))
    served = ServedGenerator("gated", own, "sha256:of-gated")
    source = TaskPrompts(tuple(TASK_PROMPTS["law"]))
    unchecked = served.adapter_id(source)
    own.set_gate_base(base_model)
    assert served.adapter_id(source) != unchecked, "one that was kept unchecked does not pass for one that was checked"
    client = serve(served)
    answer = client.post("/v1/adapters", json={"prompts": TASK_PROMPTS["law"]})
    assert answer.status_code == 403 and answer.json()["reason"] == "behaviour"
    assert client.get("/v1/adapters").json()["adapters"] == []


def test_generators_say_which_bounds_they_have_and_not_what_is_in_them(
    serve, generator, served, base_model, word_tokenizer
) -> None:
    own = copy.deepcopy(generator)
    gate = BehaviourGate.from_prompts(TASK_PROMPTS["geo"], base_model, word_tokenizer, bound=9.0, answer_tokens=2)
    policy = GeneratorPolicy(never_written=["*.down_proj"], gate=gate)
    own.set_policy(policy)
    gated = copy.deepcopy(own)
    gated.set_gate_base(base_model)
    client = serve(served, ServedGenerator("bound", own, "sha256:a"), ServedGenerator("gated", gated, "sha256:b"))
    answer = client.get("/v1/generators")
    found = {facts["generator"]: facts["policy"] for facts in answer.json()["generators"]}
    kinds = {"parts": ["never_written", "gate"], "sha256": policy.sha256}
    assert found == {
        served.name: None,
        "bound": {**kinds, "gate_checked": False},
        "gated": {**kinds, "gate_checked": True},
    }
    assert "down_proj" not in answer.text and "river" not in answer.text


def test_ids_without_a_policy_are_what_they_were(generator) -> None:
    plain = ServedGenerator("tiny", generator, "sha256:of-tiny", "sha256:of-its-encoder")
    bare = copy.deepcopy(generator)
    bare.set_policy(GeneratorPolicy(never_written=["*.down_proj"]))  # part of the generator's own hash
    source = TaskPrompts(("river ?",))
    assert plain.adapter_id(source) == ServedGenerator("t", bare, plain.revision, plain.text_encoder).adapter_id(
        source
    )
