# SPDX-License-Identifier: Apache-2.0
"""A vision-language base, a tiny one of Qwen2.5-VL's architecture: adapters on its language layers, with images."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.collecting import adapter_of
from support.live_models import OTHER_PROMPTS, PROMPTS, assert_holds, assert_untouched, snapshot
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_dnd import (
    AdapterLayout,
    CheckpointCollector,
    DnDConfig,
    DnDTrainer,
    DnDTrainingArguments,
    GeneratedAdapter,
    PromptCheckpointDataset,
    PromptConditionedLoraGenerator,
    PromptConditionedLoraGeneratorConfig,
)
from peft_dnd.adapters.lora import lora_layers
from peft_dnd.errors import BaseModelMismatchError


pytest_plugins = ("support.adapter_fixtures",)

IMAGE, VISION_START, VISION_END = 55, 57, 58
PATCH = 4
# The projections of the language layers and of the vision tower share some names (gate_proj, up_proj, down_proj).
LANGUAGE_LAYERS = r".*\.language_model\.layers\.\d+\..*_proj"

GeneratorFor = Callable[[AdapterLayout], PromptConditionedLoraGenerator]


@pytest.fixture(scope="module")
def vision_base() -> nn.Module:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": PATCH,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=56,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture
def fresh_vision_base(vision_base: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(vision_base)


def lora(targets: str | list[str] = LANGUAGE_LAYERS, **changes: Any) -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **changes)


def image_batch(colours: Sequence[float], words: Sequence[int] = (7, 8)) -> dict[str, torch.Tensor]:
    """One picture of 4 x 4 patches a row: a gradient of a strength of its own, between two words."""
    patches = torch.linspace(0, 1, 16)[:, None] * torch.linspace(-1, 1, 3 * 2 * PATCH * PATCH)
    ids = torch.tensor([[words[0], VISION_START, *[IMAGE] * 4, VISION_END, words[1]]] * len(colours))
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([patches * colour for colour in colours]),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(colours)),
    }


@torch.no_grad()
def logits(model: nn.Module, colours: Sequence[float] = (1.0, -2.0)) -> torch.Tensor:
    return model.eval()(**image_batch(colours)).logits


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in lora_layers(model, "default")]


def test_the_picture_counts(vision_base: nn.Module) -> None:
    assert not torch.allclose(logits(vision_base, [1.0])[0, -1], logits(vision_base, [-2.0])[0, -1], atol=1e-4)


def test_the_layout_is_that_of_the_language_layers_however_it_is_read(
    vision_base: nn.Module, fresh_vision_base: Callable[[], nn.Module], tmp_path: Path
) -> None:
    before = snapshot(vision_base)
    layout = AdapterLayout.from_lora_config(lora(), vision_base)
    assert_untouched(vision_base, before)
    names = [module.name for module in layout.modules]
    assert len(names) == 2 * 7
    assert all(re.fullmatch(LANGUAGE_LAYERS, name) for name in names)

    with torch.device("meta"):
        skeleton = Qwen2_5_VLForConditionalGeneration(vision_base.config)
    trained = get_peft_model(fresh_vision_base(), lora())
    trained.save_pretrained(tmp_path)
    same = [
        AdapterLayout.from_lora_config(lora(), skeleton),
        AdapterLayout.from_lora_config(lora(names), vision_base),
        AdapterLayout.from_lora_config(lora("all-linear", exclude_modules=r".*\.visual\..*"), vision_base),
        AdapterLayout.from_model(trained),
        AdapterLayout.from_folder(tmp_path),
        AdapterLayout.from_dict(layout.to_dict()),
    ]
    assert [layout.difference(other) for other in same] == [None] * len(same)


@pytest.mark.parametrize("targets", ["pattern", "names", "exclusion"])
def test_generates_for_the_language_layers_saves_and_reloads(
    targets: str,
    fresh_vision_base: Callable[[], nn.Module],
    generator_for: GeneratorFor,
    tmp_path: Path,
) -> None:
    base = fresh_vision_base()
    config = {
        "pattern": lora(),
        "names": lora([module.name for module in AdapterLayout.from_lora_config(lora(), base).modules]),
        "exclusion": lora("all-linear", exclude_modules=r".*\.visual\..*"),
    }[targets]
    layout = AdapterLayout.from_lora_config(config, base)
    untouched = logits(base)
    seen = base.model.visual(image_batch([1.0])["pixel_values"], torch.tensor([[1, 4, 4]])).last_hidden_state

    generator = generator_for(layout)
    adapter = generator.generate_adapter(PROMPTS)
    model = adapter.load_into(base)
    assert_holds(model, "default", adapter)
    assert len(adapted(model)) == 14 and not any("visual" in name for name in adapted(model))
    assert torch.equal(
        seen,
        model.get_base_model()
        .model.visual(image_batch([1.0])["pixel_values"], torch.tensor([[1, 4, 4]]))
        .last_hidden_state,
    )
    generated = logits(model)
    assert not torch.allclose(generated, untouched, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    # Other prompts, into the same place: another adapter.
    generator.generate_adapter(OTHER_PROMPTS).load_into(model)
    assert not torch.allclose(logits(model), generated, atol=1e-4)

    adapter.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(fresh_vision_base(), tmp_path / "adapter")
    assert torch.equal(logits(stock), generated)
    stock.save_pretrained(tmp_path / "again")
    again = GeneratedAdapter.from_pretrained(tmp_path / "again")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in adapter.state_dict().items())
    assert torch.equal(logits(again.load_into(fresh_vision_base())), generated)
    merged = PeftModel.from_pretrained(fresh_vision_base(), tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(logits(merged), generated, atol=1e-4)


def test_get_peft_model_and_generation_with_a_picture(
    fresh_vision_base: Callable[[], nn.Module], generator_for: GeneratorFor, tmp_path: Path
) -> None:
    layout = AdapterLayout.from_lora_config(lora(), fresh_vision_base())
    generator_for(layout).save_pretrained(tmp_path / "generator")
    config = DnDConfig(generator=str(tmp_path / "generator"), prompts=PROMPTS)
    model = get_peft_model(fresh_vision_base(), config)
    adapter = PromptConditionedLoraGenerator.from_pretrained(tmp_path / "generator").generate_adapter(PROMPTS)
    assert_holds(model, "default", adapter)
    assert torch.equal(logits(model), logits(adapter.load_into(fresh_vision_base())))

    other = fresh_vision_base()
    other.add_adapter(DnDConfig(generator=str(tmp_path / "generator"), prompts=PROMPTS))
    assert torch.equal(logits(other), logits(model))
    model.save_pretrained(tmp_path / "saved")
    stock = PeftModel.from_pretrained(fresh_vision_base(), tmp_path / "saved")
    known = inspect.signature(type(other).forward).parameters  # `mm_token_type_ids` are not known to transformers 5.1
    asked = {name: value for name, value in image_batch([1.0]).items() if name in known}
    answers = [each.generate(**asked, max_new_tokens=4, do_sample=False) for each in (model, stock)]
    assert torch.equal(*answers)


def test_a_suffix_takes_the_vision_tower_along_and_a_base_without_one_is_refused(
    base_model: nn.Module, vision_base: nn.Module, generator_for: GeneratorFor
) -> None:
    layout = AdapterLayout.from_lora_config(lora(["gate_proj"]), vision_base)
    assert sum("visual" in module.name for module in layout.modules) == 2
    with pytest.raises(BaseModelMismatchError, match=r"no module 'model\.visual\.blocks\.0\.mlp\.gate_proj'"):
        generator_for(layout).generate_adapter(PROMPTS).load_into(base_model)


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Pictures of one strength or another, and the word to answer with."""

    def __init__(self, word: int) -> None:
        self.rows = [{"colour": colour, "word": word} for colour in (-2.0, -1.0, 1.0, 2.0)] * 2

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def picture_collator(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """What a processor does for real pictures: the base's batch of rows that only name them."""
    batch = image_batch([row["colour"] for row in rows])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = torch.tensor([row["word"] for row in rows])
    return {**batch, "labels": labels}


def quiet(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }


@pytest.fixture
def text_base(vision_base: nn.Module) -> nn.Module:
    """A text model whose layers are those of the vision-language base."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text = vision_base.config.get_text_config()
    sizes = {name: getattr(text, name) for name in (*names, "num_key_value_heads")}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)).eval()
    layers = vision_base.model.language_model.state_dict()
    model.model.load_state_dict({name: value.clone() for name, value in layers.items()})
    return model


def updates_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each layer's update of the base's weights, by the layer's name within the text model."""
    return {
        name.rpartition("layers.")[2]: layer.get_delta_weight("default")
        for name, layer in lora_layers(model, "default")
    }


@pytest.mark.parametrize("bare", [False, True], ids=["with head", "bare"])
def test_a_generator_of_the_text_model_fits_what_has_it_as_a_part_and_the_other_way_round(
    text_base: nn.Module,
    fresh_vision_base: Callable[[], nn.Module],
    generator_for: GeneratorFor,
    caplog: pytest.LogCaptureFixture,
    bare: bool,
) -> None:
    with_pictures = fresh_vision_base().model if bare else fresh_vision_base()
    prefix = "" if bare else "model."
    of_text = AdapterLayout.from_lora_config(lora("all-linear"), text_base)
    of_both = AdapterLayout.from_lora_config(lora(r".*language_model\.layers\.\d+\..*_proj"), with_pictures)
    assert of_text.difference(of_both) is not None

    adapter = generator_for(of_text).generate_adapter(PROMPTS)
    seen = adapter.load_into(with_pictures)
    assert all(name.startswith(f"{prefix}language_model.layers.") for name in adapted(seen))
    message = f"'model.layers.0.mlp.down_proj' is '{prefix}language_model.layers.0.mlp.down_proj' there"
    assert message in caplog.text and caplog.text.count("looked for") == 1
    read = adapter.load_into(text_base)
    expected = updates_of(read)
    assert len(expected) == 14
    assert {name: update.tolist() for name, update in updates_of(seen).items()} == {
        name: update.tolist() for name, update in expected.items()
    }

    back = generator_for(of_both).generate_adapter(PROMPTS).load_into(read.unload())
    assert {name.partition(".layers.")[0] for name in adapted(back)} == {"model"}
    assert len(adapted(back)) == 14


def test_get_peft_model_puts_a_text_model_s_adapter_into_the_text_model_alone(
    text_base: nn.Module, fresh_vision_base: Callable[[], nn.Module], generator_for: GeneratorFor, tmp_path: Path
) -> None:
    generator = generator_for(AdapterLayout.from_lora_config(lora(["gate_proj", "up_proj"]), text_base))
    model = get_peft_model(fresh_vision_base(), DnDConfig(generator=generator, prompts=PROMPTS))
    assert len(adapted(model)) == 4 and not any("visual" in name for name in adapted(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh_vision_base(), tmp_path)), logits(model))


