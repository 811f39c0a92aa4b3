# SPDX-License-Identifier: Apache-2.0
"""The pairs folder as a data set: what it gives, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.collecting import POOL, adapter, write, write_pairs
from support.hub_state import HubServer
from torch.utils.data import DataLoader

from peft_dnd.adapters.layout import AdapterLayout
from peft_dnd.adapters.tokenizer import WeightNormalization, WeightTokenizer, weight_statistics
from peft_dnd.errors import (
    PairsFolderError,
)
from peft_dnd.pairs.collator import PromptCheckpointCollator
from peft_dnd.pairs.dataset import PromptCheckpointDataset
from peft_dnd.pairs.statistics import task_balanced_grids, token_spread
from peft_dnd.storage.files import read_safetensors
from peft_dnd.text.prompts import select_prompts
from peft_dnd.text.token_states import TokenStates


pytest_plugins = ("support.hub_server",)


@pytest.fixture
def pairs(tmp_path: Path, layout: AdapterLayout) -> Path:
    return write_pairs(tmp_path / "pairs", layout)


class Encoder:
    """Gives each prompt as many states as it has characters; the first number of each is the prompt's own."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def states(self, task: str, prompts: Any) -> TokenStates:
        self.calls.append(task)
        return TokenStates.from_list([torch.full((len(prompt), 5), own_number(prompt)) for prompt in prompts])


def own_number(prompt: str) -> float:
    return float(sum(map(ord, prompt)))


# What it gives


def test_tasks_stand_in_natural_order_and_checkpoints_in_that_of_their_steps(pairs, layout):
    write(pairs / "long", layout, 11)
    dataset = PromptCheckpointDataset.from_folder(pairs)
    assert dataset.tasks == ("law", "long", "medicine", "task 2", "task 10")
    assert [path.name[5:-12] for path in dataset.checkpoints("long")] == [f"{step:08d}" for step in range(1, 12)]
    assert len(dataset) == 3 + 11 + 1 + 2 + 2
    assert [dataset[i]["task"] for i in range(len(dataset))] == [
        task for task in dataset.tasks for _ in dataset.checkpoints(task)
    ]
    assert dataset.layout.difference(layout) is None
    assert dataset.prompts("law") == tuple(f"law prompt {i}" for i in range(POOL))


