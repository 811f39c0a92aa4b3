# SPDX-License-Identifier: Apache-2.0
"""Mixtures of two tasks: which update is the target, which prompts and rows go with it, and that a seed decides."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.collecting import adapter

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.adapters.factors import interpolated_adapter
from peft_dnd.errors import GeneratorConfigError
from peft_dnd.pairs import MixtureCollator
from peft_dnd.pairs.collator import ExampleCollator, ExamplesBesidePairs
from peft_dnd.pairs.mixtures import OWN_SHARE, PARTNER, own_part


def updates(layout: AdapterLayout, adapter: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [adapter[b.key].double() @ adapter[a.key].double() for a, b in (m.tensors for m in layout.modules)]


def test_where_a_is_shared_the_interpolated_update_is_exact(layout: AdapterLayout) -> None:
    first, second = adapter(layout, 0), adapter(layout, 1)
    second.update({a.key: first[a.key] for a, _ in (module.tensors for module in layout.modules)})
    mixed = interpolated_adapter(layout, first, second, 0.3)
    for a, b in (module.tensors for module in layout.modules):
        torch.testing.assert_close(mixed[a.key], first[a.key])
        torch.testing.assert_close(mixed[b.key], 0.3 * first[b.key] + 0.7 * second[b.key], atol=1e-5, rtol=1e-4)
    assert list(mixed) == [tensor.key for tensor in layout.tensors]


def test_of_the_interpolated_update_the_best_of_the_rank_is_kept_and_in_the_other_form_what_its_a_can_hold(
    layout: AdapterLayout,
) -> None:
    first, second = adapter(layout, 0), adapter(layout, 1)
    wanted = [0.25 * a + 0.75 * b for a, b in zip(updates(layout, first), updates(layout, second), strict=True)]
    best = interpolated_adapter(layout, first, second, 0.25, canonical=True)
    kept = interpolated_adapter(layout, first, second, 0.25)
    factors = {key: 0.25 * first[key] + 0.75 * second[key] for key in first}
    parts = zip(wanted, *(updates(layout, one) for one in (best, kept, factors)), strict=True)
    for target, of_best, of_kept, of_factors in parts:
        u, s, vt = torch.linalg.svd(target)
        rank = 3
        torch.testing.assert_close(of_best, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-4, rtol=1e-4)
        errors = [float((target - found).norm()) for found in (of_best, of_kept, of_factors)]
        assert errors[0] < errors[1] < errors[2], "interpolated factors are further off than either"
    for a, _ in (module.tensors for module in layout.modules):
        torch.testing.assert_close(kept[a.key], factors[a.key])  # where entries are compared, A stays where As are


def test_the_ends_are_the_adapters_themselves(layout: AdapterLayout) -> None:
    first, second = adapter(layout, 0), adapter(layout, 1)
    for canonical, (share, end) in itertools.product((False, True), ((1.0, first), (0.0, second))):
        mixed = interpolated_adapter(layout, first, second, share, canonical=canonical)
        for found, wanted in zip(updates(layout, mixed), updates(layout, end), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    zero = {key: torch.zeros_like(tensor) for key, tensor in first.items()}
    mixed = interpolated_adapter(layout, zero, zero, 0.5)
    assert all(bool((tensor == 0).all()) for tensor in mixed.values())


def trainer_for(
    pairs: PromptCheckpointDataset, encoder_folder: Path, output: Path, num_prompts: int = 4, **options: Any
) -> DnDTrainer:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        str(encoder_folder),
        num_prompts=num_prompts,
        max_prompt_length=16,
        decoder_config={"hidden_size": 16, "num_layers": 1, "num_templates": 4},
    )
    torch.manual_seed(0)
    arguments = DnDTrainingArguments(
        str(output),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return DnDTrainer(PromptConditionedLoraGenerator(config), arguments, train_dataset=pairs)


def test_a_mixture_reads_prompts_of_both_tasks_and_its_target_lies_between_them(
    pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(pairs, encoder_folder, tmp_path, mixture_share=1.0, smallest_prompt_set=0)
    collator: Any = trainer.data_collator
    assert isinstance(collator, MixtureCollator)
    items = [collator._mixed(pairs[number]) for number in range(len(pairs))]
    assert all(item[PARTNER]["task"] != item["task"] for item in items)
    assert len({item[PARTNER]["task"] for item in items}) > 2
    for item in items:
        batch = collator.collate([item])
        own = own_part(item, 4)
        assert 1 <= own <= 3 and abs(own / 4 - item[OWN_SHARE]) <= 0.25
        expected = interpolated_adapter(pairs.layout, item["state_dict"], item[PARTNER]["state_dict"], own / 4)
        grid = trainer.generator.weight_tokenizer.encode(expected)
        torch.testing.assert_close(batch["target_tokens"][0], grid)
        pools = [collator.collate._states(one["task"], one["prompts"]) for one in (item, item[PARTNER])]
        shown = [batch["condition_states"][0, place][batch["condition_mask"][0, place]] for place in range(4)]
        for place, prompt in enumerate(shown):
            pool = pools[place >= own]
            assert any(len(pool[k]) == len(prompt) and torch.equal(pool[k], prompt) for k in range(len(pool)))


def test_which_items_are_mixed_is_drawn_by_their_seeds_and_by_the_share(pairs: PromptCheckpointDataset) -> None:
    collators = [MixtureCollator(lambda items: list(items), pairs, 0.4) for _ in range(2)]
    epochs = [[pairs[epoch, number] for number in range(len(pairs))] for epoch in range(40)]
    found = [[item.get(PARTNER, {}).get("task") for epoch in epochs for item in c(epoch)] for c in collators]
    assert found[0] == found[1]
    share = sum(task is not None for task in found[0]) / len(found[0])
    assert 0.33 < share < 0.47
    counts = [found[0].count(task) for task in pairs.tasks]
    assert max(counts) < 1.6 * min(counts), "any other task, with equal chance"
    law, _ = pairs.split([task for task in pairs.tasks if task != "law"])
    with pytest.raises(GeneratorConfigError, match="one task"):
        MixtureCollator(list, law, 0.4)


def test_rows_of_both_tasks_go_with_a_mixture(pairs_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    for number, task in enumerate(("art", "geo", "law", "med")):
        write_examples(tmp_path / "pairs" / task, [{"input_ids": [number, row]} for row in range(8)])
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    beside = ExamplesBesidePairs(lambda items: {}, 6, ExampleCollator())
    for item in MixtureCollator(list, pairs, 1.0)([pairs[number] for number in range(len(pairs))]):
        (rows,) = beside([item])["examples"]
        tasks = [pairs.tasks[number] for number in rows["input_ids"][:, 0].tolist()]
        own = own_part(item, 6)
        assert tasks == [item["task"]] * own + [item[PARTNER]["task"]] * (6 - own)
    assert own_part(item, 1) == 1


def test_a_fit_with_mixtures_goes_on_as_an_uninterrupted_one_and_one_without_is_as_it_was(
    pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path
) -> None:
    def weights(folder: str, resume: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
        options = {"max_steps": 4, "lr_scheduler_type": "constant", **options}
        trainer = trainer_for(pairs, encoder_folder, tmp_path / folder, **options)
        trainer.train(resume_from_checkpoint=resume)
        return {name: value.clone() for name, value in trainer.generator.decoder.state_dict().items()}

    plain, mixed = weights("plain"), weights("mixed", mixture_share=0.5, save_strategy="steps", save_steps=2)
    assert any(not torch.equal(plain[name], mixed[name]) for name in plain)
    resumed = weights("cut", resume=str(tmp_path / "mixed" / "checkpoint-2"), mixture_share=0.5)
    for name, value in mixed.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_mixed_is_refused(pairs: PromptCheckpointDataset, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GeneratorConfigError, match="mixture_share must be from 0 to 1"):
        DnDTrainingArguments(str(tmp_path), mixture_share=1.5)
    with pytest.raises(GeneratorConfigError, match="num_prompts=1"):
        trainer_for(pairs, encoder_folder, tmp_path, num_prompts=1, mixture_share=0.5)