def test_other_sizes_and_the_vision_tower_are_no_text_model(
    text_base: nn.Module, vision_base: nn.Module, generator_for: GeneratorFor
) -> None:
    smaller = copy.deepcopy(text_base.config)
    smaller.intermediate_size = 24
    layout = AdapterLayout.from_lora_config(lora(["up_proj"]), Qwen2ForCausalLM(smaller))
    with pytest.raises(BaseModelMismatchError, match=r"language_model\.layers\.0\.mlp\.up_proj.* from 32 to 48"):
        generator_for(layout).generate_adapter(PROMPTS).load_into(vision_base)
    deeper = copy.deepcopy(text_base.config)
    deeper.num_hidden_layers, deeper.layer_types = 3, ["full_attention"] * 3
    layout = AdapterLayout.from_lora_config(lora(["up_proj"]), Qwen2ForCausalLM(deeper))
    with pytest.raises(BaseModelMismatchError, match=r"no module 'model\.layers\.2\.mlp\.up_proj'"):
        generator_for(layout).generate_adapter(PROMPTS).load_into(vision_base)
    # Neither is what stands in a vision tower under the same names as in a text model.
    tower = AdapterLayout.from_lora_config(lora(["up_proj"]), text_base)
    elsewhere = replace(
        tower, modules=tuple(replace(m, name=m.name.replace("model.", "vision_tower.")) for m in tower.modules)
    )
    with pytest.raises(BaseModelMismatchError, match=r"no module 'vision_tower\.layers\.0\.mlp\.up_proj'"):
        generator_for(elsewhere).generate_adapter(PROMPTS).load_into(vision_base)


