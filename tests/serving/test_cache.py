# SPDX-License-Identifier: Apache-2.0
"""The cache folder: bounded, nothing removed while it is read, nothing half-made, nothing damaged."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from peft_dnd import GeneratedAdapter, PromptConditionedLoraGenerator
from peft_dnd.errors import DestinationError, GeneratorConfigError
from peft_dnd.serving import AdapterCache, ServiceLimits, TaskPrompts, Tokens
from peft_dnd.serving.archive import tar_chunks, tar_size
from peft_dnd.serving.problems import Problem
from peft_dnd.serving.tasks import TaskNames


Make = Callable[..., AdapterCache]
IDS = [f"{number:064x}" for number in range(10)]


@pytest.fixture(scope="session")
def adapter(generator: PromptConditionedLoraGenerator) -> GeneratedAdapter:
    return generator.generate_adapter(["what is the law ?"])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **limits: AdapterCache(tmp_path / "cache", ServiceLimits(**limits))


def age(cache: AdapterCache, name: str, seconds: float) -> None:
    entry = cache.folder / "adapters" / name / "entry.json"
    used = time.time() - seconds
    os.utime(entry, (used, used))


def test_the_least_recently_used_goes_first_and_one_being_read_never(make: Make, adapter: GeneratedAdapter) -> None:
    cache = make(cache_adapters=3)
    for place, name in enumerate(IDS[:3]):
        cache.put(name, adapter, {})
        age(cache, name, 100 - place)
    assert cache.facts(IDS[0]), "which is thereby used"
    reading = cache.open(IDS[1])
    age(cache, IDS[1], 99)
    cache.put(IDS[3], adapter, {})
    assert cache.names() == [IDS[0], IDS[1], IDS[3]], "1 is the oldest, but being read, then comes 2"
    both = [cache.open(name) for name in (IDS[0], IDS[3])]
    with pytest.raises(Problem, match="being read") as refused:
        cache.put(IDS[4], adapter, {})
    assert refused.value.status == 429 and cache.names() == [IDS[0], IDS[1], IDS[3]]
    for opened in (reading, *both):
        opened.close()
    cache.put(IDS[4], adapter, {})
    assert IDS[1] not in cache.names() and len(cache.names()) == 3


def test_size_is_bounded_strictly(make: Make, adapter: GeneratedAdapter, tmp_path: Path) -> None:
    size = make().put(IDS[0], adapter, {})["size"]
    assert (
        size
        == sum(path.stat().st_size for path in (tmp_path / "cache/adapters" / IDS[0]).iterdir())
        - (tmp_path / "cache/adapters" / IDS[0] / "entry.json").stat().st_size
    )
    cache = make(cache_bytes=int(2.5 * size))
    for name in IDS[1:5]:
        cache.put(name, adapter, {})
        assert cache.size()[1] <= 2.5 * size
    assert len(cache.names()) == 2
    with pytest.raises(Problem, match="more than") as refused:
        make(cache_bytes=size - 1).put(IDS[5], adapter, {})
    assert refused.value.status == 507


def test_what_is_too_old_is_neither_given_nor_kept(make: Make, adapter: GeneratedAdapter) -> None:
    cache = make(cache_seconds=0.3)
    cache.put(IDS[0], adapter, {})
    reading = cache.open(IDS[0])
    assert cache.facts(IDS[0]) and cache.remove_old() == 0
    time.sleep(0.35)
    assert cache.peek(IDS[0]) is None and cache.remove_old() == 0, "it is being read"
    reading.close()
    assert cache.remove_old() == 1 and cache.names() == []
    cache.put(IDS[1], adapter, {})
    time.sleep(0.35)
    assert cache.open(IDS[1]) is None and cache.names() == []


def test_whoever_reads_reads_to_the_end(make: Make, adapter: GeneratedAdapter) -> None:
    cache = make()
    facts = cache.put(IDS[0], adapter, {})
    opened = cache.open(IDS[0])
    chunks = tar_chunks(opened.files, facts["files"])
    begun = next(chunks)
    assert cache.remove(IDS[0]) and not cache.remove(IDS[0]) and cache.open(IDS[0]) is None
    whole = begun + b"".join(chunks)
    opened.close()
    assert len(whole) == tar_size(facts["files"])
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        assert {entry.name: entry.size for entry in tar} == facts["files"]


def test_a_damaged_adapter_is_removed_and_made_again(make: Make, adapter: GeneratedAdapter, caplog) -> None:
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    damages = [
        lambda folder: cut(folder / "adapter_model.safetensors"),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "entry.json").write_text("{"),
        lambda folder: (folder / "entry.json").write_text("[]"),
        lambda folder: (folder / "entry.json").write_text('{"files": {"../../CACHEDIR.TAG": 1}, "created": 1e12}'),
        lambda folder: (folder / "entry.json").write_bytes(b"\xff"),
        lambda folder: (folder / "entry.json").unlink(),
    ]
    cache = make()
    for again in (lambda: cache.facts(IDS[0]), lambda: make().facts(IDS[0])):
        for number, damage in enumerate(damages):
            cache.put(IDS[0], adapter, {})
            damage(cache.folder / "adapters" / IDS[0])
            assert again() is None, number
            assert cache.size() == (0, 0) and not list((cache.folder / "adapters").iterdir()), number
    assert "removed a damaged adapter" in caplog.text


def test_another_who_made_the_same_is_no_fault(make: Make, adapter: GeneratedAdapter, tmp_path: Path) -> None:
    one, other = make(), make()
    one.put(IDS[0], adapter, {})
    other.put(IDS[0], adapter, {})
    assert one.names() == other.names() == [IDS[0]]
    one.close()
    assert other.facts(IDS[0]) and len(list((tmp_path / "cache/work").iterdir())) == 2


def test_a_start_removes_what_the_dead_left_and_not_what_the_living_write(
    make: Make, adapter: GeneratedAdapter, tmp_path: Path
) -> None:
    living = make()
    (living._work.path / "half").mkdir()
    dead = tmp_path / "cache/work/dead"
    dead.mkdir()
    (dead / "adapter_model.safetensors").write_bytes(b"half")
    dead.with_suffix(".lock").touch()
    make()
    assert not dead.exists() and (living._work.path / "half").is_dir()


def test_a_folder_with_other_things_in_it_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    precious = tmp_path / "cache" / "thesis.txt"
    precious.write_text("mine")
    with pytest.raises(DestinationError, match="no cache of this service"):
        make()
    assert [*(tmp_path / "cache").iterdir()] == [precious]
    shutil.rmtree(tmp_path / "cache")
    make()
    make()


def test_names_that_are_none_open_nothing(make: Make, adapter: GeneratedAdapter) -> None:
    cache = make()
    for name in ("", ".", "..", "../tasks", IDS[0][:-1], IDS[0] + "\n", "A" * 64):
        assert cache.open(name) is None and not cache.remove(name)


def test_bounds_must_be_possible() -> None:
    with pytest.raises(GeneratorConfigError, match="cache_bytes"):
        ServiceLimits(cache_bytes=0)
    assert ServiceLimits(queue=1).most_of_one_client == 1 and ServiceLimits().most_of_one_client == 16


def test_tasks_that_are_damaged_are_none(tmp_path: Path) -> None:
    tasks = TaskNames(tmp_path, 10, remember_prompts=True)
    source = TaskPrompts(("a", "b"), ("c", "d"), seed=3)
    tasks.put("law", IDS[0], source)
    assert tasks.get("law").source == source and [task.name for task in tasks.all()] == ["law"]
    (path,) = tmp_path.glob("*.json")
    for content in ("{", "[]", '{"name": "law"}', '{"name": "law", "adapter": "x", "source": {"prompts": 1}}'):
        path.write_text(content)
        assert tasks.get("law") is None and tasks.all() == []
    with pytest.raises(GeneratorConfigError, match=r"'\.\./x'"):
        TaskNames(tmp_path, 10, fixed={"../x": source})


def test_tokens_must_be_safe(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# ours\n\nme:0123456789abcdef\n0123456789ABCDEF\r\n")
    tokens = Tokens.from_file(path)
    assert len(tokens) == 2 and tokens.owner_of("Bearer 0123456789abcdef") == "me"
    assert tokens.owner_of("Bearer 0123456789ABCDEF") == "token-2" and tokens.owner_of(None) is None
    for text, words in (("short", "5 characters"), ("a b:0123456789abcdef", "line 1"), ("0123456789abcdéf", "line 1")):
        with pytest.raises(GeneratorConfigError, match=f"(?i){words}") as error:
            Tokens([text])
        assert text not in str(error.value), "a token is told to nobody"
    path.write_text("# none\n")
    with pytest.raises(GeneratorConfigError, match="holds none"):
        Tokens.from_file(path)
