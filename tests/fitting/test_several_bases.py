# SPDX-License-Identifier: Apache-2.0
"""Fitting one generator for several bases: batches in balance, losses of their own; a base added, all else kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.constants import TASK_PROMPTS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dnd import (
    AdapterLayout,
    DnDTrainer,
    DnDTrainingArguments,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
    write_examples,
)
from peft_dnd.errors import GeneratorConfigError, LayoutError, NotFittedError
from peft_dnd.fitting.inputs import EpochSampler
from peft_dnd.fitting.several_bases import BalancedSampler
from peft_dnd.pairs.replay_store import STORE_NAME
from peft_dnd.pairs.several_bases import PairsOfBases
from peft_dnd.pairs.writer import PairWriter


SIZES = {"wide": (24, 1), "deep": (16, 2), "new": (32, 1)}
COUNTS = {"wide": 3, "deep": 1, "new": 2}


def base_of(name: str) -> nn.Module:
    width, depth = SIZES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": depth, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()


@pytest.fixture(scope="module")
def of_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptCheckpointDataset]:
    """Pairs of three bases, of one, two and three checkpoints a task: random adapters, and examples."""
    found = {}
    for number, name in enumerate(SIZES):
        folder = tmp_path_factory.mktemp(name)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        layout = AdapterLayout.from_lora_config(config, base_of(name))
        draw = torch.Generator().manual_seed(number)
        for task, prompts in TASK_PROMPTS.items():
            own = {t.key: torch.randn(t.shape, generator=draw) * 0.1 for t in layout.tensors}
            writer = PairWriter(folder / task, prompts, layout)
            writer.begin()
            for step in range(COUNTS[name]):
                writer.add({key: value + 0.001 * step for key, value in own.items()}, step + 1)
            writer.close()
            write_examples(folder / task, [{"input_ids": [3, 4, 5 + row], "labels": [-100, 4, 5]} for row in range(4)])
        found[name] = PromptCheckpointDataset.from_folder(folder)
    return found


@pytest.fixture
def first_two(of_bases: dict[str, PromptCheckpointDataset]) -> dict[str, PromptCheckpointDataset]:
    return {name: of_bases[name] for name in ("wide", "deep")}


def make(pairs: Any, encoder: Path, **settings: Any) -> PromptConditionedLoraGenerator:
    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs, str(encoder), num_prompts=4, max_prompt_length=16, **settings
    )
    torch.manual_seed(0)
    return PromptConditionedLoraGenerator(config)


def arguments(folder: Path, **options: Any) -> DnDTrainingArguments:
    given = {"max_steps": 3, "per_device_train_batch_size": 6, "report_to": "none", "use_cpu": True}
    return DnDTrainingArguments(str(folder), disable_tqdm=True, **{**given, **options})


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def unequal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def distance(one: Any, other: Any) -> float:
    return sum((tensor - other[key]).square().sum().item() for key, tensor in one.items())


def test_the_loss_and_its_gradient_are_the_mean_of_the_bases_own(
    first_two: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(first_two, encoder_folder, decoder_config={"zero_init_output": False, "summary_noise": 0.0})
    quiet = arguments(tmp_path, condition_noise=0.0, target_noise=0.0)
    trainer = DnDTrainer(generator, quiet, first_two)
    trainer._prepare()
    items = [trainer.pairs[number] for number in (0, 4, 12)]
    loss = trainer.compute_loss(generator.eval(), trainer.data_collator(items))
    loss.backward()
    together = {name: parameter.grad.clone() for name, parameter in generator.named_parameters()}
    generator.zero_grad()
    apart = 0.0
    for name, of_base in (("wide", items[:2]), ("deep", items[2:])):
        one = generator.for_base(name)
        alone = DnDTrainer(one, quiet, first_two[name])
        alone._prepare()
        half = alone.compute_loss(one.eval(), alone.data_collator(of_base)) / 2
        half.backward()
        apart += half.item()
    assert loss.item() == pytest.approx(apart)
    assert loss.item() > 0.1
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name])


def test_fitting_moves_the_trunk_and_every_head(
    first_two: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(first_two, encoder_folder)
    before = copies(generator)
    trainer = DnDTrainer(generator, arguments(tmp_path, max_steps=90), first_two, eval_dataset=first_two)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] < 0.6 * metrics["eval_mean_adapter_loss"]
    for key in ("loss", "mean_adapter_loss"):
        of_bases = [metrics[f"eval_{name}_{key}"] for name in first_two]
        counts = [len(pairs) for pairs in first_two.values()]
        assert of_bases[0] != of_bases[1]
        mean = sum(of * count for of, count in zip(of_bases, counts, strict=True)) / sum(counts)
        assert metrics[f"eval_{key}"] == pytest.approx(mean)
    for name, pairs in first_two.items():
        one = generator.for_base(name)
        alone = DnDTrainer(one, arguments(tmp_path / f"alone-{name}"), pairs, eval_dataset=pairs).evaluate()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"])
    changed = unequal(before, copies(generator))
    own = ("decoder.writer.", "heads.deep.writer.", "heads.deep.normalization.")
    for part in ("decoder.summary_mixing.", "decoder.center", *own):
        assert any(key.startswith(part) for key in changed), part
    assert generator.prompt_reference is not None
    assert len(generator.prompt_reference.counts) == len(TASK_PROMPTS), "a task of two bases is one task"
    for name, pairs in first_two.items():
        one = generator.for_base(name)
        alone = make(pairs, encoder_folder)
        DnDTrainer(alone, arguments(tmp_path / name, max_steps=1), pairs)._prepare()
        assert torch.equal(one.normalization.mean, alone.normalization.mean), "the normalisation is the base's own"
        assert torch.equal(one.normalization.scale, alone.normalization.scale)
        middle = pairs.mean_state_dict()
        written = {
            task: generator.generate_adapter(TASK_PROMPTS[task], base=name).state_dict() for task in pairs.tasks
        }
        found = [distance(adapter, pairs.mean_state_dict(task)) for task, adapter in written.items()]
        least = [distance(middle, pairs.mean_state_dict(task)) for task in pairs.tasks]
        assert sum(found) < 0.7 * sum(least), "each base learns its own adapters"
    trainer.save_model()
    saved = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert saved.config.base_names == ("wide", "deep")


def test_a_base_is_added_and_all_else_stays_to_the_bit(
    of_bases: dict[str, PromptCheckpointDataset],
    first_two: dict[str, PromptCheckpointDataset],
    encoder_folder: Path,
    tmp_path: Path,
) -> None:
    generator = make(first_two, encoder_folder)
    DnDTrainer(generator, arguments(tmp_path / "first"), first_two).train()
    generator.save_pretrained(tmp_path / "saved")
    generator = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "saved")
    before = copies(generator)
    adapters = {name: generator.generate_adapter(TASK_PROMPTS["law"], base=name).state_dict() for name in first_two}
    one = generator.add_base(of_bases["new"], name="new")
    started = copies(generator)
    DnDTrainer(one, arguments(tmp_path / "new", weight_decay=0.5, save_steps=2), of_bases["new"]).train()
    after = copies(generator)
    assert unequal(before, after) == set()
    moved = unequal(started, after)
    assert moved
    assert all(key.startswith("heads.new.") for key in moved)
    assert "heads.new.writer.templates" in moved
    for name, adapter in adapters.items():
        again = generator.generate_adapter(TASK_PROMPTS["law"], base=name).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in adapter.items())
    assert all(parameter.requires_grad for parameter in generator.parameters()), "frozen for that fit alone"
    checkpoint = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "new" / "checkpoint-2")
    assert checkpoint.config.base_names == ("new",)
    generator.save_pretrained(tmp_path / "saved")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "saved")
    assert loaded.config.base_names == ("wide", "deep", "new")
    assert unequal(copies(loaded), after) == set()


def test_a_generator_of_one_base_becomes_one_of_two(
    of_bases: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(of_bases["wide"], encoder_folder)
    generator.config.base_name = "wide"
    DnDTrainer(generator, arguments(tmp_path / "wide"), of_bases["wide"]).train()
    adapter = generator.generate_adapter(TASK_PROMPTS["law"]).state_dict()
    one = generator.add_base(of_bases["deep"], name="deep")
    DnDTrainer(one, arguments(tmp_path / "deep"), of_bases["deep"]).train()
    again = generator.generate_adapter(TASK_PROMPTS["law"], base="wide").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in adapter.items())
    assert (
        generator.generate_adapter(TASK_PROMPTS["law"], base="deep").layout.difference(of_bases["deep"].layout) is None
    )


def test_a_base_is_added_to_a_loaded_generator_that_keeps_its_tasks(
    of_bases: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(of_bases["wide"], encoder_folder)
    DnDTrainer(generator, arguments(tmp_path / "fit", replay_store_share=1.0), of_bases["wide"]).train()
    generator.save_pretrained(tmp_path / "one")
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "one")
    one = loaded.add_base(of_bases["new"], name="new")
    DnDTrainer(one, arguments(tmp_path / "more"), of_bases["new"]).train()
    one.save_pretrained(tmp_path / "new")
    loaded.save_pretrained(tmp_path / "two")
    assert one.replay_store is None  # it holds the first base's adapters
    assert not (tmp_path / "new" / STORE_NAME).exists()
    again = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "two")
    assert set(again.for_base(again.config.base_names[0]).replay_store.tasks) == set(TASK_PROMPTS)


def test_a_head_is_not_fitted_to_a_trunk_that_was_not(
    first_two: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    one = make(first_two, encoder_folder).for_base("deep")
    with pytest.raises(NotFittedError, match="Fit all bases first"):
        DnDTrainer(one, arguments(tmp_path), first_two["deep"]).train()


def test_task_loss_of_every_base(
    first_two: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(first_two, encoder_folder)
    models = {name: base_of(name) for name in first_two}
    before = {name: copies(model) for name, model in models.items()}
    options = {"task_loss_weight": 1.0, "rebuild_weight": 0.1, "task_examples": 2}
    trainer = DnDTrainer(
        generator, arguments(tmp_path, **options), first_two, eval_dataset=first_two, base_model=models
    )
    started = copies(generator)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_task_loss"] > 0
    changed = unequal(started, copies(generator))
    assert any(key.startswith("heads.deep.writer") for key in changed)
    assert any(key.startswith("decoder.writer") for key in changed)
    assert all(unequal(before[name], copies(model)) == set() for name, model in models.items())
    with pytest.raises(
        GeneratorConfigError, match=r"base_model must be a dictionary with one for each, 'wide', 'deep'"
    ):
        DnDTrainer(generator, arguments(tmp_path, **options), first_two, base_model=models["wide"])


def test_an_interrupted_fit_goes_on_as_if_it_had_not_been(
    first_two: dict[str, PromptCheckpointDataset], encoder_folder: Path, tmp_path: Path
) -> None:
    whole = make(first_two, encoder_folder)
    DnDTrainer(whole, arguments(tmp_path / "a", max_steps=4, save_steps=2), first_two).train()
    resumed = make(first_two, encoder_folder)
    trainer = DnDTrainer(resumed, arguments(tmp_path / "b", max_steps=4), first_two)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], tensor, rtol=0, atol=1e-6)


def test_each_base_comes_as_often_and_with_fresh_seeds() -> None:
    sampler = BalancedSampler([EpochSampler(6, 0), EpochSampler(2, 0)])
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 12
    assert [number < 6 for _, number in drawn] == [True, False] * 6, "in turn, so that every batch is in balance"
    assert Counter(number for _, number in drawn[::2]) == Counter(range(6))
    assert Counter(number for _, number in drawn[1::2]) == {6: 3, 7: 3}
    assert len(set(drawn)) == 12, "one that comes again has another seed"
    sampler.set_epoch(1)
    assert not set(drawn) & set(sampler)


def test_items_say_whose_they_are(of_bases: dict[str, PromptCheckpointDataset]) -> None:
    pairs = PairsOfBases(of_bases)
    assert len(pairs) == 4 * (3 + 1 + 2) == sum(map(len, of_bases.values()))
    assert [pairs[i]["base"] for i in (0, 11, 12, 15, 16, 23)] == ["wide", "wide", "deep", "deep", "new", "new"]
    assert pairs[(7, 12)]["seed"] == of_bases["deep"][(7, 0)]["seed"]
    assert pairs.tasks == tuple(of_bases["wide"].tasks)
    with pytest.raises(IndexError):
        pairs[24]


def test_what_cannot_be_meant_is_refused(
    of_bases: dict[str, PromptCheckpointDataset],
    first_two: dict[str, PromptCheckpointDataset],
    encoder_folder: Path,
    tmp_path: Path,
) -> None:
    generator = make(first_two, encoder_folder)
    wide, deep = first_two.values()
    for given, kind, message in (
        (wide, GeneratorConfigError, r"train_dataset must be a dictionary of such names.*PromptCheckpointDataset"),
        ({"wide": wide, "deeep": deep}, GeneratorConfigError, r"bases 'wide', 'deep'.*\['deeep', 'wide'\]"),
        ({"wide": wide}, GeneratorConfigError, r"no pairs of the base 'deep'.*for_base\('wide'\)"),
        ({"wide": deep, "deep": wide}, LayoutError, r"train_dataset\['wide'\]"),
        ({"wide": wide, "deep": 3}, GeneratorConfigError, r"has 3 for the base 'deep'"),
    ):
        with pytest.raises(kind, match=message):
            DnDTrainer(generator, arguments(tmp_path), given)
    with pytest.raises(GeneratorConfigError, match="adapter_scorer is for one base"):
        DnDTrainer(generator, arguments(tmp_path), first_two, adapter_scorer=lambda task, adapter: 0.0)
    with pytest.raises(GeneratorConfigError, match="no base"):
        make({}, encoder_folder)
    with pytest.raises(GeneratorConfigError, match="from_adapters takes"):
        make({"wide": str(tmp_path)}, encoder_folder)