def test_an_item_is_a_pool_and_one_of_its_own_checkpoints(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    item = dataset[1]
    assert item.keys() == {"task", "prompts", "state_dict", "examples", "distillation", "replayed", "seed"}
    assert not item["replayed"]
    assert (item["task"], item["prompts"]) == ("law", dataset.prompts("law"))
    expected = adapter(layout, 2)
    assert item["state_dict"].keys() == expected.keys()
    assert all(torch.equal(item["state_dict"][key], expected[key]) for key in expected)
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert dataset[-1]["task"] == "task 10"


def test_each_visit_draws_afresh_and_the_same_again_for_the_same_epoch(pairs):
    dataset = PromptCheckpointDataset.from_folder(pairs, seed=3)

    def seeds(epoch: int) -> list[int]:
        dataset.set_epoch(epoch)
        return [item["seed"] for item in dataset]

    epochs = [seeds(epoch) for epoch in (0, 1, 2)]
    assert len({seed for epoch in epochs for seed in epoch}) == 3 * len(dataset)
    assert seeds(1) == epochs[1]
    again = PromptCheckpointDataset.from_folder(pairs, seed=3)
    assert [again[(1, i)]["seed"] for i in range(len(again))] == epochs[1]
    assert PromptCheckpointDataset.from_folder(pairs, seed=4)[0]["seed"] != again[0]["seed"]


def test_seeds_are_the_same_for_good(pairs):
    """A change here would let a fit that is resumed after an upgrade go on with other prompts."""
    dataset = PromptCheckpointDataset.from_folder(pairs, seed=1)
    assert [dataset[(2, i)]["seed"] for i in (0, 1)] == [2677740986343061110, 869862837300706142]


@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_draw_what_one_process_draws_in_every_epoch(pairs, persistent):
    dataset = PromptCheckpointDataset.from_folder(pairs)

    def epochs(**settings: Any) -> list[list[tuple[str, int]]]:
        loader = DataLoader(dataset, batch_size=2, collate_fn=_names_and_seeds, **settings)
        result = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            result.append([pair for batch in loader for pair in batch])
        return result

    alone = epochs()
    assert alone[0] != alone[1]
    assert epochs(num_workers=2, persistent_workers=persistent) == alone


def _names_and_seeds(items: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(item["task"], item["seed"]) for item in items]


def test_a_split_goes_by_task_and_keeps_the_seed(pairs):
    dataset = PromptCheckpointDataset.from_folder(pairs, seed=5)
    train, held_out = dataset.split(held_out=["task 2", "law"])
    assert (train.tasks, held_out.tasks) == (("medicine", "task 10"), ("law", "task 2"))
    assert (len(train), len(held_out), train.seed, held_out.seed) == (3, 5, 5, 5)
    assert dataset.split("law")[1].tasks == ("law",)
    train.set_epoch(1)
    assert held_out[0]["seed"] == dataset[(0, 0)]["seed"]


def test_some_tasks_only_leave_the_others_alone(pairs):
    (pairs / "law" / "prompts.jsonl").unlink()
    (pairs / "medicine" / "task.json").unlink()
    assert PromptCheckpointDataset.from_folder(pairs, tasks=["task 10", "task 2"]).tasks == ("task 2", "task 10")
    assert PromptCheckpointDataset.from_folder(pairs, tasks="task 2").tasks == ("task 2",)


def test_checkpoints_stay_in_memory_only_when_asked_or_small(pairs, monkeypatch):
    reads = []
    monkeypatch.setattr(
        "peft_dnd.pairs.dataset.read_safetensors", lambda path: reads.append(path) or read_safetensors(path)
    )
    for keep, expected in ((True, 1), (False, 2), (None, 1)):
        reads.clear()
        dataset = PromptCheckpointDataset.from_folder(pairs, keep_in_memory=keep)
        assert reads == []
        dataset[0]["state_dict"].clear()
        assert dataset[0]["state_dict"]
        assert len(reads) == expected
    monkeypatch.setattr("peft_dnd.pairs.dataset._KEPT_IN_MEMORY", 100)
    assert not PromptCheckpointDataset.from_folder(pairs).keep_in_memory


def test_it_can_be_pickled(pairs):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    dataset.set_epoch(4)
    assert pickle.loads(pickle.dumps(dataset))[0]["seed"] == dataset[0]["seed"]


def test_means_count_each_task_alike(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    key = layout.tensors[0].key
    law = torch.stack([adapter(layout, seed)[key] for seed in (1, 2, 3)])
    assert torch.allclose(dataset.mean_state_dict("law")[key], law.mean(0), atol=1e-7)
    means = torch.stack([dataset.mean_state_dict(task)[key] for task in dataset.tasks])
    assert torch.allclose(dataset.mean_state_dict()[key], means.mean(0), atol=1e-7)
    assert torch.equal(dataset.state_dict("law")[key], law[-1])
    assert torch.equal(dataset.state_dict("law", 0)[key], law[0])


# The collator


def test_a_batch_holds_drawn_prompts_and_their_own_task_s_checkpoint(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    tokenizer = WeightTokenizer(layout, 16)
    collate = PromptCheckpointCollator(Encoder(), tokenizer, num_prompts=4, max_length=9)
    items = [dataset[i] for i in (0, 3, 7)]
    batch = collate(items)
    assert batch.keys() == {"condition_states", "condition_mask", "target_tokens"}
    assert batch["condition_states"].shape == (3, 4, 9, 5) and batch["condition_states"].dtype == torch.float32
    assert batch["condition_mask"].shape == (3, 4, 9) and batch["condition_mask"].dtype == torch.bool
    assert batch["target_tokens"].shape == (3, *tokenizer.grid_shape)
    for b, item in enumerate(items):
        assert torch.equal(batch["target_tokens"][b], tokenizer.encode(item["state_dict"]))
        chosen = [item["prompts"][i] for i in select_prompts(POOL, 4, item["seed"]).tolist()]
        assert batch["condition_states"][b, :, 0, 0].tolist() == [own_number(prompt) for prompt in chosen]
        assert batch["condition_mask"][b].sum(1).tolist() == [min(9, len(prompt)) for prompt in chosen]
        assert len(set(chosen)) == 4


def test_a_small_pool_is_repeated_by_the_rule_of_inference(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    collate = PromptCheckpointCollator(Encoder(), WeightTokenizer(layout), num_prompts=POOL + 2, max_length=4)
    states = collate([dataset[0]])["condition_states"][0, :, 0, 0].tolist()
    assert set(states) == {own_number(prompt) for prompt in dataset.prompts("law")}


def test_without_encoding_it_gives_the_prompts_themselves(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    encoder = Encoder()
    tokenizer = WeightTokenizer(layout)
    collate = PromptCheckpointCollator(encoder, tokenizer, num_prompts=3, max_length=4, encode=False)
    items = [dataset[0], dataset[3]]
    batch = collate(items)
    assert batch.keys() == {"prompts", "target_tokens"}
    for prompts, item in zip(batch["prompts"], items, strict=True):
        assert prompts == [item["prompts"][i] for i in select_prompts(POOL, 3, item["seed"]).tolist()]
    assert encoder.calls == []


def test_each_task_s_prompts_are_read_once(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    encoder = Encoder()
    collate = PromptCheckpointCollator(encoder, WeightTokenizer(layout), num_prompts=3, max_length=4)
    collate.warm_up(dataset)
    assert encoder.calls == list(dataset.tasks)
    for epoch in range(2):
        collate([dataset[(epoch, i)] for i in range(len(dataset))])
    assert encoder.calls == list(dataset.tasks)


# Statistics


def test_statistics_count_each_task_alike(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    tokenizer = WeightTokenizer(layout, 16)
    mean, scale = weight_statistics(tokenizer, task_balanced_grids(dataset, tokenizer))
    assert torch.allclose(mean, tokenizer.encode(dataset.mean_state_dict()), atol=1e-6)
    # The scale of a tensor: root of the mean over tasks of the mean square deviation from that mean.
    tensor = layout.tensors[0]
    deviations = [
        torch.stack([dataset.state_dict(task, i)[tensor.key] for i in range(len(dataset.checkpoints(task)))])
        .sub(dataset.mean_state_dict()[tensor.key])
        .square()
        .mean()
        for task in dataset.tasks
    ]
    assert float(scale[0]) == pytest.approx(float(torch.stack(deviations).mean().sqrt()), rel=1e-5)


def test_spread_is_that_of_the_normalised_tokens(pairs, layout):
    dataset = PromptCheckpointDataset.from_folder(pairs)
    tokenizer = WeightTokenizer(layout, 16)
    plain = WeightNormalization(tokenizer.grid_shape)
    halved = WeightNormalization(tokenizer.grid_shape)
    scale = torch.ones(tokenizer.num_tokens)
    scale[0] = 2.0
    halved.set_statistics(torch.ones(tokenizer.grid_shape), scale)
    spread = token_spread(dataset, tokenizer, plain)
    assert (spread.num_tasks, spread.num_checkpoints) == (4, 8)
    other = token_spread(dataset, tokenizer, halved)
    ratios = (other.between_task / spread.between_task)[[0, 1, 2]]
    assert float(ratios[1] / ratios[0]) == pytest.approx(2.0, rel=1e-5)
    assert float(ratios[2] / ratios[1]) == pytest.approx(1.0, rel=1e-5)


# The Hub


@pytest.fixture
def on_hub(pairs: Path, local_hub: HubServer) -> HubServer:
    """The Hub, with `pairs` as the data set "someone/pairs", and things beside them that nobody needs."""
    (pairs / "README.md").write_text("a card")
    (pairs / "law" / "optimizer.pt").write_bytes(b"heavy")
    local_hub.put("someone/pairs", pairs, kind="datasets")
    return local_hub


def fetched(hub: HubServer) -> set[str]:
    (snapshot,) = Path(hub.cache, "datasets--someone--pairs", "snapshots").iterdir()
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def test_from_the_hub_only_what_is_needed_is_downloaded(pairs, on_hub):
    (commit,) = on_hub.repos["datasets", "someone/pairs"].commits
    on_hub.put("someone/pairs", pairs / "law", kind="datasets")  # the main branch goes on
    dataset = PromptCheckpointDataset.from_hub("someone/pairs", revision=commit, seed=7)
    assert dataset.tasks == ("law", "medicine", "task 2", "task 10")
    assert (dataset.hub_id, dataset.hub_commit) == ("someone/pairs", commit)
    assert "README.md" not in fetched(on_hub) and "law/optimizer.pt" not in fetched(on_hub)
    assert dataset[0]["seed"] == PromptCheckpointDataset.from_folder(pairs, seed=7)[0]["seed"]
    fitted, held_out = dataset.split(["law"])
    assert (fitted.hub_commit, held_out.hub_id) == (commit, "someone/pairs")


def test_from_the_hub_some_tasks_only(pairs, local_hub, layout):
    write(pairs / "odd [1]", layout, 1)
    local_hub.put("someone/pairs", pairs, kind="datasets")
    other = pairs.parent / "other"
    write(other / "law", layout, 1)
    # The branch moves between the first look and the second.
    local_hub.before("/resolve/", lambda: local_hub.put("someone/pairs", other, kind="datasets"))
    dataset = PromptCheckpointDataset.from_hub("someone/pairs", tasks=["odd [1]", "task 2"])
    assert dataset.tasks == ("odd [1]", "task 2")
    weights = [name for name in fetched(local_hub) if name.endswith(".safetensors")]
    assert {name.split("/")[0] for name in weights} == {"odd [1]", "task 2"}
    with pytest.raises(PairsFolderError, match="no task 'lore'"):
        PromptCheckpointDataset.from_hub("someone/pairs", tasks=["lore"])


def test_from_the_hub_what_is_no_id_is_refused():
    with pytest.raises(PairsFolderError, match="a Hub id has the form 'org/pairs'"):
        PromptCheckpointDataset.from_hub("no id/at/all")
    with pytest.raises(TypeError, match="Did you mean 'revision'"):
        PromptCheckpointDataset.from_hub("someone/pairs", revison="v1")
