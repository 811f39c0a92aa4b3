# SPDX-License-Identifier: Apache-2.0
"""What a generator keeps of its tasks: packed, bounded, the same in whatever order they came, refused if damaged."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.rows import rows_of

from peft_dnd import PromptCheckpointDataset, write_examples
from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.tokenizer import WeightNormalization, WeightTokenizer, weight_statistics
from peft_dnd.errors import CorruptFileError, FormatVersionError, GeneratorConfigError, LayoutError
from peft_dnd.pairs import ReplayStore, StoreBounds, TaskExamples, task_balanced_grids
from peft_dnd.pairs.packed_adapters import AdapterPacking
from peft_dnd.pairs.replay_store import STORE_NAME
from peft_dnd.pairs.store_update import updated_store
from peft_dnd.storage.files import read_safetensors, write_safetensors


ALL = StoreBounds(share=1.0)


@pytest.fixture
def packing(pairs: PromptCheckpointDataset) -> AdapterPacking:
    tokenizer = WeightTokenizer(pairs.layout)
    normalization = WeightNormalization(tokenizer.grid_shape)
    normalization.set_statistics(*weight_statistics(tokenizer, task_balanced_grids(pairs, tokenizer)))
    return AdapterPacking(tokenizer, normalization)


def store_of(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, bounds: StoreBounds = ALL, old: ReplayStore | None = None
) -> ReplayStore:
    store = updated_store(old, pairs, pairs.tasks, packing, "prompts", bounds)
    assert store is not None
    return store


def test_an_adapter_comes_back_within_half_a_step_of_its_token(
    pairs: PromptCheckpointDataset, packing: AdapterPacking
) -> None:
    wanted = pairs.state_dict("law")
    packed = packing.pack(wanted)
    assert packed.num_bytes < 0.4 * sum(tensor.nbytes for tensor in wanted.values())
    tokens, given = packing.unpack_tokens(packed), packing.normalized(wanted)
    assert bool(((tokens - given).abs().amax((1, 2)) <= packed.sizes / 254 * 1.001).all())
    assert not tokens[~packing.tokenizer.valid_mask()].any()
    found = packing.unpack(packed)
    assert found.keys() == wanted.keys()
    assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in wanted.items()}


def test_what_is_kept_is_read_again_to_the_bit(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    store = store_of(pairs, packing)
    path = tmp_path / STORE_NAME
    store.save(path)
    assert path.stat().st_size == store.num_bytes
    again = ReplayStore.load(path)
    assert again.pairs_bytes == store.pairs_bytes > 0
    assert (again.condition_text, again.layout.difference(store.layout)) == ("prompts", None)
    again.check(packing, "prompts", "it")
    for name, task in store.tasks.items():
        found = again.tasks[name]
        assert (found.texts, found.pairs_bytes) == (task.texts, task.pairs_bytes) and found.texts
        assert found.adapter is not None and task.adapter is not None
        assert torch.equal(found.adapter.values, task.adapter.values)
        assert torch.equal(found.adapter.sizes, task.adapter.sizes)
        mean = packing.normalized(pairs.mean_state_dict(name))
        assert (packing.unpack_tokens(found.adapter) - mean).abs().max() < 0.05  # of deviations of about 1


@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
def test_it_is_never_larger_than_it_may_be(
    share: float, pairs: PromptCheckpointDataset, packing: AdapterPacking
) -> None:
    store = store_of(pairs, packing, StoreBounds(share))
    assert store.num_bytes <= share * store.pairs_bytes
    bounded = store_of(pairs, packing, StoreBounds(share, most_bytes=store.num_bytes - 1))
    assert bounded.num_bytes < store.num_bytes
    assert list(bounded.tasks) == list(pairs.tasks)  # texts of every task stay


def test_fewer_texts_are_kept_before_none_are(pairs: PromptCheckpointDataset, packing: AdapterPacking) -> None:
    many = PromptCheckpointDataset(
        [
            replace(pairs._task(name), prompts=tuple(f"{name} {i} " + "word " * 40 for i in range(99)))
            for name in pairs.tasks
        ]
    )
    store = store_of(many, packing)
    assert {len(task.texts) for task in store.tasks.values()} == {64}
    assert all(set(task.texts) < set(many.prompts(name)) for name, task in store.tasks.items())
    smaller = store_of(many, packing, StoreBounds(share=0.2))
    assert smaller.num_bytes <= 0.2 * smaller.pairs_bytes
    assert {len(task.texts) for task in smaller.tasks.values()} < {16, 32}


def test_the_order_in_which_tasks_come_does_not_matter(
    pairs: PromptCheckpointDataset, packing: AdapterPacking
) -> None:
    first, second = pairs.split(list(pairs.tasks)[:2])
    bounds = StoreBounds(share=1.0, most_bytes=store_of(pairs, packing).num_bytes - 1)
    at_once = store_of(pairs, packing, bounds)
    kept = {name for name, task in at_once.tasks.items() if task.adapter is not None}
    assert 0 < len(kept) < len(pairs.tasks)  # there is room for some
    for parts in ((first, second), (second, first)):
        whole = store_of(parts[1], packing, ALL, old=store_of(parts[0], packing))
        assert list(whole.tasks) == list(pairs.tasks)
        again = store_of(pairs, packing, bounds, old=whole)
        assert {name for name, task in again.tasks.items() if task.adapter is not None} == kept


def test_there_may_be_no_room_at_all_which_is_said(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, caplog: pytest.LogCaptureFixture
) -> None:
    assert updated_store(None, pairs, pairs.tasks, packing, "prompts", StoreBounds(most_bytes=100)) is None
    assert "Raise replay_store_share" in caplog.text
    caplog.clear()
    assert updated_store(None, pairs, pairs.tasks, packing, "prompts", StoreBounds(share=0.0)) is None
    assert not caplog.records  # nothing was to be kept


def test_another_generators_is_refused(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, layout: AdapterLayout
) -> None:
    store = store_of(pairs, packing)
    with pytest.raises(GeneratorConfigError, match=r"of the form 'prompts', .*'answers'.*fit with the pairs of all"):
        store.check(packing, "answers", "It")
    other = WeightNormalization(packing.tokenizer.grid_shape)
    with pytest.raises(GeneratorConfigError, match=r"another normalisation.*fit with the pairs of all tasks"):
        store.check(AdapterPacking(packing.tokenizer, other), "prompts", "It")
    fewer = AdapterLayout.from_dict({**layout.to_dict(), "modules": layout.to_dict()["modules"][1:]})
    with pytest.raises(LayoutError, match=r"another generator's.*fit with the pairs of all tasks"):
        replace(store, layout=fewer).check(packing, "prompts", "It")


def with_rows(pairs: PromptCheckpointDataset, folder: Path, checkpoints: bool) -> PromptCheckpointDataset:
    """The tasks with rows, and with or without their checkpoints."""
    tasks = []
    for name in pairs.tasks:
        folder.joinpath(name).mkdir()
        write_examples(folder / name, rows_of(name, count=60))
        task = replace(pairs._task(name), examples=TaskExamples(folder / name / "examples.jsonl"))
        tasks.append(task if checkpoints else replace(task, checkpoints=()))
    return PromptCheckpointDataset(tasks, layout=pairs.layout)


def test_rows_are_kept_as_far_as_there_is_room_alike_of_all_tasks(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    bare = with_rows(pairs, tmp_path, checkpoints=False)

    def store_within(bounds: StoreBounds, old: ReplayStore | None = None, base: str = "this") -> ReplayStore:
        store = updated_store(old, bare, bare.tasks, packing, "prompts", bounds, rows=["examples"], base=base)
        assert store is not None
        return store

    whole = store_within(ALL)
    assert whole.pairs_bytes > sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
    for name, task in whole.tasks.items():
        assert len(task.examples) == 16 and all(row in list(rows_of(name, count=60)) for row in task.examples)
    whole.save(tmp_path / STORE_NAME)
    assert ReplayStore.load(tmp_path / STORE_NAME).tasks["law"].examples == whole.tasks["law"].examples
    smaller = store_within(StoreBounds(1.0, most_bytes=whole.num_bytes - 1))
    assert smaller.num_bytes < whole.num_bytes
    assert [task.examples for task in smaller.tasks.values()] == [t.examples[:8] for t in whole.tasks.values()]
    # Of a fit without rows the old ones stay, and those for another base go.
    (_, second) = bare.split(["law"])
    again = updated_store(whole, second, second.tasks, packing, "prompts", ALL)
    assert again is not None and again.base == "this"
    assert (len(again.tasks["art"].examples), again.tasks["law"].examples) == (16, ())
    other = updated_store(whole, second, ["law"], packing, "prompts", ALL, rows=["examples"], base="other")
    assert other is not None and other.base == "other"
    assert (other.tasks["art"].examples, len(other.tasks["law"].examples)) == ((), 16)


def test_rows_leave_room_for_checkpoints(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    both = with_rows(pairs, tmp_path, checkpoints=True)
    for share in (0.15, 0.4):
        store = updated_store(
            None, both, both.tasks, packing, "prompts", StoreBounds(share), rows=["examples"], base="this"
        )
        assert store is not None and store.num_bytes <= share * store.pairs_bytes
        assert any(task.adapter is not None for task in store.tasks.values())
        assert any(task.examples for task in store.tasks.values())


def test_one_of_the_first_format_is_read(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    path = tmp_path / STORE_NAME
    store = store_of(pairs, packing)
    store.save(path)
    tensors = read_safetensors(path)
    about = json.loads(zlib.decompress(tensors["about"].numpy().tobytes()))
    about = {name: value for name, value in about.items() if name not in ("encoder", "base")}
    about["tasks"] = [task[:4] for task in about["tasks"]]
    packed = torch.frombuffer(bytearray(zlib.compress(json.dumps(about).encode())), dtype=torch.uint8)
    write_safetensors(path, {**tensors, "about": packed}, ("peft_dnd_replay_store", "1"))
    found = ReplayStore.load(path)
    assert (found.encoder, found.base) == (None, None)
    assert [task.texts for task in found.tasks.values()] == [task.texts for task in store.tasks.values()]
    assert all(task.examples == task.distillation == () for task in found.tasks.values())


@pytest.mark.parametrize("damage", ["cut", "nothing", "about", "values", "sizes", "stranger"])
def test_a_damaged_one_says_how_to_mend_it(
    damage: str, pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    path = tmp_path / STORE_NAME
    store_of(pairs, packing).save(path)
    tensors = read_safetensors(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nothing":
        path.write_bytes(b"")
    elif damage == "about":
        write_safetensors(path, {**tensors, "about": tensors["about"][:-20]})
    elif damage == "values":
        write_safetensors(path, {**tensors, "values": tensors["values"][1:]})
    elif damage == "sizes":
        write_safetensors(path, {**tensors, "sizes": tensors["sizes"] * torch.inf})
    else:
        write_safetensors(path, {"weight": torch.zeros(3)})
    with pytest.raises(CorruptFileError, match="restore"):
        ReplayStore.load(path)


def test_one_of_a_newer_version_is_not_guessed_at(
    pairs: PromptCheckpointDataset, packing: AdapterPacking, tmp_path: Path
) -> None:
    path = tmp_path / STORE_NAME
    store_of(pairs, packing).save(path)
    write_safetensors(path, read_safetensors(path), ("peft_dnd_replay_store", "3"))
    with pytest.raises(FormatVersionError, match="Upgrade"):
        ReplayStore.load(path)
