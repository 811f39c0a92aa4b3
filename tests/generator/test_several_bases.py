# SPDX-License-Identifier: Apache-2.0
"""A generator of several bases: which base is meant, its folder, its card, one base alone, PEFT, the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.constants import TASK_PROMPTS
from support.several_bases import PROMPTS, SIZES, assert_same, base_of, fitted, layout_for, make, weights
from torch import nn

from peft_dnd import (
    AdapterLayout,
    DnDConfig,
    PromptConditionedLoraGenerator,
    StreamedLoraGenerator,
)
from peft_dnd.adapters import layout_from_config
from peft_dnd.cli.app import main
from peft_dnd.errors import (
    BaseModelMismatchError,
    GeneratorConfigError,
    NotFittedError,
    PolicyError,
)
from peft_dnd.generator import verify_adapter
from peft_dnd.generator.fingerprint import generator_sha256
from peft_dnd.policy import GeneratorPolicy


pytest_plugins = ("support.several_bases",)


@pytest.mark.parametrize("decoder_type", ["set_transformer", "core", "text_to_lora"])
def test_a_folder_and_back(
    decoder_type: str, layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(layouts, encoder_folder, decoder_type)
    generator.save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    streamed = StreamedLoraGenerator.from_pretrained(tmp_path)
    for name, layout in layouts.items():
        adapter = generator.generate_adapter(PROMPTS, base=name)
        assert adapter.layout.difference(layout) is None
        assert adapter.layout.base_model_name_or_path == layout.base_model_name_or_path
        assert_same(adapter, loaded.generate_adapter(PROMPTS, base=name))
        assert_same(adapter, streamed.generate_adapter(PROMPTS, base=name), 1e-5)
    half = PromptConditionedLoraGenerator.from_pretrained(tmp_path, dtype="bfloat16")
    for one in map(half.for_base, layouts):
        assert one.normalization.mean.dtype == torch.float32, "the mean adapter is not rounded"
        assert {parameter.dtype for parameter in one.decoder.parameters()} == {torch.bfloat16}
    assert_same(half.generate_adapter(PROMPTS, base="deep"), generator.generate_adapter(PROMPTS, base="deep"), 0.1)
    files = [path.name for path in tmp_path.glob("*.safetensors")]
    stored = load_file(tmp_path / "model.safetensors")
    assert files == ["model.safetensors"]
    assert sum(key.startswith("heads.small-1%2E5") for key in stored) == 0, "the first stands where an only one does"
    assert stored["heads.wide.normalization.scale"].shape == (generator.for_base("wide").weight_tokenizer.num_tokens,)


def test_an_adapter_of_each_base_is_made_again(several: PromptConditionedLoraGenerator) -> None:
    for name in several.config.base_names:
        adapter = several.generate_adapter(PROMPTS, base=name)
        assert adapter.provenance["generator_sha256"] == generator_sha256(several)
        assert verify_adapter(adapter, several, PROMPTS).passed
    other = several.generate_adapter(PROMPTS[:2], base="deep")
    assert not verify_adapter(other, several, PROMPTS).passed


def test_a_policy_of_one_bases_modules_is_refused_for_several(
    several: PromptConditionedLoraGenerator, layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path
) -> None:
    of_one = GeneratorPolicy(never_written=("*.q_proj",))
    with pytest.raises(PolicyError, match="this generator has several"):
        several.set_policy(of_one)
    assert several.policy is None
    of_all = make(layouts, encoder_folder)
    of_all.set_policy(GeneratorPolicy(classifier="ours"))
    of_all.save_pretrained(tmp_path / "all")
    assert PromptConditionedLoraGenerator.from_pretrained(tmp_path / "all").policy.sha256 == of_all.policy.sha256
    of_all.for_base("deep").save_pretrained(tmp_path / "one")
    assert PromptConditionedLoraGenerator.from_pretrained(tmp_path / "one").policy.sha256 == of_all.policy.sha256
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["format_version"] == 2, "those who know no policies must not load it"
    alone = make(layouts["wide"], encoder_folder)
    alone.set_policy(of_one)
    with pytest.raises(GeneratorConfigError, match="bounds the modules of its one base"):
        alone.add_base(layouts["deep"], name="deep")


def test_adapters_of_each_base_are_held_against_the_policy_of_all(
    layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = make(layouts, encoder_folder)
    generator.set_prompt_classifier(lambda texts: [None] * len(texts))
    generator.set_policy(GeneratorPolicy(classifier="ours"))
    generator.save_pretrained(tmp_path / "generator")
    for name in layouts:
        adapter = generator.generate_adapter(PROMPTS, base=name)
        assert generator.check_adapter(adapter).problems == ()
        adapter.save_pretrained(tmp_path / name)
        assert main(["inspect", str(tmp_path / name), "--policy-of", str(tmp_path / "generator")]) == 0
    other = make(layout_for(base_of("org/deep", (16, 2))), encoder_folder).generate_adapter(PROMPTS)
    problems = generator.check_adapter(other).problems
    assert "unlike what the generator (the first) writes" in problems[0]
    assert "layers.2" in problems[0], "what the base of that name lacks"


def test_the_trunk_is_shared_and_counted_once(several: PromptConditionedLoraGenerator) -> None:
    one, other = several.for_base("wide"), several.for_base("deep")
    assert one.decoder.summary_mixing is other.decoder.summary_mixing is several.decoder.summary_mixing
    assert one.decoder.center is several.decoder.center
    assert one.decoder.writer is not other.decoder.writer
    trunk = sum(p.numel() for name, p in several.decoder.named_parameters() if not name.startswith("writer."))
    heads = sum(p.numel() for name in SIZES for p in several.for_base(name).decoder.writer.parameters())
    assert several.num_parameters() == trunk + heads


def test_a_single_base_is_saved_as_ever(
    layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(layouts["wide"], encoder_folder)
    generator.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == 1
    assert not {"bases", "base_name"} & set(config)
    assert generator.for_base() is generator.for_base("org/wide") is generator
    with pytest.raises(GeneratorConfigError, match=r"no adapters for the base 'deep'. Known: 'wide'"):
        generator.generate_adapter(PROMPTS, base="deep")


def test_several_bases_are_of_a_newer_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 2
    assert set(config["bases"]) == {"wide", "deep"}
    assert config["base_name"] == "small-1.5"


@pytest.mark.parametrize("asked", ["wide", "org/wide", "/models/wide/", "someone-elses/wide"])
def test_a_base_goes_by_its_name(several: PromptConditionedLoraGenerator, asked: str) -> None:
    assert several.config.find_base(asked) == "wide"


@pytest.mark.parametrize("asked", ["wid", "", 3, "org/wider"])
def test_an_unknown_base_is_refused(several: PromptConditionedLoraGenerator, asked: Any) -> None:
    with pytest.raises(GeneratorConfigError, match=r"base"):
        several.generate_adapter(PROMPTS, base=asked)


def test_no_base_at_all_is_refused_by_naming_the_known_ones(several: PromptConditionedLoraGenerator) -> None:
    with pytest.raises(GeneratorConfigError, match=r"3 bases: 'small-1.5', 'deep', 'wide'.*base='small-1.5'"):
        several.generate_adapter(PROMPTS)
    with pytest.raises(GeneratorConfigError, match=r"3 bases"):
        several(*(part[None] for part in several.encode_prompts(PROMPTS)))
    with pytest.raises(GeneratorConfigError, match=r"3 bases"):
        several.config.adapter_layout  # noqa: B018


def test_many_tasks_for_one_base(several: PromptConditionedLoraGenerator) -> None:
    found = several.generate_adapters({"law": PROMPTS, "med": TASK_PROMPTS["med"]}, base="deep")
    assert_same(found["law"], several.generate_adapter(PROMPTS, base="deep"))
    assert_same(found["med"], several.generate_adapter({"med": TASK_PROMPTS["med"]}, base="deep")["med"])


def test_a_model_is_known_by_its_layout(several: PromptConditionedLoraGenerator, bases: dict[str, nn.Module]) -> None:
    for name, base in bases.items():
        assert several.config.find_base(base) == name.rpartition("/")[2]
    nameless = base_of("", (40, 1))
    assert several.config.find_base(nameless) == "wide"
    with pytest.raises(
        BaseModelMismatchError, match=r"fits none of the generator's bases, 'small-1.5', 'deep', 'wide'"
    ):
        several.generate_adapter(PROMPTS, base=base_of("wide", (48, 1)))


def test_of_layouts_that_fit_the_deepest_is_meant(encoder_folder: Path) -> None:
    two, four = base_of("org/two", (16, 2)), base_of("org/four", (16, 4))
    config = make({"two": layout_for(two), "four": layout_for(four)}, encoder_folder).config
    assert config.find_base(four) == "four"
    assert config.find_base(base_of("", (16, 4))) == "four"
    assert config.find_base(two) == "two"


def test_two_bases_of_one_layout(encoder_folder: Path, tmp_path: Path) -> None:
    chat, plain = base_of("org/chat", (16, 2)), base_of("org/plain", (16, 2))
    generator = make({"chat": layout_for(chat), "plain": layout_for(plain)}, encoder_folder)
    generator.save_pretrained(tmp_path)
    config = DnDConfig(generator=str(tmp_path), prompts=PROMPTS)
    for name, base in (("chat", chat), ("plain", plain)):
        model = get_peft_model(copy.deepcopy(base), config)
        live = AdapterLayout.from_model(model)
        assert live.base_model_name_or_path == f"org/{name}"
        written = weights(generator.generate_adapter(PROMPTS, base=name))
        key = next(iter(written))
        live_weights = {k.replace(".default", ""): v for k, v in model.state_dict().items() if ".lora_" in k}
        torch.testing.assert_close(live_weights[key], written[key], rtol=0, atol=1e-6)
    renamed = base_of("somebody/mine", (16, 2))
    before = {key: value.clone() for key, value in renamed.state_dict().items()}
    with pytest.raises(GeneratorConfigError, match=r"could be any of the bases 'chat', 'plain'.*base='chat'"):
        get_peft_model(renamed, DnDConfig(generator=str(tmp_path), prompts=PROMPTS))
    assert before.keys() == renamed.state_dict().keys(), "the model is untouched"
    with pytest.warns(UserWarning, match="org/plain"):
        get_peft_model(renamed, DnDConfig(generator=str(tmp_path), base="plain", prompts=PROMPTS))


def test_pefts_own_functions_find_the_base(
    several: PromptConditionedLoraGenerator, folder: Path, bases: dict[str, nn.Module], tmp_path: Path
) -> None:
    config = DnDConfig(generator=several, prompts=PROMPTS)
    with pytest.raises(GeneratorConfigError, match=r"bases 'small-1.5', 'deep', 'wide'.*DnDConfig\(base=...\)"):
        config.to_dict()
    for name, base in bases.items():  # one configuration for all of them, again and again
        model = get_peft_model(copy.deepcopy(base), config)
        expected = several.generate_adapter(PROMPTS, base=name)
        assert type(model.peft_config["default"]) is LoraConfig
        assert model.peft_config["default"].r == expected.layout.max_rank
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        tokens = torch.arange(8)[None]
        reference = expected.load_into(copy.deepcopy(base))
        torch.testing.assert_close(loaded(tokens).logits, reference(tokens).logits)
        assert (loaded(tokens).logits - base(tokens).logits).abs().max() > 1e-3
    assert config.r is None, "the configuration stays as it is"
    named = DnDConfig(generator=str(folder), base="org/wide", prompts=PROMPTS)
    assert named.r == named.layout.max_rank
    with pytest.raises(BaseModelMismatchError):
        get_peft_model(copy.deepcopy(bases["org/deep"]), named)
    with pytest.raises(GeneratorConfigError, match=r"Known: 'small-1.5'"):
        DnDConfig(generator=several, base="widest", prompts=PROMPTS)


def test_another_rank_than_the_chosen_bases_is_refused(
    several: PromptConditionedLoraGenerator, bases: dict[str, nn.Module]
) -> None:
    with pytest.raises(GeneratorConfigError, match="r=17"):
        get_peft_model(copy.deepcopy(bases["org/wide"]), DnDConfig(generator=several, r=17, prompts=PROMPTS))


def test_one_base_alone_is_a_generator_of_one(several: PromptConditionedLoraGenerator, tmp_path: Path) -> None:
    several.for_base("deep").save_pretrained(tmp_path)
    alone = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert alone.config.base_names == ("deep",)
    assert alone.whole is None
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 1
    assert_same(alone.generate_adapter(PROMPTS), several.generate_adapter(PROMPTS, base="deep"))


def test_bases_of_other_methods(bases: dict[str, nn.Module], encoder_folder: Path) -> None:
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    layouts = {
        "lora": layout_for(bases["org/wide"]),
        "ia3": layout_from_config(ia3, bases["org/deep"]),
    }
    generator = make(layouts, encoder_folder)
    assert generator.generate_adapter(PROMPTS, base=bases["org/deep"]).layout.method == "IA3"
    with pytest.raises(GeneratorConfigError, match=r"writes IA3 adapters for the base 'ia3'.*DnDConfig\(base=...\)"):
        DnDConfig(generator=generator, prompts=PROMPTS)
    model = get_peft_model(
        copy.deepcopy(bases["org/deep"]), DnDConfig(generator=generator, base="ia3", prompts=PROMPTS)
    )
    assert type(model.peft_config["default"]) is IA3Config


def test_a_head_may_have_settings_of_its_own(
    layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(layouts["wide"], encoder_folder)
    one = generator.add_base(layouts["deep"], decoder_config={"num_templates": 5})
    assert len(one.decoder.writer.templates) == 5
    fitted(generator).save_pretrained(tmp_path)
    loaded = PromptConditionedLoraGenerator.from_pretrained(tmp_path)
    assert loaded.config.bases["deep"]["decoder_config"] == {"num_templates": 5}
    assert_same(one.generate_adapter(PROMPTS), loaded.generate_adapter(PROMPTS, base="deep"))
    for settings, message in (
        ({"hidden_size": 8}, "'hidden_size' is a setting of the trunk"),
        ({"num_template": 8}, "'num_template' is a setting of the trunk, or of no part"),
    ):
        with pytest.raises(GeneratorConfigError, match=message):
            generator.add_base(layouts["small-1.5"], decoder_config=settings)
    assert generator.config.base_names == ("wide", "deep"), "what was refused left nothing"


def test_adding_a_base_changes_nothing_that_is_there(
    layouts: dict[str, AdapterLayout], encoder_folder: Path, tmp_path: Path
) -> None:
    generator = make(layouts["wide"], encoder_folder)
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    adapter = generator.generate_adapter(PROMPTS)
    one = generator.add_base(layouts["deep"], name="new")
    after = generator.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".")[1] for key in set(after) - set(before)} == {"new"}
    again = weights(generator.generate_adapter(PROMPTS, base="wide"))
    assert all(torch.equal(tensor, again[key]) for key, tensor in weights(adapter).items())
    with pytest.raises(NotFittedError):
        generator.generate_adapter(PROMPTS, base="new")
    for wrong, message in (
        ({"name": "wide"}, "a base 'wide' already"),
        ({"name": " "}, "without spaces"),
    ):
        with pytest.raises(GeneratorConfigError, match=message):
            generator.add_base(layouts["small-1.5"], **wrong)
    with pytest.raises(GeneratorConfigError, match=r"generator.whole.add_base"):
        one.add_base(layouts["small-1.5"])
    with pytest.raises(GeneratorConfigError, match=r"got 'pairs'"):
        generator.add_base("pairs")


def test_a_decoder_without_a_head_has_one_base(layouts: dict[str, AdapterLayout], encoder_folder: Path) -> None:
    with pytest.raises(GeneratorConfigError, match=r"'hyper_convolution' has no part that could be one base's alone"):
        make(layouts, encoder_folder, "hyper_convolution", kernel_size=3)


def test_the_card_and_the_summary_name_all(several: PromptConditionedLoraGenerator, folder: Path) -> None:
    card = several.model_card("me/generator")
    for name in ("org/small-1.5", "org/wide", "org/deep"):
        assert f"- {name}\n" in card.split("---")[1]
    assert "| adapter of wide |" in card
    summary = json.loads((folder / "peft_dnd_summary.json").read_text())
    assert summary["base_model"] is None
    assert summary["bases"]["deep"]["base_model"] == "org/deep"
    assert summary["decoder"]["parameters"] == several.num_parameters()


def test_names_of_this_machine_stay_here(layouts: dict[str, AdapterLayout], encoder_folder: Path) -> None:
    generator = make(layouts, encoder_folder)
    generator.config.bases["deep"]["layout"]["base_model_name_or_path"] = "/models/deep"
    with pytest.warns(UserWarning, match="'/models/deep', a folder that only this machine has"):
        found = generator.names_for_others(include_text_encoder=True)
    assert found["bases"]["deep"]["layout"]["base_model_name_or_path"] is None
    assert found["bases"]["wide"]["layout"]["base_model_name_or_path"] == "org/wide"
    assert found["layout"]["base_model_name_or_path"] == "org/small-1.5"
