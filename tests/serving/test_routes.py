# SPDX-License-Identifier: Apache-2.0
"""The service over HTTP: adapters by prompts and by task, what is refused, who may ask, what is logged and counted."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
import torch
from support.constants import TASK_PROMPTS

from peft_dnd import GeneratedAdapter
from peft_dnd.serving import JsonFormatter, ServedGenerator, TaskPrompts, Tokens


PROMPTS = TASK_PROMPTS["law"]
TOKEN = "a-token-of-the-tests"


def unpacked(content: bytes, folder: Path) -> GeneratedAdapter:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(folder, filter="data")
    return GeneratedAdapter.from_pretrained(folder)


def test_an_adapter_goes_over_http_byte_for_byte(serve, generator, tmp_path) -> None:
    client = serve()
    posted = client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": 3})
    facts = posted.json()
    assert posted.status_code == 201 and posted.headers["Location"] == f"/v1/adapters/{facts['id']}"
    expected = generator.generate_adapter(PROMPTS, seed=3)
    expected.save_pretrained(tmp_path / "expected")

    sent = client.get(f"/v1/adapters/{facts['id']}")
    assert sent.headers["content-type"] == "application/x-tar" and int(sent.headers["content-length"]) == len(
        sent.content
    )
    made = unpacked(sent.content, tmp_path / "unpacked")
    assert all(torch.equal(made.state_dict()[key], value) for key, value in expected.state_dict().items())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one = client.get(f"/v1/adapters/{facts['id']}/files/{name}")
        assert (
            one.content == (tmp_path / "expected" / name).read_bytes() == (tmp_path / "unpacked" / name).read_bytes()
        )
        assert facts["files"][name] == len(one.content)
    assert facts["size"] == sum(facts["files"].values()) and facts["prompts"] == len(PROMPTS) and facts["seed"] == 3
    assert facts["prompts_sha256"] == expected.provenance["prompts_sha256"]

    tag = {"If-None-Match": sent.headers["ETag"]}
    assert client.get(f"/v1/adapters/{facts['id']}", headers=tag).status_code == 304
    assert client.get(f"/v1/adapters/{facts['id']}", headers={"If-None-Match": '"other"'}).content == sent.content


def test_the_same_request_is_worked_on_once_and_another_is_another(serve, served, monkeypatch) -> None:
    made = []
    original = ServedGenerator.generate
    monkeypatch.setattr(
        ServedGenerator, "generate", lambda self, source: made.append(source) or original(self, source)
    )
    client = serve()
    request = {"prompts": PROMPTS}
    first, second = (client.post("/v1/adapters", json=request) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200) and first.json() == second.json()
    assert len(made) == 1
    others = [{**request, "seed": 1}, {"prompts": PROMPTS[::-1]}, {"prompts": [*PROMPTS, "river ?"]}]
    ids = {first.json()["id"], *(client.post("/v1/adapters", json=other).json()["id"] for other in others)}
    assert len(ids) == 4 and len(made) == 4
    elsewhere = ServedGenerator("tiny", served.generator, "sha256:of-another", served.text_encoder)
    encoded = ServedGenerator("tiny", served.generator, served.revision, "sha256:of-another")
    source = TaskPrompts(tuple(PROMPTS))
    assert len({generator.adapter_id(source) for generator in (served, elsewhere, encoded)} | ids) == 6
    # The same, whatever it is called and wherever it runs: the hash of a request is part of what is promised.
    assert ServedGenerator("other", served.generator, served.revision, served.text_encoder).adapter_id(source) in ids


def test_a_wrong_method_is_told_the_right_ones(serve) -> None:
    client = serve()
    allowed = {
        "/v1/adapters": "GET, POST",
        f"/v1/adapters/{'0' * 64}": "DELETE, GET",
        "/v1/tasks/a": "DELETE, GET, PUT",
    }
    for path, methods in {**allowed, "/v1/tasks": "GET", "/metrics": "GET"}.items():
        answer = client.patch(path)
        assert (answer.status_code, answer.headers["Allow"]) == (405, methods)


@pytest.mark.parametrize("sent", [{}, {"Content-Type": "text/plain"}])
def test_a_body_that_does_not_say_that_it_is_json_is_told_what_to_say(serve, sent) -> None:
    client = serve()
    answer = client.post("/v1/adapters", content=json.dumps({"prompts": PROMPTS}), headers=sent)
    assert answer.status_code == 422 and "Content-Type: application/json" in answer.json()["detail"]
    assert ("as text/plain" if sent else "without that header") in answer.json()["detail"]
    assert client.get("/v1/adapters").json()["adapters"] == []
    for media in ("application/json; charset=utf-8", "application/vnd.api+json"):
        told = {"Content-Type": media}
        wrong = client.post("/v1/adapters", content=json.dumps({"prompts": []}), headers=told).json()
        assert "see errors" in wrong["detail"] and wrong["errors"]
        assert client.post("/v1/adapters", content=json.dumps({"prompts": PROMPTS}), headers=told).status_code < 300


def test_list_and_delete(serve) -> None:
    client = serve()
    ids = sorted(
        client.post("/v1/adapters", json={"prompts": PROMPTS, "seed": seed}).json()["id"] for seed in range(3)
    )
    assert [facts["id"] for facts in client.get("/v1/adapters").json()["adapters"]] == ids
    page = client.get("/v1/adapters", params={"limit": 2}).json()
    rest = client.get("/v1/adapters", params={"limit": 2, "after": page["next"]}).json()
    assert [facts["id"] for facts in page["adapters"] + rest["adapters"]] == ids and rest["next"] is None
    assert client.delete(f"/v1/adapters/{ids[0]}").status_code == 204
    for method, path in (("DELETE", ""), ("GET", ""), ("GET", "/facts"), ("GET", "/files/README.md")):
        assert client.request(method, f"/v1/adapters/{ids[0]}{path}").status_code == 404
    assert client.get(f"/v1/adapters/{ids[1]}/facts").json()["id"] == ids[1]


def test_tasks_have_names(serve, tmp_path) -> None:
    client = serve()
    assert client.post("/v1/adapters", json={"task": "law"}).status_code == 404
    named = client.put("/v1/tasks/law", json={"prompts": PROMPTS})
    assert named.status_code == 201 and client.put("/v1/tasks/law", json={"prompts": PROMPTS}).status_code == 200
    found = client.post("/v1/adapters", json={"task": "law"})
    assert found.status_code == 200 and found.json()["id"] == named.json()["id"]
    assert client.get("/v1/tasks").json()["tasks"] == [client.get("/v1/tasks/law").json()]
    assert client.get("/v1/tasks/law").json() == {
        "task": "law",
        "adapter": named.json()["id"],
        "prompts_remembered": False,
        "fixed": False,
    }
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert not any(prompt.encode() in written for prompt in PROMPTS)
    client.delete(f"/v1/adapters/{named.json()['id']}")
    assert client.post("/v1/adapters", json={"task": "law"}).status_code == 410
    assert client.delete("/v1/tasks/law").status_code == 204 and client.get("/v1/tasks/law").status_code == 404


def test_remembered_prompts_make_the_adapter_again_even_after_a_restart(serve, tmp_path) -> None:
    first = serve(remember_prompts=True, folder=tmp_path / "one")
    name = first.put("/v1/tasks/law", json={"prompts": PROMPTS, "seed": 2}).json()["id"]
    first.delete(f"/v1/adapters/{name}")
    again = serve(folder=tmp_path / "one").post("/v1/adapters", json={"task": "law"})
    assert again.status_code == 201 and again.json()["id"] == name


def test_tasks_of_the_operator_are_there_from_the_start_and_stay(serve, tmp_path) -> None:
    client = serve(named={"law": TaskPrompts(tuple(PROMPTS))}, tasks=1)
    assert client.get("/v1/tasks/law").json()["fixed"]
    found = client.post("/v1/adapters", json={"task": "law"})
    assert found.status_code == 201
    assert client.post("/v1/adapters", json={"prompts": PROMPTS}).json()["id"] == found.json()["id"]
    assert client.put("/v1/tasks/law", json={"prompts": ["river ?"]}).status_code == 409
    assert client.delete("/v1/tasks/law").status_code == 409
    assert client.put("/v1/tasks/med", json={"prompts": ["river ?"]}).status_code == 201
    assert client.put("/v1/tasks/geo", json={"prompts": ["river ?"]}).status_code == 409, "one is all there may be"


def test_prompts_that_do_not_belong(serve, served, discerning) -> None:
    client = serve(discerning, served)
    belongs = client.post("/v1/adapters", json={"prompts": PROMPTS}).json()
    assert 0 <= belongs["out_of_distribution"] < 0.95
    strange = {"prompts": ["abcdefgh fedc"] * 4}
    score = client.post("/v1/adapters", json=strange).json()["out_of_distribution"]
    assert score > belongs["out_of_distribution"]
    for _ in range(2):  # also where the adapter is there already
        refused = client.post(
            "/v1/adapters", json={**strange, "out_of_distribution": "refuse", "threshold": score / 2}
        )
        assert refused.status_code == 422 and f"{score:.3f}" in refused.json()["detail"]
    shrunk = client.post("/v1/adapters", json={**strange, "out_of_distribution": "shrink", "threshold": score / 2})
    assert shrunk.status_code == 201 and 0 < shrunk.json()["shrunk_by"] < 1
    unable = client.post("/v1/adapters", json={**strange, "generator": "tiny", "out_of_distribution": "refuse"})
    assert unable.status_code == 422 and "'ignore'" in unable.json()["detail"]
    assert [facts["generator"] for facts in client.get("/v1/generators").json()["generators"]] == [
        "discerning",
        "tiny",
    ]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "body"),
        (b"{", 422, "JSON"),
        (b"[" * 200_000, 400, "body"),
        (b'{"prompts": 1' + b"0" * 10_000 + b"}", 400, "body"),
        (b"\xff\xfe", 422, "JSON"),
        (b'{"prompts": []}', 422, "at least 1 item"),
        (b'{"prompts": "what ?"}', 422, "valid list"),
        (b'{"prompts": [" "]}', 422, "match pattern"),
        (b'{"prompts": ["\\ud800"]}', 422, "unicode"),
        (b'{"prompts": ["a"], "\\ud800": 1}', 422, "unicode"),
        (b'{"prompts": ["a"], "promts": ["a"]}', 422, "body.prompts.promts"),
        (b'{"prompts": ["a"], "task": "b"}', 422, "body.task.prompts"),
        (b'{"prompts": ["a"], "seed": -1}', 422, "seed"),
        (b'{"prompts": ["a"], "seed": "1"}', 422, "seed"),
        (b'{"prompts": ["a"], "threshold": NaN}', 422, "threshold"),
        (b'{"prompts": ["a"], "out_of_distribution": "warn"}', 422, "'ignore', 'shrink', 'mean' or 'refuse'"),
        (b'{"prompts": ["a"], "generator": "typo"}', 422, "There are: tiny"),
        (b'{"prompts": ["a"], "generator": "../../etc"}', 422, "generator"),
        (b'{"prompts": ["a"], "answers": ["b"]}', 422, "answers"),
        (b'{"prompts": ["a"], "answers": ["b", "c"]}', 422, "1 prompts and 2 answers"),
        (b'{"prompts": ["a", "b", "c", "d"]}', 422, "the most are 3"),
        (b'{"prompts": ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]}', 422, "the most are 30"),
        (b'{"task": "../../etc/passwd"}', 422, "task"),
        (b'{"prompts": ["' + b"a" * 300_000 + b'"]}', 413, "250000 bytes"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(serve, tmp_path, body: bytes, status: int, words: str) -> None:
    client = serve(prompts=3, prompt_characters=30, request_bytes=250_000)
    answer = client.post("/v1/adapters", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and words in answer.text, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and len(answer.content) < 1500
    assert answer.json()["status"] == status
    assert not list((tmp_path / "cache" / "adapters").iterdir())


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2f..%2fetc", "x" * 64, "A" * 64, "0" * 63, "0" * 64 + "%00", "%ff"]
)
def test_no_path_comes_from_a_request(serve, name: str) -> None:
    client = serve()
    for path in (f"/v1/adapters/{name}", f"/v1/adapters/{'0' * 64}/files/{name}", f"/v1/tasks/{name}/x"):
        for method in ("GET", "DELETE"):
            assert client.request(method, path).status_code in (404, 405, 422)


def test_a_body_without_a_length_is_cut_off_too(serve) -> None:
    answer = serve(request_bytes=1000).post("/v1/adapters", content=(b"a" * 100 for _ in range(20)))
    assert answer.status_code == 413


def test_tokens_are_wanted_wherever_they_should_be(serve) -> None:
    client = serve(tokens=Tokens([f"me:{TOKEN}", "another-token-of-16"]))
    paths = [
        (method, path)
        for path, methods in client.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
        .json()["paths"]
        .items()
        for method in methods
    ]
    assert len(paths) > 12
    for method, path in [*paths, ("get", "/openapi.json"), ("get", "/nothing")]:
        answer = client.request(method, path)
        assert (answer.status_code == 200) if path.startswith("/health/") else (answer.status_code == 401), path
    for wrong in (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN} x",
        "Bearer \xff",
    ):
        answer = client.get("/v1/tasks", headers={"Authorization": wrong.encode("latin-1")})
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}", "Bearer another-token-of-16"):
        assert client.get("/v1/tasks", headers={"Authorization": right}).status_code == 200


def test_logs_are_json_and_tell_nothing_of_the_prompts(serve, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    client = serve(tokens=Tokens([f"me:{TOKEN}"]))
    secret, headers = "the secret colour", {"Authorization": f"Bearer {TOKEN}"}
    client.post("/v1/adapters", json={"prompts": [secret]}, headers=headers)
    client.post("/v1/adapters", json={"prompts": [secret, ""]}, headers=headers)
    client.get(f"/v1/tasks/{secret}?q={secret}", headers=headers)

    def fail(*_: object) -> None:
        raise ZeroDivisionError(secret)

    monkeypatch.setattr(ServedGenerator, "generate", fail)
    fault = client.post("/v1/adapters", json={"prompts": [secret], "seed": 1}, headers=headers)
    assert fault.status_code == 500 and secret not in fault.text
    lines = [JsonFormatter().format(record) for record in caplog.records if not record.name.startswith("httpx")]
    assert not any("secret" in line or TOKEN in line for line in lines)
    ours = [line for line in map(json.loads, lines) if line["logger"] == "peft_dnd.serving.guard"]
    assert [(line["status"], line["route"], line["client"]) for line in ours] == [
        (201, "/v1/adapters", "me"),
        (422, "/v1/adapters", "me"),
        (422, "/v1/tasks/{task}", "me"),
        (500, "/v1/adapters", "me"),
    ]
    assert ours[-1]["exception"] == "ZeroDivisionError" and ours[-1]["request"] in fault.json()["detail"]
    assert ours[-1]["raised_at"][-1].endswith("in fail") and ours[0]["adapter"]


def test_metrics_count(serve) -> None:
    client = serve()
    for _ in range(3):
        client.post("/v1/adapters", json={"prompts": PROMPTS})
    text = client.get("/metrics").text
    assert 'peft_dnd_requests_total{method="POST",route="/v1/adapters",status="200"} 2.0' in text
    assert 'peft_dnd_adapters_asked_total{found="yes",generator="tiny"} 2.0' in text
    assert 'peft_dnd_generation_seconds_count{generator="tiny"} 1.0' in text
    assert "peft_dnd_adapters_kept 1.0" in text and "process_resident_memory_bytes" in text


def test_health_tells_of_a_folder_that_cannot_be_written_to(serve, monkeypatch) -> None:
    client = serve()
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    client.app.state.service._writable_at -= 1  # it is tried once a second

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert client.get("/health/ready").status_code == 503 and client.get("/health/live").status_code == 200


def test_a_full_disk_is_told_and_leaves_nothing(serve, tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    client = serve()
    monkeypatch.setattr("peft_dnd.storage.files.save_file", full)
    answer = client.post("/v1/adapters", json={"prompts": PROMPTS})
    assert answer.status_code == 507 and str(tmp_path) not in answer.text
    monkeypatch.undo()
    left = [path for part in ("adapters", "work") for path in (tmp_path / "cache" / part).rglob("*")]
    assert [path.suffix for path in left if path.is_file()] == [".lock"]
    assert client.post("/v1/adapters", json={"prompts": PROMPTS}).status_code == 201


def test_a_page_of_another_site_cannot_ask_a_service_of_this_machine(serve) -> None:
    client = serve(hosts=("localhost", "127.0.0.1"))
    request = {"prompts": PROMPTS}
    for host, status in (("127.0.0.1:8000", 201), ("localhost", 200), ("evil.example", 400), ("", 400)):
        assert client.post("/v1/adapters", json=request, headers={"host": host}).status_code == status
    for kind in ({}, {"content-type": "text/plain"}):  # what a page may send without asking first
        answer = client.post("/v1/adapters", content=json.dumps(request), headers={"host": "localhost", **kind})
        assert answer.status_code == 422