def test_pairs_and_both_losses_on_pictures(
    fresh_vision_base: Callable[[], nn.Module], encoder_folder: Path, tmp_path: Path
) -> None:
    for task, word in (("law", 9), ("river", 11)):
        torch.manual_seed(0)
        model = get_peft_model(fresh_vision_base(), lora())
        pictures = Pictures(word)
        collector = CheckpointCollector(tmp_path / "pairs" / task, [f"what {task} ?"], last=2, examples=pictures.rows)
        Trainer(
            model=model,
            args=TrainingArguments(max_steps=3, remove_unused_columns=False, **quiet(tmp_path / "run")),
            data_collator=picture_collator,
            train_dataset=pictures,
            callbacks=[collector],
        ).train()
    pairs = PromptCheckpointDataset.from_folder(tmp_path / "pairs")
    assert pairs.layout.difference(AdapterLayout.from_lora_config(lora(), fresh_vision_base())) is None
    last = pairs.state_dict("river")
    assert all(torch.equal(tensor, last[key]) for key, tensor in adapter_of(model).items())

    config = PromptConditionedLoraGeneratorConfig.from_adapters(
        pairs,
        str(encoder_folder),
        num_prompts=2,
        max_prompt_length=8,
        decoder_type="hyper_convolution",
        decoder_config={"kernel_size": 3},
    )
    torch.manual_seed(0)
    generator = PromptConditionedLoraGenerator(config)
    arguments = DnDTrainingArguments(
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        task_loss_weight=1.0,
        rebuild_weight=1.0,
        task_examples=4,
        **quiet(tmp_path / "fit"),
    )
    trainer = DnDTrainer(
        generator, arguments, pairs, pairs, base_model=fresh_vision_base(), task_collator=picture_collator
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_task_loss"] < before["eval_task_loss"]
    assert after["eval_weight_loss"] < before["eval_weight_loss"]
