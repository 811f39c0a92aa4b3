# SPDX-License-Identifier: Apache-2.0
"""Adapters from a service: fetched once and whole, whatever it sends; its token goes nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from support.engine_stand_ins import StandIn, tar_of

from peft_dnd import GeneratedAdapter
from peft_dnd.engines import ServedAdapters
from peft_dnd.errors import EngineError, LayoutError


ID = "a" * 64


@pytest.fixture
def adapters(service: StandIn, adapter_files: dict[str, bytes], tmp_path: Path) -> ServedAdapters:
    service.says(f"/v1/adapters/{ID}", tar_of(adapter_files))
    service.says("/v1/adapters", {"id": ID, "size": 1})
    return ServedAdapters(service.url + "/", "secret", tmp_path / "cache")


def test_by_id_and_by_task(adapters, service, adapter_files, tmp_path) -> None:
    folder = adapters.find(f"dnd:{ID}")
    assert folder == tmp_path / "cache" / ID
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for path in folder.iterdir():
        assert path.read_bytes() == adapter_files[path.name]
    assert adapters.find("law") == adapters.find("dnd:law") == folder
    told = [(method, path, json.loads(body) if body else None) for method, path, _, body in service.asked]
    asks_for_law = ("POST", "/v1/adapters", {"task": "law"})
    assert told == [("GET", f"/v1/adapters/{ID}", None), asks_for_law, asks_for_law], "fetched once"
    assert {token for _, _, token, _ in service.asked} == {"Bearer secret"}


def test_what_is_in_the_cache_needs_no_service(adapters, service, tmp_path) -> None:
    folder = adapters.find(f"dnd:{ID}")
    later = ServedAdapters("http://127.0.0.1:1", None, tmp_path / "cache")
    assert later.find(f"dnd:{ID}") == folder
    with pytest.raises(EngineError, match=r"cannot be reached.*PEFT_DND_SERVICE_URL"):
        later.find("law")


@pytest.mark.parametrize(
    "name", ["", "dnd:", "../law", "dnd:../x", "/etc", "a/b", "a\\b", ".", "law\n", "x" * 129, "é"]
)
def test_names_that_nobody_could_mean_are_not_even_asked_for(adapters, service, name) -> None:
    assert adapters.find(name) is None and service.asked == []


def test_what_the_service_does_not_know(adapters, service) -> None:
    assert adapters.find(f"dnd:{'b' * 64}") is None
    service.says("/v1/adapters", {"detail": "unknown task"}, status=404)
    assert adapters.find("law") is None


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"detail": "no token"}, "401.*no token.*Check the token"),
        (429, {"detail": "busy"}, "429.*busy"),
        (500, b"<html>", "500"),
        (200, b"<html>", "no JSON"),
        (200, [1], "no JSON object"),
        (200, {"id": "../../etc"}, "gave no id"),
        (200, {"id": None}, "gave no id"),
    ],
)
def test_what_else_it_may_answer(adapters, service, status, body, words) -> None:
    service.says("/v1/adapters", body, status=status)
    with pytest.raises(EngineError, match=words):
        adapters.find("law")


def test_no_redirect_is_followed_with_the_token(adapters, service, tmp_path) -> None:
    service.says("/v1/adapters", b"", status=302, Location=f"{service.url}/elsewhere")
    with pytest.raises(EngineError, match="302"):
        adapters.find("law")
    assert [path for _, path, _, _ in service.asked] == ["/v1/adapters"]


def test_what_is_no_whole_adapter_leaves_nothing(adapters, service, adapter_files, tmp_path) -> None:
    whole = tar_of(adapter_files)
    weights = adapter_files["adapter_model.safetensors"]
    outside = {"../../outside": b"x", "/tmp/outside": b"x", "link/adapter_config.json": b"x"}
    for sent, error in {
        b"no tar": EngineError,
        whole[: len(whole) // 2]: EngineError,
        tar_of({"adapter_config.json": b"{}"}): EngineError,
        tar_of({**adapter_files, "adapter_model.safetensors": weights[:100]}): EngineError,
        tar_of({**adapter_files, "adapter_config.json": b'{"peft_type": "IA3"}'}): LayoutError,
        tar_of({**adapter_files, "adapter_config.json": b"x" * ((1 << 20) + 1)}): EngineError,
        tar_of(outside): EngineError,
    }.items():
        service.says(f"/v1/adapters/{ID}", sent)
        with pytest.raises(error):
            adapters.find(f"dnd:{ID}")
        assert not list((tmp_path / "cache").iterdir()), sent[:40]
    assert not (tmp_path / "outside").exists()
    service.says(f"/v1/adapters/{ID}", tar_of({**outside, **adapter_files}))
    folder = adapters.find(f"dnd:{ID}")
    assert folder is not None and len(list(folder.iterdir())) == 2


def test_a_connection_that_breaks_leaves_nothing(adapters, service, adapter_files, tmp_path) -> None:
    whole = tar_of(adapter_files)
    service.says(f"/v1/adapters/{ID}", whole[:2000], **{"Content-Length": str(len(whole)), "Connection": "close"})
    with pytest.raises(EngineError):
        adapters.find(f"dnd:{ID}")
    assert not list((tmp_path / "cache").iterdir())


def test_an_adapter_of_several_ranks_is_kept_with_one(adapters, service, fresh_base, tmp_path) -> None:
    config = LoraConfig(r=2, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"])
    get_peft_model(fresh_base(), config).save_pretrained(tmp_path / "several")
    files = {path.name: path.read_bytes() for path in (tmp_path / "several").iterdir()}
    service.says(f"/v1/adapters/{ID}", tar_of(files))
    folder = adapters.find(f"dnd:{ID}")
    assert {module.rank for module in GeneratedAdapter.from_pretrained(folder).layout.modules} == {4}


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///etc", "ftp://host", "http://", "http://host/?a=b"])
def test_a_url_that_is_none(url, tmp_path) -> None:
    with pytest.raises(EngineError, match="must be like"):
        ServedAdapters(url, None, tmp_path)


def test_a_url_with_a_password_does_not_stand_in_the_error(tmp_path) -> None:
    with pytest.raises(EngineError) as found:
        ServedAdapters("http://me:secret@host", None, tmp_path)
    assert "secret" not in str(found.value)


def test_half_a_folder_is_fetched_anew(adapters, tmp_path) -> None:
    folder = adapters.find(f"dnd:{ID}")
    (folder / "adapter_model.safetensors").unlink()
    assert adapters.find(f"dnd:{ID}") == folder and len(list(folder.iterdir())) == 2
    shutil.rmtree(folder)
    assert adapters.find(f"dnd:{ID}") == folder
