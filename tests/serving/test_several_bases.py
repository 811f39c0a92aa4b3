# SPDX-License-Identifier: Apache-2.0
"""A generator of several bases behind HTTP: a request names the base, and each base's adapter is kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.constants import TASK_PROMPTS
from support.several_bases import make

from peft_dnd import GeneratedAdapter
from peft_dnd.errors import NotFittedError
from peft_dnd.serving import ServedGenerator, TaskPrompts, load_served_generator


pytest_plugins = ("support.several_bases",)

BODY = {"prompts": TASK_PROMPTS["law"], "seed": 1}


@pytest.fixture
def several_served(several: Any) -> ServedGenerator:
    return ServedGenerator("several", several, "sha256:of-several")


def read(client: Any, facts: dict[str, Any], folder: Path) -> GeneratedAdapter:
    folder.mkdir()
    for file in facts["files"]:
        (folder / file).write_bytes(client.get(f"/v1/adapters/{facts['id']}/files/{file}").content)
    return GeneratedAdapter.from_pretrained(folder)


def test_a_request_names_the_base(serve: Any, several_served: ServedGenerator, served: Any, tmp_path: Path) -> None:
    client = serve(several_served, served)
    (told, one) = client.get("/v1/generators").json()["generators"]
    names = told["bases"]
    assert names == list(several_served.generator.config.base_names) and len(names) == 3
    assert len(one["bases"]) == 1
    found = {}
    for name in names:
        answer = client.post("/v1/adapters", json={**BODY, "base": name})
        assert answer.status_code == 201, answer.text
        found[name] = answer.json()
        assert found[name]["base"] == name
        expected = several_served.generator.generate_adapter(BODY["prompts"], base=name, seed=1)
        adapter = read(client, found[name], tmp_path / name)
        assert adapter.layout.difference(expected.layout) is None
        assert all((tensor == expected.state_dict()[key]).all() for key, tensor in adapter.state_dict().items())
    assert len({facts["id"] for facts in found.values()}) == 3
    again = client.post("/v1/adapters", json={**BODY, "base": found[names[1]]["base_model"]})
    assert again.status_code == 200 and again.json()["id"] == found[names[1]]["id"], "its model's id is it too"


def test_what_base_is_meant_must_be_clear(serve: Any, several_served: ServedGenerator, served: Any) -> None:
    client = serve(several_served, served)
    for body, words in (
        (BODY, "Name one as base: it is not named"),
        ({**BODY, "base": "wid"}, "'wid' is none of them"),
    ):
        answer = client.post("/v1/adapters", json=body)
        assert answer.status_code == 422
        detail = answer.json()["detail"]
        assert words in detail and "'several'" in detail and "'wide'" in detail and "add_base" not in detail
    for value in ("", "x" * 300, 3):
        assert client.post("/v1/adapters", json={**BODY, "base": value}).status_code == 422
    name = client.get("/v1/generators").json()["generators"][1]["bases"][0]
    plain = {**BODY, "generator": "tiny"}
    one, named = (client.post("/v1/adapters", json=body).json() for body in (plain, {**plain, "base": name}))
    assert one["id"] == named["id"] and one["base"] is None, "a generator of one base gives what it gave"
    assert client.post("/v1/adapters", json={**plain, "base": "other"}).status_code == 422


@pytest.mark.parametrize("remembered", [True, False])
def test_a_task_has_an_adapter_for_each_base(serve: Any, several_served: ServedGenerator, remembered: bool) -> None:
    client = serve(several_served, remember_prompts=remembered)
    put = client.put("/v1/tasks/law", json={**BODY, "base": "wide"})
    assert put.status_code == 201 and put.json()["base"] == "wide"
    assert client.post("/v1/adapters", json={"task": "law"}).json()["id"] == put.json()["id"]
    assert client.post("/v1/adapters", json={"task": "law", "base": "wide"}).json()["id"] == put.json()["id"]
    other = client.post("/v1/adapters", json={"task": "law", "base": "deep"})
    if remembered:
        assert other.status_code == 201 and other.json()["base"] == "deep"
        assert client.get("/v1/tasks/law").json()["adapter"] == put.json()["id"], "it stays the base's it was put for"
    else:
        assert other.status_code == 410 and "for the base 'wide'" in other.json()["detail"]


def test_the_operators_tasks_are_for_any_base(serve: Any, several_served: ServedGenerator) -> None:
    client = serve(several_served, named={"law": TaskPrompts(tuple(TASK_PROMPTS["law"]))})
    assert client.post("/v1/adapters", json={"task": "law"}).status_code == 422
    ids = {client.post("/v1/adapters", json={"task": "law", "base": base}).json()["id"] for base in ("wide", "deep")}
    assert len(ids) == 2


def test_loading(layouts: Any, encoder_folder: Path, tmp_path: Path) -> None:
    generator = make(layouts, encoder_folder)
    generator.save_pretrained(tmp_path / "generator")
    loaded = load_served_generator("several", str(tmp_path / "generator"))
    assert loaded.generator.config.base_names == generator.config.base_names
    generator.add_base(generator.config.layouts["wide"], name="unfitted")
    generator.save_pretrained(tmp_path / "generator")
    with pytest.raises(NotFittedError, match="or not for all of its bases"):
        load_served_generator("several", str(tmp_path / "generator"))
